"""A composed step on its way through the pipeline stages of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apexsim.costs.steps import BatchStats
from apexsim.serving.batching import Ledger
from apexsim.serving.cohort import Cohort
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request


@dataclass(slots=True)
class Batch:
    """Who computes in a step and when it runs.

    ``marching`` cohort members get a token at its end, and so do the requests in ``samples``, one by one; ``singles``
    are those of them who are not members. For those in ``leaving`` it is the last; with it those in ``showing`` have
    all that their client is handed first. ``step`` is the cohort's count when the batch was composed, ``whole`` says
    that none of its members stood still. ``labels`` are the replica and how many requests it had running and waiting.
    """

    stats: BatchStats
    samples: Sequence[Request]
    marching: int = 0
    singles: Sequence[Request] = ()
    leaving: Sequence[Request] = ()
    showing: Sequence[Request] = ()
    step: int = 0
    whole: bool = True
    start_ns: int = 0
    end_ns: int = 0
    labels: tuple[int, int, int] = (0, 0, 0)

    def show(self) -> None:
        """The batch ends: clients are handed their first tokens."""
        for request in self.showing:
            request.shown_ns = self.end_ns

    def release(self, members: Sequence[Request]) -> None:
        """The cohort dissolves while the batch is in flight: its members here are stamped one by one from now on."""
        if self.marching:
            mine = [request for request in members if request.joined <= self.step]
            for request in mine:
                request.pending += 1
            self.samples = [*self.samples, *mine]
            self.marching -= len(mine)


def compose(
    ledger: Ledger, running: Sequence[Request], blocks: BlockManager, windows: Sequence[int], cohort: Cohort
) -> Batch:
    """Advance the requests of a closed ledger by their tokens and describe the step they form.

    A request whose known tokens are then all computed samples its next one; logits are computed for every scheduled
    request (as vLLM's ``logits_indices`` does, also for a chunk that samples nothing).
    """
    if ledger.marching:
        batch = march_on(running[: ledger.marching], windows, cohort)
    else:
        batch = Batch(BatchStats(0, 0, (0,) * len(windows)), (), step=cohort.step, whole=cohort.size == 0)
    if not (ledger.decodes or ledger.chunks):
        return batch
    decodes, context, attended, _, _ = batch.stats
    singles = [request for request in ledger.decodes if _advance(request, 1, blocks)]
    if singles:
        context += sum([request.computed for request in singles])
        attended = tuple(
            [sum([min(r.computed, w) for r in singles]) + a for w, a in zip(windows, attended, strict=True)]
        )
    singles += [request for request, tokens in ledger.chunks if _advance(request, tokens, blocks)]
    chunks = tuple([(tokens, request.computed - tokens) for request, tokens in ledger.chunks])
    decodes += len(ledger.decodes)
    batch.stats = BatchStats(decodes, context, attended, chunks, decodes + len(chunks))
    batch.samples, batch.singles = [*batch.samples, *singles], singles
    batch.leaving = [*batch.leaving, *[request for request in singles if request.known == request.total]]
    if singles and singles[0].shown:
        batch.showing = [*batch.showing, *[request for request in singles if request.known == request.shown]]
    return batch


def march_on(members: Sequence[Request], windows: Sequence[int], cohort: Cohort) -> Batch:
    """The decode step of a whole cohort."""
    size, step, late = cohort.size, cohort.step, cohort.take_late()
    leaving = cohort.march(1)
    attended = tuple([cohort.attended(members, window) for window in windows])
    stats = BatchStats(size, cohort.context, attended, (), size)
    cohort.leave(leaving)
    showing = [request for _, request in cohort.show()] if cohort.unshown else ()
    return Batch(stats, late, size - len(late), leaving=leaving, showing=showing, step=step)


def _advance(request: Request, tokens: int, blocks: BlockManager) -> bool:
    """Compute ``tokens`` more of a request; true if that is all it knows and its next token is sampled."""
    request.computed += tokens
    blocks.grow(request, request.computed)
    if request.computed < request.known:
        return False
    request.known += 1
    request.pending += 1
    request.decoding = True
    return True
