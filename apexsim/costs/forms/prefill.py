"""Prefill attention of a chunk behind a history: tiles of queries times the keys they see, packed on multiprocessors.

Symbols: ``L`` tokens of the chunk, ``H`` tokens of its history, ``b`` equal sequences, ``h`` query heads, ``kv`` KV
heads, ``g = h / kv``, ``d`` head size, ``win`` sliding window (None: full), P peak FLOP/s, SM
multiprocessors, BW HBM bytes/s.

    gp    = min(g, max(1, TQ / L)) for L < 2048, else 1       heads of a group packed into a short query tile of TQ rows
    nt    = ceil(L gp / TQ)                                   query tiles of a packed head
    pairs = sum over the chunk of min(H + i, win)             query-key pairs, causal
    kvl   = pairs / L + min(L, TQ / gp) / 2 + pad             keys per tile; pad 64, with a window 128
            + (1 - skip) (L - 1) / 2 behind a history         kernels that do not skip the upper triangle there
    tile  = 4 TQ 128 d / (P / SM e_c)                         one query tile against 128 keys (over w_eff with a window)
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


def prefill_s(chunks: Chunks, heads: Heads, c: Coefficients, hw: Hardware, xp: Any = np) -> Any:
    """Seconds of ``batch`` equal chunks, without residual; ``xp`` is numpy, or the scalar look-alike for floats."""
    chunk, history, batch = chunks
    h, kv, d, window, kv_bytes = heads
    tq, sms = c["query_tile"], hw.sms
    packed = xp.where(chunk < 2048, xp.minimum(h / kv, xp.maximum(1.0, tq / chunk)), 1.0)
    tiles = batch * (h / packed) * xp.ceil(chunk * packed / tq)
    pairs = causal_pairs(chunk, history, window, xp)
    keys = pairs / chunk + xp.minimum(chunk, tq / packed) / 2 + (64 if window is None else 128)
    rectangle = xp.where(history > 0, (1 - c["causal_skip"]) * (chunk - 1) / 2, 0.0)
    longest = history + chunk if window is None else xp.minimum(history + chunk, window + tq)
    keys = xp.minimum(keys + rectangle, longest + 128.0)
    efficiency = c["compute_efficiency"] * (1.0 if window is None else c["window_efficiency"])
    tile = 4 * tq * 128 * d * sms / (hw.flops_per_s * efficiency)
    work = tiles * (xp.maximum(keys, 64.0) / 128 * tile + c["tile_s"]) / sms
    splits = xp.maximum(1.0, xp.minimum(xp.floor(sms / tiles), longest / 256))
    tail = c["tail"] * (xp.ceil(longest / 128) * tile * splits ** -c["split_exponent"] + c["tile_s"])
    most = xp.maximum(work, tail)
    p = c["sharpness"]
    busy = most * ((work / most) ** p + (tail / most) ** p) ** (1 / p)
    busy = busy * xp.maximum(1.0, busy / 1e-3) ** c["throttle"]
    traffic = c["kv_passes"] * 2 * kv * (2 + kv_bytes) + c["io_passes"] * 4 * h
    return c["launch_s"] + busy + batch * chunk * d * traffic / hw.bytes_per_s


def roofline_s(chunks: Chunks, heads: Heads, hw: Hardware, xp: Any = np) -> Any:
    """Least time: causal pairs at peak FLOP/s, or bytes (keys, values, queries, outputs) at peak HBM bandwidth."""
    chunk, history, batch = chunks
    h, kv, d, window, kv_bytes = heads
    seen = history + chunk if window is None else xp.minimum(history + chunk, window + chunk)
    flops = 4 * causal_pairs(chunk, history, window, xp) * h * d
    moved = 2 * kv_bytes * seen * kv * d + 4 * chunk * h * d
    return batch * xp.maximum(flops / hw.flops_per_s, moved / hw.bytes_per_s)


def residual_coordinates(chunks: Chunks, heads: Heads) -> tuple[Any, ...]:
    """Coordinates of the correction: length, heads in flight, group, window (2: sliding, 1: full).

    The length is that of a lone prompt whose tokens see as many keys on average as those of the chunk.
    """
    length = chunks.tokens + 2 * chunks.history
    return length, chunks.batch * heads.heads, heads.heads / heads.kv_heads, 1.0 if heads.window is None else 2.0
