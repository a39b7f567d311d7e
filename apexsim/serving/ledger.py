"""One scheduling decision of iteration-level batching: policies fill a ledger, one per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.specs.engine import SchedulerDefaults


class Together(NamedTuple):
    """Decoding jobs that may be given their next token together: ``size`` of them, who take ``blocks`` KV blocks.

    ``behind`` is the position in ``running`` behind all who decode in groups, those of other groups in flight included.
    """

    size: int
    blocks: int
    behind: int


class Budgets(NamedTuple):
    """What a ledger offers before it is filled: tokens and sequences of the step, and free seats."""

    tokens: int
    sequences: int
    seats: int


class Ledger:
    """One scheduling decision: what is left of the token, seat and block budgets, and who was given what.

    ``decodes`` get the one token that brings them to the end of what they know; ``chunks`` are everybody else with
    their tokens. The ``admitted`` among them are fresh from the queue, each with the tokens that it has blocks for
    from now on; ``recovered`` are the tokens that a job preempted before finds computed. The ``fetched`` are seated and
    compute nothing until their KV entries have come. Jobs are named, never counted off: any that runs may be
    ``preempted`` and any that waits ``admitted``. Jobs that the replica ``offered`` together stand first in
    ``running``; they are given their tokens as one, ``together`` of them, and are not in ``decodes``. Nothing here
    touches a job or the block manager: the scheduler applies a filled ledger, and composing its step advances the jobs.
    ``lookahead`` is how many sampled tokens of a job may still be in flight when it is given the next.
    """

    __slots__ = (
        "_asked", "_full", "_manager", "_most", "admitted", "blocks", "chunked", "chunks", "decodes", "fetched",
        "lookahead", "offered", "preempted", "recovered", "seats", "sequences", "together", "tokens",
    )  # fmt: skip

    def __init__(
        self, manager: BlockManager, scheduler: SchedulerDefaults, budgets: Budgets, *, lookahead: int,
        offered: Together | None = None,
    ) -> None:  # fmt: skip
        self.tokens, self.sequences, self.seats = budgets
        self.blocks = manager.free
        self.lookahead = lookahead
        self.together = 0
        self.decodes: list[Job] = []
        self.chunks: list[tuple[Job, int]] = []
        self.preempted: list[Job] = []
        self.admitted: list[tuple[Job, int]] = []
        self.fetched: list[tuple[Job, int]] = []
        self.recovered: dict[Job, int] = {}
        self._asked: tuple[Job | None, int, int] = (None, 0, 0)  # who asked last whether he can be admitted
        self._manager = manager
        self._full = scheduler.admission == "full"
        self.chunked = scheduler.chunked_prefill
        self._most = scheduler.max_chunk_tokens if self.chunked else None
        self.offered = offered

    def wants(self, job: Job) -> int:
        """Tokens that ``job`` could compute in this step; 0 while the token it would start from is in flight."""
        if job.pending > self.lookahead or (job.group is not None and job.group.in_flight):
            return 0
        if job.preemptions and not job.computed:
            left = job.known - self._manager.cached(job, self.blocks)
        else:
            left = job.known - job.computed
        return left if self._most is None else min(left, self._most)

    def can_give(self, job: Job, tokens: int) -> bool:
        """Whether the blocks for ``tokens`` more of a running job are there."""
        after = job.computed + tokens
        return after <= job.capacity or self._manager.missing(job, after) <= self.blocks

    def give(self, job: Job, tokens: int) -> None:
        """Spend ``tokens`` of the budget, and the blocks they need, on ``job``."""
        after = job.computed + tokens
        if after > job.capacity:
            self.blocks -= self._manager.missing(job, after)
        self.tokens -= tokens
        self.sequences -= 1
        if job.decoding:
            self.decodes.append(job)
        else:
            self.chunks.append((job, tokens))

    def give_decodes(self, running: Sequence[Job], position: int) -> int:
        """Give a token to each job from ``position`` on, as long as they decode and budgets and blocks last.

        Returns the position of the first that got none. Equal to ``give(job, 1)`` one by one, but those ``offered`` at
        the head of ``running`` are served as one (the replica has seen to it that an untouched ledger can).
        """
        if position == 0 and self.offered is not None:
            size, blocks, position = self.offered
            self.together = size
            self.tokens -= size
            self.sequences -= size
            self.blocks -= blocks
        if position == len(running):
            return position
        last = min(len(running), position + max(0, min(self.tokens, self.sequences)))
        first, add = position, self.decodes.append
        while position < last:
            job = running[position]
            computed = job.computed
            if not job.decoding or job.pending > self.lookahead:
                break
            if computed == job.capacity:
                blocks = self._manager.missing(job, computed + 1)
                if blocks > self.blocks:
                    break
                self.blocks -= blocks
            add(job)
            position += 1
        self.tokens -= position - first
        self.sequences -= position - first
        return position

    def can_admit(self, job: Job) -> bool:
        """Whether a waiting job finds a seat, and blocks for its whole prompt (or life, under full admission)."""
        tokens = job.total if self._full else job.known
        needed = self._manager.missing(job, tokens)
        self._asked = job, tokens, needed
        return self.seats > 0 and needed <= self.blocks

    def lacks(self, job: Job) -> str:
        """What a waiting job does not find here."""
        if self.seats <= 0:
            return "a seat"
        if not self.can_admit(job):
            return f"KV blocks ({self.blocks} are free)"
        if self.wants(job) > self.tokens and not self.chunked:
            return f"a step of more than {self.tokens} tokens"
        return "the policy, which left it waiting"

    def admit(self, job: Job, tokens: int) -> None:
        """Seat a waiting job and give it ``tokens``; only their blocks are taken, unless admission is full."""
        if job.preemptions:
            self.recovered[job] = self._manager.cached(job, self.blocks)
        held = job.total if self._full else job.computed + self.recovered.get(job, 0) + tokens
        asked, tokens_asked, needed = self._asked
        self.blocks -= needed if asked is job and tokens_asked == held else self._manager.missing(job, held)
        self.seats -= 1
        self.tokens -= tokens
        self.sequences -= 1
        self.admitted.append((job, held))
        self.chunks.append((job, tokens))

    def fetch(self, job: Job) -> None:
        """Seat a waiting job whose KV entries lie elsewhere; only their blocks are taken, unless admission is full."""
        held = job.total if self._full else job.computed
        self.blocks -= self._manager.missing(job, held)
        self.seats -= 1
        self.fetched.append((job, held))

    def recomputes_alone(self) -> bool:
        """Whether all it gives is one whole prompt and output to a job that was preempted before."""
        alone = len(self.chunks) == 1 and not (self.together or self.decodes)
        return alone and not self.chunked and self.chunks[0][0].preemptions > 0

    def preempt(self, job: Job) -> None:
        """Send a running job back to the queue; its blocks count as free from here on."""
        self.blocks += job.blocks
        self.preempted.append(job)
