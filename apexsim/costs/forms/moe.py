"""Fused experts of one device: reading the weights of the experts touched, or computing their padded rows.

Symbols: ``T`` tokens, ``k`` experts per token, ``E`` experts of the model, ``h`` hidden, ``I`` expert width on this
device, ``w`` bytes of a weight element, ``ng`` matrices of an expert (3 gated, 2 plain), P peak FLOP/s, BW HBM bytes/s.
Routing (see ``routing``) puts ``act`` distinct experts and ``rl`` rows on the device.

    rows = T k
    per  = rl / act                  rows of an expert
    W    = act ng h I w              bytes of the weights read
    t_w  = W (1 - 3/4 hit) / (BW e_m)
    t_c  = act hypot(per + 16 pad, 16 pmin) 2 ng h I / (P e_c I / (I + I0))
    T    = t0 + t_E E / 100 + pnorm(t_w, t_c) + (rows (h c1 + I c2) + rl (h + I) c3) 2 / BW

Replays of a measurement find small weights in L2, hit = 1 / (1 + (W / (c L2))^4), four times as fast as HBM; in serving
every weight is cold and hit = 0.
"""

from __future__ import annotations

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
    Coefficient("hidden_passes", 1.0, 0.05, 20.0, "c1: passes over rows x hidden (gather, weighted sum)"),
    Coefficient("inter_passes", 1.0, 0.02, 20.0, "c2: passes over rows x width (activation)"),
    Coefficient("local_passes", 0.5, 0.01, 12.0, "c3: passes over the rows of this device"),
)
# Bytes a second out of L2 over those out of HBM, about, on all these devices.
L2_SPEED = 4.0


class MoeShape(NamedTuple):
    """Sizes of expert layers, arrays that broadcast.

    ``active`` distinct experts and ``local`` rows are those of the device, ``tokens`` those of its whole group.
    """

    tokens: Any
    hidden: Any
    inter: Any
    topk: Any
    experts: Any
    ep: Any
    matrices: Any
    active: Any
    local: Any


def roofline_s(s: MoeShape, weight_bytes: float, hw: Hardware) -> Array:
    """Least time of the device: its rows at peak FLOP/s, or its weights and rows, in and out once, at peak HBM."""
    matrix = s.matrices * s.hidden * s.inter
    moved = s.active * matrix * weight_bytes + 2 * s.local / s.topk * s.hidden * 2
    return np.asarray(np.maximum(2 * s.local * matrix / hw.flops_per_s, moved / hw.bytes_per_s))


def moe_s(s: MoeShape, weight_bytes: float, c: Coefficients, hw: Hardware, *, cold: bool = True) -> Array:
    """Seconds of the experts on the device, without residual; ``cold``: no weight is in L2."""
    rows, active, local = s.tokens * s.topk, s.active, s.local
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
    """Coordinates of the correction: experts per chosen one, ep, size of an expert's matrix, tokens."""
    return s.experts / s.topk, s.ep, s.hidden * s.inter, s.tokens


def shape_name(hidden: float, width: float, topk: float, experts: float) -> str:
    """What the experts of a model are called in a profile, by the model's own sizes (``width``: of a whole expert)."""
    return "x".join(str(int(size)) for size in (hidden, width, topk, experts))


def shape_coordinates(split: Any, tokens: Any) -> tuple[Any, ...]:
    """Coordinates of the correction of one model: expert over tensor degree of its experts, tokens."""
    return split, tokens
