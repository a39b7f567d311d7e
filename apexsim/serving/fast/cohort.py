"""Decoding jobs that step together, kept as one.

In a step of decodes every job of a cohort gets a token. The cohort counts such steps once instead of updating each job
at each of them: a member's tokens follow from the count, so that a step costs the same whether 4 or 400 jobs decode.

    member.computed = member.base + step          (known is one more: a member always awaits its next token)
    member samples its last token at step s       when base + s + 1 == total: a heap of those steps
    and the last of those first shown             when base + s + 1 == shown: another
    and fills a window of w tokens at step s      when base + s == w: a count for each such step
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from apexsim.costs.steps import BatchStats
from apexsim.serving.batch import Batch
from apexsim.serving.clock import FOREVER
from apexsim.serving.decodes import Advanced
from apexsim.serving.fast.blocks import MOST_MOVES, MOST_NOTED, Growth, LateBlocks, MemberGrowth, Taking
from apexsim.serving.fast.windows import WindowSum
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager


class Cohort:
    """``size`` decoding jobs after ``step`` common steps; ``context`` sums their computed tokens.

    ``in_flight``: it goes with a batch of its own, which has not ended. ``late`` members joined while the others stood
    still: their next token is stamped singly, because it does not come as long after their previous one.
    ``last_end_ns`` is when everybody else's latest token came, at the end of the step composed at count ``last_step``.
    ``unshown`` members have yet to sample what their client is handed first; whoever lets the cohort march takes the
    ``shown`` from it, with the step that did it. At step ``due`` a member samples its last token, and nobody before.
    """

    def __init__(self, blocks: BlockManager, windows: Sequence[int]) -> None:
        self.size = 0
        self.in_flight = False
        self.step = 0
        self.context = 0
        self.due = FOREVER
        self.late: list[Job] = []
        self.last_end_ns = 0
        self.last_step: int | None = None
        self.stayed = 0  # blocks that those took who marched a step more than others (see ``march_over``)
        self._blocks = blocks
        self._each = blocks.needed(1)
        self.growth: Growth = SteadyGrowth(blocks) if blocks.steady else MemberGrowth(blocks)
        self.windows = [WindowSum(window) for window in windows]
        self.unshown: list[tuple[int, int, Job]] = []
        self.shown: list[tuple[int, Job]] = []
        self._leavers: list[tuple[int, int, Job]] = []
        self._joined = 0

    # -- who is a member ----------------------------------------------------------------------------------------------

    def join(self, job: Job, *, late: bool) -> None:
        """Take in a job that awaits its next token; ``late`` if its latest did not come with everybody else's."""
        base = job.base = job.computed - self.step
        job.group, job.joined, job.place = self, self.step + 1 if late else self.step, self._joined
        self.growth.join(job)
        heappush(self._leavers, (job.total - 1 - base, self._joined, job))
        self.due = self._leavers[0][0]
        if job.known < job.shown:
            heappush(self.unshown, (job.shown - 1 - base, self._joined, job))
        for window in self.windows:
            window.join(job, self.step)
        self._joined += 1
        self.size += 1
        self.context += job.computed
        if late:
            self.late.append(job)

    def take_in(self, fresh: Iterable[tuple[Job, bool]], running: Sequence[Job]) -> bool:
        """Let those join who stand right behind the members in ``running``, each with whether nobody stood still.

        False when one stands elsewhere.
        """
        for job, whole in fresh:
            if running[self.size] is not job:
                return False
            self.join(job, late=not whole)
        return True

    def _leave(self, jobs: Iterable[Job], end_ns: int | None) -> None:
        """Let members go whose last token has been sampled, and comes at ``end_ns`` if that is known."""
        for job in jobs:
            self._forget(job)
            job.catch_up(job.total - 1, end_ns)
            self.growth.leave(job)
            self.size -= 1
            self.context -= job.computed

    def let_go(self, job: Job) -> None:
        """Let a member go its own way, with a token to come. It has none of its own in flight."""
        self._forget(job)
        at_end_ns = self.last_end_ns if self.last_step is not None and job.joined <= self.last_step else None
        job.catch_up(job.base + self.step, at_end_ns if not job.pending else None)
        self.growth.leave(job)
        if job.computed > job.capacity:
            self._blocks.hand_over(job)
        self.size -= 1
        self.context -= job.computed
        if job in self.late:
            self.late.remove(job)
        self._drop_gone(self._leavers)
        self._drop_gone(self.unshown)
        self.due = self._leavers[0][0] if self._leavers else FOREVER

    def _forget(self, job: Job) -> None:
        job.group = None
        for window in self.windows:
            window.leave(job)

    def _drop_gone(self, heap: list[tuple[int, int, Job]]) -> None:
        """Of those who were let go before their time, none may stand first."""
        while heap and not self._stays(heap[0]):
            heappop(heap)

    def _stays(self, entry: tuple[int, int, Job]) -> bool:
        _, place, job = entry
        return job.group is self and job.place == place

    # -- what comes ---------------------------------------------------------------------------------------------------

    def missing(self, steps: int = 1) -> int:
        """Blocks that the members lack to march ``steps`` steps."""
        return self.growth.missing(self.step, steps)

    def taken(self, steps: int) -> int:
        """Blocks that are taken after ``steps`` steps, of which those who leave on the way take no part in the last."""
        to_leave = self.due - self.step
        if steps <= to_leave:
            return self.missing(steps)
        going = [job for due, _, job in self._leavers if due == self.step + to_leave]
        return self.missing(steps) - sum([self.growth.takes(job, self.step + to_leave) for job in going])

    def stats(self, ahead: int) -> BatchStats:
        """The decode step ``ahead`` steps from now: 0 is the one composed last."""
        size, context = self.size, self.context + ahead * self.size
        if not self.windows:
            return BatchStats(size, context, (), (), size)
        step = self.step + ahead
        attended = tuple([window.attended(size, step) for window in self.windows])
        regular = min([window.full_at for window in self.windows]) - step + 1
        return BatchStats(size, context, attended, (), size, tuple([window.open for window in self.windows]), regular)

    def stats_with(self, left: Sequence[Job]) -> BatchStats:
        """The step composed last, with those who sampled their last token in it and have ``left``."""
        stats = self.stats(0)
        if not left:
            return stats
        attended = tuple([
            tokens + sum([min(job.computed, window.window) for job in left])
            for tokens, window in zip(stats.window_contexts, self.windows, strict=True)
        ])  # fmt: skip
        size = stats.decodes + len(left)
        return BatchStats(size, stats.context + sum([job.computed for job in left]), attended, (), size)

    def outlook(self, ahead: int) -> tuple[BatchStats, int]:
        """``stats``, and for how many steps from now there are enough blocks whoever crosses when."""
        most, size = self._each * self.growth.members, self.size
        enough = self._blocks.free // most * self._blocks.block_size - 1 if most else FOREVER
        if self.windows:
            return self.stats(ahead), enough
        # As ``stats`` says it, without the call: this is asked for in every stretch.
        return BatchStats(size, self.context + ahead * size, (), (), size), enough

    # -- steps --------------------------------------------------------------------------------------------------------

    def march(self) -> list[Job]:
        """Compose a step now. Returns the members whose last token it samples, who leave."""
        self.growth.march(self.step)
        return self._counted(1)

    def march_at(self, times_ns: Sequence[int], now_ns: int) -> list[Job]:
        """The same of steps composed at these times, all before ``now_ns``."""
        self.growth.march_at(self.step, times_ns, now_ns)
        return self._counted(len(times_ns))

    def march_over(self, steps: int, taking: Taking) -> tuple[list[Job], list[Job]]:
        """The same of steps composed at the times of a stretch: those who leave, and those of one step more.

        When members have sampled their last token there may be a step left: those who stay march it alone, and the
        others have their last token by then.
        """
        to_leave = self.due - self.step
        self.stayed = 0
        if steps <= to_leave:
            self.growth.march_over(self.step, steps, taking)
            return self._counted(steps), []
        self.growth.march_over(self.step, to_leave, taking)
        left = self._counted(to_leave, taking.next_end_ns)
        if not self.size:
            return left, []
        self.stayed = self.growth.missing(self.step, 1)
        if self.stayed:
            self.growth.march_at(self.step, (taking.composed_ns(steps - 1),), taking.next_end_ns)
        return left, self._counted(1)

    def _counted(self, steps: int, end_ns: int | None = None) -> list[Job]:
        self.step += steps
        self.context += steps * self.size
        if self.unshown:
            self._show()
        if self.step < self.due:
            return []
        leaving, leavers = [], self._leavers
        while leavers and leavers[0][0] == self.step:
            leaving.append(heappop(leavers)[2])
            if leavers and not self._stays(leavers[0]):
                self._drop_gone(leavers)
        self.due = leavers[0][0] if leavers else FOREVER
        self._leave(leaving, end_ns)
        return leaving

    def _show(self) -> None:
        while self.unshown and self.unshown[0][0] <= self.step:
            step, _, job = heappop(self.unshown)
            self.shown.append((step, job))
            self._drop_gone(self.unshown)

    def take_late(self) -> Sequence[Job]:
        """The late members, as the step is composed whose token they get singly."""
        late, self.late = self.late, []
        for job in late:
            job.sample()
        return late


