"""Multilinear interpolation on a small logarithmic grid: the residual that corrects a physical form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from apexsim.costs.forms.hardware import Array
from apexsim.specs.device import ResidualGrid

Corner = tuple[npt.NDArray[np.int64], Array]


class LogGrid:
    """A residual grid ready to be read: log factors at arbitrary coordinates, clamped to the outer knots."""

    def __init__(self, axes: Sequence[Sequence[float]], values: Array) -> None:
        """``values`` are log factors, one per combination of knots, shaped like the axes."""
        self.axes = [np.log(np.asarray(knots, dtype=float)) for knots in axes]
        self.values = values
        self._at = lru_cache(maxsize=256)(self._read_at)

    @classmethod
    def of(cls, grid: ResidualGrid) -> LogGrid:
        shape = [len(knots) for knots in grid.axes.values()]
        return cls(list(grid.axes.values()), np.asarray(grid.percent, dtype=float).reshape(shape) / 100)

    def corners(self, coordinates: Sequence[Array]) -> list[Corner]:
        """(flat knot index, weight) of the 2^d knots around every point; weights of a point sum to 1."""
        low, share = zip(
            *(_locate(np.log(x), axis) for x, axis in zip(coordinates, self.axes, strict=True)), strict=True
        )
        found = []
        for sides in itertools.product((0, 1), repeat=len(self.axes)):
            index = np.ravel_multi_index(
                tuple(np.minimum(i + side, len(axis) - 1) for i, side, axis in zip(low, sides, self.axes, strict=True)),
                self.values.shape,
            )
            weight: Array = np.asarray(1.0)
            for part, side in zip(share, sides, strict=True):
                weight = weight * (part if side else 1 - part)
            found.append((index, weight))
        return found

    def log_factor(self, *coordinates: float | Array) -> Array:
        """Log of the correction at broadcast ``coordinates`` (natural values, not logarithms)."""
        grid = self._at(tuple([None if np.ndim(x) else float(x) for x in coordinates]))
        varying = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in coordinates if np.ndim(x)))
        if not varying:
            return grid.values
        flat = grid.values.ravel()
        return np.asarray(sum(weight * flat[index] for index, weight in grid.corners(varying)))

    def _read_at(self, fixed: tuple[float | None, ...]) -> LogGrid:
        """The grid left when the axes with a number are read at it, one after another; None leaves an axis as it is."""
        values, left = self.values, []
        for knots, x in zip(self.axes, fixed, strict=True):
            if x is None:
                left.append(np.exp(knots))
                continue
            low, share = _locate(np.log(np.asarray(x, dtype=float)), knots)
            above = values.take(np.minimum(low + 1, len(knots) - 1), axis=len(left))
            values = values.take(low, axis=len(left)) * (1 - share) + above * share
        return LogGrid(left, values)

    def along_last(self, others: Sequence[float]) -> LogGrid:
        """One-dimensional grid along the last axis, with ``others`` fixing the axes before it."""
        return self._at((*others, None))


def _locate(x: Array, axis: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Segment below every point and how far into it the point lies (0 to 1)."""
    position = np.interp(x, axis, np.arange(len(axis), dtype=float))
    low = np.minimum(np.asarray(position).astype(np.int64), max(0, len(axis) - 2))
    return low, position - low
