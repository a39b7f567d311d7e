"""The two fits: coefficients of a form inside physical bounds, and the small residual grid on what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients
from apexsim.costs.forms.residual import LogGrid
from apexsim.specs.device import ResidualGrid

Knots = Mapping[str, Sequence[float]]

# Errors beyond this fraction count linearly, not squared: kernel choices of the library make outliers.
SOFT_ERROR = 0.05


class Stiffness(NamedTuple):
    """How much a residual resists its rows: weight of smoothness and of smallness, in rows per knot."""

    smooth: float
    small: float


STIFFNESS = Stiffness(smooth=3.0, small=0.3)


def fit_coefficients(
    predict: Callable[[Coefficients], Array],
    measured_s: Array,
    weight: Array,
    coefficients: Sequence[Coefficient],
    start: Coefficients,
) -> dict[str, float]:
    """Coefficients that minimise the weighted soft-L1 log error of ``predict`` against ``measured_s``.

    ``start`` overrides the starting values of ``coefficients`` and adds constants that are not fitted. Every
    coefficient stays inside its bounds; the search runs on their logarithms. Rounded to 4 significant digits, so
    that a profile file says exactly what was scored.
    """
    from scipy.optimize import least_squares

    low, high = (np.log([getattr(c, side) for c in coefficients]) for side in ("low", "high"))
    names = [c.name for c in coefficients]
    constants = {name: value for name, value in start.items() if name not in names}
    first = np.log([min(max(start.get(c.name, c.start), c.low * 1.01), c.high * 0.99) for c in coefficients])

    def unpack(x: Array) -> dict[str, float]:
        return {**dict(zip(names, np.exp(x).tolist(), strict=True)), **constants}

    root, target = np.sqrt(weight), np.log(measured_s)
    found = least_squares(
        lambda x: root * (np.log(predict(unpack(x))) - target),
        first,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=SOFT_ERROR,
        diff_step=1e-3,
        x_scale=np.maximum(0.3, (high - low) / 4),
        max_nfev=40,
        ftol=1e-4,
        xtol=1e-4,
    )
    return {name: _round(value) for name, value in unpack(found.x).items()}


def fit_residual(
    log_error: Array, weight: Array, coordinates: Sequence[Array], knots: Knots, *, stiffness: Stiffness = STIFFNESS
) -> ResidualGrid:
    """Smooth grid of corrections that best explains ``log_error`` (log measured - log form), in whole percent.

    Weighted least squares on the multilinear basis, with second differences along every axis and the values
    themselves held small, re-weighted twice so that outliers do not bend it.
    """
    from scipy import sparse

    shape = [len(values) for values in knots.values()]
    grid = LogGrid(list(knots.values()), np.zeros(shape))
    rows = np.arange(len(log_error))
    basis = sum(
        sparse.csr_matrix((share, (rows, index)), shape=(len(rows), grid.values.size))
        for index, share in grid.corners(np.broadcast_arrays(*coordinates))
    )
    penalty = _penalty(shape, stiffness) * (weight.sum() / grid.values.size)
    robust = np.ones_like(log_error)
    for _ in range(3):
        scaled = basis.multiply((weight * robust)[:, None]).tocsr()
        normal = (basis.T @ scaled).toarray() + penalty
        values = np.linalg.solve(normal, np.asarray(scaled.T @ log_error))
        robust = 1 / np.sqrt(1 + ((log_error - basis @ values) / SOFT_ERROR) ** 2)
    percent = np.rint(values * 100).astype(int).reshape(-1, shape[-1])
    axes = {name: tuple(float(x) for x in points) for name, points in knots.items()}
    return ResidualGrid(axes=axes, percent=tuple(tuple(row) for row in percent.tolist()))


def _penalty(shape: Sequence[int], stiffness: Stiffness) -> Array:
    """Quadratic form of roughness (second differences along every axis) and size of a grid of ``shape``."""
    total = stiffness.small * 0.05 * np.eye(int(np.prod(shape)))
    for axis, size in enumerate(shape):
        order = min(2, size - 1)
        if order == 0:
            continue
        difference = np.diff(np.eye(size), n=order, axis=0)
        before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
        along = np.kron(np.kron(np.eye(before), difference.T @ difference), np.eye(after))
        total += stiffness.smooth * 0.05 * along
    return total


def _round(value: float) -> float:
    return float(f"{value:.4g}")