class GroupBatch(Batch):
    """A batch in which ``marching`` members of a cohort get a token, beside those in ``samples`` who get one singly.

    ``mixed``: others take part; ``singles`` are those of them who sample. ``step`` is the cohort's count when the batch
    was composed, ``whole`` says that none of its members stood still. ``group`` is the cohort itself, where the batch
    has one of its own.
    """

    __slots__ = ("group", "marching", "mixed", "singles", "step", "whole")

    def __init__(self, stats: BatchStats, samples: Sequence[Job], *, marching: int, step: int) -> None:
        # All that ``Batch`` says is said here once more: this is made for every step with prompts.
        self.stats = stats
        self.samples = samples
        self.leaving: Sequence[Job] = ()
        self.showing: Sequence[Job] = ()
        self.start_ns = self.end_ns = 0
        self.labels = (0, 0, 0)
        self.group: Cohort | None = None
        self.marching = marching
        self.singles: Sequence[Job] = ()
        self.mixed = False
        self.step = step
        self.whole = True

    def add(self, others: Advanced) -> None:
        """Let others take part who are advanced one by one."""
        stats, singles, leaving, showing = others
        decodes, context, attended, _, survivors, _, _ = self.stats
        if attended:
            attended = tuple([one + other for one, other in zip(attended, stats.window_contexts, strict=True)])
        self.stats = BatchStats(
            decodes + stats.decodes, context + stats.context, attended, stats.chunks, survivors + stats.survivors
        )
        self.singles, self.mixed = singles, True
        self.samples = [*self.samples, *singles] if self.samples else singles
        self.leaving = [*self.leaving, *leaving] if self.leaving else leaving
        self.showing = [*self.showing, *showing] if self.showing else showing

    def release(self, members: Iterable[Job]) -> None:
        """Its cohort dissolves while the batch is in flight: members that march in it end singly from now on."""
        if self.marching:
            mine = [job for job in members if job.joined <= self.step]
            for job in mine:
                job.sample()
            self.samples = [*self.samples, *mine]
            self.marching -= len(mine)


