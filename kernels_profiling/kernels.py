"""The kernels that are timed, and that the live engine runs: the very same callables.

Shapes are those of one rank. Caches are paged, ``[blocks, block_size, kv_heads, head_dim]``; a token at position p of a
sequence lies in slot ``block_table[p // block_size] * block_size + p % block_size``. None of these waits for a GPU,
and all but ``prefill_attention`` keep their shapes from step to step: they can be captured in CUDA graphs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def gemm(x: Tensor, w: Tensor) -> Tensor:
    """x[m, k] W[n, k]^T."""
    return F.linear(x, w)


def gemm_fp8(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """The same from fp8 (e4m3) operands with one scale each (float32 scalars), into bf16."""
    return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)


def quantise_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Activations to fp8 (e4m3) by one scale."""
    return (x / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the embedding table."""
    return F.embedding(ids, table)


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last axis; over heads it is the norm of queries and keys."""
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Residual add and norm: (norm of the sum, the sum). ``residual`` is overwritten by the sum."""
    residual = residual.add_(x)
    return F.rms_norm(residual, (residual.shape[-1],), w, eps), residual


def rope_tables(positions: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[positions, dim]`` of the rotary embedding (halves repeated), in the dtype of ``like``."""
    frequency = base ** (-torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(positions, device=like.device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate ``q[tokens, heads, d]`` and ``k`` by ``cos, sin[tokens, d]``, rows of ``rope_tables`` at the positions."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.addcmul(q * cos, _half_turned(q), sin), torch.addcmul(k * cos, _half_turned(k), sin)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's product: silu of the first half of the last axis times the second."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def write_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Write ``k, v[tokens, kv_heads, d]`` into their ``slots`` (int64) of a paged cache."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v)


def moe(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, topk: int) -> Tensor:
    """Routed SwiGLU experts over ``x[tokens, hidden]``: softmax over the chosen, grouped products in order of expert.

    ``gate_up`` is ``[experts, 2 inter, hidden]``, ``down`` ``[experts, hidden, inter]``.
    """
    weight, chosen = router_logits.float().topk(topk, dim=-1)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order))
    ends = counts.cumsum(0).to(torch.int32)
    rows = x.index_select(0, order // topk)
    inner = silu_mul(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    out = F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
    out = out * weight.softmax(dim=-1).to(out.dtype).flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // topk, out)


def sample_greedy(logits: Tensor) -> Tensor:
    """The likeliest token of every row."""
    return logits.argmax(dim=-1)


def sample_top_p(logits: Tensor, top_p: float = 0.9) -> Tensor:
    """A token of every row, drawn from the likeliest ones that make up ``top_p`` of the probability."""
    ranked, tokens = logits.float().softmax(dim=-1).sort(dim=-1, descending=True)
    ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked > top_p, 0.0)
    # Exponential races draw from a categorical law without waiting for the device, unlike multinomial.
    winner = (ranked / torch.empty_like(ranked).exponential_()).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, winner).squeeze(-1)
