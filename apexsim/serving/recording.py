"""What a run leaves behind beside its requests: one row a step (or run of decode steps), and token gaps."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from apexsim.columns import BLOCK_ROWS, Columns, Rows, joined
from apexsim.costs.durations import SPANS, RunDurations, Tally
from apexsim.costs.steps import BatchStats

STEP_COLUMNS = (
    "start_ns", "end_ns", "replica", "repeats", "decodes", "context", "chunk_tokens", "survivors",
    "kv_blocks", "kv_blocks_peak", "running", "waiting",
)  # fmt: skip
_END, _REPEATS, _HELD, _PEAK = 1, 3, 8, 9  # end_ns, repeats, kv_blocks and kv_blocks_peak among them
CHUNK_COLUMNS = ("step", "tokens", "history")
LOT_ROWS = 1 << 12  # steps that are written together; blocks of rows are whole lots
_MOST_GAPS = 1 << 18  # whole numbers: gaps are counted when there are half as many


class Recorder:
    """Collects integers while the clock runs; turns them into columns afterwards."""

    def __init__(self, windows: Sequence[int]) -> None:
        seen = (f"window_{what}_{window}" for what in ("context", "growing") for window in windows)
        self.step_columns = (*STEP_COLUMNS, *seen)
        self._nobody_grows = (0,) * len(windows)
        self._rows, self._chunk_rows = Rows(self.step_columns), Rows(CHUNK_COLUMNS)
        self._stored = 0  # steps in the rows
        self._chunks_before: list[int] = []  # how many chunks the steps before each lot have
        self._steps = array("q")  # the latest lot of steps, not yet in the rows, and its chunks
        self._chunks = array("q")
        self._width = len(self.step_columns)
        self._packed = Struct(f"{self._width}q").pack  # quicker than to extend an array by a tuple
        self._row = self._held = 0  # where the latest row begins, and the blocks in use in its first step
        # replica, decodes and context of the step that would go on where the latest row ends, and its start; -1: none
        self._next, self._next_ns = (0, 0, 0), -1
        self._gaps, self._tally = array("q"), Tally()
        self._runs = RunDurations()
        self.runs = self._runs.noted  # (run, steps, sequences): steps 2, 3 ... of it gave each of them a token
        self.pipeline_ns = 0  # what steps that only decode took on all stages of a pipeline

    def step(
        self,
        stats: BatchStats,
        labels: tuple[int, int, int],
        times_ns: tuple[int, int],
        repeats: int,
        held: tuple[int, int],
        gap: tuple[int, int] = (0, 0),
    ) -> None:
        """Add a step, or ``repeats`` decode steps that follow one another.

        ``labels`` are the replica and its counts of running and waiting requests, ``times_ns`` start and end, ``held``
        the KV blocks in use in the first and the last. ``gap``: nanoseconds since the token before the first step, and
        of how many tokens. Decode steps that go on where a row ended make it longer.
        """
        if gap[1]:
            self._gaps.extend(gap)
        decodes, context, window_contexts, chunks, survivors, growing, _ = stats
        start_ns, end_ns = times_ns
        steps = self._steps
        goes_on = start_ns == self._next_ns and (labels[0], decodes, context) == self._next and not chunks
        self._next = labels[0], decodes, context + repeats * decodes
        if goes_on:
            self._next_ns = end_ns
            row = self._row
            steps[row + _END] = end_ns
            steps[row + _REPEATS] += repeats
            steps[row + _HELD] = (self._held + held[1]) // 2
            steps[row + _PEAK] = held[1]
            return
        if len(steps) == LOT_ROWS * self._width:
            self._store()
            steps = self._steps
        self._next_ns = -1 if chunks or window_contexts else end_ns
        self._row, self._held = len(steps), held[0]
        steps.frombytes(self._packed(
            start_ns, end_ns, labels[0], repeats, decodes, context, self._noted(chunks) if chunks else 0, survivors,
            (held[0] + held[1]) // 2, held[1], labels[1], labels[2], *window_contexts,
            *(growing or self._nobody_grows),
        ))  # fmt: skip

    def _noted(self, chunks: Sequence[tuple[int, int]]) -> int:
        """Tokens of the chunks of the next row, after each has a row of its own."""
        row = self._stored + len(self._steps) // self._width
        for tokens, history in chunks:
            self._chunks.extend((row, tokens, history))
        return sum([tokens for tokens, _ in chunks])

    def peak(self, held: int) -> None:
        """So many KV blocks are in use at the end of the latest step."""
        steps, at = self._steps, self._row + _PEAK
        steps[at] = held if held > steps[at] else steps[at]

    def gap(self, gap_ns: int, count: int) -> None:
        """So many tokens came ``gap_ns`` after the previous one of their request."""
        self._gaps.extend((gap_ns, count))

    def gaps(self, gaps: Iterable[tuple[int, int]]) -> None:
        """Many of them."""
        for gap in gaps:
            self._gaps.extend(gap)

    def pipeline(self, spent_ns: int) -> None:
        """Steps that only decode took so long on all stages of a pipeline."""
        self.pipeline_ns += spent_ns

    def steps(self) -> Columns:
        """Columns of ``step_columns``, in the order of their ends; in a pipeline nearly, as a row may hold many."""
        self._store()
        return joined(self._rows.blocks())

    def chunks(self) -> Columns:
        """Columns step (row in ``steps``), tokens, history (tokens cached before the chunk)."""
        self._store()
        return joined(self._chunk_rows.blocks())

    def blocks(self) -> Iterator[tuple[Columns, Columns]]:
        """Steps and their chunks, so many steps at a time; ``step`` is then the row in this block."""
        self._store()
        ends = [*(self._chunks_before[:: BLOCK_ROWS // LOT_ROWS] or [0]), len(self._chunk_rows)]
        for number, steps in enumerate(self._rows.blocks()):
            chunks = self._chunk_rows.read(ends[number], ends[number + 1])
            chunks["step"] -= number * BLOCK_ROWS
            yield steps, chunks

    def _store(self) -> None:
        """Write the lot of steps: all have ended, and the next one begins a row of its own."""
        if not self._steps:
            return
        self._chunks_before.append(len(self._chunk_rows))
        self._rows.append(self._steps.tobytes())
        self._stored = len(self._rows)
        # Looked at here alone: a look at every gap and run would cost the clock loop a hundredth of its time.
        if len(self._gaps) >= _MOST_GAPS:
            self._add_up()
        if len(self._runs.noted) >= SPANS:
            self._runs.add_up()
        self._chunk_rows.append(self._chunks.tobytes())
        self._steps, self._chunks, self._next_ns = array("q"), array("q"), -1

    def inter_token_gaps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distinct gaps in nanoseconds, ascending, and how many tokens had each."""
        self._add_up()
        runs, self._runs = self._runs.collect(), RunDurations()
        self._tally.add(runs.values, runs.counts)
        return self._tally.values, self._tally.counts

    def _add_up(self) -> None:
        """Count the gaps that were noted so far."""
        gaps, counts = np.array(self._gaps, dtype=np.int64).reshape(-1, 2).T
        self._tally.add(gaps, counts)
        self._gaps = array("q")
