"""Fused experts of one device: reading the weights of the experts touched, or computing their padded rows.

Symbols: ``T`` tokens, ``k`` experts per token, ``E`` experts of the model, ``ep`` expert-parallel degree, ``h`` hidden,
``I`` expert width on this device, ``w`` bytes of a weight element, ``ng`` matrices of an expert (3 gated, 2 plain),
P peak FLOP/s, BW HBM bytes/s. Routing is balanced or a power law: expert of rank r is chosen with weight r^-alpha.

    rows = T k                       rl = rows / ep (1 + skew log2 ep)     of the most loaded device
    A    = distinct experts touched  act = min(E / ep, A / ep (1 + hot log2 ep))           there
    per  = rl / act                  rows of an expert
    W    = act ng h I w              bytes of the weights read
    t_w  = W (1 - 3/4 hit) / (BW e_m)
    t_c  = act hypot(per + 16 pad, 16 pmin) 2 ng h I / (P e_c I / (I + I0))
    T    = t0 + t_E E / 100 + pnorm(t_w, t_c) + (rows (h c1 + I c2) + rl (h + I) c3) 2 / BW

``A`` is min(E, T k) when balanced, else the expected number of distinct experts, sum of 1 - (1 - q_r)^T with q_r the
chance that a token picks expert r. ``skew`` and ``hot`` act on power laws only. Replays of a measurement find small
weights in L2, hit = 1 / (1 + (W / (c L2))^4), four times as fast as HBM; in serving every weight is cold and hit = 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware, pnorm

COEFFICIENTS = (
    Coefficient("launch_s", 20e-6, 2e-6, 80e-6, "t0: the few kernels of the operator"),
    Coefficient("per_100_experts_s", 1e-6, 0.01e-6, 20e-6, "t_E: sorting rows by expert, per 100 experts"),
    Coefficient("memory_efficiency", 0.8, 0.3, 0.97, "e_m: share of the HBM peak reading weights"),
    Coefficient("cached_share", 0.4, 0.02, 1.0, "c: share of L2 that keeps weights between replays"),
    Coefficient("compute_efficiency", 0.6, 0.1, 0.98, "e_c: share of the tensor-core peak at great width"),
    Coefficient("half_width", 200.0, 1.0, 3000.0, "I0: expert width at which half of that is reached"),
    Coefficient("padding", 0.5, 0.01, 8.0, "pad: rows wasted in the tiles of an expert, in 16 rows"),
    Coefficient("least_tile", 1.0, 0.1, 8.0, "pmin: smallest tile, in 16 rows"),
    Coefficient("sharpness", 3.0, 1.0, 12.0, "p: how sharply the slowest resource wins"),
    Coefficient("skew", 0.2, 0.001, 1.0, "extra rows of the most loaded device under a power law, per doubling of ep"),
    Coefficient("hot", 0.05, 0.001, 1.0, "extra experts touched on that device, per doubling of ep"),
    Coefficient("hidden_passes", 1.0, 0.05, 20.0, "c1: passes over rows x hidden (gather, weighted sum)"),
    Coefficient("inter_passes", 1.0, 0.02, 20.0, "c2: passes over rows x width (activation)"),
    Coefficient("local_passes", 0.5, 0.01, 12.0, "c3: passes over the rows of this device"),
)
# Bytes a second out of L2 over those out of HBM, about, on all these devices.
L2_SPEED = 4.0


class MoeShape(NamedTuple):
    """Sizes of expert layers, arrays that broadcast; ``touched`` = distinct experts, ``power_law`` = 1 or 0."""

    tokens: Any
    hidden: Any
    inter: Any
    topk: Any
    experts: Any
    ep: Any
    matrices: Any
    touched: Any
    power_law: Any


@lru_cache(maxsize=4096)
def pick_chances(experts: int, topk: int, alpha: float) -> Array:
    """Chance of every expert to be among the ``topk`` of a token, when weights fall as rank^-alpha (0: balanced).

    Chances are proportional to the weights and sum to ``topk``; an expert picked by every token is held at 1 and the
    rest share what is left.
    """
    weights = np.arange(1, experts + 1, dtype=float) ** -alpha
    certain = 0
    while certain < topk:
        chances = (topk - certain) * weights / weights[certain:].sum()
        if chances[certain] <= 1:
            break
        certain += 1
    chances[:certain] = 1.0
    return np.asarray(chances)


def touched_experts(tokens: Any, experts: int, topk: int, alpha: float) -> Array:
    """Distinct experts that ``tokens`` tokens reach: min(E, T k) when balanced, expected under a power law."""
    tokens = np.asarray(tokens, dtype=float)
    if alpha == 0:
        return np.asarray(np.minimum(float(experts), tokens * topk))
    missed = (1 - pick_chances(experts, topk, alpha)) ** tokens[..., None]
    return np.asarray((1 - missed).sum(axis=-1))


def _active(s: MoeShape, hot: float) -> Any:
    """Experts touched on the most loaded device; at least one expert of one row."""
    grown = s.touched / s.ep * (1 + hot * s.power_law * np.log2(s.ep))
    return np.maximum(np.minimum(s.experts / s.ep, grown), np.minimum(1.0, s.touched))


def moved_bytes(s: MoeShape, weight_bytes: float) -> Any:
    """Bytes the average device must move: weights of the experts touched there, and its rows in and out once."""
    weights = np.minimum(s.experts, s.touched) / s.ep * s.matrices * s.hidden * s.inter * weight_bytes
    return weights + 2 * s.tokens * s.hidden * 2


def roofline_s(s: MoeShape, weight_bytes: float, hw: Hardware) -> Array:
    """Least time of the average device: its rows at peak FLOP/s, or its bytes at peak HBM."""
    flops = 2 * s.tokens * s.topk / s.ep * s.matrices * s.hidden * s.inter
    return np.asarray(np.maximum(flops / hw.flops_per_s, moved_bytes(s, weight_bytes) / hw.bytes_per_s))


def moe_s(s: MoeShape, weight_bytes: float, c: Coefficients, hw: Hardware, *, cold: bool = True) -> Array:
    """Seconds of the experts on the most loaded device, without residual; ``cold``: no weight is in L2."""
    rows = s.tokens * s.topk
    local = rows / s.ep * (1 + s.power_law * c["skew"] * np.log2(s.ep))
    active = _active(s, c["hot"])
    per = local / active
    matrix = s.matrices * s.hidden * s.inter
    read = active * matrix * weight_bytes
    if not cold:
        read = read * (1 - (1 - 1 / L2_SPEED) / (1 + (read / (c["cached_share"] * hw.l2_bytes)) ** 4))
    weights = read / (hw.bytes_per_s * c["memory_efficiency"])
    padded = np.hypot(per + 16 * c["padding"], 16 * c["least_tile"])
    rate = hw.flops_per_s * c["compute_efficiency"] * s.inter / (s.inter + c["half_width"])
    compute = active * padded * 2 * matrix / rate
    passes = rows * (s.hidden * c["hidden_passes"] + s.inter * c["inter_passes"])
    passes = passes + local * (s.hidden + s.inter) * c["local_passes"]
    fixed = c["launch_s"] + c["per_100_experts_s"] * s.experts / 100
    return np.asarray(fixed + pnorm([weights, compute], c["sharpness"]) + 2 * passes / hw.bytes_per_s)


def residual_coordinates(s: MoeShape) -> tuple[Any, ...]:
    """Coordinates of the correction: routing, experts per chosen one, ep, size of an expert's matrix, tokens."""
    return 1.0 + s.power_law, s.experts / s.topk, s.ep, s.hidden * s.inter, s.tokens
