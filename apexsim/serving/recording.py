"""What a run leaves behind beside its requests: one row a step (or run of decode steps), and token gaps."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from apexsim.columns import BLOCK_ROWS, Columns, Rows, joined
from apexsim.costs.durations import RunDurations, Tally
from apexsim.costs.steps import BatchStats
from apexsim.costs.timing import RunTimes
from apexsim.serving.batch import Batch
from apexsim.serving.cohort import Cohort
from apexsim.serving.request import Request

STEP_COLUMNS = (
    "start_ns", "end_ns", "replica", "repeats", "decodes", "context", "chunk_tokens", "survivors",
    "kv_blocks", "kv_blocks_peak", "running", "waiting",
)  # fmt: skip
CHUNK_COLUMNS = ("step", "tokens", "history")
LOT_ROWS = 1 << 12  # steps that are written together; blocks of rows are whole lots
_MOST_GAPS = 1 << 18  # whole numbers: gaps are counted when there are half as many


class Recorder:
    """Collects integers while the clock runs; turns them into columns afterwards."""

    def __init__(self, windows: Sequence[int]) -> None:
        self.step_columns = (*STEP_COLUMNS, *(f"window_context_{window}" for window in windows))
        self._rows, self._chunk_rows = Rows(self.step_columns), Rows(CHUNK_COLUMNS)
        self._stored = 0  # steps in the rows
        self._chunks_before: list[int] = []  # how many chunks the steps before each lot have
        self._steps = array("q")  # the latest lot of steps, not yet in the rows, and its chunks
        self._chunks = array("q")
        self._width = len(self.step_columns)
        self._packed = Struct(f"{self._width}q").pack  # quicker than to extend an array by a tuple
        self._row = self._held = 0  # where the latest row begins, and the blocks in use in its first step
        # replica, decodes, context and start of the step that would go on where the latest row ends
        self._next: tuple[int, int, int, int] | None = None
        self._gaps, self._tally = array("q"), Tally()
        self._runs = RunDurations()
        self.pipeline_ns = 0  # what steps that only decode took on all stages of a pipeline

    def step(
        self,
        stats: BatchStats,
        labels: tuple[int, int, int],
        times_ns: tuple[int, int],
        repeats: int,
        held: tuple[int, int],
    ) -> None:
        """Add a step, or ``repeats`` decode steps that follow one another.

        ``labels`` are the replica and its counts of running and waiting requests, ``times_ns`` start and end, ``held``
        the KV blocks in use in the first and the last (a row keeps their mean and the last). Decode steps that go on
        where a row ended are added to that row.
        """
        decodes, context, window_contexts, chunks, survivors = stats
        start_ns, end_ns = times_ns
        steps = self._steps
        going_on = None if chunks else (labels[0], decodes, context + repeats * decodes, end_ns)
        if not (chunks or window_contexts) and (labels[0], decodes, context, start_ns) == self._next:
            row = self._row
            steps[row + 1] = end_ns
            steps[row + 3] += repeats
            steps[row + 8] = (self._held + held[1]) // 2
            steps[row + 9] = held[1]
            self._next = going_on
            return
        if len(steps) == LOT_ROWS * self._width:
            self._store()
            steps = self._steps
        self._row, self._held, self._next = len(steps), held[0], going_on
        chunk_tokens = 0
        for tokens, history in chunks:
            chunk_tokens += tokens
            self._chunks.extend((self._stored + len(steps) // self._width, tokens, history))
        steps.frombytes(self._packed(
            start_ns, end_ns, labels[0], repeats, decodes, context, chunk_tokens, survivors,
            (held[0] + held[1]) // 2, held[1], labels[1], labels[2], *window_contexts,
        ))  # fmt: skip

    def peak(self, held: int) -> None:
        """So many KV blocks are in use at the end of the latest step."""
        steps, at = self._steps, self._row + 9
        steps[at] = held if held > steps[at] else steps[at]

    def tokens(self, requests: Sequence[Request], end_ns: int) -> None:
        """One sampled token of each request comes to exist; the gap to its previous one is an inter-token latency."""
        latest = count = 0
        for request in requests:
            request.pending -= 1
            last = request.last_token_ns
            request.last_token_ns = end_ns
            if last is None:
                request.first_token_ns = end_ns
            elif last == latest:
                count += 1
            else:
                self.gap(end_ns - latest, count)
                latest, count = last, 1
        self.gap(end_ns - latest, count)

    def gap(self, gap_ns: int, count: int) -> None:
        """So many tokens came ``gap_ns`` after the previous one of their request."""
        if count:
            self._gaps.extend((gap_ns, count))

    def ended(self, batch: Batch, cohort: Cohort, held: int) -> None:
        """A batch ended: every request in it has a token more, cohort members all after the same gap."""
        end_ns = batch.end_ns
        if batch.showing:
            batch.show()
        if batch.samples:
            self.tokens(batch.samples, end_ns)
        if batch.whole:
            if batch.marching:
                self.gap(end_ns - cohort.last_end_ns, batch.marching)
            cohort.last_step, cohort.last_end_ns = batch.step, end_ns
        self.step(batch.stats, batch.labels, (batch.start_ns, end_ns), 1, (held, held))

    def run(self, run: RunTimes, steps: int, sequences: int) -> None:
        """Steps 2 ... ``steps`` of a run gave ``sequences`` requests a token each; the first has its ``gap``."""
        if steps > 1:
            self._runs.add(run, steps, sequences)

    def steps(self) -> Columns:
        """Columns of ``step_columns``, in the order in which steps ended."""
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
        self._chunk_rows.append(self._chunks.tobytes())
        self._steps, self._chunks, self._next = array("q"), array("q"), None
        self._stored = len(self._rows)
        # Looked at here alone: a look at every gap and run would cost the clock loop a hundredth of its time.
        if len(self._gaps) >= _MOST_GAPS:
            self._add_up()
        self._runs.settle()

    def inter_token_gaps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Distinct gaps in nanoseconds, ascending, and how many tokens had each."""
        self._add_up()
        both, runs = Tally(), self._runs.collect()
        for each in (self._tally, runs):
            both.add(each.values, each.counts)
        return both.values, both.counts

    def _add_up(self) -> None:
        """Count the gaps that were noted so far."""
        gaps, counts = np.array(self._gaps, dtype=np.int64).reshape(-1, 2).T
        self._tally.add(gaps, counts)
        self._gaps = array("q")
