"""Prefill chunks and decodes in one launch of a variable-length attention kernel (FlashAttention 2).

Such a launch neither packs the query heads of a KV head into one tile nor splits long contexts over blocks, as the
kernels for decode alone do: every decode costs a block per query head. So its time is not the sum of its parts
(which is 20 to 40 % short on measured steps) but that of blocks queueing for multiprocessors.

Symbols: ``H`` query heads, ``kv`` KV heads, ``d`` head size of one device, P peak FLOP/s, BW HBM bytes/s, ``w`` bytes
of a cached element; a chunk has ``q`` tokens behind ``h`` cached ones; ``nd`` decodes attend to ``k`` keys on average.

    one    = 4 64 128 d / (P / SM e_c)                      64 queries against 128 keys
    chunk  : ceil(q / 64) H blocks of (h + (1 - skip / 2) q + 64) / 128 one + tau, the longest of (h + q) / 128 one
    decode : nd H blocks of k / 128 one c_d + tau t_b
    idle   : H (most n - sum of them) blocks of t_e, n sequences with ceil(q / 64) tiles each, ``most`` at most
    KV     = 2 d kv w (h + q) of every chunk + 2 d kv w k nd r
    r      = 1 + (again - 1) / (1 + (c L2 / (2 d w k nd))^4),  again = clip(H / kv nd / (occ SM), 1, H / kv)
    T      = t0 + pnorm(all blocks / SM, longest block, KV / (BW e_m))

The grid of a launch has room for the longest chunk in every sequence: beside 128 decodes a chunk of 2,048 tokens starts
31 blocks a head for every decode that find nothing to do, and leave.

``r`` counts reads of KV from HBM: the query heads that share a KV head run one after another over the whole batch, and
find it in L2 only if the batch's part of it fits there or they run at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Coefficient, Coefficients, Hardware
from apexsim.costs.forms.prefill import Heads

# Queries and keys of a tile where the cache is paged, up to heads of 128.
QUERIES, KEYS = 64, 128
COEFFICIENTS = (
    Coefficient("launch_s", 8e-6, 2e-6, 40e-6, "t0: launch, drain, and the write of the KV cache"),
    Coefficient("compute_efficiency", 0.6, 0.1, 0.98, "e_c: share of the tensor-core peak inside a tile"),
    Coefficient("block_s", 2e-6, 0.05e-6, 20e-6, "tau: what a block of a chunk costs beside its keys"),
    Coefficient("causal_skip", 0.9, 0.01, 1.0, "skip: share of the triangle above the diagonal that is not computed"),
    Coefficient("decode_tile", 0.3, 0.01, 2.0, "c_d: keys of one query against those of a full tile"),
    Coefficient("decode_block", 0.5, 0.01, 4.0, "t_b: block cost of a decode against that of a chunk"),
    Coefficient("idle_block_s", 0.1e-6, 0.001e-6, 2e-6, "t_e: a block that finds no query to work on"),
    Coefficient("memory_efficiency", 0.85, 0.3, 0.97, "e_m: share of the HBM peak"),
    Coefficient("blocks_in_flight", 2.0, 0.2, 32.0, "occ: blocks of a multiprocessor that share what they read"),
    Coefficient("cached_share", 0.5, 0.05, 2.0, "c: share of L2 that keeps the KV of one head for its next query head"),
    Coefficient("sharpness", 3.0, 1.0, 12.0, "p: how sharply the slowest resource wins"),
)


class Blocks(NamedTuple):
    """What some sequences bring to a launch: seconds of all their blocks, of the longest, and bytes of KV.

    ``tiles`` of queries are those of all sequences, ``most_tiles`` those of the longest, both of one head.
    """

    work_s: Any
    longest_s: Any
    kv_bytes: Any
    sequences: Any
    tiles: Any
    most_tiles: Any


class Bound(NamedTuple):
    """The form with one head shape put in: seconds of a full tile, KV bytes of a token, in all and of one KV head."""

    heads: float
    group: float
    window: float | None
    tile_s: float
    token_bytes: float
    head_bytes: float
    c: Coefficients
    hw: Hardware


def bind(heads: Heads, c: Coefficients, hw: Hardware) -> Bound:
    """Work out what does not depend on the batch."""
    tile_s = 4.0 * QUERIES * KEYS * heads.head_dim * hw.sms / (hw.flops_per_s * c["compute_efficiency"])
    head_bytes = 2.0 * heads.head_dim * heads.kv_bytes
    group, token_bytes = heads.heads / heads.kv_heads, head_bytes * heads.kv_heads
    return Bound(heads.heads, group, heads.window, tile_s, token_bytes, head_bytes, c, hw)


def chunk_blocks(tokens: Any, history: Any, bound: Bound, xp: Any = np) -> Blocks:
    """A chunk of ``tokens`` >= 1 behind ``history``; ``xp`` is numpy or its look-alike for plain floats."""
    c, keys = bound.c, history + tokens
    reach = history + tokens * (1.0 - 0.5 * c["causal_skip"]) + KEYS / 2
    if bound.window is not None:
        keys, reach = xp.minimum(keys, bound.window + tokens), xp.minimum(reach, bound.window + KEYS)
    longest = keys if bound.window is None else xp.minimum(keys, bound.window + KEYS)
    block = reach / KEYS * bound.tile_s + c["block_s"]
    tiles = xp.ceil(tokens / QUERIES)
    longest_s = longest / KEYS * bound.tile_s + c["block_s"]
    return Blocks(bound.heads * tiles * block, longest_s, bound.token_bytes * keys, 1.0, tiles, tiles)


def decode_blocks(decodes: Any, keys: Any, bound: Bound, xp: Any = np) -> Blocks:
    """``decodes`` >= 1 sequences of one token, attending to ``keys`` on average (windows taken off already)."""
    c = bound.c
    block = keys / KEYS * bound.tile_s * c["decode_tile"] + c["block_s"] * c["decode_block"]
    of_head = bound.head_bytes * keys * decodes
    missed = 1.0 / (1.0 + (c["cached_share"] * bound.hw.l2_bytes / of_head) ** 4)
    again = xp.maximum(1.0, xp.minimum(bound.group * decodes / (c["blocks_in_flight"] * bound.hw.sms), bound.group))
    reads = 1.0 + (again - 1.0) * missed
    kv_bytes = bound.token_bytes * keys * decodes * reads
    return Blocks(bound.heads * decodes * block, block, kv_bytes, decodes, decodes, 1.0)


def together(parts: Sequence[Blocks]) -> Blocks:
    """Several chunks of one launch as one."""
    works, longest, kv_bytes, sequences, tiles, most_tiles = zip(*parts, strict=True)
    return Blocks(sum(works), max(longest), sum(kv_bytes), sum(sequences), sum(tiles), max(most_tiles))


def launch_s(chunks: Blocks, decodes: Blocks, bound: Bound, xp: Any = np) -> Any:
    """Seconds of one launch over chunks (their blocks added up, the longest of them) and decodes."""
    c, p = bound.c, bound.c["sharpness"]
    room = xp.maximum(chunks.most_tiles, decodes.most_tiles) * (chunks.sequences + decodes.sequences)
    idle_s = bound.heads * (room - chunks.tiles - decodes.tiles) * c["idle_block_s"]
    busy = (chunks.work_s + decodes.work_s + idle_s) / bound.hw.sms
    longest = xp.maximum(chunks.longest_s, decodes.longest_s)
    moved = (chunks.kv_bytes + decodes.kv_bytes) / (bound.hw.bytes_per_s * c["memory_efficiency"])
    most = xp.maximum(xp.maximum(busy, longest), moved)
    return c["launch_s"] + most * ((busy / most) ** p + (longest / most) ** p + (moved / most) ** p) ** (1 / p)
