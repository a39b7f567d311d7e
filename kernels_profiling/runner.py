"""Runs composed steps on a device: packs their tokens, replays a CUDA graph where one fits, hands back tokens.

Everything is allocated once. On a CPU the buffers that the host fills are those that the model reads; on a GPU each has
a twin there, at an address that graphs can rely on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apexsim.serving.job import Job
from kernels_profiling import attention
from kernels_profiling.paged_cache import BlockTables
from kernels_profiling.transformer import Packed, Transformer

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pair:
    """A buffer of the host and the one the device reads: the same where the device is the host."""

    host: Tensor
    device: Tensor

    @property
    def array(self) -> npt.NDArray[np.generic]:
        """The host's side for numpy."""
        return self.host.numpy()

    def send(self, count: int) -> Tensor:
        """The first ``count`` lines on the device, what the host wrote there being on its way."""
        sent = self.device[:count]
        if self.device is not self.host:
            sent.copy_(self.host[:count], non_blocking=True)
        return sent


def _pair(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Pair:
    cuda = device.type == "cuda"
    host = torch.zeros(shape, dtype=dtype, pin_memory=cuda)
    return Pair(host, torch.zeros(shape, dtype=dtype, device=device) if cuda else host)


class Runner:
    """The model, its step buffers and, on a GPU, its decode graphs.

    ``known`` holds the tokens of every job by index: its prompt and what it has sampled so far.
    """

    def __init__(self, model: Transformer, tables: BlockTables, *, token_budget: int, graphs: bool = True) -> None:
        device, seats = model.keys.device, len(tables.rows)
        self.model = model
        self.tables = tables
        self.known: list[Integers] = []
        self._size = model.block_size
        tokens = max(token_budget, seats)
        self._ids, self._positions, self._slots = (_pair((tokens,), torch.int64, device) for _ in range(3))
        self._last = _pair((seats,), torch.int64, device)
        self._lengths = _pair((seats,), torch.int32, device)
        self._tables = _pair(tables.rows.shape, torch.int32, device)
        blocks = tables.rows.shape[1]
        self._widths = [blocks] if attention.one_launch(device) else graph_widths(blocks)
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._batches = graph_sizes(seats) if graphs and device.type == "cuda" else []
        self._pool = torch.cuda.graph_pool_handle() if self._batches else None

    def run(self, decodes: Sequence[Job], chunks: Sequence[tuple[Job, int]]) -> list[int]:
        """Compute a step whose jobs have been advanced already; the next token of each, decodes first."""
        if not chunks and self._batches:
            return self._replay(decodes)
        self._fill_decodes(decodes)
        tokens = self._fill_chunks(len(decodes), chunks)
        longest = max([job.computed for job in (*decodes, *[job for job, _ in chunks])])
        histories = [(count, job.computed - count) for job, count in chunks]
        packed = self._packed(tokens, len(decodes) + len(chunks), -(-longest // self._size), histories)
        found: list[int] = self.model.forward(packed).tolist()
        return found

    # -- packing ----------------------------------------------------------------------------------------------

    def _fill_decodes(self, decodes: Sequence[Job]) -> None:
        """Write one token of each decoding job: the one it sampled last."""
        count = len(decodes)
        if not count:
            return
        known = self.known
        lengths = np.array([job.computed for job in decodes])
        positions = lengths - 1
        tables = self.tables.rows[[self.tables.row(job) for job in decodes]]
        blocks = tables[np.arange(count), positions // self._size].astype(np.int64)
        self._ids.array[:count] = [known[job.index][job.computed - 1] for job in decodes]
        self._positions.array[:count] = positions
        self._slots.array[:count] = blocks * self._size + positions % self._size
        self._tables.array[:count] = tables
        self._lengths.array[:count] = lengths
        self._last.array[:count] = np.arange(count)

    def _fill_chunks(self, decodes: int, chunks: Sequence[tuple[Job, int]]) -> int:
        """Write the tokens of chunks behind those that decode; returns how many tokens there are in all."""
        begin, size = decodes, self._size
        for at, (job, count) in enumerate(chunks, start=decodes):
            positions, end = np.arange(job.computed - count, job.computed), begin + count
            row = self.tables.rows[self.tables.row(job)]
            self._ids.array[begin:end] = self.known[job.index][positions]
            self._positions.array[begin:end] = positions
            self._slots.array[begin:end] = row[positions // size].astype(np.int64) * size + positions % size
            self._tables.array[at] = row
            self._lengths.array[at] = job.computed
            self._last.array[at] = end - 1
            begin = end
        return begin

    def _packed(self, tokens: int, sequences: int, width: int, chunks: Sequence[tuple[int, int]]) -> Packed:
        """What the model reads, sent to the device."""
        return Packed(
            ids=self._ids.send(tokens),
            positions=self._positions.send(tokens),
            slots=self._slots.send(tokens),
            tables=self._tables.send(sequences)[:, :width],
            lengths=self._lengths.send(sequences),
            last=self._last.send(sequences),
            decodes=sequences - len(chunks),
            chunks=chunks,
        )

    # -- CUDA graphs ------------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Capture the decode graphs of all batch sizes and table widths, the largest first: they share its memory."""
        for width in reversed(self._widths):
            for batch in reversed(self._batches):
                self._graph(batch, width)

    def _replay(self, decodes: Sequence[Job]) -> list[int]:
        """The step as the smallest graph that holds it, padded with sequences of nobody."""
        count = len(decodes)
        blocks = -(-max([job.computed for job in decodes]) // self._size)
        batch, width = self._batches[bisect_left(self._batches, count)], self._widths[bisect_left(self._widths, blocks)]
        graph, out = self._graph(batch, width)
        self._fill_decodes(decodes)
        self._pad(count, batch)
        self._packed(batch, batch, width, ())
        graph.replay()
        found: list[int] = out[:count].tolist()
        return found

    def _pad(self, count: int, batch: int) -> None:
        """Lines ``count`` ... ``batch`` as sequences of one token in the spare block."""
        padding = slice(count, batch)
        self._ids.array[padding] = self._positions.array[padding] = 0
        self._slots.array[padding] = self.tables.spare * self._size
        self._lengths.array[padding] = 1
        self._tables.array[padding] = self.tables.spare
        self._last.array[padding] = np.arange(count, batch)

    def _graph(self, batch: int, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a decode step of this size, captured when first asked for."""
        found = self._captured.get((batch, width))
        if found is None:
            self._pad(0, batch)
            packed = self._packed(batch, batch, width, ())
            self.model.forward(packed)  # lazily made workspaces must exist before
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = self.model.forward(packed)
            found = self._captured[batch, width] = graph, out
        return found


def graph_sizes(seats: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, then every eighth, up to all seats."""
    return sorted({*[size for size in (1, 2, 4) if size < seats], *range(8, seats, 8), seats})


def graph_widths(blocks: int) -> list[int]:
    """Table widths that are captured where attention reads whole tables: powers of two up to ``blocks``."""
    return [*(1 << power for power in range(4, (blocks - 1).bit_length()) if 1 << power < blocks), blocks]
