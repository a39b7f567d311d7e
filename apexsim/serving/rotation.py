"""Macro-steps in a pipeline, where disjoint groups of requests take turns and times are computed one after another."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.steps import DecodeRun, StepCost
from apexsim.serving.batch import Batch
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.stretch import Stretch

LONGEST = 256
"""Silent ends planned ahead: each is computed, and lost when an arrival cuts it off."""


class Rotation(Stretch):
    """A pipeline: disjoint groups of decoding requests take turns, each composed again when its step ends."""

    def __init__(self, in_flight: Sequence[Batch], stage_free: Sequence[int], runs: Sequence[DecodeRun], silent: int) -> None:
        self.silent = silent
        self._batches = tuple(in_flight)
        self._free = tuple(stage_free)
        self._runs = runs
        _, self._ends, _ = self._timeline(silent)
        self.next_end_ns = self.end_ns(silent + 1)

    def end_ns(self, count: int) -> int:
        return self._ends[count - 1]

    def passed(self, now_ns: int) -> int:
        return bisect_left(self._ends, now_ns, hi=self.silent)

    def _timeline(self, silent: int) -> tuple[list[int], list[int], list[int]]:
        """Start and end of every step in order of their ends, and when each stage is free after ``silent`` compositions."""
        starts = [batch.start_ns for batch in self._batches]
        ends = [batch.end_ns for batch in self._batches]
        free, groups = list(self._free), len(self._batches)
        for composed in range(silent):
            time_ns = ends[composed]
            starts.append(max(time_ns, free[0]))
            for stage, duration_ns in enumerate(self._runs[composed % groups].stage_ns(composed // groups + 1)):
                time_ns = free[stage] = max(time_ns, free[stage]) + duration_ns
            ends.append(time_ns)
        return starts, ends, free

    def settle(self, in_flight: deque[Batch], stage_free: list[int], recorder: Recorder, blocks: BlockManager) -> list[Request]:
        groups, silent = len(self._batches), self.silent
        starts, ends, stage_free[:] = self._timeline(silent)
        for position, batch in enumerate(self._batches[:silent]):
            times = ends[position:silent:groups]
            _pass(batch, (times[0], times[-1]), np.diff(np.array(times, dtype=np.int64)), recorder, blocks)
            batch.stats = batch.stats.grown(len(times))
            latest = position + len(times) * groups
            batch.start_ns, batch.end_ns = starts[latest], ends[latest]
        in_flight.rotate(-silent)
        latest = in_flight[-1]
        latest.leaving = [request for request in latest.samples if request.known == request.total]
        return latest.leaving


def _pass(
    batch: Batch, ends_ns: tuple[int, int], gaps_ns: NDArray[np.int64], recorder: Recorder, blocks: BlockManager
) -> None:
    """Let steps of a decode batch end, the first and last at ``ends_ns``, each followed by its composition anew."""
    held, steps = blocks.held, len(gaps_ns) + 1
    first_ns, last_ns = ends_ns
    for request in batch.samples:
        assert request.last_token_ns is not None, "planned only once everybody has a token"
        recorder.gaps[first_ns - request.last_token_ns] += 1
        request.last_token_ns = last_ns
        request.known += steps
        request.computed += steps
        blocks.grow(request, request.computed)
    for gap_ns in gaps_ns.tolist():
        recorder.gaps[gap_ns] += len(batch.samples)
    recorder.step(batch, repeats=steps, end_ns=last_ns, held=(held, blocks.held))


def plan_rotation(
    in_flight: Sequence[Batch], running: Sequence[Request], stage_free: Sequence[int], cost: StepCost, blocks: BlockManager
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


def _silent_ends(groups: Sequence[Sequence[Request]], runs: Sequence[DecodeRun], blocks: BlockManager) -> int:
    """How many step ends may pass unseen: group ``q`` of ``G`` is composed anew at ends q + 1, q + 1 + G, q + 1 + 2G ...

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
