"""Decode attention: one query token per sequence against its cached keys and values.

Symbols: ``b`` sequences, ``L`` mean keys each (at most the window), ``h`` query heads, ``kv`` KV heads, ``g = h / kv``,
``d`` head size, ``w`` bytes of a KV element, BW HBM bytes/s, P peak FLOP/s, SM multiprocessors, L2 cache bytes.

    B   = 2 w b kv L d + 4 b h d                              keys, values, queries, outputs
    ns  = clip(L / l_s, 1, s_max)                             splits of a sequence over multiprocessors
          1 for g = 1 where split_ungrouped is 0              (kernels that split only packed groups of heads)
    act = min(1, b kv ns ceil(g / 64) / SM)                   share of multiprocessors at work
    t_m = B (miss / (BW e_m) + (1 - miss) / (BW l2)) / min(1, act b_sm)
    T   = t0 + pnorm(t_m, b kv t_cta / SM, 4 b h L d / (P e_c)) + t_l log2(1 + ns)

``miss = 1 / (1 + (c L2 / B)^6)``: tables replay one buffer, which L2 holds when small.
Serving is cold: miss = 1.
Lengths of unequal sequences count through their mean, as measured batches of unequal lengths do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware, pnorm

COEFFICIENTS = (
    Coefficient("launch_s", 9e-6, 1e-6, 20e-6, "t0: launch and drain"),
    Coefficient("memory_efficiency", 0.9, 0.75, 0.99, "e_m: share of the HBM peak"),
    Coefficient("l2_ratio", 2.0, 1.0, 4.0, "l2: L2 bandwidth in units of BW (measuring only)"),
    Coefficient("l2_hit_share", 0.8, 0.4, 1.1, "c: share of L2 that holds a replayed cache (measuring only)"),
    Coefficient("sm_bandwidth", 1.2, 0.3, 6.0, "b_sm: bandwidth one multiprocessor can draw, in BW / SM"),
    Coefficient("block_s", 2e-6, 0.05e-6, 10e-6, "t_cta: one sequence and KV head on a multiprocessor"),
    Coefficient("compute_efficiency", 0.5, 0.02, 0.98, "e_c: share of the tensor-core peak"),
    Coefficient("sharpness", 3.0, 1.0, 12.0, "p: how sharply the slowest resource wins"),
    Coefficient("split_tokens", 128.0, 32.0, 1024.0, "l_s: keys of one split"),
    Coefficient("max_splits", 48.0, 2.0, 256.0, "s_max: most splits of a sequence"),
    Coefficient("merge_s", 0.5e-6, 0.01e-6, 5e-6, "t_l: merging splits, per doubling"),
)


class DecodeShape(NamedTuple):
    """Sizes of decode batches, as arrays or numbers that broadcast; ``keys`` are already cut at the window."""

    batch: Any
    keys: Any
    heads: Any
    kv_heads: Any
    head_dim: Any
    kv_bytes: float


def moved_bytes(s: DecodeShape) -> Any:
    """Bytes that a cold batch must move: keys, values, queries, outputs."""
    return s.batch * s.head_dim * (2 * s.kv_bytes * s.kv_heads * s.keys + 4 * s.heads)


def roofline_s(s: DecodeShape, hw: Hardware) -> Array:
    """Least time the hardware allows a cold batch."""
    flops = 4.0 * s.batch * s.heads * s.keys * s.head_dim
    return np.asarray(np.maximum(flops / hw.flops_per_s, moved_bytes(s) / hw.bytes_per_s))


def decode_s(s: DecodeShape, c: Coefficients, hw: Hardware, *, cold: bool = True) -> Array:
    """Seconds of decode batches, without residual."""
    size = moved_bytes(s)
    splits = np.clip(s.keys / c["split_tokens"], 1.0, c["max_splits"])
    if not c["split_ungrouped"]:
        splits = np.where(s.heads > s.kv_heads, splits, 1.0)
    active = np.minimum(1.0, s.batch * s.kv_heads * splits * np.ceil(s.heads / s.kv_heads / 64) / hw.sms)
    per_byte = 1 / (hw.bytes_per_s * c["memory_efficiency"])
    if not cold:
        miss = 1 / (1 + np.minimum(c["l2_hit_share"] * hw.l2_bytes / size, 1e6) ** 6)
        per_byte = miss * per_byte + (1 - miss) / (hw.bytes_per_s * c["l2_ratio"])
    memory = size * per_byte / np.minimum(1.0, active * c["sm_bandwidth"])
    blocks = s.batch * s.kv_heads * c["block_s"] / hw.sms
    compute = 4.0 * s.batch * s.heads * s.keys * s.head_dim / (hw.flops_per_s * c["compute_efficiency"])
    busy = pnorm([memory, blocks, compute], c["sharpness"])
    return np.asarray(c["launch_s"] + busy + c["merge_s"] * np.log2(1 + splits))


def residual_coordinates(s: DecodeShape, windowed: bool) -> tuple[Any, ...]:
    """Coordinates of the correction: window (2: sliding, 1: full), group, (sequence, KV head) pairs, keys."""
    return 2.0 if windowed else 1.0, s.heads / s.kv_heads, s.batch * s.kv_heads, s.keys
