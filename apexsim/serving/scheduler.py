"""What a filled ledger does to a queue, its seats and its KV blocks. Knows no clock: a live engine runs it as well."""

from __future__ import annotations

from collections.abc import Iterable

from apexsim.serving.faults import PolicyFault
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.ledger import Budgets, Ledger, Together
from apexsim.serving.queues import Queue
from apexsim.specs.engine import SchedulerDefaults


class Scheduler:
    """Jobs that wait, run, or are set ``aside``, and the blocks they hold.

    Those aside hold a seat and are given nothing: their last token is in flight, or their KV entries are on their way.
    Those ``kept`` have ended, and hold blocks that another replica is yet to fetch.

    A step: ``open`` a ledger for a policy to fill, ``apply`` it, compose its step (see ``decodes``), ``see_off``
    those whose last token it samples, and once that token exists let them ``leave``.
    """

    __slots__ = ("_budget", "_lookahead", "aside", "blocks", "kept", "running", "settings", "waiting")

    def __init__(
        self, settings: SchedulerDefaults, blocks: BlockManager, waiting: Queue, *, lookahead: int = 0
    ) -> None:
        """``waiting`` is the policy's queue, still empty."""
        self.running: list[Job] = []
        self.waiting = waiting
        self.aside: set[Job] = set()
        self.kept: set[Job] = set()
        self.blocks = blocks
        self.settings = settings
        self._lookahead = lookahead
        self._budget = settings.token_budget

    def open(self, sequences: int, offered: Together | None = None) -> Ledger:
        """A ledger for at most ``sequences``, with the seats and blocks that are free."""
        seats = self.settings.max_num_seqs - len(self.running) - len(self.aside)
        budgets = Budgets(self._budget, sequences, seats)
        return Ledger(self.blocks, self.settings, budgets, lookahead=self._lookahead, offered=offered)

    def apply(self, ledger: Ledger, now_ns: int) -> None:
        """Preempt and seat those whom a filled ledger names.

        Raises ``PolicyFault`` where it names one who does not run, or does not wait.
        """
        for job in ledger.preempted:
            self._unseat(job)
            self.blocks.preempt(job)
            job.lose()
            self.waiting.appendleft(job)
        for job, held in ledger.admitted:
            self._seat(job, held, ledger, now_ns)
        for job, held in ledger.fetched:
            self._fetch(job, held, now_ns)

    def _unseat(self, job: Job) -> None:
        try:
            self.running.remove(job) if self.running[-1] is not job else self.running.pop()
        except (ValueError, IndexError):
            raise PolicyFault("preempted a request that does not run", job) from None

    def _seat(self, job: Job, held: int, ledger: Ledger, now_ns: int) -> None:
        """A job leaves the queue and holds the blocks of ``held`` tokens."""
        try:
            self.waiting.take(job)
        except ValueError:
            raise PolicyFault("admitted a request that does not wait", job) from None
        if job.fetch is not None:
            raise PolicyFault("admitted a request whose KV entries are to be fetched", job)
        self.running.append(job)
        if job.preemptions:
            job.resume(ledger.recovered[job])
            self.blocks.recover(job, job.computed)
        self.blocks.grow(job, held)
        if job.scheduled_ns is None:
            job.scheduled_ns = now_ns

    def _fetch(self, job: Job, held: int, now_ns: int) -> None:
        """A job leaves the queue, holds the blocks of ``held`` tokens, and has its KV entries sent here."""
        try:
            self.waiting.take(job)
        except ValueError:
            raise PolicyFault("fetched for a request that does not wait", job) from None
        if job.fetch is None:
            raise PolicyFault("fetched for a request that has nothing to fetch", job)
        self.aside.add(job)
        self.blocks.grow(job, held)
        job.scheduled_ns = now_ns
        job.fetch(job)

    def see_off(self, leaving: Iterable[Job]) -> None:
        """Jobs whose last token is in flight keep seat and blocks until it ends, but are not scheduled again."""
        for job in leaving:
            self.running.remove(job)
            self.aside.add(job)

    def leave(self, job: Job) -> None:
        """The last token of a job exists: its seat is free, and its blocks unless they are kept."""
        if job in self.aside:
            self.aside.remove(job)
        else:
            self.running.remove(job)
        if job.kept:
            self.kept.add(job)
        else:
            self.blocks.release(job)

    def load(self, job: Job) -> None:
        """The KV entries that a job has fetched are here: it runs."""
        self.aside.remove(job)
        job.load()
        self.running.append(job)

    def forget(self, job: Job) -> None:
        """Another replica has fetched what a job has left."""
        self.kept.remove(job)
        self.blocks.release(job)

    def check_idle(self) -> None:
        """Assert that nothing is left behind once every job is done."""
        assert not any((self.running, self.waiting, self.aside, self.kept))
        assert self.blocks.free == self.blocks.total, f"{self.blocks.held} blocks were never given back"
