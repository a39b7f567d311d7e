"""Macro-steps on one stage, where all running requests march as one cohort and the times are in closed form.

With ``L`` batches in flight (1 synchronous, 2 asynchronous), the k-th step end from now composes step ``C(k)``: one token
for every member. C(1) starts when the last batch in flight ends, the others follow without a gap::

    L = 2      in flight [b0][b1]  C(1)   C(2)  ...
    end(k)               1   2     3      4             end(L + k) is the end of C(k)

Batches in flight may hold prompts, as long as they complete them: those requests are members from C(1) on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from apexsim.costs.steps import BatchStats, DecodeRun, StepCost
from apexsim.serving.batch import Batch, march_on
from apexsim.serving.cohort import Cohort
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.stretch import Stretch


class March(Stretch):
    """``silent`` step ends of a cohort whose step C(1) has the statistics ``stats``.

    At most the last of their compositions samples somebody's last token, after which one more may follow: with two
    batches in flight those who stay are composed once more before the leavers' step ends.
    """

    def __init__(
        self, in_flight: Sequence[Batch], cohort: Cohort, cost: StepCost, run: DecodeRun, stats: BatchStats, silent: int
    ) -> None:
        self.silent = silent
        self._known = [batch.end_ns for batch in in_flight]
        self._first = len(self._known)
        self._from_ns = self._known[-1]
        self._latest = in_flight[-1]
        self._cohort = cohort
        self._cost = cost
        self._run = run
        self._stats = stats
        self.next_end_ns = self.end_ns(silent + 1)

    def end_ns(self, count: int) -> int:
        if count <= self._first:
            return self._known[count - 1]
        return self._from_ns + self._run.elapsed_ns(count - self._first)

    def passed(self, now_ns: int) -> int:
        count, first, start_ns = self.silent, self._first, self._from_ns
        last_ns = self.end_ns(count)
        if last_ns < now_ns:
            return count
        if count > first and start_ns < now_ns:
            # Steps differ little, so that a straight line through both ends of the run guesses within a few steps.
            count = first + (count - first) * (now_ns - start_ns) // (last_ns - start_ns)
        while count and self.end_ns(count) >= now_ns:
            count -= 1
        while self.end_ns(count + 1) < now_ns:
            count += 1
        return count

    def settle(
        self, in_flight: deque[Batch], stage_free: list[int], recorder: Recorder, blocks: BlockManager
    ) -> list[Request]:
        cohort, silent, first, held = self._cohort, self.silent, self._first, blocks.held
        late, cohort.late = cohort.late, []
        for request in late:
            request.pending += 1
        for _ in range(min(silent, first)):
            recorder.ended(in_flight.popleft(), cohort, held)
        step, marches, through = cohort.step, min(silent, cohort.steps_to_leave), silent - first
        leaving = cohort.march(marches)
        time_ns = self._from_ns
        if through > 0:
            time_ns = self._record(through, step, late, recorder, (held, blocks.held))
        for count in range(max(1, through + 1), marches + 1):
            times_ns = time_ns, self.end_ns(first + count)
            in_flight.append(self._batch(count, step, late, times_ns))
            time_ns = times_ns[1]
        in_flight[-1].leaving = leaving
        cohort.leave(leaving)
        if silent > marches and cohort.size:
            in_flight.append(self._stay(time_ns))
            leaving = leaving + in_flight[-1].leaving
        stage_free[0] = in_flight[-1].end_ns
        return leaving

    def _batch(self, count: int, step: int, late: list[Request], times_ns: tuple[int, int]) -> Batch:
        """C(count); ``step`` is the cohort's count before C(1), in which ``late`` members have a token singly."""
        stats = self._stats.grown(count - 1) if count > 1 else self._stats
        samples = late if count == 1 else []
        return self._latest.followed_by(stats, samples=samples, step=step + count - 1, times_ns=times_ns)

    def _record(self, through: int, step: int, late: list[Request], recorder: Recorder, held: tuple[int, int]) -> int:
        """C(1) to C(through) have ended; returns when.

        The first gap depends on what was before, the others are the steps' durations.
        """
        cohort, first = self._cohort, self._first
        first_ns, last_ns = self.end_ns(first + 1), self.end_ns(first + through)
        recorder.tokens(late, first_ns)
        if cohort.size > len(late):
            recorder.gaps[first_ns - cohort.last_end_ns] += cohort.size - len(late)
        recorder.run(self._run, through, cohort.size)
        recorder.step(self._batch(1, step, late, (self._from_ns, first_ns)), repeats=through, end_ns=last_ns, held=held)
        cohort.last_step, cohort.last_end_ns = step + through - 1, last_ns
        return last_ns

    def _stay(self, start_ns: int) -> Batch:
        """The step of those who stay while the last token of the others is in flight."""
        batch = march_on((), (), self._cohort)
        (duration_ns,) = self._cost.stage_ns(batch.stats)
        stay = self._latest.followed_by(
            batch.stats, samples=[], step=batch.step, times_ns=(start_ns, start_ns + duration_ns)
        )
        stay.leaving = batch.leaving
        return stay


def plan_march(
    in_flight: Sequence[Batch], running: Sequence[Request], cohort: Cohort, cost: StepCost, blocks: BlockManager,
    windows: Sequence[int],
) -> March | None:  # fmt: skip
    """The longest stretch of a cohort that is everybody on one stage; None when the next step end already matters.

    A step end matters when somebody leaves with it.
    """
    if in_flight[0].leaving:
        return None
    cohort_size = cohort.size
    attended = tuple([cohort.attended(running, window, ahead=1) for window in windows])
    stats = BatchStats(cohort_size, cohort.context + cohort_size, attended, (), cohort_size)
    run = cost.decode_run(stats)
    if run is None:
        return None
    to_leave = cohort.steps_to_leave
    stay = to_leave <= run.limit and len(in_flight) == 2 and not windows
    silent = 1 if in_flight[-1].leaving else min(to_leave + stay, run.limit)
    if cohort.missing(silent) > blocks.free:
        silent = bisect_right(range(1, silent + 1), blocks.free, key=cohort.missing)
    return March(in_flight, cohort, cost, run, stats, silent) if silent else None
