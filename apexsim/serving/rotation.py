"""Macro-steps in a pipeline, where disjoint groups of requests take turns and times are computed one after another."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from apexsim.costs.timing import RunTimes, StepTimes
from apexsim.serving.batch import Batch
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.stretch import StepEnd, Stretch

LONGEST = 256
"""Silent ends planned ahead: each is computed, and lost when an arrival cuts it off."""


class Rotation(Stretch):
    """``silent`` step ends of a pipeline: each group of decoding requests is composed again when its step ends."""

    def __init__(
        self, in_flight: Sequence[Batch], stage_free: Sequence[int], runs: Sequence[RunTimes], silent: int
    ) -> None:
        self.silent = silent
        self._batches = tuple(in_flight)
        self._starts = [batch.start_ns for batch in in_flight]
        self._ends = [batch.end_ns for batch in in_flight]
        self._passed_on: list[list[int]] = []
        self._compose(runs, list(stage_free))
        self.next_end_ns = self.end_ns(silent + 1)

    def _compose(self, runs: Sequence[RunTimes], free: list[int]) -> None:
        """Start and end of every step to come, in order of their ends, and when each of its stages ended."""
        groups = len(self._batches)
        durations = self._durations = [run.stages_ns(1, self.silent // groups + 1) for run in runs]
        for composed in range(self.silent):
            time_ns = self._ends[composed]
            self._starts.append(max(time_ns, free[0]))
            passed_on = []
            for free_ns, duration_ns in zip(free, durations[composed % groups][composed // groups], strict=True):
                time_ns = (free_ns if free_ns > time_ns else time_ns) + duration_ns
                passed_on.append(time_ns)
            self._passed_on.append(passed_on)
            self._ends.append(time_ns)
            free = passed_on

    def end_ns(self, count: int) -> int:
        return self._ends[count - 1]

    def passed(self, now_ns: int) -> int:
        return bisect_left(self._ends, now_ns, hi=self.silent)

    def conclude(
        self, in_flight: deque[Batch], stage_free: list[int], recorder: Recorder, blocks: BlockManager
    ) -> StepEnd:
        composed = self._settle(in_flight, stage_free, recorder, blocks) if self.silent else ()
        batch = in_flight.popleft()
        batch.show()
        recorder.tokens(batch.samples, batch.end_ns)
        recorder.step(batch.stats, batch.labels, (batch.start_ns, batch.end_ns), 1, (blocks.held, blocks.held))
        return StepEnd(batch.end_ns, batch.leaving, composed)

    def _settle(
        self, in_flight: deque[Batch], stage_free: list[int], recorder: Recorder, blocks: BlockManager
    ) -> Sequence[Request]:
        """Apply the silent ends; returns those whose last token the latest composition samples."""
        groups, silent, starts, ends = len(self._batches), self.silent, self._starts, self._ends
        stage_free[:] = self._passed_on[silent - 1]
        recorder.pipeline_ns += sum([sum(self._durations[at % groups][at // groups]) for at in range(silent)])
        for position, batch in enumerate(self._batches[:silent]):
            times = ends[position:silent:groups]
            _take(batch, times, self.next_end_ns, blocks)
            _pass(batch, times, recorder, blocks)
            batch.stats = batch.stats.grown(len(times))
            latest = position + len(times) * groups
            batch.start_ns, batch.end_ns = starts[latest], ends[latest]
        in_flight.rotate(-silent)
        last = in_flight[-1]
        last.leaving = [request for request in last.samples if request.known == request.total]
        return last.leaving


def _take(batch: Batch, ends_ns: Sequence[int], now_ns: int, blocks: BlockManager) -> None:
    """Add to ``block_ns``, up to now, the blocks that a decode batch takes when it is composed anew at these ends."""
    for request in batch.samples:
        for at in range(max(0, request.capacity - request.computed), len(ends_ns), blocks.block_size):
            before = request.computed + at
            taken = blocks.needed(before + 1) - blocks.needed(before)
            blocks.block_ns += taken * (now_ns - ends_ns[at])


def _pass(batch: Batch, ends_ns: Sequence[int], recorder: Recorder, blocks: BlockManager) -> None:
    """Let steps of a decode batch end, each followed by its composition anew."""
    held, steps, first_ns, last_ns = blocks.held, len(ends_ns), ends_ns[0], ends_ns[-1]
    batch.show()
    recorder.tokens(batch.samples, first_ns)
    batch.showing = [request for request in batch.samples if request.shown == request.known + steps]
    for request in batch.samples:
        if request.known < request.shown < request.known + steps:
            request.shown_ns = ends_ns[request.shown - request.known]
        request.pending += 1
        request.last_token_ns = last_ns
        request.known += steps
        request.computed += steps
        blocks.grow(request, request.computed)
    for before_ns, end_ns in pairwise(ends_ns):
        recorder.gap(end_ns - before_ns, len(batch.samples))
    recorder.step(batch.stats, batch.labels, (batch.start_ns, last_ns), steps, (held, blocks.held))


def plan_rotation(
    in_flight: Sequence[Batch],
    running: Sequence[Request],
    stage_free: Sequence[int],
    cost: StepTimes,
    blocks: BlockManager,
) -> Rotation | None:
    """The longest stretch of a pipeline whose batches together decode all running requests; None if there is none."""
    groups = [batch.samples for batch in in_flight]
    if sum(map(len, groups)) != len(running) or any(batch.stats.chunks or batch.leaving for batch in in_flight):
        return None
    if any(request.last_token_ns is None for group in groups for request in group):
        return None
    runs = [run for batch in in_flight if (run := cost.decode_run(batch.stats))]
    if len(runs) < len(groups):
        return None
    silent = _silent_ends(groups, runs, blocks)
    return Rotation(in_flight, stage_free, runs, silent) if silent > 0 else None


def _silent_ends(groups: Sequence[Sequence[Request]], runs: Sequence[RunTimes], blocks: BlockManager) -> int:
    """How many step ends may pass unseen: group ``q`` of ``G`` is composed anew at ends q + 1, q + 1 + G, ...

    The composition that samples a request's last token is the last one, and no composition may find too few blocks.
    """
    silent, count = LONGEST, len(groups)
    for position, (group, run) in enumerate(zip(groups, runs, strict=True)):
        tokens_to_come = min(request.total - request.known for request in group)
        silent = min(silent, (tokens_to_come - 1) * count + position + 1, (run.limit - 1) * count + position)

    def missing(ends: int) -> int:
        return sum(
            blocks.missing(request, request.computed + (ends - position + count - 1) // count)
            for position, group in enumerate(groups)
            for request in group
        )

    if silent > 0 and missing(silent) > blocks.free:
        return bisect_right(range(1, silent + 1), blocks.free, key=missing)
    return silent
