"""One replica: a queue, a KV cache and steps in flight, driven by a batching policy and a step cost."""

from __future__ import annotations

from collections.abc import Callable

from simpy import Event

from apexsim.serving.batch import Flight
from apexsim.serving.clock import ARRIVAL, FOREVER, Alarm, Clock
from apexsim.serving.decodes import Decodes, OneByOne
from apexsim.serving.fast import together
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.ledger import Ledger
from apexsim.serving.messages import Arrive, Loaded, Message
from apexsim.serving.recording import Recorder
from apexsim.serving.scheduler import Scheduler
from apexsim.serving.settings import ReplicaSettings


class Replica:
    """Steps under one barrier.

    A step: read the messages, let the policy fill a ledger, apply it, compose, launch. That happens when a batch ends,
    or when an idle replica wakes, until enough batches are in flight or nothing can be scheduled. ``Decodes`` knows
    what a step does to those who decode, and when many of them may pass as one event.
    """

    def __init__(
        self, index: int, *, clock: Clock, settings: ReplicaSettings, blocks: BlockManager, recorder: Recorder,
        on_done: Callable[[Job], None],
    ) -> None:  # fmt: skip
        self.index = index
        self._next_ns: int | None = None  # when the next message comes, where known: it will cut a stretch
        self._inbox: list[Message] = []
        self._clock = clock
        self._rank = 1 + index
        self._settings = settings
        self._blocks = blocks
        self._on_done = on_done
        self._scheduler = Scheduler(settings.scheduler, blocks, settings.policy.queue(), lookahead=settings.lookahead)
        self.running, self.waiting = self._scheduler.running, self._scheduler.waiting
        self._flight = Flight(settings.cost, recorder, lookahead=settings.lookahead)
        balanced = settings.scheduler.pipeline_split == "balanced" and settings.cost.stages > 1
        self._most = 0 if balanced else settings.scheduler.max_num_seqs  # sequences of a batch; 0: see _spread
        self._every = settings.receive_interval
        self._ended_ns = 0  # when a step last ended, or began in an idle replica
        self._looked = 0  # steps composed when the last prompts were
        self._ledger: Ledger | None = None
        self._alarm: Alarm | None = None
        self._decodes = self._decodes_of(settings)

    def _decodes_of(self, settings: ReplicaSettings) -> Decodes:
        if settings.exact_steps or not settings.policy.decodes_first:
            return OneByOne(self._flight, self._blocks, settings.windows)
        return together(self.index, self._flight, self._scheduler, settings.windows)

    # -- what others tell and see: in events of rank 0 alone (see ``messages``) -------------------------------------

    def deliver(self, message: Message, next_ns: int | None = None) -> None:
        """A message comes; it is read when the next step is composed. ``next_ns``: when the next one does, if known."""
        assert self._clock.rank == ARRIVAL, "replicas hear of others in events of rank 0"
        self._next_ns = next_ns
        self._inbox.append(message)
        message.job.replica = self.index
        if self._decodes.stretching:
            self._cut()
        elif not self._flight.batches and self._alarm is None:
            self._alarm = self._clock.at(self._clock.now_ns, self._rank, self._wake)

    @property
    def in_queue(self) -> int:
        """Jobs that wait."""
        return len(self.waiting) + sum([isinstance(message, Arrive) for message in self._inbox])

    @property
    def seated(self) -> int:
        """Jobs that hold a seat: they run, or their last token or what they fetch is on its way."""
        return len(self.running) + len(self._scheduler.aside)

    @property
    def kv_blocks(self) -> int:
        """KV blocks in use."""
        return self._blocks.held + self._decodes.view(self._clock.now_ns).blocks

    @property
    def kv_blocks_total(self) -> int:
        """KV blocks that there are."""
        return self._blocks.total

    @property
    def block_ns(self) -> int:
        """KV blocks in use, integrated over the time up to the latest step end."""
        return self._blocks.block_ns(self._ended_ns) + self._decodes.late_block_ns

    # -- the step ---------------------------------------------------------------------------------------------------

    def _wake(self, _: Event) -> None:
        now_ns = self._ended_ns = self._clock.now_ns
        self._clock.rank = self._rank
        self._fill(now_ns)
        self._set_alarm(self._plan(now_ns))
        self._clock.rank = ARRIVAL

    def _end_step(self, _: Event) -> None:
        """The next end of a step that matters, and those after it as long as nothing else comes in between."""
        clock, decodes = self._clock, self._decodes
        clock.rank, now_ns = self._rank, clock.now_ns
        while True:
            for job in decodes.end():
                self._scheduler.leave(job)
                self._on_done(job)
            self._fill(now_ns)
            end_ns, arrival_ns = self._plan(now_ns), self._next_ns
            # A stretch that is known to be cut needs no alarm before.
            cut = arrival_ns is not None and end_ns is not None and decodes.stretching and arrival_ns <= end_ns
            if end_ns is None or cut or not clock.reaches(end_ns, self._rank):
                break
            now_ns = end_ns
        self._ended_ns = now_ns
        self._set_alarm(None if cut else end_ns)
        clock.rank = ARRIVAL

    def _fill(self, now_ns: int) -> None:
        """Compose steps until enough are in flight."""
        flight, decodes = self._flight, self._decodes
        while len(flight.batches) < flight.most and not decodes.stretching:
            if self._inbox:
                self._read()
            # True: the next step is on its way. False: there is none. None: that takes a decision.
            known = None if self.waiting or self._inbox else decodes.go_on(self._most or self._spread(), now_ns)
            if known is not None:
                self._ledger = None
                if known:
                    continue
                return
            ledger = self._decide(now_ns)
            if ledger.together or ledger.decodes or ledger.chunks:
                self._launch(ledger, now_ns)
            elif not ledger.preempted:
                return

    def _read(self) -> None:
        """Hear of what has come, if this is a step at which the scheduler looks."""
        idle = not (self._flight.batches or self.running)
        if self._every == 1 or idle or (self._decodes.composed - self._looked) % self._every == 0:
            for message in self._inbox:
                if isinstance(message, Arrive):
                    self.waiting.append(message.job)
                elif isinstance(message, Loaded):
                    self._scheduler.load(message.job)
                else:
                    self._scheduler.forget(message.job)
            self._inbox.clear()

    def _decide(self, now_ns: int) -> Ledger:
        """Let the policy fill a ledger, and apply it."""
        sequences = self._most or self._spread()
        calm = self._ledger is None or not self._ledger.preempted
        ledger = self._ledger = self._scheduler.open(sequences, self._decodes.offer(sequences, calm=calm))
        self._settings.policy.fill(ledger, self.running, self.waiting)
        if ledger.preempted or ledger.admitted or ledger.fetched:
            self._scheduler.apply(ledger, now_ns)
        return ledger

    def _launch(self, ledger: Ledger, now_ns: int) -> None:
        batch = self._decodes.compose(ledger)
        if ledger.chunks and self._every > 1:
            self._looked = self._decodes.composed
        self._flight.launch(batch, now_ns)
        if batch.leaving:
            self._scheduler.see_off(batch.leaving)
        batch.labels = self.index, len(self.running) + len(self._scheduler.aside), len(self.waiting)

    def _spread(self) -> int:
        """Most sequences of a batch where a balanced pipeline spreads everybody over its batches."""
        return -(-(len(self.running) + len(self.waiting)) // self._flight.most)

    # -- many steps at once -----------------------------------------------------------------------------------------

    def _plan(self, now_ns: int) -> int | None:
        """Let steps pass unseen for as long as it is known what they lead to.

        Returns when the next one ends that may change something; None if none is in flight.
        """
        decodes, batches, ledger = self._decodes, self._flight.batches, self._ledger
        if batches and not (decodes.stretching or self._inbox):
            steady_ns = FOREVER
            if ledger is not None:
                steady_ns = self._settings.policy.steady_until(ledger, self.waiting, now_ns)
            if steady_ns > now_ns:
                decodes.plan(self._most or self._spread(), now_ns, self._next_ns)
                if steady_ns < FOREVER:
                    decodes.cut(steady_ns)
        if decodes.stretching:
            return decodes.next_end_ns
        return batches[0].end_ns if batches else None

    def _set_alarm(self, end_ns: int | None) -> None:
        self._alarm = None if end_ns is None else self._clock.at(end_ns, self._rank, self._end_step)

    def _cut(self) -> None:
        """Something has come: the step in flight is the last that passes unseen."""
        if self._decodes.cut(self._clock.now_ns) and self._alarm is not None:
            self._alarm.silence()
            self._alarm = None
        if self._alarm is None:
            self._set_alarm(self._decodes.next_end_ns)

    # -- afterwards -------------------------------------------------------------------------------------------------

    def lacks(self, job: Job) -> str:
        """What a waiting job would not find if a step were composed now."""
        return self._scheduler.open(self._most or self._spread()).lacks(job)

    def check_idle(self) -> None:
        """Assert that nothing is left behind once every job is done."""
        assert not any((self._flight.batches, self._inbox))
        self._scheduler.check_idle()
