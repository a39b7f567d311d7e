"""One replica: a queue, a KV cache and a pipeline of batches, driven by a batching policy and a step cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from simpy import Event

from apexsim.costs.timing import StepTimes
from apexsim.serving.batch import Batch, compose
from apexsim.serving.batching import BatchPolicy, Ledger
from apexsim.serving.clock import ARRIVAL, Alarm, Clock
from apexsim.serving.cohort import Cohort
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.march import March, Outset, plan_march
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.rotation import plan_rotation
from apexsim.serving.scheduler import Scheduler
from apexsim.serving.stretch import Stretch
from apexsim.specs.engine import SchedulerDefaults


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What every replica of a pool shares. ``windows`` are the model's attention windows, ascending.

    A request reaches the queue after ``frontend_ns`` in a serial frontend.
    """

    cost: StepTimes
    scheduler: SchedulerDefaults
    policy: BatchPolicy
    windows: tuple[int, ...]
    frontend_ns: int
    exact_steps: bool

    @property
    def lookahead(self) -> int:
        """Sampled tokens in flight with which a request is scheduled again; a pipeline hides the host by itself."""
        return self.scheduler.lookahead_steps if self.cost.stages == 1 else 0


class Replica:
    """Steps under one barrier.

    Compositions happen when a batch ends, or when an idle replica wakes, until enough batches are in flight (one a
    stage, or two under a lookahead) or nothing can be scheduled. A batch enters a stage when the stage before has
    passed it on and the batch before has left it. With one batch in flight that is synchronous scheduling; with two
    on one stage, asynchronous: a batch is composed when the one before it starts, from what is known at that time.
    """

    def __init__(
        self, index: int, *, clock: Clock, settings: ReplicaSettings, blocks: BlockManager, recorder: Recorder,
        on_finish: Callable[[Request], None],
    ) -> None:  # fmt: skip
        self.index = index
        self.unfinished = 0
        self._inbox: list[Request] = []
        self._every = settings.scheduler.receive_interval if settings.cost.stages == 1 else 1
        self._singly = self._looked = 0  # compositions outside the cohort's march; all of them when prompts came last
        self.next_arrival_ns: int | None = None  # where known: a stretch that it will cut needs no alarm before
        self._clock = clock
        self._set = settings
        self._blocks = blocks
        self._recorder = recorder
        self._on_finish = on_finish
        self._lookahead = settings.lookahead
        self._scheduler = Scheduler(settings.scheduler, blocks, settings.policy.queue(), lookahead=settings.lookahead)
        self.running, self.waiting = self._scheduler.running, self._scheduler.waiting
        self._batches = max(settings.cost.stages, 1 + self._lookahead)
        self._balanced = settings.scheduler.pipeline_split == "balanced" and settings.cost.stages > 1
        self._in_flight: deque[Batch] = deque()
        self._stage_free = [0] * settings.cost.stages
        self._frontend_free = 0
        self._alarm: Alarm | None = None
        self._stretch: Stretch | None = None
        self._ledger: Ledger | None = None
        self._cohort = Cohort(blocks)
        self._march = settings.cost.stages == 1 and settings.policy.marches and not settings.exact_steps
        self._most = min(settings.scheduler.max_num_seqs, settings.scheduler.token_budget)
        self._dissolved = False
        self._fresh: list[tuple[Request, bool]] = []

    # -- arrivals ---------------------------------------------------------------------------------------------

    @property
    def block_ns(self) -> int:
        """KV blocks in use, integrated over the time up to the latest step end."""
        return self._blocks.block_ns + self._cohort.late_block_ns

    @property
    def frontend_ns(self) -> int:
        """How long the serial frontend takes for a request."""
        return self._set.frontend_ns

    def submit(self, request: Request) -> None:
        """A request arrives; it joins the queue after the serial frontend has handled it."""
        request.replica = self.index
        self.unfinished += 1
        if not self.frontend_ns:
            self._enqueue(request)
            return
        self._frontend_free = max(self._clock.now_ns, self._frontend_free) + self.frontend_ns
        self._clock.at(self._frontend_free, ARRIVAL, lambda _: self._enqueue(request))

    def take(self, request: Request) -> None:
        """A request leaves the frontend at this moment and joins the queue."""
        request.replica = self.index
        self.unfinished += 1
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        (self.waiting if self._every == 1 else self._inbox).append(request)
        if self._stretch is not None:
            self._cut(self._stretch)
        elif not self._in_flight and self._alarm is None:
            self._alarm = self._clock.at(self._clock.now_ns, 1 + self.index, self._wake)

    # -- the step ---------------------------------------------------------------------------------------------

    def _wake(self, _: Event) -> None:
        self._blocks.pass_time(self._clock.now_ns)
        self._fill_pipeline()
        self._set_alarm(self._plan_next())

    def _end_step(self, _: Event) -> None:
        """The next end of a step that matters, and those after it as long as nothing else comes in between."""
        now_ns = self._clock.now_ns
        while True:
            self._blocks.pass_time(now_ns)
            if not self._part():
                self._end_batch()
                self._fill_pipeline()
            end_ns = self._plan_next()
            if end_ns is None or not self._clock.reaches(end_ns, 1 + self.index):
                self._set_alarm(None if self._cut_before(end_ns) else end_ns)
                return
            now_ns = end_ns

    def _end_batch(self) -> None:
        """The oldest batch ends: its tokens exist, its last requests leave."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            batch = self._in_flight.popleft()
            self._recorder.ended(batch, self._cohort, self._blocks.held)
            end_ns, left = batch.end_ns, batch.leaving
        else:
            end_ns, left, composed = stretch.conclude(self._in_flight, self._stage_free, self._recorder, self._blocks)
            self._scheduler.see_off(composed)
        for request in left:
            self._leave(request, end_ns)

    def _part(self) -> bool:
        """If all that happens is that one request leaves a march, let the others march on."""
        march = self._stretch
        if self.waiting or self._inbox or not isinstance(march, March):
            return False
        leaver = march.part(self._in_flight, self._recorder, self._blocks)
        if leaver is None:
            return False
        self._ledger = None
        self._scheduler.see_off((leaver,))
        self._leave(leaver, self._clock.now_ns)
        march.go_on(self._blocks, self._labels())
        return True

    def _leave(self, request: Request, end_ns: int) -> None:
        self._scheduler.leave(request, end_ns)
        self.unfinished -= 1
        self._on_finish(request)

    def _fill_pipeline(self) -> None:
        while len(self._in_flight) < self._batches:
            if self._inbox:
                self._receive()
            if self._only_march():
                self._ledger = None
                self._stretch = self._plan_march(owed=1)
                if self._stretch is not None:
                    return
            ledger = self._open_ledger()
            self._set.policy.fill(ledger, self.running, self.waiting)
            batch = self._close(ledger)
            if batch is not None:
                self._count(ledger)
                self._launch(batch)
            elif not ledger.preempted:
                break

    def _receive(self) -> None:
        """Let those who have come join the queue, if this is a step at which the scheduler looks."""
        idle = not (self._in_flight or self.running)
        if idle or (self._singly + self._cohort.step - self._looked) % self._every == 0:
            self.waiting.extend(self._inbox)
            self._inbox.clear()

    def _count(self, ledger: Ledger) -> None:
        """A batch is composed; those of the whole cohort it counts itself."""
        if not ledger.marching:
            self._singly += 1
        if ledger.chunks:
            self._looked = self._singly + self._cohort.step

    def _only_march(self) -> bool:
        """With an empty queue, all running requests members and one batch to compose, there is nothing to decide."""
        if (
            self.waiting
            or self._inbox
            or not self._march
            or self._dissolved
            or len(self._in_flight) < self._batches - 1
        ):
            return False
        if self._fresh:
            self._join()
        return self._all_march()

    def _open_ledger(self) -> Ledger:
        sequences = self._sequences()
        if self._march:
            self._gather()
        return self._scheduler.open(sequences, self._cohort if self._cohort.size else None)

    def _sequences(self) -> int:
        """Most sequences of a batch: a balanced pipeline spreads everybody over its batches."""
        if self._balanced:
            return -(-(len(self.running) + len(self.waiting)) // self._batches)
        return self._set.scheduler.max_num_seqs

    def _gather(self) -> None:
        """Let the cohort take in who decodes by now; dissolve it if its members cannot all have their next token."""
        cohort, most = self._cohort, self._most
        if self._dissolved and len(self.running) <= most and not (self._ledger and self._ledger.preempted):
            self._dissolved = False
            self._fresh = [(request, False) for request in takewhile(lambda request: request.decoding, self.running)]
        self._join()
        if cohort.size and (cohort.size > most or cohort.missing(1) > self._blocks.free):
            self._dissolve()

    def _join(self) -> None:
        """Requests that have sampled by themselves become members; they stand behind the others in ``running``."""
        cohort = self._cohort
        for request, whole in self._fresh:
            if self.running[cohort.size] is not request:  # a policy that does not serve in order: no cohort at its head
                self._dissolve()
                break
            cohort.join(request, late=not whole)
        self._fresh.clear()

    def _dissolve(self) -> None:
        members = self.running[: self._cohort.size]
        stamped = {request for request in members if request.pending}
        for batch in self._in_flight:
            batch.release(members)
        self._cohort.dissolve(members, stamped)
        self._dissolved = True

    def _close(self, ledger: Ledger) -> Batch | None:
        """Apply a ledger: preemptions, seats, blocks, tokens. None when nothing was scheduled."""
        self._ledger = ledger
        if ledger.preempted or ledger.admitted:
            self._scheduler.apply(ledger, self._clock.now_ns)
        if not (ledger.marching or ledger.decodes or ledger.chunks):
            return None
        batch = compose(ledger, self.running, self._blocks, self._set.windows, self._cohort)
        if self._march and not self._dissolved:
            self._fresh += [(request, batch.whole) for request in batch.singles if request.known < request.total]
        return batch

    def _launch(self, batch: Batch) -> None:
        """Send a batch through the stages: it enters one when that is free and the stage before has passed it on."""
        free = self._stage_free
        now_ns, free_ns = self._clock.now_ns, free[0]
        batch.start_ns = time_ns = now_ns if now_ns > free_ns else free_ns
        durations_ns = self._set.cost.stage_ns(batch.stats)
        for stage, duration_ns in enumerate(durations_ns):
            free_ns = free[stage]
            time_ns = free[stage] = (time_ns if time_ns > free_ns else free_ns) + duration_ns
        if len(durations_ns) > 1 and not batch.stats.chunks:
            self._recorder.pipeline_ns += sum(durations_ns)
        batch.end_ns = time_ns
        if batch.leaving:
            self._scheduler.see_off(batch.leaving)
        batch.labels = self._labels()
        self._in_flight.append(batch)

    def _labels(self) -> tuple[int, int, int]:
        return self.index, len(self.running) + self._scheduler.leaving, len(self.waiting)

    def lacks(self, request: Request) -> str:
        """What a waiting request would not find if a step were composed now."""
        return self._scheduler.open(self._sequences()).lacks(request)

    def check_idle(self) -> None:
        """Assert that nothing is left behind once every request is done."""
        assert not any((self._in_flight, self._inbox, self.unfinished))
        self._scheduler.check_idle()

    # -- taking many steps at once ----------------------------------------------------------------------------

    def _plan_next(self) -> int | None:
        """When the next step ends that can change anything; None when none is in flight."""
        if self._stretch is None and self._in_flight and not self._set.exact_steps:
            self._stretch = self._plan()
        if self._stretch is not None:
            return self._stretch.next_end_ns
        return self._in_flight[0].end_ns if self._in_flight else None

    def _cut_before(self, end_ns: int | None) -> bool:
        """Whether a stretch is known to be cut before it ends."""
        arrival_ns = self.next_arrival_ns
        if self._stretch is None or arrival_ns is None or end_ns is None:
            return False
        return arrival_ns <= end_ns

    def _set_alarm(self, end_ns: int | None) -> None:
        self._alarm = None if end_ns is None else self._clock.at(end_ns, 1 + self.index, self._end_step)

    def _plan(self) -> Stretch | None:
        decided = self._ledger is not None and not self._set.policy.repeats(self._ledger, self.waiting)
        if self._inbox or decided:
            return None
        if self._set.cost.stages > 1:
            if any(len(batch.samples) > self._sequences() for batch in self._in_flight):
                return None
            return plan_rotation(self._in_flight, self.running, self._stage_free, self._set.cost, self._blocks)
        if not self._march or self._dissolved or len(self._in_flight) < self._batches:
            return None
        self._join()
        return self._plan_march(owed=0) if self._all_march() else None

    def _all_march(self) -> bool:
        """Whether everybody who runs is a member, and one step has seats and tokens for all of them."""
        return 0 < self._cohort.size == len(self.running) <= self._most

    def _plan_march(self, *, owed: int) -> Stretch | None:
        windows = self._set.windows
        attended = (
            tuple([self._cohort.attended(self.running, window, ahead=1) for window in windows]) if windows else ()
        )
        outset = Outset(self._in_flight, self._cohort, self._clock.now_ns, owed, self._labels())
        return plan_march(outset, self._set.cost, self._blocks, attended)

    def _cut(self, stretch: Stretch) -> None:
        """Something arrived: the step in flight is the last that passes unseen."""
        if stretch.cut(self._clock.now_ns) and self._alarm is not None:
            self._alarm.silence()
            self._alarm = None
        if self._alarm is None:
            self._set_alarm(stretch.next_end_ns)
