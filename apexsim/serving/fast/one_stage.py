"""Many decode steps at once on one stage, where everybody who decodes is one cohort and times are in closed form.

C(1), C(2) ... are the steps that the cohort takes in a stretch. C(1) starts when the ``first`` batches, in flight
before, have ended. The others follow without a gap. At most K batches are in flight: 2 with a lookahead, else 1. Each
end composes one more. At the start ``ahead`` (0 or 1) of the C are in flight already. What is missing to K is *owed*:
composed at once, so that first + ahead + owed = K::

    K = 1, first 1, owed 0   [b0]  C(1)  C(2)          C(k) is composed at end(k), end(1 + k) is its end
    end(k)                     1     2     3

    K = 1, owed 1                  C(1)  C(2)          C(k) is composed at end(k - 1), end(k) is its end
    end(k)                           1     2

    K = 2, first 2, owed 0   [b0][b1]  C(1)  C(2)      C(k) is composed at end(k), end(2 + k) is its end
    end(k)                     1   2     3     4

    K = 2, ahead 1, owed 1             C(1)  C(2)      C(k + 1) is composed at end(k - 1), end(k) is the end of C(k)
    end(k)                               1     2

Batches in flight may hold prompts, as long as they complete them: those jobs are members from C(1) on. When members
have their last token at end(silent + 1), the others have been composed once more if K is 2: that step is *ahead* of the
next stretch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from apexsim.costs.steps import BatchStats
from apexsim.costs.timing import RunTimes
from apexsim.serving.batch import Batch, Flight, Labels, emit
from apexsim.serving.decodes import Passed, advance
from apexsim.serving.fast.cohort import Cohort, GroupBatch, batch_of, march_on, stand_still
from apexsim.serving.job import Job
from apexsim.serving.ledger import Ledger, Together
from apexsim.serving.scheduler import Scheduler


class Surroundings(NamedTuple):
    """What a fast path works on."""

    replica: int
    flight: Flight
    scheduler: Scheduler
    windows: tuple[int, ...]


class Groups:
    """What a pipeline has in common with one stage.

    Members of cohorts stand first in ``running``. Where they cannot, or a budget or the blocks do not last for all of a
    cohort, all go ``astray``: they are advanced one by one, as the oracle does, until they can stand so again.
    """

    def __init__(self, around: Surroundings) -> None:
        self._replica, self._flight, self._scheduler, self._windows = around
        self._blocks = self._scheduler.blocks
        self._recorder = self._flight.recorder
        self._running = self._scheduler.running
        self._cohorts: list[Cohort] = []
        self._astray = False
        self.stretching = False
        self.next_end_ns = 0
        self._singly = 0  # steps in which no cohort marched

    @property
    def composed(self) -> int:
        """Steps composed so far."""
        return self._singly + sum([cohort.step for cohort in self._cohorts])

    @property
    def late_block_ns(self) -> int:
        """Blocks over time that the KV cache was not told of yet."""
        return sum([cohort.growth.late_block_ns() for cohort in self._cohorts])

    def _new_cohort(self) -> Cohort:
        cohort = Cohort(self._blocks, self._windows)
        self._cohorts.append(cohort)
        return cohort

    def _end(self, batch: Batch, cohort: Cohort | None, held: int) -> Sequence[Job]:
        """A batch ends: everybody in it has a token more, members of its cohort all after the same gap."""
        assert isinstance(batch, GroupBatch)
        end_ns, gap = batch.end_ns, (0, 0)
        if batch.samples or batch.showing:
            batch.emit(self._recorder)
        for job in batch.leaving:
            job.end(end_ns)
        if cohort is not None and batch.whole:
            gap = end_ns - cohort.last_end_ns, batch.marching
            cohort.last_step, cohort.last_end_ns = batch.step, end_ns
        self._recorder.step(batch.stats, batch.labels, (batch.start_ns, end_ns), 1, (held, held), gap)
        return batch.leaving


class DecodeStretch:
    """``silent`` step ends of a cohort whose step C(1) has the statistics ``stats``; see the top of this module.

    ``early`` compositions (0 or 1) come at ``early_ns``, before C(1) starts at ``from_ns``. ``labels`` are those of the
    replica at the start, ``first_labels`` those at the composition of C(1).
    """

    __slots__ = (
        "_known", "_start_ns", "ahead", "early", "early_ns", "first", "first_labels", "from_ns", "labels",
        "next_end_ns", "owed", "run", "silent", "stats",
    )  # fmt: skip

    def __init__(
        self, run: RunTimes, stats: BatchStats, known: Sequence[int], begun: tuple[int, int, int],
        labels: tuple[Labels, Labels],
    ) -> None:  # fmt: skip
        """``known`` are the ends of the batches in flight, ``begun`` how many steps are ahead and owed, and the time.

        ``labels``: of the replica now, and when C(1) was composed.
        """
        ahead, owed, start_ns = begun
        self.labels, self.first_labels = labels
        self.run = run
        self.stats = stats
        self._known = known
        self.first = len(known)
        self.ahead = ahead
        self.owed = owed
        self._start_ns = start_ns
        self.from_ns = known[-1] if known else start_ns
        self.early = int(self.first + owed > 1)
        self.early_ns = start_ns if owed else known[0]
        self.silent = self.next_end_ns = 0

    def reach(self, silent: int) -> int:
        """Let so many ends be silent; returns when the first comes that is not."""
        self.silent = silent
        self.next_end_ns = end_ns = self.end_ns(silent + 1)
        return end_ns

    def end_ns(self, count: int) -> int:
        """When the ``count``-th step end from the start happens, counted from 1."""
        later = count - self.first
        return self.from_ns + self.run.elapsed_ns(later) if later > 0 else self._known[count - 1]

    def composed_ns(self, number: int) -> int:
        """When a composition happens, the first being number 0: at once if it is owed, then at each end."""
        end = number + 1 - self.owed
        return self.end_ns(end) if end else self._start_ns

    def passed(self, now_ns: int) -> tuple[int, int]:
        """How many silent ends lie before ``now_ns``, and when the next end is; one at that time has not happened."""
        later = self.silent - self.first
        if later > 0 and now_ns > self.from_ns:
            count, next_ns = self.run.ended_before(now_ns - self.from_ns, later)
            return self.first + count, self.from_ns + next_ns
        count = bisect_left(self._known, now_ns, hi=min(self.silent, self.first))
        return count, self.end_ns(count + 1)


class OneStage(Groups):
    """The fast path on one stage."""

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        self._cohort = self._new_cohort()
        settings = self._scheduler.settings
        self._most = min(settings.max_num_seqs, settings.token_budget)
        self._fresh: list[tuple[Job, bool]] = []  # who has sampled by himself, and whether nobody stood still then
        self._stretch: DecodeStretch | None = None
        self._ahead = False  # whether a step of the whole cohort is in flight that no batch stands for
        self._composed_at: Labels = (0, 0, 0)  # what was to be said of the replica when that step was composed

    # -- who decodes together ---------------------------------------------------------------------------------------

    def offer(self, sequences: int, *, calm: bool) -> Together | None:
        """All of the cohort, after it has taken in who decodes by now; None while everybody is astray."""
        if self._ahead:
            self._hand_back()
        cohort, running = self._cohort, self._running
        if self._astray and calm and len(running) <= self._most:
            self._astray = False
            self._fresh = [(job, False) for job in takewhile(lambda job: job.decoding, running)]
        if self._fresh:
            self._join()
        if not cohort.size:
            return None
        missing = cohort.missing()
        if cohort.size > self._most or missing > self._blocks.free:
            self._dissolve()
            return None
        return Together(cohort.size, missing, cohort.size)

    def _join(self) -> None:
        """Jobs that have sampled by themselves become members; they stand behind the others in ``running``."""
        fresh, self._fresh = self._fresh, []
        if not self._cohort.take_in(fresh, self._running):  # a policy that does not serve in order
            self._dissolve()

    def _dissolve(self) -> None:
        members = self._running[: self._cohort.size]
        for job in members:
            self._cohort.let_go(job)
        for batch in self._flight.batches:
            assert isinstance(batch, GroupBatch)
            batch.release(members)
        self._astray = True

    def _all_together(self) -> bool:
        """Whether everybody who runs is a member, and one step has seats and tokens for all of them."""
        if self._astray:
            return False
        if self._fresh:
            self._join()
        return 0 < self._cohort.size == len(self._running) <= self._most

    # -- steps ------------------------------------------------------------------------------------------------------

    def compose(self, ledger: Ledger) -> GroupBatch:
        """See ``Decodes``."""
        if not (ledger.decodes or ledger.chunks):
            return march_on(self._cohort)
        others = advance(ledger, self._blocks, self._windows)
        if ledger.together:
            batch = march_on(self._cohort, others)
        else:
            batch = stand_still(self._cohort, others)
            self._singly += 1
        if batch.singles and not self._astray:
            self._fresh += [(job, batch.whole) for job in batch.singles if job.known < job.total]
        return batch

    def end(self) -> Sequence[Job]:
        """See ``Decodes``."""
        stretch = self._stretch
        if stretch is None:
            blocks = self._blocks
            return self._end(self._flight.batches.popleft(), self._cohort, blocks.total - blocks.free)
        self._stretch, self.stretching = None, False
        return self._settle(stretch)

    def _settle(self, stretch: DecodeStretch) -> Sequence[Job]:
        """Apply all ends up to the first that is not silent; returns who leaves with that one."""
        cohort, batches, blocks = self._cohort, self._flight.batches, self._blocks
        held = blocks.total - blocks.free
        left: Sequence[Job] = ()
        for _ in range(min(stretch.silent + 1, stretch.first)):
            left = self._end(batches.popleft(), cohort, held)
        compositions = stretch.silent + stretch.owed
        if not compositions:
            return left
        step, to_leave = cohort.step - stretch.ahead, cohort.due - cohort.step
        through = stretch.silent + 1 - stretch.first  # C(1) to C(through) have ended
        late = cohort.take_late() if cohort.late else ()
        if late and through > 0:
            emit(late, stretch.from_ns + stretch.run.first_ns, self._recorder)
        leaving, more = cohort.march_over(compositions, stretch)
        showing = self._show(stretch, step, through) if cohort.shown else ()
        if through > 0:
            held = self._record(stretch, step, len(late), held)
            late = ()
        self._flight.free_ns[0] = stretch.next_end_ns
        if compositions > to_leave:  # those who stay have been composed once more
            if cohort.size or more:
                self._keep_in_flight(stretch, (more, late, showing), held)
            return leaving
        if through < stretch.ahead + compositions:
            self._keep_in_flight(stretch, (leaving, late, showing), held)
            return left
        for job in leaving:
            job.end(stretch.next_end_ns)
        return leaving or left

    def _keep_in_flight(
        self, stretch: DecodeStretch, who: tuple[Sequence[Job], Sequence[Job], Sequence[Job]], held: int
    ) -> None:
        """A step of the whole cohort has been composed and starts now; a batch stands for it if it ends singly.

        ``who`` leave with it, are late in it, are shown with it; ``held`` are the blocks that the latest row tells of.
        """
        leaving, late, showing = who
        self._ahead, self._composed_at = True, stretch.labels
        if leaving or late or showing:
            batch = self._hand_back(leaving, late)
            batch.showing = showing
            self._scheduler.see_off(leaving)
        if self._blocks.total - self._blocks.free > held:
            self._recorder.peak(self._blocks.total - self._blocks.free)

    def _hand_back(self, leaving: Sequence[Job] = (), late: Sequence[Job] = ()) -> GroupBatch:
        """Let a batch stand for the step in flight, with which some leave and in which some are late."""
        flight = self._flight
        batch = batch_of(self._cohort, leaving, late)
        batch.start_ns = flight.free_ns[0]
        batch.end_ns = flight.free_ns[0] = batch.start_ns + flight.cost.stage_ns(batch.stats)[0]
        batch.labels = self._composed_at
        flight.batches.append(batch)
        self._ahead = False
        return batch

    def _record(self, stretch: DecodeStretch, step: int, late: int, held: int) -> int:
        """C(1) to C(``through``) have ended. The first gap depends on what was before, the others are the durations.

        ``step`` is the cohort's count before C(1), in which ``late`` members had a token singly; ``held`` are the
        blocks in use before the stretch. Returns those that the row tells of at its end.
        """
        cohort, last_ns = self._cohort, stretch.next_end_ns
        through = stretch.silent + 1 - stretch.first
        # Where nothing was composed that has ended by now, what was taken since belongs to later steps.
        taken = self._blocks.total - self._blocks.free - cohort.stayed
        held_last = held if through == stretch.ahead else taken
        stats, recorder = stretch.stats, self._recorder
        gap = stretch.from_ns + stretch.run.first_ns - cohort.last_end_ns, stats.decodes - late
        times_ns = stretch.from_ns, last_ns
        recorder.step(stats, stretch.first_labels, times_ns, through, (held, held_last), gap)
        if through > 1:
            recorder.runs.append((stretch.run, through, stats.decodes))
        cohort.last_step, cohort.last_end_ns = step + through - 1, last_ns
        return held_last

    def _show(self, stretch: DecodeStretch, step: int, through: int) -> list[Job]:
        """Hand clients the first tokens that C(1) to C(``through``) bring; returns those whose come with the next one.

        ``step`` is the cohort's count before C(1).
        """
        coming = []
        for at, job in self._cohort.shown:
            if at - step <= through:
                job.show(stretch.end_ns(stretch.first + at - step))
            else:
                coming.append(job)
        self._cohort.shown.clear()
        return coming

    # -- stretches --------------------------------------------------------------------------------------------------

    def go_on(self, sequences: int, now_ns: int) -> bool | None:
        """With all running jobs members and one step to compose, there is nothing to decide."""
        flight = self._flight
        if len(flight.batches) + self._ahead < flight.most - 1 or not self._all_together():
            return None
        return self._lay_out(now_ns) or None

    def plan(self, sequences: int, now_ns: int, until_ns: int | None) -> None:
        """See ``Decodes``."""
        if len(self._flight.batches) == self._flight.most and self._all_together():
            self._lay_out(now_ns)

    def _lay_out(self, now_ns: int) -> bool:
        """Plan the longest stretch of a cohort that is everybody. False when there is nothing to gain or to compose."""
        flight, cohort, ahead = self._flight, self._cohort, int(self._ahead)
        stats, enough = cohort.outlook(1 - ahead)
        run: RunTimes | None = flight.cost.decode_run(stats)  # type: ignore[assignment]  # as it is on one stage
        if run is None:
            return False
        known = [batch.end_ns for batch in flight.batches]
        owed = flight.most - len(known) - ahead
        compositions = self._compositions(run.limit - ahead, owed)
        if compositions > enough:
            compositions = self._with_blocks_for(compositions)
        if compositions <= 0:
            return False
        scheduler = self._scheduler
        labels = self._replica, len(self._running) + len(scheduler.aside), len(scheduler.waiting)
        both = labels, self._composed_at if ahead else labels
        stretch = DecodeStretch(run, stats, known, (ahead, owed, now_ns), both)
        self.next_end_ns = stretch.reach(compositions - owed)
        self._stretch, self._ahead, self.stretching = stretch, False, True
        return True

    def _compositions(self, limit: int, owed: int) -> int:
        """How many may follow each other, up to ``limit``: with the end after the last one somebody leaves."""
        to_leave = self._cohort.due - self._cohort.step
        most = to_leave + self._flight.most - 1 if to_leave <= limit else limit
        for position, batch in enumerate(self._flight.batches):
            if batch.leaving:
                return min(most, position + owed)
        return most

    def _with_blocks_for(self, most: int) -> int:
        """For how many of them there are blocks."""
        return bisect_right(range(1, most + 1), self._blocks.free, key=self._cohort.missing)

    def cut(self, now_ns: int) -> bool:
        """Keep only the silent ends before ``now_ns``. True if any were dropped."""
        stretch = self._stretch
        if stretch is None:
            return False
        passed, next_ns = stretch.passed(now_ns)
        if passed == stretch.silent:
            return False
        stretch.silent = passed
        stretch.next_end_ns = self.next_end_ns = next_ns
        return True

    def view(self, now_ns: int) -> Passed:
        """See ``Decodes``."""
        stretch = self._stretch
        if stretch is None:
            return Passed()
        passed, _ = stretch.passed(now_ns)
        return Passed(passed, self._cohort.taken(passed + stretch.owed))
