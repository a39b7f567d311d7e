"""A composed step on its way through the pipeline stages of a replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apexsim.costs.steps import BatchStats
from apexsim.serving.batching import Ledger
from apexsim.serving.kv_cache import BlockManager
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


def compose(ledger: Ledger, blocks: BlockManager, windows: Sequence[int]) -> Batch:
    """Advance the requests of a closed ledger by their tokens and describe the step they form.

    A request whose known tokens are then all computed samples its next one; logits are computed for every scheduled
    request (as vLLM's ``logits_indices`` does, also for a chunk that samples nothing).
    """
    decodes, leaving, context = ledger.decodes, [], 0
    for request in decodes:
        request.computed = after = request.known
        if after > request.capacity:
            blocks.grow(request, after)
        request.known = after + 1
        request.pending += 1
        context += after
        if after + 1 == request.total:
            leaving.append(request)
    attended = tuple(sum(min(request.computed, window) for request in decodes) for window in windows)
    if not ledger.chunks:
        # A request that has its first token from this step was never in a decode batch before.
        steady = all(request.known > request.prompt_tokens + 1 for request in decodes)
        return Batch(decodes, decodes, leaving, BatchStats(len(decodes), context, attended, (), len(decodes)), steady)
    sampled = [request for request, tokens in ledger.chunks if _advance(request, tokens, blocks)]
    leaving += [request for request in sampled if request.known == request.total]
    requests = decodes + [request for request, _ in ledger.chunks]
    chunks = tuple((tokens, request.computed - tokens) for request, tokens in ledger.chunks)
    stats = BatchStats(len(decodes), context, attended, chunks, len(requests))
    return Batch(requests, decodes + sampled, leaving, stats, steady=False)


def _advance(request: Request, tokens: int, blocks: BlockManager) -> bool:
    """Compute ``tokens`` more of a prompt; true if that completes it and its next token is sampled."""
    request.computed += tokens
    blocks.grow(request, request.computed)
    if request.computed < request.known:
        return False
    request.known += 1
    request.pending += 1
    return True
