"""How long the ranks of an expert-parallel group wait for the most loaded one."""

from __future__ import annotations

from functools import lru_cache
from math import comb

import numpy as np

from apexsim.costs.fitted import ROUTING_ALPHA, MoeLayer
from apexsim.costs.forms import moe
from apexsim.costs.forms.hardware import Array


def busy_share(layer: MoeLayer, tokens: Array) -> Array:
    """Share of the experts' time in which an average rank works; the rest it waits in the next collective.

    The time is that of the rank with the most experts to read. Every expert is reached with the probability p that
    ``tokens`` tokens leave on average, so a rank reads Binomial(experts / ep, p), and the time follows the largest of
    ep such numbers.
    """
    if layer.ep == 1:
        return np.ones(len(tokens))
    alpha = ROUTING_ALPHA[layer.routing]
    reached = moe.touched_experts(np.maximum(tokens, 1.0), layer.experts, layer.topk, alpha) / layer.experts
    return np.array([_mean_over_largest(layer.experts // layer.ep, layer.ep, round(float(p), 4)) for p in reached])


@lru_cache(maxsize=65536)
def _mean_over_largest(experts: int, ranks: int, reached: float) -> float:
    """Mean of Binomial(experts, reached) over the expected largest of ``ranks`` of them."""
    counts = range(experts + 1)
    chances = np.array([comb(experts, n) * reached**n * (1 - reached) ** (experts - n) for n in counts])
    largest = float((1 - np.minimum(np.cumsum(chances), 1.0) ** ranks).sum())
    # Somebody reads an expert: independent experts would leave all ranks without now and then.
    return experts * reached / max(largest, 1.0)
