"""Many decode steps at once in a pipeline, where each batch in flight is a cohort and they take turns.

With G batches in flight, end k composes the batch that ends anew: the batch in place q of the flight ends at ends
q + 1, q + 1 + G, q + 1 + 2 G ... and is composed at each. When a step enters and leaves each stage follows from the
step before it there: these times are worked out one after another, as far as they are asked for.

A batch that ends leaves its cohort *ready*: all of it is composed together next. Who finds no place in that batch is
ready still, and joins the next one that is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

from apexsim.costs.timing import StageTimes
from apexsim.serving.batch import Labels
from apexsim.serving.clock import FOREVER
from apexsim.serving.decodes import Passed, advance
from apexsim.serving.fast.cohort import Cohort, GroupBatch, march_on, stand_still
from apexsim.serving.fast.one_stage import Groups, Surroundings
from apexsim.serving.job import Job
from apexsim.serving.ledger import Ledger, Together

LONGEST = 128
"""Silent ends planned ahead: each is worked out singly."""
FEW = 4
"""Steps of a batch whose durations are had together."""


class Run(NamedTuple):
    """The steps of a cohort in a stretch: that composed at its first end is step ``begins`` of ``times``.

    0 where its batch in flight holds others beside members, 1 where that is step 0 itself.
    """

    cohort: Cohort
    times: StageTimes
    begins: int


class PipelineStretch:
    """``silent`` step ends of batches that take turns."""

    def __init__(
        self, batches: Sequence[GroupBatch], free_ns: Sequence[int], runs: Sequence[Run], labels: Labels
    ) -> None:
        """``labels`` are those of the replica now: of all steps that are composed in the stretch."""
        self.batches = batches
        self.labels = labels
        self.silent = self.next_end_ns = 0
        self.starts = [batch.start_ns for batch in batches]
        self.ends = [batch.end_ns for batch in batches]
        self.free: list[list[int]] = [list(free_ns)]  # when each stage is free, after so many compositions
        self.spent: list[int] = []  # on all stages, by composition
        self._runs = runs
        self._durations: list[list[list[int]]] = [[] for _ in runs]

    def end_ns(self, count: int) -> int:
        """When the ``count``-th step end from now on happens, counted from 1."""
        self._work_out(count, FOREVER)
        return self.ends[count - 1]

    def _work_out(self, count: int, until_ns: int) -> None:
        """Know so many ends, or all up to the first that is not before ``until_ns``: each composes the next step."""
        starts, ends, spent, frees, groups = self.starts, self.ends, self.spent, self.free, len(self._runs)
        composed, known, free, time_ns = len(spent), len(ends), frees[-1], ends[-1]
        while known < count and time_ns < until_ns:
            durations, step = self._durations[composed % groups], composed // groups
            if step == len(durations):
                _, times, begins = self._runs[composed % groups]
                durations += times.stages_ns(begins + step, FEW)
            stages_ns, time_ns = durations[step], ends[composed]
            starts.append(time_ns if time_ns > free[0] else free[0])
            free_ns = []
            for stage_free_ns, duration_ns in zip(free, stages_ns):  # noqa: B905 - a hot path
                time_ns = (stage_free_ns if stage_free_ns > time_ns else time_ns) + duration_ns
                free_ns.append(time_ns)
            free = free_ns
            frees.append(free)
            spent.append(sum(stages_ns))
            ends.append(time_ns)
            composed, known = composed + 1, known + 1

    def reach(self, silent: int, until_ns: int = FOREVER) -> int:
        """Let so many ends be silent; where the stretch is cut at ``until_ns``, no more than lie before.

        Returns when the first end comes that is not silent.
        """
        self._work_out(silent + len(self._runs), until_ns)
        self.silent = silent = bisect_left(self.ends, until_ns, hi=min(silent, len(self.ends)))
        self._work_out(silent + len(self._runs), FOREVER)  # all that silent ends compose
        self.next_end_ns = self.ends[silent]
        return self.next_end_ns

    def passed(self, now_ns: int) -> int:
        """How many silent ends lie before ``now_ns``; one at that very time has not happened."""
        return bisect_left(self.ends, now_ns, hi=self.silent)


class InTurn(Groups):
    """The fast path in a pipeline."""

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        self._spare: list[Cohort] = []
        self._ready = self._new_cohort()
        self._rest = self._new_cohort()  # those of the ready who find no place in the next batch
        self._head = 0  # how many jobs are members of some cohort: the first of those that run
        self._stretch: PipelineStretch | None = None
        self._budget = self._scheduler.settings.token_budget

    # -- who decodes together ---------------------------------------------------------------------------------------

    def offer(self, sequences: int, *, calm: bool) -> Together | None:
        """All who are ready, or as many of the first as find a place; None while everybody is astray."""
        self._astray = self._astray and not calm
        if self._astray:
            return None
        self._take_in()
        excess = self._ready.size - min(sequences, self._budget)
        if excess > 0:
            self._leave_out(excess)
        missing = self._ready.missing() if self._ready.size else 0
        if missing > self._blocks.free:
            self._dissolve()
            return None
        return Together(self._ready.size, missing, self._head) if self._head else None

    def _take_in(self) -> None:
        """Who was left out before is ready, and who decodes right behind the members and has no token to come."""
        if self._rest.size:
            self._ready, self._rest = self._merged(self._ready, self._rest)
        running = self._running
        while self._head < len(running) and running[self._head].decoding and not running[self._head].pending:
            self._ready.join(running[self._head], late=True)
            self._head += 1

    def _leave_out(self, count: int) -> None:
        """The last of the ready are left to the next batch."""
        ready = [job for job in self._running[: self._head] if job.group is self._ready]
        for job in ready[-count:]:
            self._ready.let_go(job)
            self._rest.join(job, late=True)

    def _merged(self, one: Cohort, other: Cohort) -> tuple[Cohort, Cohort]:
        """A cohort of all members of two, and the other, empty."""
        larger, smaller = (one, other) if one.size >= other.size else (other, one)
        if smaller.size:
            for job in [job for job in self._running[: self._head] if job.group is smaller]:
                smaller.let_go(job)
                larger.join(job, late=True)
        return larger, smaller

    def _dissolve(self) -> None:
        """Everybody is advanced one by one from now on, those in flight included."""
        members = self._running[: self._head]
        of = [(job, job.group) for job in members]
        for job, group in of:
            assert isinstance(group, Cohort)
            group.let_go(job)
        for batch in self._flight.batches:
            assert isinstance(batch, GroupBatch)
            batch.release([job for job, group in of if group is batch.group])
        self._astray, self._head = True, 0

    # -- steps ------------------------------------------------------------------------------------------------------

    def compose(self, ledger: Ledger) -> GroupBatch:
        """See ``Decodes``."""
        ready, members = self._ready, self._ready.size
        alone = not (ledger.decodes or ledger.chunks)
        others = None if alone else advance(ledger, self._blocks, self._windows)
        if ledger.together:
            batch = march_on(ready, others)
            self._head -= members - ready.size
            self._give_away(batch)
        else:
            assert others is not None
            cohort = self._empty()
            batch = stand_still(cohort, others)
            batch.group, cohort.in_flight = cohort, True
            self._singly += 1
        self._join(batch)
        return batch

    def _join(self, batch: GroupBatch) -> None:
        """Who samples his first token in a batch, and stands right behind the members, is one of its cohort."""
        cohort = _cohort(batch)
        for job in batch.singles:
            if job.known == job.total or self._astray or self._running[self._head] is not job:
                return
            cohort.join(job, late=False)
            self._head += 1

    def _empty(self) -> Cohort:
        return self._spare.pop() if self._spare else self._new_cohort()

    def _give_away(self, batch: GroupBatch) -> None:
        """The cohort that is ready goes with its batch."""
        batch.group, self._ready = self._ready, self._empty()
        batch.group.in_flight = True

    def go_on(self, sequences: int, now_ns: int) -> bool | None:
        """With all running jobs members there is nothing to decide: those who are ready go on."""
        offered = self.offer(sequences, calm=True)
        if offered is None or self._head < len(self._running):
            return None
        if not offered.size:
            return False
        batch = march_on(self._ready)
        self._give_away(batch)
        self._flight.launch(batch, now_ns)
        self._see_off(batch.leaving)
        batch.labels = self._labels()
        return True

    def _labels(self) -> Labels:
        return self._replica, len(self._running) + len(self._scheduler.aside), len(self._scheduler.waiting)

    def _see_off(self, leaving: Sequence[Job]) -> None:
        if leaving:
            self._head -= len(leaving)
            self._scheduler.see_off(leaving)

    def end(self) -> Sequence[Job]:
        """See ``Decodes``."""
        if self._stretch is not None:
            self._settle(self._stretch)
            self._stretch, self.stretching = None, False
        batch = self._flight.batches.popleft()
        assert isinstance(batch, GroupBatch)
        left = self._end(batch, batch.group, self._blocks.total - self._blocks.free)
        _cohort(batch).in_flight = False
        self._ready, empty = self._merged(self._ready, _cohort(batch))
        self._spare.append(empty)
        return left

    # -- stretches --------------------------------------------------------------------------------------------------

    def plan(self, sequences: int, now_ns: int, until_ns: int | None) -> None:
        """See ``Decodes``."""
        batches = cast(list[GroupBatch], list(self._flight.batches))
        if self._astray or self._head < len(self._running) or self._ready.size or self._rest.size:
            return
        runs = self._runs(batches, sequences)
        silent = self._silent_ends(runs) if runs else 0
        if silent > 0:
            stretch = PipelineStretch(batches, self._flight.free_ns, runs, self._labels())
            self.next_end_ns = stretch.reach(silent, FOREVER if until_ns is None else until_ns)
            if stretch.silent:
                self._stretch, self.stretching = stretch, True

    def _runs(self, batches: Sequence[GroupBatch], sequences: int) -> list[Run]:
        """The run of every batch; none at all where one of them will not simply be composed anew."""
        runs = []
        for batch in batches:
            cohort = _cohort(batch)
            if batch.leaving or not 0 < cohort.size <= sequences:
                return []
            begins = 0 if batch.mixed else 1
            times = self._flight.cost.decode_run(batch.stats if begins else cohort.stats(1))
            if times is None:
                return []
            runs.append(Run(cohort, times, begins))
        return runs

    def _silent_ends(self, runs: Sequence[Run]) -> int:
        """How many step ends may pass unseen.

        The composition that samples a member's last token is the last one, and no composition may find too few blocks.
        """
        silent, count, free = LONGEST, len(runs), self._blocks.free
        for position, (cohort, times, begins) in enumerate(runs):
            last = (cohort.due - cohort.step - 1) * count + position + 1
            silent = min(silent, last, (times.limit - begins) * count + position)
        cohorts = [run.cohort for run in runs]
        if silent > 0 and _missing(cohorts, silent) > free:
            return bisect_right(range(1, silent + 1), free, key=lambda ends: _missing(cohorts, ends))
        return silent

    def _settle(self, stretch: PipelineStretch) -> None:
        """Apply the silent ends."""
        groups, silent = len(stretch.batches), stretch.silent
        self._flight.free_ns[:] = stretch.free[silent]
        self._recorder.pipeline(sum(stretch.spent[:silent]))
        for position, batch in enumerate(stretch.batches[:silent]):
            ends = stretch.ends[position:silent:groups]
            self._pass(batch, ends, stretch, stretch.starts[position + groups])
            latest = position + len(ends) * groups
            batch.start_ns, batch.end_ns = stretch.starts[latest], stretch.ends[latest]
        self._flight.batches.rotate(-silent)

    def _pass(self, batch: GroupBatch, ends_ns: Sequence[int], stretch: PipelineStretch, again_ns: int) -> None:
        """Let steps of a batch end, each followed by its composition anew, which first starts at ``again_ns``."""
        cohort, recorder, blocks = _cohort(batch), self._recorder, self._blocks
        held, step, size = blocks.total - blocks.free, cohort.step, cohort.size
        again = cohort.stats(1) if batch.mixed else batch.stats
        batch.emit(recorder)
        leaving = cohort.march_at(ends_ns, stretch.next_end_ns)
        first_gap, labels = (ends_ns[0] - cohort.last_end_ns, batch.marching), batch.labels
        steps, start_ns, both = len(ends_ns), batch.start_ns, (held, blocks.total - blocks.free)
        if batch.mixed:
            recorder.step(batch.stats, labels, (start_ns, ends_ns[0]), 1, (held, held), first_gap)
            steps, start_ns, labels, first_gap = steps - 1, again_ns, stretch.labels, (0, 0)
        if steps:
            recorder.step(again, labels, (start_ns, ends_ns[-1]), steps, both, first_gap)
        if len(ends_ns) > 1:
            recorder.gaps([(end - before, size) for before, end in pairwise(ends_ns)])
        batch.stats, batch.samples, batch.mixed = cohort.stats_with(leaving), (), False
        batch.marching, batch.labels, batch.leaving = batch.stats.decodes, stretch.labels, leaving
        batch.showing = self._show(cohort, step, ends_ns) if cohort.shown else ()
        batch.step = cohort.step - 1
        cohort.last_step, cohort.last_end_ns = batch.step - 1, ends_ns[-1]
        self._see_off(leaving)

    def _show(self, cohort: Cohort, step: int, ends_ns: Sequence[int]) -> list[Job]:
        """Hand clients the tokens that have come since count ``step``; returns those whose come with the next step."""
        coming = []
        for at, job in cohort.shown:
            if at - step < len(ends_ns):
                job.show(ends_ns[at - step])
            else:
                coming.append(job)
        cohort.shown.clear()
        return coming

    def cut(self, now_ns: int) -> bool:
        """Keep only the silent ends before ``now_ns``. True if any were dropped."""
        stretch = self._stretch
        if stretch is None:
            return False
        passed = stretch.passed(now_ns)
        if passed == stretch.silent:
            return False
        self.next_end_ns = stretch.reach(passed)
        return True

    def view(self, now_ns: int) -> Passed:
        """See ``Decodes``."""
        stretch = self._stretch
        if stretch is None:
            return Passed()
        passed = stretch.passed(now_ns)
        return Passed(passed, _missing(list(map(_cohort, stretch.batches)), passed))


def _cohort(batch: GroupBatch) -> Cohort:
    assert batch.group is not None
    return batch.group


def _missing(cohorts: Sequence[Cohort], ends: int) -> int:
    """Blocks that so many ends take: the cohort in place q is composed anew at ends q + 1, q + 1 + G, ..."""
    count = len(cohorts)
    return sum([
        cohort.missing(-(-(ends - position) // count)) for position, cohort in enumerate(cohorts[:ends])
    ])  # fmt: skip
