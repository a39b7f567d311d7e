"""What a closed ledger does to a queue, its seats and its KV blocks. Knows no clock: a live engine runs it as well."""

from __future__ import annotations

from collections.abc import Iterable

from apexsim.serving.batching import Ledger
from apexsim.serving.cohort import Cohort
from apexsim.serving.faults import PolicyFault
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.queues import Queue
from apexsim.serving.request import Request
from apexsim.specs.engine import SchedulerDefaults


class Scheduler:
    """Requests that wait, run, or only await their last token, and the blocks they hold.

    A step: ``open`` a ledger for a policy to fill, ``apply`` it, ``compose`` the batch (see ``batch``), ``see_off``
    those whose last token it samples, and once that token exists let them ``leave``.
    """

    __slots__ = ("_lookahead", "_set", "blocks", "leaving", "running", "waiting")

    def __init__(
        self, settings: SchedulerDefaults, blocks: BlockManager, waiting: Queue, *, lookahead: int = 0
    ) -> None:
        """``waiting`` is the policy's queue, still empty."""
        self.running: list[Request] = []
        self.waiting = waiting
        self.leaving = 0
        self.blocks = blocks
        self._set = settings
        self._lookahead = lookahead

    def open(self, sequences: int, cohort: Cohort | None = None) -> Ledger:
        """A ledger for at most ``sequences``, with the seats and blocks that are free; ``cohort`` marches as one."""
        seats = self._set.max_num_seqs - len(self.running) - self.leaving
        return Ledger(
            self.blocks, self._set, seats=seats, sequences=sequences, lookahead=self._lookahead, cohort=cohort
        )

    def apply(self, ledger: Ledger, now_ns: int) -> None:
        """Preempt and seat those whom a filled ledger names.

        Raises ``PolicyFault`` where it names one who does not run, or does not wait.
        """
        for request in ledger.preempted:
            self._unseat(request)
            self.blocks.preempt(request)
            request.computed = 0
            request.decoding = False
            request.preemptions += 1
            self.waiting.appendleft(request)
        for request, tokens in ledger.admitted:
            self._seat(request, ledger.held_after(request, tokens), ledger, now_ns)

    def _unseat(self, request: Request) -> None:
        try:
            self.running.remove(request) if self.running[-1] is not request else self.running.pop()
        except (ValueError, IndexError):
            raise PolicyFault("preempted a request that does not run", request) from None

    def _seat(self, request: Request, held: int, ledger: Ledger, now_ns: int) -> None:
        """A request leaves the queue and holds the blocks of ``held`` tokens."""
        try:
            self.waiting.take(request)
        except ValueError:
            raise PolicyFault("admitted a request that does not wait", request) from None
        self.running.append(request)
        if request.preemptions:
            request.computed = ledger.recovered[request]
            self.blocks.recover(request, request.computed)
        self.blocks.grow(request, held)
        if request.scheduled_ns is None:
            request.scheduled_ns = now_ns

    def see_off(self, leaving: Iterable[Request]) -> None:
        """Requests whose last token is in flight keep seat and blocks until it ends, but are not scheduled again."""
        for request in leaving:
            self.running.remove(request)
            self.leaving += 1

    def leave(self, request: Request, end_ns: int) -> None:
        """The last token of a request exists: its seat and blocks are free."""
        request.last_token_ns = end_ns
        self.blocks.release(request)
        self.leaving -= 1

    def check_idle(self) -> None:
        """Assert that nothing is left behind once every request is done."""
        assert not any((self.running, self.waiting, self.leaving))
        assert self.blocks.free == self.blocks.total, f"{self.blocks.held} blocks were never given back"
