"""Macro-steps on one stage, where all running requests march as one cohort and the times are in closed form.

The k-th step end from now composes a step, one token for every member: call these steps C(1), C(2) ... C(1) starts when
the last of the ``K`` batches in flight ends, the others follow without a gap. One more composition may be *owed* at the
start of the stretch; then C(1) is that one::

    K = 2, none owed     in flight [b0][b1]  C(1)   C(2)         C(k) is composed at end(k), end(2 + k) is its end
    end(k)                         1   2     3      4

    K = 1, one owed      in flight [b0]      C(1)   C(2)         C(k) is composed at end(k - 1), end(1 + k) is its end
    end(k)                         1         2      3

Batches in flight may hold prompts, as long as they complete them: those requests are members from C(1) on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from apexsim.costs.steps import BatchStats
from apexsim.costs.timing import RunTimes, StepTimes
from apexsim.serving.batch import Batch, march_on
from apexsim.serving.cohort import Cohort
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.stretch import StepEnd, Stretch


class Outset(NamedTuple):
    """Where a march begins: the batches in flight and the cohort behind them, at ``start_ns``.

    ``owed`` compositions (0 or 1) are due at once. ``labels`` are the replica and its counts of running and waiting
    requests.
    """

    in_flight: Sequence[Batch]
    cohort: Cohort
    start_ns: int
    owed: int
    labels: tuple[int, int, int]


class March(Stretch):
    """``silent`` step ends of a cohort whose step C(1) has the statistics ``stats``.

    At most the last of their compositions samples somebody's last token, after which one more may follow: with two
    batches in flight those who stay are composed once more before the leavers' step ends.
    """

    def __init__(self, outset: Outset, cost: StepTimes, run: RunTimes, stats: BatchStats) -> None:
        self._owed = outset.owed
        self._ahead = 0
        self._known = [batch.end_ns for batch in outset.in_flight]
        self._first = len(self._known)
        self._start_ns = outset.start_ns
        self.from_ns = self._known[-1] if self._known else outset.start_ns
        self._labels = self._first_labels = outset.labels
        self._cohort = outset.cohort
        self._cost = cost
        self.run = run
        self._stats = stats
        self.early = int(self._first + self._owed > 1)  # compositions before the batches in flight have all ended

    def plan(self, in_flight: Sequence[Batch], blocks: BlockManager) -> bool:
        """Look as far ahead as possible. False when that is nowhere."""
        cohort, owed, limit = self._cohort, self._owed, self.run.limit - self._ahead
        to_leave = cohort.steps_to_leave
        if self._stats.window_contexts or to_leave > limit:
            silent = min(to_leave, limit) - owed
        else:
            silent, most = self._first + self._ahead + to_leave - 1, limit - owed
            silent = silent if silent < most else most
        for position, batch in enumerate(in_flight):
            if batch.leaving and position < silent:
                silent = position
        self._missing = cohort.most_missing(silent + owed)  # a bound that mostly does, and is quicker to have
        if self._missing > blocks.free:
            self._missing = cohort.missing(silent + owed)
        if self._missing > blocks.free:
            silent = bisect_right(range(1, silent + owed + 1), blocks.free, key=cohort.missing) - owed
        if silent + owed <= 0:
            return False
        self.silent, self.next_end_ns = silent, self.end_ns(silent + 1)
        return True

    def end_ns(self, count: int) -> int:
        later = count - self._first
        return self.from_ns + self.run.elapsed_ns(later) if later > 0 else self._known[count - 1]

    def passed(self, now_ns: int) -> int:
        silent, first, start_ns = self.silent, self._first, self.from_ns
        count = min(silent, first)
        if silent > first and now_ns > start_ns:
            # Steps differ little, so that a straight line through both ends of the run guesses within a few steps.
            ahead = (silent + 1 - first) * (now_ns - start_ns) // max(1, self.next_end_ns - start_ns)
            count = min(silent, first + ahead)
        while count < silent and self.end_ns(count + 1) < now_ns:
            count += 1
        while count and self.end_ns(count) >= now_ns:
            count -= 1
        return count

    def conclude(
        self, in_flight: deque[Batch], stage_free: list[int], recorder: Recorder, blocks: BlockManager
    ) -> StepEnd:
        cohort, ahead, held, compositions = self._cohort, self._ahead, blocks.held, self.silent + self._owed
        left: Sequence[Request] = ()
        for _ in range(min(self.silent + 1, self._first)):
            ended = in_flight.popleft()
            recorder.ended(ended, cohort, held)
            left = ended.leaving
        if not compositions:
            return StepEnd(self.next_end_ns, left)
        late, step, through = cohort.take_late(), cohort.step - ahead, self.silent + 1 - self._first
        marches = min(compositions, cohort.steps_to_leave)
        leaving = composed = cohort.march(marches, self)
        showing = self._show(step, through) if cohort.unshown else {}
        time_ns = self.from_ns
        if through > 0:
            time_ns = self._record(through, step, late, recorder, (held, blocks.held))
        for count in range(max(1, through + 1), ahead + marches + 1):
            times_ns = time_ns, self.end_ns(self._first + count)
            in_flight.append(self._batch(count, step, late, times_ns))
            in_flight[-1].showing = showing.get(count, ())
            time_ns = times_ns[1]
        if through == ahead + marches:
            left = leaving
        else:
            in_flight[-1].leaving = leaving
        cohort.leave(leaving)
        if compositions > marches and cohort.size:
            self._hold_last(blocks)
            in_flight.append(self._stay(time_ns))
            composed = [*leaving, *in_flight[-1].leaving]
        recorder.peak(blocks.held)
        stage_free[0] = in_flight[-1].end_ns if in_flight else time_ns
        return StepEnd(self.next_end_ns, left, composed)

    def part(self, in_flight: deque[Batch], recorder: Recorder, blocks: BlockManager) -> Request | None:
        """Let the next end pass if all it brings is that one member leaves and the others go on; returns who left.

        None where more than that happens: ``conclude`` is for everything. Afterwards this is the march of those who
        stay, from that end on; with two batches in flight their first step has been composed ``ahead``. It waits to
        ``go_on`` once the blocks of the leaver are free.
        """
        cohort, ahead, held = self._cohort, self._ahead, blocks.held
        through = self.silent + 1 - self._first
        steps = through - ahead
        leaver = cohort.lone_leaver(steps)
        if leaver is None or self._stats.window_contexts:
            return None
        if self._missing + cohort.most_missing(1) > blocks.free:
            return None
        stayers = self._stats_without(leaver, steps)
        run = self._cost.decode_run(stayers)
        if run is None:
            return None
        while in_flight:
            recorder.ended(in_flight.popleft(), cohort, held)
        late, step = cohort.take_late(), cohort.step - ahead
        leaving = cohort.march(steps, self)
        if cohort.unshown:
            self._show(step, through)
        last_ns = self._record(through, step, late, recorder, (held, blocks.held))
        cohort.leave(leaving)
        self._ahead = self.silent + self._owed - steps
        if self._ahead:
            self._hold_last(blocks)
            cohort.march(1)
        self.from_ns = last_ns
        recorder.peak(blocks.held)
        self._stats, self.run = stayers, run
        return leaver

    def go_on(self, blocks: BlockManager, labels: tuple[int, int, int]) -> None:
        """Plan the march of those who stay."""
        self._first_labels = self._labels if self._ahead else labels
        self._labels, self._first, self._owed = labels, 0, 1
        self.early = 0
        self.plan((), blocks)

    # -- when blocks are taken (see growth.Taking) --------------------------------------------------------------------

    def composed_ns(self, number: int) -> int:
        """The first is composed at the start, or at the first end if none is owed; each later one at the next end."""
        end = number + 1 - self._owed
        if end >= self._first:
            return self.from_ns + self.run.elapsed_ns(end - self._first)
        return self._known[end - 1] if end else self._start_ns

    def _hold_last(self, blocks: BlockManager) -> None:
        """Those who stay are composed at the last silent end: ``block_ns`` up to the next one."""
        missing, composed_ns = self._cohort.missing(1), self.composed_ns(self.silent + self._owed - 1)
        blocks.block_ns += missing * (self.next_end_ns - composed_ns)

    def _stats_without(self, leaver: Request, steps: int) -> BatchStats:
        """The step after the one, ``steps`` from now, with which ``leaver`` leaves."""
        size, context = self._cohort.size, self._cohort.context
        stay, context = size - 1, context + steps * size - (leaver.total - 1)
        return BatchStats(stay, context + stay, (), (), stay)

    def _batch(self, count: int, step: int, late: Sequence[Request], times_ns: tuple[int, int]) -> Batch:
        """C(count); ``step`` is the cohort's count before C(1), in which ``late`` members have a token singly."""
        stats = self._stats.grown(count - 1) if count > 1 else self._stats
        samples = late if count == 1 else ()
        start_ns, end_ns = times_ns
        return Batch(
            stats=stats,
            samples=samples,
            marching=stats.decodes - len(samples),
            step=step + count - 1,
            start_ns=start_ns,
            end_ns=end_ns,
            labels=self._first_labels if count == 1 else self._labels,
        )

    def _record(
        self, through: int, step: int, late: Sequence[Request], recorder: Recorder, held: tuple[int, int]
    ) -> int:
        """C(1) to C(through) have ended; returns when.

        The first gap depends on what was before, the others are the steps' durations.
        """
        cohort = self._cohort
        first_ns, last_ns = self.from_ns + self.run.elapsed_ns(1), self.next_end_ns
        if through == self._ahead:  # no composition since: what was taken since belongs to later steps
            held = held[0], held[0]
        if late:
            recorder.tokens(late, first_ns)
        recorder.gap(first_ns - cohort.last_end_ns, cohort.size - len(late))
        recorder.run(self.run, through, cohort.size)
        recorder.step(self._stats, self._first_labels, (self.from_ns, last_ns), through, held)
        cohort.last_step, cohort.last_end_ns = step + through - 1, last_ns
        return last_ns

    def _show(self, step: int, through: int) -> dict[int, list[Request]]:
        """Hand clients their first tokens as far as C(1) to C(``through``) bring them.

        ``step`` is the cohort's count before C(1). Returns whose come with which later C.
        """
        later: dict[int, list[Request]] = {}
        for at, request in self._cohort.show():
            if at - step <= through:
                request.shown_ns = self.end_ns(self._first + at - step)
            else:
                later.setdefault(at - step, []).append(request)
        return later

    def _stay(self, start_ns: int) -> Batch:
        """The step of those who stay while the last token of the others is in flight."""
        batch = march_on((), (), self._cohort)
        (duration_ns,) = self._cost.stage_ns(batch.stats)
        batch.start_ns, batch.end_ns, batch.labels = start_ns, start_ns + duration_ns, self._labels
        return batch


def plan_march(outset: Outset, cost: StepTimes, blocks: BlockManager, attended: tuple[int, ...]) -> March | None:
    """The longest stretch of a cohort that is everybody on one stage; None when there is nothing to gain or to compose.

    A step end matters, and is not silent, when somebody leaves with it. ``attended`` are the contexts of C(1) within
    each window of the model.
    """
    cohort = outset.cohort
    stats = BatchStats(cohort.size, cohort.context + cohort.size, attended, (), cohort.size)
    run = cost.decode_run(stats)
    if run is None:
        return None
    march = March(outset, cost, run, stats)
    return march if march.plan(outset.in_flight, blocks) else None
