"""Attention over a paged KV cache: FlashAttention-3 where it can be imported, else torch's own kernels.

FlashAttention-3 reads the pages itself and takes chunks and decodes in one launch. Without it pages are gathered and
torch's scaled_dot_product_attention does the rest; on a GPU it takes decodes all at once, so that those of unequal
lengths cost as the longest of them, while a CPU computes them one after another.
``source`` says which one runs, and goes with every measured row.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class Ragged(NamedTuple):
    """Sequences of one launch: their blocks, their keys (those of the chunk included), where their queries begin
    (int32, one more than sequences), and the most queries of one."""

    block_tables: Tensor
    lengths: Tensor
    starts: Tensor
    longest: int


@lru_cache
def _flash3() -> Any:
    """The module of FlashAttention-3, where it is installed and the device is a Hopper."""
    found = importlib.util.find_spec("flash_attn_interface")
    if found is None or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    return importlib.import_module("flash_attn_interface")


def source(device: torch.device) -> str:
    """Name of the kernel behind ``prefill_attention`` and ``decode_attention``."""
    if device.type == "cpu":
        return f"torch {torch.__version__} (CPU), pages gathered; chunks scaled_dot_product_attention, decodes matmul"
    if _flash3() is not None:
        return "FlashAttention-3, paged"
    return f"torch {torch.__version__} scaled_dot_product_attention, pages gathered"


def one_launch(device: torch.device) -> bool:
    """Whether chunks and decodes can share a launch (``mixed_attention``)."""
    return device.type == "cuda" and _flash3() is not None


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, history: int) -> Tensor:
    """Causal attention of one chunk ``q[tokens, heads, d]`` behind ``history`` tokens, all its keys cached already.

    ``block_table`` (int32, the sequence's blocks in order) covers history and chunk at least.
    """
    chunk = q.shape[0]
    length = history + chunk
    if one_launch(q.device):
        # Made on the device: copies from the host cannot be captured.
        starts = torch.arange(2, dtype=torch.int32, device=q.device) * chunk
        lengths = torch.full((1,), length, dtype=torch.int32, device=q.device)
        return mixed_attention(q, k_cache, v_cache, Ragged(block_table.unsqueeze(0), lengths, starts, chunk))
    keys, values = (_gathered(cache, block_table)[:length].transpose(0, 1) for cache in (k_cache, v_cache))
    mask: Any = None if history == 0 else causal_lower_right(chunk, length)
    heads = q.transpose(0, 1)
    out = F.scaled_dot_product_attention(
        heads[None], keys[None], values[None], attn_mask=mask, is_causal=history == 0, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, lengths: Tensor) -> Tensor:
    """One query a sequence, ``q[batch, heads, d]``, against its ``lengths`` keys (its own, cached already, included).

    ``block_tables`` is ``[batch, blocks]`` (int32), as wide as the longest sequence; entries beyond a sequence's end
    are any lawful block. ``lengths`` are int32.
    """
    batch = q.shape[0]
    if one_launch(q.device):
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        return mixed_attention(q, k_cache, v_cache, Ragged(block_tables, lengths, starts, 1))
    if q.device.type == "cpu":
        return _decode_one_by_one(q, k_cache, v_cache, block_tables, lengths)
    keys, values = (
        _gathered(cache, block_tables.flatten()).view(batch, -1, *cache.shape[2:]).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    seen = torch.arange(keys.shape[2], device=q.device, dtype=torch.int32) < lengths[:, None]
    mask = seen.view(batch, 1, 1, -1)
    out = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=True)
    return out.squeeze(2)


def _decode_one_by_one(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Decodes on a CPU, where to look at lengths costs nothing: the cost follows the sum of them, not the longest.

    In float32, and by plain products: for single queries that is several times faster than torch's kernel in bf16.
    One sequence after another stays in the inner caches, so that every one costs the same in any batch.
    """
    size, kv_heads = k_cache.shape[1:3]
    queries = (q.float() * q.shape[-1] ** -0.5).view(q.shape[0], kv_heads, -1, q.shape[-1])
    out = torch.empty_like(queries)
    for at, length in enumerate(lengths.tolist()):
        blocks = tables[at, : -(-length // size)]
        keys, values = (_gathered(cache, blocks)[:length].float().transpose(0, 1) for cache in (k_cache, v_cache))
        chances = torch.matmul(queries[at], keys.transpose(1, 2)).softmax(-1)
        torch.matmul(chances, values, out=out[at])
    return out.view_as(q).to(q.dtype)


def mixed_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, ragged: Ragged) -> Tensor:
    """Chunks and decodes, ``q[tokens, heads, d]`` in all, in one launch of FlashAttention-3."""
    out = _flash3().flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=ragged.lengths,
        page_table=ragged.block_tables,
        cu_seqlens_q=ragged.starts,
        max_seqlen_q=ragged.longest,
        causal=True,
    )
    return torch.as_tensor(out[0] if isinstance(out, tuple) else out)


def _gathered(cache: Tensor, blocks: Tensor) -> Tensor:
    """Tokens of ``blocks`` in order: ``[tokens, kv_heads, d]``."""
    return cache.index_select(0, blocks).flatten(0, 1)
