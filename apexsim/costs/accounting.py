"""What a run's steps took in all, worked out after it: joules, FLOPs, bytes, and device seconds by evidence.

All figures are of all devices together; a device that waits for another pipeline stage or has no batch is not working
and is left to the idle power of whoever sums up.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from apexsim.costs.energy import joules
from apexsim.costs.steps import StepCost
from apexsim.costs.work import Columns, work_of


@dataclass(frozen=True)
class Accounting:
    """Totals over all devices. ``energy_j`` by operator; ``seconds`` of device time by (operator, evidence).

    Operators are the kinds of a device profile, and ``host``. Evidence is ``fitted``, ``estimated``, or
    ``extrapolated`` where a size lay outside what was measured.
    """

    energy_j: dict[str, float]
    flops: float
    bytes_moved: float
    seconds: dict[tuple[str, str], float]


def account(cost: StepCost, steps: Columns, chunks: Columns, *, time_scale: float = 1.0) -> Accounting:
    """Sum up the work of a run's rows (see ``work_of``), each taking ``time_scale`` times as long as it costs.

    A scale other than 1 puts a measured step time in place of the predicted one.
    """
    power = cost.tables.costs.profile.power
    energy_j: defaultdict[str, float] = defaultdict(float)
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    flops = bytes_moved = 0.0
    for work in work_of(cost, steps, chunks):
        # Sums, not np.dot: a threaded BLAS may add in another order from run to run.
        energy_j[work.kind] += float((joules(power, work, time_scale) * work.runs).sum())
        flops += float((work.flops * work.runs).sum())
        bytes_moved += float((work.bytes_moved * work.runs).sum())
        spent = time_scale * work.seconds * work.runs
        beyond = float(spent[np.broadcast_to(work.outside, spent.shape)].sum())
        for how, some_s in ((work.evidence, float(spent.sum()) - beyond), ("extrapolated", beyond)):
            if some_s > 0:
                seconds[work.kind, how] += some_s
    return Accounting(dict(energy_j), flops, bytes_moved, dict(seconds))
