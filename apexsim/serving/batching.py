"""Iteration-level batching: policies fill a ledger, one per step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from operator import attrgetter

from apexsim.serving.cohort import Cohort
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.queues import Fifo, Ordered, Queue
from apexsim.serving.request import Request
from apexsim.specs.engine import SchedulerDefaults


class Ledger:
    """One scheduling decision: what is left of the token, seat and block budgets, and who was given what.

    ``decodes`` get the one token that brings them to the end of what they know; ``chunks`` are everybody else with
    their tokens, the ``admitted`` among them fresh from the queue; ``recovered`` are the tokens that a request
    preempted before finds computed. Requests are named, never counted off: any that runs may be ``preempted`` and any
    that waits ``admitted``. ``marching`` is the size of the cohort, the first of the running requests, if it
    decodes as one. Nothing here touches a request or the block manager; the replica applies a filled ledger in one go.
    ``lookahead`` is how many sampled tokens of a request may still be in flight when it is given the next.
    """

    __slots__ = (
        "_full", "_manager", "_most", "admitted", "blocks", "chunked", "chunks", "cohort", "decodes", "lookahead",
        "marching", "preempted", "recovered", "seats", "sequences", "tokens",
    )  # fmt: skip

    def __init__(
        self, manager: BlockManager, scheduler: SchedulerDefaults, *, seats: int, sequences: int, lookahead: int,
        cohort: Cohort | None = None,
    ) -> None:  # fmt: skip
        self.tokens = scheduler.token_budget
        self.seats = seats
        self.sequences = sequences
        self.blocks = manager.free
        self.lookahead = lookahead
        self.marching = 0
        self.decodes: list[Request] = []
        self.chunks: list[tuple[Request, int]] = []
        self.preempted: list[Request] = []
        self.admitted: list[tuple[Request, int]] = []
        self.recovered: dict[Request, int] = {}
        self._manager = manager
        self._full = scheduler.admission == "full"
        self.chunked = scheduler.chunked_prefill
        self._most = scheduler.max_chunk_tokens if self.chunked else None
        self.cohort = cohort

    def wants(self, request: Request) -> int:
        """Tokens that ``request`` could compute in this step; 0 while the token it would start from is in flight."""
        if request.pending > self.lookahead:
            return 0
        if request.preemptions and not request.computed:
            left = request.known - self._manager.cached(request, self.blocks)
        else:
            left = request.known - request.computed
        return left if self._most is None else min(left, self._most)

    def can_give(self, request: Request, tokens: int) -> bool:
        """Whether the blocks for ``tokens`` more of a running request are there."""
        after = request.computed + tokens
        return after <= request.capacity or self._manager.missing(request, after) <= self.blocks

    def give(self, request: Request, tokens: int) -> None:
        """Spend ``tokens`` of the budget, and the blocks they need, on ``request``."""
        after = request.computed + tokens
        if after > request.capacity:
            self.blocks -= self._manager.missing(request, after)
        self.tokens -= tokens
        self.sequences -= 1
        if request.decoding:
            self.decodes.append(request)
        else:
            self.chunks.append((request, tokens))

    def give_decodes(self, running: Sequence[Request], position: int) -> int:
        """Give a token to each request from ``position`` on, as long as they decode and budgets and blocks last.

        Returns the position of the first that got none. Equal to ``give(request, 1)`` one by one, but a cohort at the
        head of ``running`` is served as one (the replica has seen to it that an untouched ledger can).
        """
        if position == 0 and self.cohort is not None:
            position = self.marching = self.cohort.size
            self.tokens -= position
            self.sequences -= position
            self.blocks -= self.cohort.missing(1)
        if position == len(running):
            return position
        last = min(len(running), position + max(0, min(self.tokens, self.sequences)))
        first, add = position, self.decodes.append
        while position < last:
            request = running[position]
            computed = request.computed
            if not request.decoding or request.pending > self.lookahead:
                break
            if computed == request.capacity:
                blocks = self._manager.missing(request, computed + 1)
                if blocks > self.blocks:
                    break
                self.blocks -= blocks
            add(request)
            position += 1
        self.tokens -= position - first
        self.sequences -= position - first
        return position

    def can_admit(self, request: Request) -> bool:
        """Whether a waiting request finds a seat, and blocks for its whole prompt (or life, under full admission)."""
        needed = self._manager.missing(request, request.total if self._full else request.known)
        return self.seats > 0 and needed <= self.blocks

    def lacks(self, request: Request) -> str:
        """What a waiting request does not find here."""
        if self.seats <= 0:
            return "a seat"
        if not self.can_admit(request):
            return f"KV blocks ({self.blocks} are free)"
        if self.wants(request) > self.tokens and not self.chunked:
            return f"a step of more than {self.tokens} tokens"
        return "the policy, which left it waiting"

    def admit(self, request: Request, tokens: int) -> None:
        """Seat a waiting request and give it ``tokens``; only their blocks are taken, unless admission is full."""
        if request.preemptions:
            self.recovered[request] = self._manager.cached(request, self.blocks)
        self.blocks -= self._manager.missing(request, self.held_after(request, tokens))
        self.seats -= 1
        self.tokens -= tokens
        self.sequences -= 1
        self.admitted.append((request, tokens))
        self.chunks.append((request, tokens))

    def held_after(self, request: Request, tokens: int) -> int:
        """Cached tokens that a request has blocks for once it is admitted with ``tokens``."""
        return request.total if self._full else request.computed + self.recovered.get(request, 0) + tokens

    def recomputes_alone(self) -> bool:
        """Whether all it gives is one whole prompt and output to a request that was preempted before."""
        alone = len(self.chunks) == 1 and not (self.marching or self.decodes)
        return alone and not self.chunked and self.chunks[0][0].preemptions > 0

    def preempt(self, request: Request) -> None:
        """Send a running request back to the queue; its blocks count as free from here on."""
        self.blocks += request.blocks
        self.preempted.append(request)


class BatchPolicy(ABC):
    """Fills ledgers: the base of one's own policies, whose steps are simulated singly unless it promises more.

    ``marches`` promises that it gives decodes, if any, by ``give_decodes(running, 0)`` before it spends anything else;
    a replica may then take decodes as one. ``repeats`` says of a filled ledger that, as long as nothing arrives,
    finishes or runs short of blocks, the next would give every running request that decodes by then one token, and
    nothing else; a replica may then take many steps at once. ``needs_deadline`` asks for requests that all have a
    ``deadline_ns``.
    """

    marches = False
    needs_deadline = False

    def queue(self) -> Queue:
        """An empty queue, whose order is that in which ``fill`` is shown who waits: that of arrival."""
        return Fifo()

    @abstractmethod
    def fill(self, ledger: Ledger, running: Sequence[Request], waiting: Iterable[Request]) -> None:
        """Spend the ledger's budgets on running requests (in the order they were seated) and on those waiting."""

    def repeats(self, ledger: Ledger, waiting: Queue) -> bool:
        """Whether the next ledger would only go on with decodes."""
        return False


