"""Attention costs bound to one shape: a chunk's cost for floats or arrays, and the curve of a decode batch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from apexsim.costs.forms import decode, mixed, prefill
from apexsim.costs.forms.hardware import Array, Hardware
from apexsim.costs.forms.prefill import Heads
from apexsim.costs.forms.residual import LogGrid
from apexsim.costs.forms.scalar import SCALAR
from apexsim.specs.device import FittedOperator

Curve = tuple[Sequence[float], Sequence[float]]

# Chunks whose blocks are remembered.
MAX_CHUNKS = 1 << 16
# Contexts at which a decode curve is computed: 8 per octave, up to 2 M tokens.
CURVE_KEYS: Array = np.exp2(np.arange(0, 21 * 8 + 1) / 8)


def interpolate(x: float, curve: Curve) -> float:
    """``numpy.interp`` for one float: linear between knots, constant outside."""
    knots, values = curve
    above = bisect_right(knots, x)
    if above == 0:
        return values[0]
    if above == len(knots):
        return values[-1]
    left = knots[above - 1]
    return values[above - 1] + (x - left) / (knots[above] - left) * (values[above] - values[above - 1])


class PrefillCost:
    """Cost of one chunk under one attention shape: ``cost(chunk, history)`` in floats, ``many`` over arrays.

    Both run the same form and interpolate the same one-dimensional residual, cut from the grid at this shape's heads.
    ``launch_s`` of it are paid once by a kernel whatever it works on; chunks that share a kernel are asked for without
    (``launch=False``), and still cost at least the roofline.
    """

    def __init__(self, op: FittedOperator, heads: Heads, hw: Hardware) -> None:
        self.launch_s = op.coefficients["launch_s"]
        self._bound = prefill.bind(heads, op.coefficients, hw)
        self._residual: Curve = ([0.0], [0.0])
        if op.residual:
            *others, _ = prefill.residual_coordinates(prefill.Chunks(1.0, 0.0), heads)
            line = LogGrid.of(op.residual).along_last(others)
            self._residual = (line.axes[0].tolist(), line.values.tolist())

    def __call__(self, chunk: float, history: float, *, launch: bool = True) -> float:
        """Seconds of a chunk of ``chunk`` >= 1 tokens behind ``history``: plain floats, a few microseconds."""
        seconds, least = prefill.prefill_s(prefill.Chunks(chunk, history), self._bound, SCALAR)
        seconds = seconds * math.exp(interpolate(math.log(chunk), self._residual))
        return float(max(seconds if launch else seconds - self.launch_s, least))

    def many(self, chunk: Any, history: Any, *, launch: bool = True) -> Array:
        """The same over arrays of at least one token; zero where a chunk is empty."""
        tokens, past = np.broadcast_arrays(np.asarray(chunk, dtype=float), np.asarray(history, dtype=float))
        some = np.maximum(tokens, 1.0)
        seconds, least = prefill.prefill_s(prefill.Chunks(some, past), self._bound)
        seconds = seconds * np.exp(np.interp(np.log(some), *self._residual))
        seconds = seconds if launch else seconds - self.launch_s
        return np.asarray(np.where(tokens > 0, np.maximum(seconds, least), 0.0))


class SharedLaunch:
    """Cost of one launch over chunks and decodes under one attention shape, a few microseconds a call.

    ``decodes`` >= 1 sequences of a token attend to ``keys`` on average; ``chunks``, one or more, are (tokens, history).
    """

    def __init__(self, op: FittedOperator, heads: Heads, hw: Hardware) -> None:
        self._bound = mixed.bind(heads, op.coefficients, hw)
        self._known: dict[tuple[int, int], mixed.Blocks] = {}

    def __call__(self, decodes: int, keys: float, chunks: Sequence[tuple[int, int]]) -> float:
        """Seconds of the launch."""
        bound = self._bound
        parts = [self._known.get(chunk) or self._blocks(chunk) for chunk in chunks]
        first = parts[0] if len(parts) == 1 else mixed.together(parts)
        return float(mixed.launch_s(first, mixed.decode_blocks(decodes, keys, bound, SCALAR), bound, SCALAR))

    def _blocks(self, chunk: tuple[int, int]) -> mixed.Blocks:
        if len(self._known) >= MAX_CHUNKS:
            self._known.clear()
        found = self._known[chunk] = mixed.chunk_blocks(*chunk, self._bound, SCALAR)
        return found


class DecodeCost:
    """Seconds of a decode batch as a function of its mean keys.

    The form is computed at fixed contexts, made non-decreasing there and joined by straight lines, so that the cost
    never falls as a context grows, whatever the residual does. (Bytes are linear in keys: lines lose nothing.)
    """

    def __init__(self, op: FittedOperator, grid: LogGrid | None, batch: int, heads: Heads, hw: Hardware) -> None:
        """``grid`` is the residual of ``op``, ready to be read."""
        shape = decode.DecodeShape(
            float(batch), CURVE_KEYS, float(heads.heads), float(heads.kv_heads), float(heads.head_dim), heads.kv_bytes
        )
        seconds = decode.decode_s(shape, op.coefficients, hw)
        if grid:
            coordinates = decode.residual_coordinates(shape, heads.window is not None)
            seconds = seconds * np.exp(grid.log_factor(*coordinates))
        self._seconds = np.maximum.accumulate(np.maximum(seconds, decode.roofline_s(shape, hw)))
        self._most = float(CURVE_KEYS[-1]) if heads.window is None else float(heads.window)

    def __call__(self, keys: Array) -> Array:
        """Seconds at ``keys`` mean keys a sequence."""
        return np.asarray(np.interp(np.minimum(keys, self._most), CURVE_KEYS, self._seconds))