def batch_of(cohort: Cohort, leaving: Sequence[Job], late: Sequence[Job]) -> GroupBatch:
    """The step that a cohort has composed last, with which some leave and in which some are late."""
    stats = cohort.stats_with(leaving)
    batch = GroupBatch(stats, late, marching=stats.decodes - len(late), step=cohort.step - 1)
    batch.leaving = leaving
    return batch


def march_on(cohort: Cohort, others: Advanced | None = None) -> GroupBatch:
    """The decode step of a whole cohort, and of others beside it."""
    late = cohort.take_late() if cohort.late else ()
    batch = GroupBatch(cohort.stats(1), late, marching=cohort.size - len(late), step=cohort.step)
    batch.leaving = cohort.march()
    if cohort.shown:
        batch.showing = [job for _, job in cohort.shown]
        cohort.shown.clear()
    if others is not None:
        batch.add(others)
    return batch


def stand_still(cohort: Cohort, others: Advanced) -> GroupBatch:
    """A step of others alone, beside which a cohort stands still."""
    stats, singles, leaving, showing = others
    batch = GroupBatch(stats, singles, marching=0, step=cohort.step)
    batch.singles, batch.leaving, batch.showing, batch.mixed = singles, leaving, showing, True
    batch.whole = cohort.size == 0
    return batch


