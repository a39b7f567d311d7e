"""Prefill attention of a chunk behind a history: tiles of queries times the keys they see, packed on multiprocessors.

Symbols: ``L`` tokens of the chunk, ``H`` tokens of its history, ``b`` equal sequences, ``h`` query heads, ``kv`` KV
heads, ``g = h / kv``, ``d`` head size, ``win`` sliding window (None: full), P peak FLOP/s, SM
multiprocessors, BW HBM bytes/s.

    gp    = min(g, max(1, TQ / L)) for L < 2048, else 1       heads of a group packed into a short query tile of TQ rows
    nt    = ceil(L gp / TQ)                                   query tiles of a packed head
    pairs = sum over the chunk of min(H + i, win)             query-key pairs, causal
    kvl   = pairs / L + min(L, TQ / gp) / 2 + pad             keys per tile; pad 64, with a window 128
            + (1 - skip) (L - 1) / 2 behind a history         kernels that do not skip the upper triangle there
    tile  = 4 TQ 128 d / (P / SM e_c)                         one query tile against 128 keys (over w_eff with a window;
                                                              1 where no window was measured)
    work  = b (h / gp) nt (max(kvl, 64) / 128 tile + tau) / SM
    long  = c_l (ceil(kvmax / 128) tile ns^-a + tau)          the longest tile; ns: key splits at low occupancy
    T     = t0 + pnorm(work, long) max(1, T / 1 ms)^thr + (kv_passes 2 L b kv d (2 + w_kv) + io_passes 4 L b h d) / BW

The last term is the write of the new keys and values (the tables contain it; a step must not add it again) and the
queries and outputs. Never faster than the pairs at P, nor than the keys and values of the history at BW.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Coefficient, Coefficients, Hardware

QUERY_TILES = (64, 128, 256)

COEFFICIENTS = (
    Coefficient("launch_s", 8e-6, 1e-6, 20e-6, "t0: launch, and the kernel that writes the cache"),
    Coefficient("compute_efficiency", 0.7, 0.2, 0.98, "e_c: share of the tensor-core peak in the inner loop"),
    Coefficient("tile_s", 1.0e-6, 0.02e-6, 10e-6, "tau: start and end of one query tile"),
    Coefficient("tail", 1.0, 0.3, 2.0, "c_l: weight of the longest tile"),
    Coefficient("split_exponent", 0.5, 0.02, 1.0, "a: gain from splitting keys when few tiles are in flight"),
    Coefficient("sharpness", 3.0, 1.0, 12.0, "p: how sharply work or the longest tile wins"),
    Coefficient("throttle", 0.02, 1e-4, 0.15, "thr: slow-down exponent of kernels longer than 1 ms"),
    Coefficient("kv_passes", 1.0, 0.05, 6.0, "passes over the new keys and values"),
    Coefficient("io_passes", 1.0, 0.05, 6.0, "passes over queries and outputs"),
)
WINDOW_EFFICIENCY = Coefficient("window_efficiency", 0.8, 0.2, 1.2, "w_eff: inner loop under a sliding window")


class Chunks(NamedTuple):
    """``batch`` equal sequences, each computing ``tokens`` tokens behind ``history`` cached ones."""

    tokens: Any
    history: Any
    batch: Any = 1


class Heads(NamedTuple):
    """Attention heads of one device: query heads, KV heads, head size, window (None: full), bytes of a KV element."""

    heads: Any
    kv_heads: Any
    head_dim: Any
    window: Any
    kv_bytes: float


def causal_pairs(chunk: Any, history: Any, window: Any, xp: Any = np) -> Any:
    """Query-key pairs of ``chunk`` new tokens behind ``history``: sum of min(history + i, window)."""
    full = chunk * history + chunk * (chunk + 1) / 2
    if window is None:
        return full
    beyond = xp.maximum(0, xp.minimum(chunk, history + chunk - window))
    head = xp.maximum(0, history - window)
    # Tokens past the window lose (history + i - window) keys each: an arithmetic series from head + 1.
    lost = xp.where(head > 0, chunk * head + chunk * (chunk + 1) / 2, beyond * (beyond + 1) / 2)
    return full - lost


class Bound(NamedTuple):
    """A form with everything worked out that does not depend on the chunk: one head shape on one device."""

    heads: Any
    group: Any
    window: Any
    c: Coefficients
    sms: int
    query_tile: float
    tile_s: Any
    pad: float
    token_s: Any
    pair_s: Any
    query_io_s: Any
    key_s: Any


def bind(heads: Heads, c: Coefficients, hw: Hardware) -> Bound:
    """Work out the constants of one head shape: seconds of a tile, per new token, per pair and per key read."""
    h, kv, d, window, kv_bytes = heads
    tq = c["query_tile"]
    efficiency = c["compute_efficiency"] * (1.0 if window is None else c.get(WINDOW_EFFICIENCY.name, 1.0))
    traffic = c["kv_passes"] * 2 * kv * (2 + kv_bytes) + c["io_passes"] * 4 * h
    return Bound(
        heads=h,
        group=h / kv,
        window=window,
        c=c,
        sms=hw.sms,
        query_tile=tq,
        tile_s=4 * tq * 128 * d * hw.sms / (hw.flops_per_s * efficiency),
        pad=64.0 if window is None else 128.0,
        token_s=d * traffic / hw.bytes_per_s,
        pair_s=4 * h * d / hw.flops_per_s,
        query_io_s=4 * h * d / hw.bytes_per_s,
        key_s=2 * kv_bytes * kv * d / hw.bytes_per_s,
    )


def prefill_s(chunks: Chunks, bound: Bound, xp: Any = np) -> tuple[Any, Any]:
    """Seconds of ``chunks`` without residual, and the least the hardware allows (for one sequence at a time).

    ``xp`` is numpy, or the scalar look-alike for plain floats. The least is the causal pairs at peak FLOP/s, or the
    queries, outputs and keys in sight at peak HBM bandwidth.
    """
    chunk, history, batch = chunks
    c, window = bound.c, bound.window
    pairs = causal_pairs(chunk, history, window, xp)
    busy = _busy_s(chunks, pairs, bound, xp)
    busy = busy * xp.maximum(1.0, busy / 1e-3) ** c["throttle"]
    seen = history + chunk if window is None else chunk + xp.minimum(history, window)
    least = xp.maximum(bound.pair_s * pairs, bound.query_io_s * chunk + bound.key_s * seen)
    return c["launch_s"] + busy + batch * chunk * bound.token_s, batch * least


def _busy_s(chunks: Chunks, pairs: Any, bound: Bound, xp: Any) -> Any:
    """Makespan of the query tiles: all the work over the multiprocessors, or the longest tile."""
    chunk, history, batch = chunks
    c, window, tq, sms = bound.c, bound.window, bound.query_tile, bound.sms
    packed = xp.where(chunk < 2048, xp.minimum(bound.group, xp.maximum(1.0, tq / chunk)), 1.0)
    tiles = batch * (bound.heads / packed) * xp.ceil(chunk * packed / tq)
    longest = history + chunk if window is None else xp.minimum(history + chunk, window + tq)
    keys = pairs / chunk + xp.minimum(chunk, tq / packed) / 2 + bound.pad
    keys = keys + xp.where(history > 0, (1 - c["causal_skip"]) * (chunk - 1) / 2, 0.0)
    keys = xp.maximum(xp.minimum(keys, longest + 128.0), 64.0)
    work = tiles * (keys / 128 * bound.tile_s + c["tile_s"]) / sms
    splits = xp.maximum(1.0, xp.minimum(xp.floor(sms / tiles), longest / 256))
    tail = c["tail"] * (xp.ceil(longest / 128) * bound.tile_s * splits ** -c["split_exponent"] + c["tile_s"])
    most, p = xp.maximum(work, tail), c["sharpness"]
    return most * ((work / most) ** p + (tail / most) ** p) ** (1 / p)


def residual_coordinates(chunks: Chunks, heads: Heads) -> tuple[Any, ...]:
    """Coordinates of the correction: window (2: sliding, 1: full), group, heads in flight, tokens of the chunk."""
    windowed = 1.0 if heads.window is None else 2.0
    return windowed, heads.heads / heads.kv_heads, chunks.batch * heads.heads, chunks.tokens
