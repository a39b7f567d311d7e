"""Joules of work, by the power model of a device profile.

    P = active_w + j_per_byte bytes / t + j_per_flop FLOP / t       kernels, by their kind
    P = comm_w                                                      collectives
    P = gap_w                                                       inside a step, waiting for the host

A device is held at ``limit_w`` by its clocks over milliseconds, which is many kernels: so the joules of a step's
kernels are a smooth minimum of their sum and of what the limit leaves them in the time of the whole step. Measured
times contain the slower clocks already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array
from apexsim.costs.work import Work
from apexsim.specs.power import PowerModel


def joules(power: PowerModel, work: Work, time_scale: float = 1.0) -> Array:
    """Joules of one run of an operator at every size, if it takes ``time_scale`` times as long as ``work`` says.

    FLOPs and bytes stay: slower work draws less power, but more energy. The limit is left to ``limited``.
    """
    seconds = time_scale * work.seconds
    if work.dtype is None:
        return (power.gap_w if work.kind == "host" else power.comm_w) * seconds
    # MXFP4 experts run on fp8 tensor cores where the device has 4-bit ones, else on bf16 ones (see ``Hardware.of``).
    wide = "fp8" if "nvfp4" in power.j_per_flop else "bf16"
    drawn = power.of(work.kind, wide if work.dtype == "mxfp4" else COMPUTE_DTYPE.get(work.dtype, work.dtype))
    watts = drawn.active_w * work.busy + power.comm_w * (1 - work.busy)
    return watts * seconds + drawn.j_per_byte * work.bytes_moved + drawn.j_per_flop * work.flops


class Drawn(NamedTuple):
    """Joules of every work over all rows of steps, and joules and device seconds of every row over all works."""

    by_work_j: list[float]
    by_step_j: Array
    by_step_s: Array


def limited(power: PowerModel, works: Sequence[Work], steps: int, time_scale: float = 1.0) -> Drawn:
    """Joules of ``works`` over all runs in ``steps`` rows of steps, every step kept within the limit."""
    drawn = [work.by_run(joules(power, work, time_scale)) for work in works]
    kernels_j, others_j, spent_s = np.zeros(steps), np.zeros(steps), np.zeros(steps)
    for work, each in zip(works, drawn, strict=True):
        spent_s += work.by_step(work.by_run(time_scale * work.seconds), steps)
        if work.dtype is None:
            others_j += work.by_step(each, steps)
        else:
            kernels_j += work.by_step(each, steps)
    least = smooth_least(kernels_j, np.maximum(power.limit_w * spent_s - others_j, 0.0))
    share = np.divide(least, kernels_j, out=np.ones(steps), where=kernels_j > 0)
    by_work_j = [
        float((each if work.dtype is None else each * (share if work.step is None else share[work.step])).sum())
        for work, each in zip(works, drawn, strict=True)
    ]
    return Drawn(by_work_j, least + others_j, spent_s)


def smooth_least(first: Array, second: Array) -> Array:
    """Smooth minimum (a^-8 + b^-8)^(-1/8) of arrays >= 0: 8 % below the plain one where both are equal."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    share = np.divide(low, high, out=np.zeros_like(low), where=high > 0)
    fourth = (share * share) ** 2
    return np.asarray(low / np.sqrt(np.sqrt(np.sqrt(1 + fourth * fourth))))