class SteadyGrowth:
    """Every crossing takes the same number of blocks: crossings are counted, members are not touched."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._size = blocks.block_size
        self._each = blocks.needed(1)
        self.members = 0
        self._crossing = [0] * (2 * self._size)  # twice over, so that what crosses in a row stands in a row
        self._late = LateBlocks(self._size)

    def join(self, job: Job) -> None:
        if job.capacity < job.total:  # else it holds all the blocks it will ever need
            self.members += 1
            at = -job.base % self._size
            self._crossing[at] += 1
            self._crossing[at + self._size] += 1
            step = job.computed - job.base
            self._late.joined.append(step + -job.computed % self._size)
            if len(self._late.joined) >= MOST_MOVES:
                self._late.settle(step)

    def missing(self, step: int, steps: int) -> int:
        size, crossing = self._size, self._crossing
        if steps == 1:
            return self._each * crossing[step % size]
        first, rest = step % size, steps % size
        crossings = sum(crossing[first : first + rest])
        if steps >= size:
            crossings += steps // size * self.members
        return self._each * crossings

    def march(self, step: int) -> None:
        missing = self.missing(step, 1)
        if missing:
            self._blocks.take(missing)

    def march_over(self, step: int, steps: int, taking: Taking) -> None:
        missing = self.missing(step, steps)
        if not missing:
            return
        early_ns = 0
        if taking.early:
            early_ns = self._each * self._crossing[step % self._size] * (taking.next_end_ns - taking.early_ns)
            step, steps = step + 1, steps - 1
        self._blocks.take(missing, early_ns)
        if steps:
            noted = self._late.noted
            noted.append((step, steps, taking.next_end_ns - taking.from_ns, taking.run))
            if len(noted) >= MOST_NOTED:
                self._late.settle(step + steps)

    def march_at(self, step: int, times_ns: Sequence[int], now_ns: int) -> None:
        crossing, size, each = self._crossing, self._size, self._each
        taken = taken_ns = 0
        for at, composed_ns in enumerate(times_ns, step):
            if crosses := crossing[at % size]:
                taken += crosses
                taken_ns += crosses * (now_ns - composed_ns)
        if taken:
            self._blocks.take(each * taken, each * taken_ns)

    def takes(self, job: Job, step: int) -> int:
        return self._each if job.capacity < job.total and (job.base + step) % self._size == 0 else 0

    def late_block_ns(self) -> int:
        return self._each * self._late.sum()

    def leave(self, job: Job) -> None:
        if job.capacity < job.total:
            self.members -= 1
            at = -job.base % self._size
            self._crossing[at] -= 1
            self._crossing[at + self._size] -= 1
            self._late.left.append(job.computed - job.base + -job.computed % self._size)
