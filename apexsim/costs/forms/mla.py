"""Decode attention over latent vectors: every query head reads the same cached vector, as key and as value.

Symbols: ``b`` sequences, ``L`` mean keys each, ``h`` query heads of the device, ``c`` compressed and ``r`` rotated
elements of a latent vector, ``w`` bytes of a cached element, BW HBM bytes/s, P peak FLOP/s, SM multiprocessors, L2
cache bytes. Queries meet the latent vectors directly (the up-projections are absorbed into query and output).

    B   = w b L (c + r) + 2 b h (2 c + r)                     latent vectors once; queries in, outputs out
    F   = 2 b L ceil(h / tile) tile (2 c + r)                 scores and weighted sum; heads padded to a tile
    ns  = clip(L / l_s, 1, s_max)                             splits of a sequence over multiprocessors
    act = min(1, b ns ceil(h / tile) / SM)                    share of multiprocessors at work
    t_m = B (miss / (BW e_m) + (1 - miss) / (BW l2)) / min(1, act b_sm)
    T   = t0 + pnorm(t_m, b ceil(h / tile) t_cta / SM, F / (P e_c)) + t_l log2(1 + ns)

``miss = 1 / (1 + (c L2 / B)^6)`` in the replayed measurements, 1 in serving. Prompts run ordinary attention over
unfolded keys and values (``forms.prefill``), with heads of (query + value size) / 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware, pnorm

HEAD_TILES = (16.0, 64.0, 128.0)

COEFFICIENTS = (
    Coefficient("memory_efficiency", 0.85, 0.4, 0.99, "e_m: share of the HBM peak"),
    Coefficient("l2_ratio", 1.5, 1.0, 4.0, "l2: L2 bandwidth in units of BW (measuring only)"),
    Coefficient("l2_hit_share", 0.8, 0.2, 1.1, "c: share of L2 that holds a replayed cache (measuring only)"),
    Coefficient("sm_bandwidth", 1.2, 0.3, 6.0, "b_sm: bandwidth one multiprocessor can draw, in BW / SM"),
    Coefficient("block_s", 5e-6, 0.05e-6, 60e-6, "t_cta: one sequence and tile of heads on a multiprocessor"),
    Coefficient("compute_efficiency", 0.5, 0.02, 0.98, "e_c: share of the tensor-core peak"),
    Coefficient("sharpness", 3.0, 1.0, 12.0, "p: how sharply the slowest resource wins"),
    Coefficient("split_tokens", 256.0, 32.0, 4096.0, "l_s: keys of one split"),
    Coefficient("max_splits", 48.0, 2.0, 256.0, "s_max: most splits of a sequence"),
    Coefficient("merge_s", 0.5e-6, 0.01e-6, 5e-6, "t_l: merging splits, per doubling"),
)


class LatentBatch(NamedTuple):
    """Sizes of decode batches, as arrays or numbers that broadcast: ``heads`` are those of the device."""

    batch: Any
    keys: Any
    heads: Any
    compressed: float
    rotated: float
    kv_bytes: float


def moved_bytes(s: LatentBatch) -> Any:
    """Bytes that a cold batch must move: latent vectors, queries, outputs."""
    cached = s.kv_bytes * s.keys * (s.compressed + s.rotated)
    return s.batch * (cached + 2 * s.heads * (2 * s.compressed + s.rotated))


def flops(s: LatentBatch) -> Any:
    """Scores and weighted sum, without padding."""
    return 2.0 * s.batch * s.heads * s.keys * (2 * s.compressed + s.rotated)


def roofline_s(s: LatentBatch, hw: Hardware) -> Array:
    """Least time the hardware allows a cold batch."""
    return np.asarray(np.maximum(flops(s) / hw.flops_per_s, moved_bytes(s) / hw.bytes_per_s))


def decode_s(s: LatentBatch, c: Coefficients, hw: Hardware, *, cold: bool = True) -> Array:
    """Seconds of decode batches, without residual."""
    size, tiles = moved_bytes(s), np.ceil(s.heads / c["head_tile"])
    splits = np.clip(s.keys / c["split_tokens"], 1.0, c["max_splits"])
    active = np.minimum(1.0, s.batch * splits * tiles / hw.sms)
    per_byte = 1 / (hw.bytes_per_s * c["memory_efficiency"])
    if not cold:
        miss = 1 / (1 + np.minimum(c["l2_hit_share"] * hw.l2_bytes / size, 1e6) ** 6)
        per_byte = miss * per_byte + (1 - miss) / (hw.bytes_per_s * c["l2_ratio"])
    memory = size * per_byte / np.minimum(1.0, active * c["sm_bandwidth"])
    blocks = s.batch * tiles * c["block_s"] / hw.sms
    padded = flops(s) / s.heads * tiles * c["head_tile"]
    busy = pnorm([memory, blocks, padded / (hw.flops_per_s * c["compute_efficiency"])], c["sharpness"])
    return np.asarray(c["launch_s"] + busy + c["merge_s"] * np.log2(1 + splits))


def residual_coordinates(s: LatentBatch) -> tuple[Any, ...]:
    """Coordinates of the correction: heads, sequences, keys."""
    return s.heads, s.batch, s.keys
