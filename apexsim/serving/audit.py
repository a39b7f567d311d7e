"""What a batching policy owes the replica that it decides for, checked ledger by ledger.

Policies of one's own are always served under audit: a decision that no engine could carry out ends the run with one
line, and never a result that looks like one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from apexsim.errors import BadInput
from apexsim.serving.faults import PolicyFault
from apexsim.serving.job import Job
from apexsim.serving.ledger import Budgets, Ledger
from apexsim.serving.messages import View
from apexsim.serving.policies import BatchPolicy
from apexsim.serving.queues import Queue
from apexsim.serving.routing import Router


class Audited(BatchPolicy):
    """Lets ``policy`` decide and raises ``PolicyFault`` where it broke a promise.

    ``most`` bounds how many ledgers it may fill; None for any number.
    """

    def __init__(self, policy: BatchPolicy, *, most: int | None = None) -> None:
        self.policy = policy
        self.decodes_first = policy.decodes_first
        self.needs_deadline = policy.needs_deadline
        self._left = most

    def queue(self) -> Queue:
        return self.policy.queue()

    def steady_until(self, ledger: Ledger, waiting: Queue, now_ns: int) -> int:
        return self.policy.steady_until(ledger, waiting, now_ns)

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise PolicyFault("goes on deciding and requests do not finish")
        offered = Budgets(ledger.tokens, ledger.sequences, ledger.seats)
        try:
            self.policy.fill(ledger, running, waiting)
        except PolicyFault:
            raise
        except Exception as error:  # a policy of the user's may fail in any way
            raise PolicyFault(f"raised {type(error).__name__}: {error}") from error
        for broke, job in _faults(ledger, offered, running):
            raise PolicyFault(broke, job)


class AuditedRouter:
    """Lets ``router`` choose and raises BadInput where it fails, or chose none of those it was shown."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def choose(self, job: Job, views: Sequence[View]) -> int:
        try:
            chosen: object = self._router.choose(job, tuple(views))
        except Exception as error:  # a router of the user's may fail in any way
            raise BadInput(f"the router raised {type(error).__name__}: {error}", key="router") from error
        if not isinstance(chosen, int) or isinstance(chosen, bool) or not 0 <= chosen < len(views):
            would_do = f"the router must give a position from 0 to {len(views) - 1}"
            raise BadInput(would_do, key="router", got=str(chosen))
        return chosen


def _faults(ledger: Ledger, offered: Budgets, running: Sequence[Job]) -> Iterator[tuple[str, Job | None]]:
    """Every promise that a filled ledger breaks, and the job with which it does."""
    yield from _of_whom(ledger, running)
    given = [*((job, 1) for job in ledger.decodes), *ledger.chunks]
    yield from _of_tokens(ledger, given)
    tokens = ledger.together + sum(count for _, count in given)
    if tokens > offered.tokens and not ledger.recomputes_alone():
        yield f"gave {tokens} tokens, more than the budget of {offered.tokens}", None
    if ledger.together + len(given) > offered.sequences:
        yield f"gave tokens to more than the {offered.sequences} sequences of a step", None
    seated = len(ledger.admitted) + len(ledger.fetched)
    if seated > offered.seats:
        yield f"seated {seated} requests where {offered.seats} seats were free", None
    if ledger.blocks < 0:
        yield "gave more KV blocks than are free", None


def _of_whom(ledger: Ledger, running: Sequence[Job]) -> Iterator[tuple[str, Job]]:
    """Faults of who was named, and how often."""
    admitted = [job for job, _ in ledger.admitted]
    seated, off = set(running), set(ledger.preempted)
    members = set(running[: ledger.offered.behind]) if ledger.offered else set()
    for job in _again([*running, *admitted, *[job for job, _ in ledger.fetched]]):
        yield "seated a request twice", job
    for job in _again(ledger.preempted):
        yield "preempted a request twice", job
    for job in ledger.preempted:
        if job not in seated:
            yield "preempted a request that does not run", job
        if job in members:
            yield "promises decodes first, and preempted one who decodes while there were blocks for all", job
    for job in [*ledger.decodes, *[job for job, _ in ledger.chunks]]:
        if job in members and ledger.together:
            yield "gave a request tokens twice in a step", job
        elif job in members:
            yield "promises decodes first, and gave some before, or without, give_decodes(running, 0)", job
        if job not in seated and job not in admitted:
            yield "gave tokens to a request that does not run and was not admitted", job
        if job in off:
            yield "gave tokens to a request that it preempted", job
    for job in _again([*ledger.decodes, *[job for job, _ in ledger.chunks]]):
        yield "gave a request tokens twice in a step", job


def _of_tokens(ledger: Ledger, given: Iterable[tuple[Job, int]]) -> Iterator[tuple[str, Job]]:
    """Faults of how many tokens a job was given."""
    for job, tokens in given:
        lacks = job.known - job.computed - ledger.recovered.get(job, 0)
        if tokens < 1:
            yield "scheduled a request and gave it no token", job
        if tokens > lacks:
            yield f"gave a request {tokens} tokens where it lacks {lacks}", job
        if job.pending > ledger.lookahead:
            yield "gave a request the token after one that is still in flight", job
        if tokens < lacks and not ledger.chunked:
            yield "gave part of a prompt though prompts are not chunked", job


def _again(jobs: Iterable[Job]) -> Iterator[Job]:
    """Those that come a second time."""
    return (job for job, times in Counter(jobs).items() if times > 1)
