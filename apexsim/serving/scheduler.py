"""What a closed ledger does to a queue, its seats and its KV blocks. Knows no clock: a live engine runs it as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from apexsim.serving.batching import Ledger
from apexsim.serving.cohort import Cohort
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request
from apexsim.specs.engine import SchedulerDefaults


class Scheduler:
    """Requests that wait, run, or only await their last token, and the blocks they hold.

    A step: ``open`` a ledger for a policy to fill, ``apply`` it, ``compose`` the batch (see ``batch``), ``see_off``
    those whose last token it samples, and once that token exists let them ``leave``.
    """

    __slots__ = ("_lookahead", "_set", "blocks", "leaving", "running", "waiting")

    def __init__(self, settings: SchedulerDefaults, blocks: BlockManager, *, lookahead: int = 0) -> None:
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
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
        """Preempt and seat as a filled ledger says."""
        for request in ledger.preempted:
            self.blocks.preempt(request)
            request.computed = 0
            request.decoding = False
            request.preemptions += 1
            self.running.pop()
            self.waiting.appendleft(request)
        if ledger.admitted:
            self._seat(ledger, now_ns)

    def _seat(self, ledger: Ledger, now_ns: int) -> None:
        """Admitted requests are the last chunks of a ledger and the first of the queue."""
        for request, tokens in ledger.chunks[-ledger.admitted :]:
            self.running.append(self.waiting.popleft())
            held = ledger.held_after(request, tokens)
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