class Fcfs(BatchPolicy):
    """What all policies share: running requests grow in order, the youngest is preempted, nobody overtakes the head."""

    marches = True

    def __init__(self, scheduler: SchedulerDefaults) -> None:
        self.chunked = scheduler.chunked_prefill

    def repeats(self, ledger: Ledger, waiting: Queue) -> bool:
        """With an empty queue only decodes can follow; with a queue, if its head lacks a seat or blocks.

        Who was merely crowded out of this step's tokens may find room in another. After a preemption nobody was
        considered, and a head that waits for its own token will be.
        """
        if ledger.preempted or not waiting:
            return not ledger.preempted
        head = waiting[0]
        return not (ledger.chunks or head.pending or ledger.can_admit(head))

    def _grow(self, ledger: Ledger, running: Sequence[Request]) -> None:
        """Give each running request what it wants, oldest first; take the youngest off when blocks run out."""
        last, position = len(running), ledger.give_decodes(running, 0)
        while position < last and ledger.tokens and ledger.sequences:
            request = running[position]
            tokens = min(ledger.wants(request), ledger.tokens)
            if tokens:
                while not ledger.can_give(request, tokens):
                    last -= 1
                    ledger.preempt(running[last])
                    if last == position:
                        return
                ledger.give(request, tokens)
            position = position + 1 if ledger.preempted else ledger.give_decodes(running, position + 1)

    def _admit(self, ledger: Ledger, waiting: Iterable[Request]) -> None:
        """Admit from the head of the queue while budgets last; whole prompts only unless chunked."""
        for request in waiting:
            tokens = ledger.wants(request)
            if tokens > ledger.tokens and not self._may_exceed(ledger, request):
                tokens = ledger.tokens if self.chunked else 0
            if not tokens or not ledger.sequences or not ledger.can_admit(request):
                return
            ledger.admit(request, tokens)

    def _may_exceed(self, ledger: Ledger, request: Request) -> bool:
        """Without chunks a preempted request that outgrew the budget is recomputed alone, or it never would be."""
        return not self.chunked and request.preemptions > 0 and not (ledger.marching or ledger.decodes or ledger.chunks)


class ChunkedPrefill(Fcfs):
    """vLLM V1: running requests first, then the queue, until the token budget is spent; prompts mix with decodes."""

    def fill(self, ledger: Ledger, running: Sequence[Request], waiting: Iterable[Request]) -> None:
        self._grow(ledger, running)
        if not ledger.preempted:
            self._admit(ledger, waiting)


class PrefillFirst(Fcfs):
    """vLLM V0 and SGLang: a step is all prefill as long as a prompt can be advanced or admitted, else all decode."""

    def fill(self, ledger: Ledger, running: Sequence[Request], waiting: Iterable[Request]) -> None:
        self._continue_prompts(ledger, running)
        self._admit(ledger, waiting)
        if not ledger.chunks:
            self._grow(ledger, running)

    def _continue_prompts(self, ledger: Ledger, running: Sequence[Request]) -> None:
        for request in running:
            tokens = min(ledger.wants(request), ledger.tokens)
            if tokens and not request.decoding and ledger.can_give(request, tokens):
                ledger.give(request, tokens)


class ShortestFirst(ChunkedPrefill):
    """Chunked prefill whose queue is ordered by prompt tokens: of prompt and output if the scheduler ``knows_output``.

    Long requests may wait for ever while short ones come.
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
