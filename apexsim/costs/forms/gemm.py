"""Matrix product y[m, n] = x[m, k] W[k, n]: tiles over multiprocessors against bytes over HBM.

Symbols: ``m`` rows (tokens), ``n`` outputs, ``k`` inputs, ``w`` bytes of a weight, ``w_x`` of an input, P peak
FLOP/s, BW peak HBM bytes/s, SM multiprocessors, L2 cache bytes. The kernel library picks one of a few tile shapes
(Tm x Tn), maybe cutting k into S slices; the form tries them all and keeps the fastest:

    tiles  = ceil(m / Tm) ceil(n / Tn) S                 f = tiles / SM
    waves  = 1 for f <= 1, else q ceil(f) + (1 - q) f     q: 0 persistent kernels, 1 whole waves
    t_comp = waves 2 Tm Tn ceil64(k / S) / (P / SM e_c)   work of padded tiles
    t_hbm  = moved / (BW e_m min(1, b_sm min(f, 1)))      a multiprocessor alone draws at most b_sm BW / SM
    t_l2   = tiles (Tm w_x + Tn w) k / S / (BW l2 min(f, 1))  operands that every tile reads again
    T      = t0 + best * max(1, best / 1 ms)^thr + quantise m k (4 + w_x) / BW
    best   = min over shapes of pnorm(t_comp, t_hbm, t_l2) + t_w waves + (S > 1: t_s + 8 S m n / (BW l2))

On a CPU products follow no tiles (constant ``untiled``): best = pnorm(2 m n k / (P e_c), moved / (BW e_m)).

``moved`` is weights + inputs + outputs. In the tables a small W is read again and again and stays in L2: there
``moved`` loses W / (1 + (W / (c L2))^4). In serving every weight is cold and nothing is taken off (``cold=True``).
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware, pnorm
from apexsim.units import dtype_bytes

SPLITS = (1, 2, 4, 8, 16)
OUTPUT_BYTES = 2.0

COEFFICIENTS = (
    Coefficient("launch_s", 0.5e-6, 0.05e-6, 12e-6, "t0: launch and drain of empty kernels"),
    Coefficient("compute_efficiency", 0.85, 0.3, 0.98, "e_c: share of the tensor-core peak inside a full tile"),
    Coefficient("memory_efficiency", 0.87, 0.6, 0.97, "e_m: share of the HBM peak when all multiprocessors load"),
    Coefficient("sm_bandwidth", 1.5, 0.3, 8.0, "b_sm: bandwidth one multiprocessor can draw, in BW / SM"),
    Coefficient("l2_ratio", 4.5, 1.5, 8.0, "l2: L2 bandwidth in units of HBM bandwidth"),
    Coefficient("sharpness", 6.0, 2.0, 13.0, "p: how sharply the slowest resource wins"),
    Coefficient("wave_s", 1.5e-6, 0.01e-6, 8e-6, "t_w: prologue and epilogue of a wave of tiles"),
    Coefficient("wave_odds", 0.1, 0.02, 20.0, "q / (1 - q): whole waves against persistent tiles"),
    Coefficient("throttle", 0.02, 1e-4, 0.1, "thr: slow-down exponent of kernels longer than 1 ms"),
    Coefficient("l2_hit_share", 0.3, 0.02, 0.6, "c: share of L2 that holds a replayed weight (measuring only)"),
)
SPLIT = Coefficient("split_s", 2.5e-6, 0.3e-6, 20e-6, "t_s: reduction pass of a product cut along k")
QUANTISE = Coefficient(
    "quantise_passes", 1.5, 0.1, 6.0, "activation quantisation inside the operator, in passes over HBM"
)


# A constant of profiles whose products follow no tiles (those of CPUs), and the coefficients that these have.
UNTILED = "untiled"
OF_UNTILED = ("launch_s", "compute_efficiency", "memory_efficiency", "sharpness", "throttle")


class GemmShape(NamedTuple):
    """Sizes of matrix products, as arrays or numbers that broadcast; bytes of an element of W and of x."""

    m: Array
    n: Array
    k: Array
    weight_bytes: float
    input_bytes: float


def shape(m: Array, n: Array, k: Array, dtype: str) -> GemmShape:
    """Products in ``dtype``: inputs come in it too, but in bf16 where only weights are stored small."""
    weight_bytes = dtype_bytes(dtype)
    return GemmShape(m, n, k, weight_bytes, dtype_bytes("bf16") if dtype.endswith("_wo") else weight_bytes)


@lru_cache
def tile_shapes(split: bool) -> tuple[Array, Array, Array]:
    """Every (Tm, Tn, S) a kernel library may choose; slices of k only where ``split``."""
    shapes = [
        (tm, tn, s)
        for tm, tn in itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256))
        if tm * tn <= 256 * 128
        for s in (SPLITS if split else (1,))
    ]
    tm, tn, s = np.array(shapes, dtype=float).T
    return tm, tn, s


def moved_bytes(shape: GemmShape) -> Array:
    """Bytes that a cold product must move: weights, inputs, outputs."""
    operands = shape.weight_bytes * shape.n * shape.k + shape.input_bytes * shape.m * shape.k
    return operands + OUTPUT_BYTES * shape.m * shape.n


def roofline_s(shape: GemmShape, hw: Hardware) -> Array:
    """Least time the hardware allows: peak FLOP/s or peak HBM bandwidth, whichever binds."""
    flops = 2.0 * shape.m * shape.n * shape.k
    return np.maximum(flops / hw.flops_per_s, moved_bytes(shape) / hw.bytes_per_s)


def gemm_s(shape: GemmShape, c: Coefficients, hw: Hardware, *, cold: bool = True) -> Array:
    """Seconds of products, without residual. Coefficients as listed in this module; ``split_s`` and
    ``quantise_passes`` only where the kernels do such things."""
    best = _untiled_s(shape, c, hw) if c.get(UNTILED) else _best_s(shape, c, hw, cold)
    best = best * np.maximum(1.0, best / 1e-3) ** c["throttle"]
    quantise = c.get("quantise_passes", 0.0) * shape.m * shape.k * (4 + shape.input_bytes) / hw.bytes_per_s
    return np.asarray(c["launch_s"] + best + quantise)


def _untiled_s(shape: GemmShape, c: Coefficients, hw: Hardware) -> Array:
    """Seconds of products that follow no tiles, every weight cold: on a core the cost of a row is that of any other."""
    compute = 2.0 * shape.m * shape.n * shape.k / (hw.flops_per_s * c["compute_efficiency"])
    memory = moved_bytes(shape) / (hw.bytes_per_s * c["memory_efficiency"])
    return np.asarray(pnorm([compute, memory], c["sharpness"]))


def _best_s(shape: GemmShape, c: Coefficients, hw: Hardware, cold: bool) -> Array:
    """Seconds of the fastest tile shape.

    A p-norm of three lies between the largest and 3^(1/p) times it: only shapes that this leaves in the race pay for
    their powers.
    """
    terms, extra = _candidates(shape, c, hw, cold)
    compute, memory, cache = np.broadcast_arrays(*terms)
    largest = np.maximum(np.maximum(compute, memory), cache)
    worst = largest * 3 ** (1 / c["sharpness"]) + extra
    racing = np.flatnonzero(largest + extra <= worst.min(axis=-1, keepdims=True))
    total = np.full(largest.shape, np.inf)
    terms = [term.take(racing) for term in (compute, memory, cache)]
    np.put(total, racing, pnorm(terms, c["sharpness"]) + extra.take(racing))
    return np.asarray(total.min(axis=-1))


def _candidates(shape: GemmShape, c: Coefficients, hw: Hardware, cold: bool) -> tuple[list[Array], Array]:
    """Compute, HBM and L2 seconds of every tile shape along a new last axis, and what each adds to their p-norm."""
    tm, tn, s = tile_shapes("split_s" in c)
    m, n, k = (np.asarray(x, dtype=float)[..., None] for x in shape[:3])
    tiles = np.ceil(m / tm) * np.ceil(n / tn) * s
    fill = tiles / hw.sms
    q = c["wave_odds"] / (1 + c["wave_odds"])
    busy = np.minimum(fill, 1.0)
    waves = np.maximum(1.0, q * np.ceil(fill) + (1 - q) * fill)
    depth = k / s
    l2_bytes_per_s = hw.bytes_per_s * c["l2_ratio"]
    compute = waves * (2 * tm * tn * hw.sms / (hw.flops_per_s * c["compute_efficiency"])) * (np.ceil(depth / 64) * 64)
    drawn = hw.bytes_per_s * c["memory_efficiency"] * np.minimum(1.0, c["sm_bandwidth"] * busy)
    memory = (moved_bytes(shape) - (0.0 if cold else _cached_bytes(shape, c, hw)))[..., None] / drawn
    read = tm * shape.input_bytes + tn * shape.weight_bytes
    cache = tiles * read * depth / (l2_bytes_per_s * busy)
    extra = c["wave_s"] * waves
    if "split_s" in c:
        extra = extra + (s > 1) * (c["split_s"] + 8 * s * m * n / l2_bytes_per_s)
    return [compute, memory, cache], np.asarray(extra)


def _cached_bytes(shape: GemmShape, c: Coefficients, hw: Hardware) -> Array:
    """Weight bytes that a replayed measurement finds in L2."""
    weights = shape.weight_bytes * shape.n * shape.k
    return np.asarray(weights / (1 + (weights / (c["l2_hit_share"] * hw.l2_bytes)) ** 4))


def residual_coordinates(shape: GemmShape) -> tuple[Array, Array, Array]:
    """Coordinates of the correction: outputs, inputs, rows."""
    return shape.n, shape.k, shape.m
