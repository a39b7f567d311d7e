"""Batching policies: who gets how many tokens in a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from operator import attrgetter

from apexsim.serving.clock import FOREVER
from apexsim.serving.job import Job
from apexsim.serving.ledger import Ledger
from apexsim.serving.queues import Fifo, Ordered, Queue
from apexsim.specs.engine import SchedulerDefaults


class BatchPolicy(ABC):
    """Fills ledgers: the base of one's own policies, whose steps are simulated singly unless it promises more.

    ``decodes_first`` promises that it gives decodes, if any, by ``give_decodes(running, 0)`` before it spends anything
    else, and that nothing but decodes follows as long as nobody waits and all who run decode: it is not asked then. A
    replica may then take decodes together. ``steady_until`` says of a filled ledger for how long the next ones
    would only go on with decodes; a replica may then take many steps at once. ``needs_deadline`` asks for requests that
    all have a ``deadline_ns``.
    """

    decodes_first = False
    needs_deadline = False

    def queue(self) -> Queue:
        """An empty queue, whose order is that in which ``fill`` is shown who waits: that of arrival."""
        return Fifo()

    @abstractmethod
    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        """Spend the ledger's budgets on running jobs (in the order they were seated) and on those waiting.

        Who waits is admitted with some tokens; a job with ``fetch`` is fetched instead, and computes nothing yet.
        """

    def steady_until(self, ledger: Ledger, waiting: Queue, now_ns: int) -> int:
        """Until when, as long as nothing arrives, finishes or runs short of blocks, ledgers only go on with decodes.

        Each of these ledgers would give one token to every running job that decodes, and nothing else. ``now_ns`` (or
        less) for not at all, ``FOREVER`` for as long as that; an order of the queue that changes with time says when.
        """
        return now_ns


class Fcfs(BatchPolicy):
    """What all policies share: running jobs grow in order, the youngest is preempted, nobody overtakes the head."""

    decodes_first = True

    def __init__(self, scheduler: SchedulerDefaults) -> None:
        self.chunked = scheduler.chunked_prefill

    def steady_until(self, ledger: Ledger, waiting: Queue, now_ns: int) -> int:
        """With an empty queue only decodes can follow; with a queue, if its head lacks a seat or blocks.

        Who was merely crowded out of this step's tokens may find room in another. After a preemption nobody was
        considered, and a head that waits for its own token will be.
        """
        if ledger.preempted or not waiting:
            return now_ns if ledger.preempted else FOREVER
        head = waiting[0]
        return now_ns if ledger.chunks or head.pending or ledger.can_admit(head) else FOREVER

    def _grow(self, ledger: Ledger, running: Sequence[Job]) -> None:
        """Give each running job what it wants, oldest first; take the youngest off when blocks run out."""
        last, position = len(running), ledger.give_decodes(running, 0)
        while position < last and ledger.tokens and ledger.sequences:
            job = running[position]
            tokens = min(ledger.wants(job), ledger.tokens)
            if tokens:
                while not ledger.can_give(job, tokens):
                    last -= 1
                    ledger.preempt(running[last])
                    if last == position:
                        return
                ledger.give(job, tokens)
            position = position + 1 if ledger.preempted else ledger.give_decodes(running, position + 1)

    def _admit(self, ledger: Ledger, waiting: Iterable[Job], *, fetches: bool = True) -> None:
        """Admit from the head of the queue while budgets last; whole prompts only unless chunked.

        Unless it ``fetches``, up to the first job whose KV entries are to be fetched.
        """
        for job in waiting:
            if job.fetch is not None:
                if not (fetches and ledger.can_admit(job)):
                    return
                ledger.fetch(job)
                continue
            tokens = ledger.wants(job)
            if tokens > ledger.tokens and not self._may_exceed(ledger, job):
                tokens = ledger.tokens if self.chunked else 0
            if not tokens or not ledger.sequences or not ledger.can_admit(job):
                return
            ledger.admit(job, tokens)

    def _may_exceed(self, ledger: Ledger, job: Job) -> bool:
        """Without chunks a preempted job that outgrew the budget is recomputed alone, or it never would be."""
        return not self.chunked and job.preemptions > 0 and not (ledger.together or ledger.decodes or ledger.chunks)


class ChunkedPrefill(Fcfs):
    """vLLM V1: running jobs first, then the queue, until the token budget is spent; prompts mix with decodes."""

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        self._grow(ledger, running)
        if not ledger.preempted:
            self._admit(ledger, waiting)


class PrefillFirst(Fcfs):
    """vLLM V0 and SGLang: a step is all prefill as long as a prompt can be advanced or admitted, else all decode."""

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        self._continue_prompts(ledger, running)
        self._admit(ledger, waiting, fetches=False)
        if not ledger.chunks:
            self._grow(ledger, running)
            if not ledger.preempted:
                self._fetch(ledger, waiting)

    def _fetch(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        """Fetch for those at the head of the queue: behind the decodes, which come before all that takes blocks."""
        for job in waiting:
            if job.fetch is None or not ledger.can_admit(job):
                return
            ledger.fetch(job)

    def _continue_prompts(self, ledger: Ledger, running: Sequence[Job]) -> None:
        for job in running:
            tokens = min(ledger.wants(job), ledger.tokens)
            if tokens and not job.decoding and ledger.can_give(job, tokens):
                ledger.give(job, tokens)


class ShortestFirst(ChunkedPrefill):
    """Chunked prefill whose queue is ordered by prompt tokens: of prompt and output if the scheduler ``knows_output``.

    Long jobs may wait for ever while short ones come.
    """

    def __init__(self, scheduler: SchedulerDefaults) -> None:
        super().__init__(scheduler)
        self._tokens = attrgetter("total" if scheduler.knows_output else "prompt_tokens")

    def queue(self) -> Queue:
        return Ordered(self._tokens)


class EarliestDeadline(ChunkedPrefill):
    """Chunked prefill whose queue is ordered by ``deadline_ns``, the time at which a first token is due."""

    needs_deadline = True

    def queue(self) -> Queue:
        return Ordered(attrgetter("deadline_ns"))


POLICIES: dict[str, type[Fcfs]] = {
    "chunked_prefill": ChunkedPrefill,
    "prefill_first": PrefillFirst,
    "shortest_first": ShortestFirst,
    "deadline": EarliestDeadline,
}
"""Batching policies by the name an engine profile uses."""
