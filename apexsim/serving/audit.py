"""What a batching policy owes the replica that it decides for, checked ledger by ledger.

Policies of one's own are always served under audit: a decision that no engine could carry out ends the run with one
line, and never a result that looks like one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from apexsim.serving.batching import BatchPolicy, Ledger
from apexsim.serving.faults import PolicyFault
from apexsim.serving.queues import Queue
from apexsim.serving.request import Request


class Budgets(NamedTuple):
    """What a ledger offers before it is filled."""

    tokens: int
    sequences: int
    seats: int


class Audited(BatchPolicy):
    """Lets ``policy`` decide and raises ``PolicyFault`` where it broke a promise.

    ``most`` bounds how many ledgers it may fill; None for any number.
    """

    def __init__(self, policy: BatchPolicy, *, most: int | None = None) -> None:
        self.policy = policy
        self.marches = policy.marches
        self.needs_deadline = policy.needs_deadline
        self._left = most

    def queue(self) -> Queue:
        return self.policy.queue()

    def repeats(self, ledger: Ledger, waiting: Queue) -> bool:
        return self.policy.repeats(ledger, waiting)

    def fill(self, ledger: Ledger, running: Sequence[Request], waiting: Iterable[Request]) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise PolicyFault("goes on deciding and requests do not finish")
        offered = Budgets(ledger.tokens, ledger.sequences, ledger.seats)
        self.policy.fill(ledger, running, waiting)
        for broke, request in _faults(ledger, offered, running):
            raise PolicyFault(broke, request)


def _faults(ledger: Ledger, offered: Budgets, running: Sequence[Request]) -> Iterator[tuple[str, Request | None]]:
    """Every promise that a filled ledger breaks, and the request with which it does."""
    yield from _of_whom(ledger, running)
    given = [*((request, 1) for request in ledger.decodes), *ledger.chunks]
    yield from _of_tokens(ledger, given)
    tokens = ledger.marching + sum(count for _, count in given)
    if tokens > offered.tokens and not ledger.recomputes_alone():
        yield f"gave {tokens} tokens, more than the budget of {offered.tokens}", None
    if ledger.marching + len(given) > offered.sequences:
        yield f"gave tokens to more than the {offered.sequences} sequences of a step", None
    if len(ledger.admitted) > offered.seats:
        yield f"seated {len(ledger.admitted)} requests where {offered.seats} seats were free", None
    if ledger.blocks < 0:
        yield "gave more KV blocks than are free", None


def _of_whom(ledger: Ledger, running: Sequence[Request]) -> Iterator[tuple[str, Request]]:
    """Faults of who was named, and how often."""
    admitted = [request for request, _ in ledger.admitted]
    seated, off = set(running), set(ledger.preempted)
    members = set(running[: ledger.cohort.size]) if ledger.cohort else set()
    for request in _again([*running, *admitted]):
        yield "seated a request twice", request
    for request in _again(ledger.preempted):
        yield "preempted a request twice", request
    for request in ledger.preempted:
        if request not in seated:
            yield "preempted a request that does not run", request
        if request in members:
            yield "promises to march, and preempted one who decodes while there were blocks for all", request
    for request in [*ledger.decodes, *[request for request, _ in ledger.chunks]]:
        if request in members and not ledger.marching:
            yield "promises to march, and gave decodes before, or without, give_decodes(running, 0)", request
        if request not in seated and request not in admitted:
            yield "gave tokens to a request that does not run and was not admitted", request
        if request in off:
            yield "gave tokens to a request that it preempted", request
    served = [*running[: ledger.marching], *ledger.decodes, *[request for request, _ in ledger.chunks]]
    for request in _again(served):
        yield "gave a request tokens twice in a step", request


def _of_tokens(ledger: Ledger, given: Iterable[tuple[Request, int]]) -> Iterator[tuple[str, Request]]:
    """Faults of how many tokens a request was given."""
    for request, tokens in given:
        lacks = request.known - request.computed - ledger.recovered.get(request, 0)
        if tokens < 1:
            yield "scheduled a request and gave it no token", request
        if tokens > lacks:
            yield f"gave a request {tokens} tokens where it lacks {lacks}", request
        if request.pending > ledger.lookahead:
            yield "gave a request the token after one that is still in flight", request
        if tokens < lacks and not ledger.chunked:
            yield "gave part of a prompt though prompts are not chunked", request


def _again(requests: Iterable[Request]) -> Iterator[Request]:
    """Those that come a second time."""
    return (request for request, times in Counter(requests).items() if times > 1)
