"""How long the ranks of an expert-parallel group wait for the most loaded one."""

from __future__ import annotations

import numpy as np

from apexsim.costs.fitted import MoeLayer
from apexsim.costs.forms.hardware import Array
from apexsim.costs.forms.routing import fullest_device, touched_experts


def busy_share(layer: MoeLayer, tokens: Array) -> Array:
    """Share of the experts' time in which an average rank works; the rest it waits in the next collective.

    The time is taken to follow the experts that a rank reads.
    """
    experts, topk, exponent = layer.experts, layer.topk, layer.routing_exponent
    average = touched_experts(np.maximum(tokens, 1.0), experts, topk, exponent) / layer.ep
    return np.asarray(np.minimum(average / fullest_device(tokens, experts, topk, layer.ep, exponent).active, 1.0))
