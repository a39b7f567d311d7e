"""Joules of work, by the power model of a device profile.

P = smooth minimum(limit_w, active_w + j_per_byte bytes / t + j_per_flop FLOP / t)    kernels
P = comm_w                                                                            collectives
P = gap_w                                                   inside a step, waiting for the host
"""

from __future__ import annotations

import numpy as np

from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array
from apexsim.costs.work import Work
from apexsim.specs.device import PowerModel


def joules(power: PowerModel, work: Work, time_scale: float = 1.0) -> Array:
    """Joules of one run of an operator at every size, if it takes ``time_scale`` times as long as ``work`` says.

    FLOPs and bytes stay: slower work draws less power, but more energy.
    """
    seconds = time_scale * work.seconds
    if work.dtype is None:
        return (power.gap_w if work.kind == "host" else power.comm_w) * seconds
    per_flop = power.j_per_flop.get(COMPUTE_DTYPE.get(work.dtype, work.dtype), power.j_per_flop["bf16"])
    drawn = power.active_w * seconds + power.j_per_byte * work.bytes_moved + per_flop * work.flops
    return smooth_least(drawn, power.limit_w * seconds)


def smooth_least(first: Array, second: Array) -> Array:
    """Smooth minimum (a^-8 + b^-8)^(-1/8) of arrays >= 0: 8 % below the plain one where both are equal."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    share = np.divide(low, high, out=np.zeros_like(low), where=high > 0)
    fourth = (share * share) ** 2
    return np.asarray(low / np.sqrt(np.sqrt(np.sqrt(1 + fourth * fourth))))
