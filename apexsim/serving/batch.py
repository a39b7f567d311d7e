"""A composed step on its way through the pipeline stages of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apexsim.costs.steps import BatchStats
from apexsim.serving.request import Request


@dataclass(slots=True)
class Batch:
    """Who computes in a step and when it runs.

    ``requests`` all scheduled, in order; ``samples`` those that get a token at its end; ``leaving`` those whose last
    token that is. ``steady`` batches only continue decoding, so the next one can be the same. ``running`` and
    ``waiting`` count the replica's requests when it was composed.
    """

    requests: list[Request]
    samples: list[Request]
    leaving: list[Request]
    stats: BatchStats
    steady: bool
    start_ns: int = 0
    end_ns: int = 0
    replica: int = 0
    running: int = 0
    waiting: int = 0


def compose(entries: Sequence[tuple[Request, int]], windows: Sequence[int], *, admitted: int) -> Batch:
    """Advance the requests of a closed ledger by their tokens and describe the step they form.

    A request whose known tokens are then all computed samples its next one; logits are computed for every scheduled
    request (as vLLM's ``logits_indices`` does, also for a chunk that samples nothing).
    """
    samples, leaving, chunks = [], [], []
    decodes = context = 0
    window_contexts = [0] * len(windows)
    for request, tokens in entries:
        before = request.computed
        request.computed = after = before + tokens
        if tokens == 1:
            decodes += 1
            context += after
            for position, window in enumerate(windows):
                window_contexts[position] += min(after, window)
        else:
            chunks.append((tokens, before))
        if after == request.known:
            request.known = after + 1
            request.pending += 1
            samples.append(request)
            if after + 1 == request.total:
                leaving.append(request)
    requests = [request for request, _ in entries]
    stats = BatchStats(decodes, context, tuple(window_contexts), tuple(chunks), len(requests))
    return Batch(requests, samples, leaving, stats, not chunks and not admitted and len(samples) == len(requests))
