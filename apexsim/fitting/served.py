"""Shapes that served models put on a device, for the hold-out that removes them all. Sizes from published configs."""

from __future__ import annotations

from typing import NamedTuple

TENSOR_DEGREES = (1, 2, 4, 8)


class Served(NamedTuple):
    """Widths of one model; ``ffn`` None where every layer is experts; ``experts`` = (inter, topk, experts)."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int | None
    vocab: int
    experts: tuple[int, int, int] | None = None


SERVED = (
    Served("llama-3.1-8b", 4096, 32, 8, 128, 14336, 128256),
    Served("llama-3.1-70b", 8192, 64, 8, 128, 28672, 128256),
    Served("qwen3-32b", 5120, 64, 8, 128, 25600, 151936),
    Served("qwen3-30b-a3b", 2048, 32, 4, 128, None, 151936, (768, 8, 128)),
    Served("qwen3-235b-a22b", 4096, 64, 4, 128, None, 151936, (1536, 8, 128)),
    Served("mixtral-8x7b", 4096, 32, 8, 128, None, 32000, (14336, 2, 8)),
    Served("mixtral-8x22b", 6144, 48, 8, 128, None, 32768, (16384, 2, 8)),
    Served("gpt-oss-120b", 2880, 64, 8, 64, None, 201088, (2880, 4, 128)),
    Served("gpt-oss-20b", 2880, 64, 8, 64, None, 201088, (2880, 4, 32)),
)


def gemm_shapes() -> set[tuple[int, int]]:
    """(n, k) of every dense product of the served models, by tensor degree."""
    found: set[tuple[int, int]] = set()
    for s in SERVED:
        for t in TENSOR_DEGREES:
            found.add(((s.heads + 2 * max(s.kv_heads, t)) * s.head_dim // t, s.hidden))
            found.add((s.hidden, s.heads * s.head_dim // t))
            found.add((s.vocab // t, s.hidden))
            if s.ffn:
                found |= {(2 * s.ffn // t, s.hidden), (s.hidden, s.ffn // t)}
    return found


def head_shapes() -> set[tuple[int, int]]:
    """(query heads, KV heads) on a device, by tensor degree."""
    return {(s.heads // t, max(1, s.kv_heads // t)) for s in SERVED for t in TENSOR_DEGREES}


def expert_shapes() -> set[tuple[int, int, int, int]]:
    """(hidden, expert width, topk, experts) of the served mixtures, whatever their degrees."""
    return {(s.hidden, *s.experts) for s in SERVED if s.experts}
