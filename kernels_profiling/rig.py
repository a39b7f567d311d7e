"""Operands on a device: pools of random values that cases cut their buffers from, and paged caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from kernels_profiling import attention, kernels
from kernels_profiling.clock import Clock, HostClock
from kernels_profiling.power import Meter

BLOCK_SIZE = 16
# Buffers that take turns hold so many times the last cache: by the time one comes again nothing of it is left.
COLD_CACHES = 4
MOST_BUFFERS = 512
# Shape of the weights (3 MiB in bf16) that run through the inner caches of a CPU before each call that is timed.
SWEPT = (2048, 768)
# Spread of the weights of trained transformers: that of their initialisation, about.
WEIGHT_SPREAD = 0.02


class UnsupportedHereError(Exception):
    """The device cannot run an operator; the message says why."""


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of a layer, and the blocks of some sequences: ``tables[turn, sequence, block]``."""

    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor
    turn_bytes: int

    def slots(self, table: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Slots of ``count`` tokens from position ``first`` of the sequence with this table."""
        position = torch.arange(first, first + count, device=table.device)
        return table[position // BLOCK_SIZE].to(torch.int64) * BLOCK_SIZE + position % BLOCK_SIZE


class Rig:
    """Where operands lie, and the clock of what is timed there: the host's where none is given.

    ``cache_bytes`` is the last cache of the device; ``content`` what weights hold.
    """

    def __init__(
        self,
        device: torch.device,
        cache_bytes: int,
        meter: Meter | None,
        *,
        content: str = "normal",
        clock: Clock | None = None,
    ) -> None:
        self.device, self.cache_bytes, self.meter, self._content = device, cache_bytes, meter, content
        self.clock = clock or HostClock()
        self._pools: dict[torch.dtype, torch.Tensor] = {}
        self._draw = torch.Generator(device).manual_seed(0)
        self._sweeps, self._swept = 0, _swept(self)

    def with_content(self, content: str) -> Rig:
        """The same device with weights of other ``content``: normal or zeros."""
        return Rig(self.device, self.cache_bytes, self.meter, content=content, clock=self.clock)

    def hot(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """One operand of its own, which stays in the cache as far as it fits."""
        values = torch.randn(tuple(shape), device=self.device, generator=self._draw)
        return values.to(dtype)

    def cold(self, dtype: torch.dtype, shape: Sequence[int]) -> list[torch.Tensor]:
        """Operands of one shape that take turns."""
        size = prod(shape)
        pool = self._pool(dtype, size)
        # Rows of products want to start at multiples of 16 bytes; 256 suits every kernel.
        step = -(-size // 256) * 256
        count = min(MOST_BUFFERS, max(1, (pool.numel() - size) // step + 1))
        return [pool[at * step : at * step + size].view(tuple(shape)) for at in range(count)]

    def cache(self, kv_heads: int, head_dim: int, lengths: Sequence[int]) -> PagedCache:
        """A paged cache with sequences of ``lengths``; every turn has blocks of its own, in no order."""
        block = BLOCK_SIZE * kv_heads * head_dim
        widest = max(-(-length // BLOCK_SIZE) for length in lengths)
        needed = widest * len(lengths)
        pool = self._pool(torch.bfloat16, 2 * needed * block)
        blocks = pool.numel() // (2 * block)
        turns = max(1, min(MOST_BUFFERS, blocks // needed))
        shape = (blocks, BLOCK_SIZE, kv_heads, head_dim)
        k, v = (pool[at * blocks * block : (at + 1) * blocks * block].view(shape) for at in (0, 1))
        order = torch.randperm(blocks, device=self.device, generator=self._draw)[: turns * needed]
        tables = order.to(torch.int32).view(turns, len(lengths), widest)
        return PagedCache(k, v, tables, sum(4 * length * kv_heads * head_dim for length in lengths))

    def sweep(self) -> None:
        """Run the small kernels of some other layer and read weights, as happens between two kernels of a kind."""
        weights, (one, q, k, cache, slot, length) = self.cold(torch.bfloat16, SWEPT), self._swept
        self._sweeps += 1
        normed, _ = kernels.add_rms_norm(one, one.clone(), one[0])
        kernels.rope(q, k, k[0], k[0])
        kernels.write_kv(cache, cache, slot, k, k)
        attention.decode_attention(q, cache, cache, slot.to(torch.int32)[None], length)
        kernels.silu_mul(normed)
        kernels.gemm(normed, weights[self._sweeps % len(weights)])

    def integers(self, below: int, shape: Sequence[int]) -> torch.Tensor:
        """Whole numbers from 0 to ``below``, drawn alike."""
        return torch.randint(below, tuple(shape), device=self.device, generator=self._draw)

    def uniform(self, shape: Sequence[int]) -> torch.Tensor:
        """Numbers between 0 and 1, never 0 or 1."""
        drawn = torch.rand(tuple(shape), device=self.device, generator=self._draw)
        return drawn.clamp_(1e-7, 1 - 1e-7)

    def _pool(self, dtype: torch.dtype, least: int) -> torch.Tensor:
        """A stretch of at least ``least`` elements and of ``COLD_CACHES`` caches."""
        size = max(least, COLD_CACHES * self.cache_bytes // dtype.itemsize)
        if dtype not in self._pools or self._pools[dtype].numel() < size:
            self._pools.pop(dtype, None)
            self._pools[dtype] = self._filled(dtype, size)
        return self._pools[dtype]

    def _filled(self, dtype: torch.dtype, size: int) -> torch.Tensor:
        pool = torch.zeros(size, dtype=dtype, device=self.device)
        step = 1 << 24
        for at in range(0, size if self._content == "normal" and dtype.is_floating_point else 0, step):
            part = pool[at : at + step]
            part.copy_(torch.randn(part.numel(), device=self.device, generator=self._draw).mul_(WEIGHT_SPREAD))
        return pool


def _swept(rig: Rig) -> tuple[torch.Tensor, ...]:
    """Operands of the kernels that ``sweep`` runs: a token, its queries and keys, a cache of a block."""
    one, q, k, cache = (
        rig.hot(torch.bfloat16, shape) for shape in ((1, SWEPT[1]), (1, 12, 64), (1, 4, 64), (1, BLOCK_SIZE, 4, 64))
    )
    slot, length = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    return one, q, k, cache, slot, length
