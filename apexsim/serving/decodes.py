"""Composes every step and ends it; named for the decodes, which a fast path may take together.

Here jobs are advanced one by one, as is plain to see. That is the oracle (``exact_steps``). ``serving/fast`` keeps the
same books in closed form, behind the same verbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from apexsim.costs.steps import BatchStats
from apexsim.serving.batch import Batch, Flight
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.ledger import Ledger, Together


class Passed(NamedTuple):
    """Steps of a stretch that have ended, and KV blocks that its compositions have taken: not in the books yet."""

    steps: int = 0
    blocks: int = 0


class Decodes(Protocol):
    """The steps of one replica, from their composition to their end.

    A *stretch* is a number of steps to come of which everything is known: only the step end that may change something
    is an event, and the stretch is settled there. It is cut short when something arrives.
    """

    def offer(self, sequences: int, *, calm: bool) -> Together | None:
        """Before a ledger for at most ``sequences``: who may be given their next token together, if anybody.

        ``calm``: nobody was preempted in the decision before.
        """

    def compose(self, ledger: Ledger) -> Batch:
        """Advance those whom an applied ledger names by their tokens, as one step."""

    def end(self) -> Sequence[Job]:
        """The oldest step in flight ends, and all that ended unseen before it; returns who has the last token."""

    def go_on(self, sequences: int, now_ns: int) -> bool | None:
        """With nobody waiting: True if the next step is known without a decision, and is on its way.

        False if it is known that there is none, None where that takes a decision.
        """

    def plan(self, sequences: int, now_ns: int, until_ns: int | None) -> None:
        """Plan a stretch, if what comes next is known; it will be cut at ``until_ns`` at the latest, where given."""

    def cut(self, now_ns: int) -> bool:
        """Let no end from ``now_ns`` on pass unseen: the next one is an event. True if that moves the next end."""

    def view(self, now_ns: int) -> Passed:
        """What has passed unseen so far; changes nothing."""

    stretching: bool
    """Whether steps pass unseen."""
    next_end_ns: int
    """When the next step ends that may change something, where steps pass unseen."""

    @property
    def composed(self) -> int:
        """Steps composed so far."""

    @property
    def late_block_ns(self) -> int:
        """Blocks over time that the KV cache was not told of yet."""


class OneByOne:
    """Every step is an event, every job is looked at in it."""

    late_block_ns = 0

    def __init__(self, flight: Flight, blocks: BlockManager, windows: Sequence[int]) -> None:
        self.stretching = False
        self.next_end_ns = 0
        self.composed = 0
        self._flight = flight
        self._blocks = blocks
        self._windows = windows

    def offer(self, sequences: int, *, calm: bool) -> Together | None:
        return None

    def compose(self, ledger: Ledger) -> Batch:
        self.composed += 1
        return Batch(*advance(ledger, self._blocks, self._windows))

    def end(self) -> Sequence[Job]:
        batch, recorder, held = self._flight.batches.popleft(), self._flight.recorder, self._blocks.held
        batch.emit(recorder)
        recorder.step(batch.stats, batch.labels, (batch.start_ns, batch.end_ns), 1, (held, held))
        return batch.leaving

    def go_on(self, sequences: int, now_ns: int) -> bool | None:
        return None

    def plan(self, sequences: int, now_ns: int, until_ns: int | None) -> None:
        """Nothing passes unseen."""

    def cut(self, now_ns: int) -> bool:
        return False

    def view(self, now_ns: int) -> Passed:
        return Passed()


Advanced = tuple[BatchStats, Sequence[Job], Sequence[Job], Sequence[Job]]
"""A step of jobs that are advanced one by one, and who of them samples, leaves and is shown with it (see ``Batch``)."""


def advance(ledger: Ledger, blocks: BlockManager, windows: Sequence[int]) -> Advanced:
    """Advance one by one the jobs that an applied ledger names, by their tokens.

    A job whose known tokens are then all computed samples its next one; logits are computed for every scheduled job (as
    vLLM's ``logits_indices`` does, also for a chunk that samples nothing).
    """
    samples: list[Job] = []
    context, attended = 0, (0,) * len(windows)
    if ledger.decodes:
        samples = [job for job in ledger.decodes if _computes(job, 1, blocks)]
        context = sum([job.computed for job in samples])
        attended = tuple([sum([min(job.computed, window) for job in samples]) for window in windows])
    chunks = []
    for job, tokens in ledger.chunks:
        if _computes(job, tokens, blocks):
            samples.append(job)
        chunks.append((tokens, job.computed - tokens))
    decodes = len(ledger.decodes)
    stats = BatchStats(decodes, context, attended, tuple(chunks), decodes + len(chunks))
    leaving = [job for job in samples if job.known == job.total]
    return stats, samples, leaving, [job for job in samples if job.known == job.shown]


def _computes(job: Job, tokens: int, blocks: BlockManager) -> bool:
    samples = job.compute(tokens)
    if job.computed > job.capacity:
        blocks.grow(job, job.computed)
    return samples
