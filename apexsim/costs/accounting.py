"""What a run's steps took in all, worked out after it: joules, FLOPs, bytes, and device seconds by evidence.

All figures are of all devices together; a device that waits for another pipeline stage or has no batch is not working
and is left to the idle power of whoever sums up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.energy import limited
from apexsim.costs.forms.hardware import Array
from apexsim.costs.steps import StepCost
from apexsim.costs.work import Columns, work_of
from apexsim.specs.power import CLOCK_VARIANTS
from apexsim.tables import Table, blocks
from apexsim.units import NS_PER_S

Key = TypeVar("Key")


@dataclass(frozen=True)
class Accounting:
    """Totals over all devices. ``energy_j`` by operator; ``seconds`` of device time by (operator, evidence).

    Operators are the kinds of a device profile, and ``host``. Evidence is ``fitted``, ``estimated``, or
    ``extrapolated`` where a size lay outside what was measured. ``energy_range_j``: least and most joules where the
    device runs at a clock that was not measured; None at the measured one. ``spread_s``: standard deviation of the
    seconds of each operator, all its runs wrong together. ``step_j`` and ``step_s``: joules and device seconds of each
    row of steps.
    """

    energy_j: dict[str, float]
    flops: float
    bytes_moved: float
    seconds: dict[tuple[str, str], float]
    energy_range_j: tuple[float, float] | None = None
    spread_s: dict[str, float] = field(default_factory=dict)
    step_j: Array = field(default_factory=lambda: np.zeros(0))
    step_s: Array = field(default_factory=lambda: np.zeros(0))


def account(cost: StepCost, steps: Columns, chunks: Columns, *, time_scale: float = 1.0) -> Accounting:
    """Sum up the work of a run's rows (see ``work_of``), each taking ``time_scale`` times as long as it costs.

    A scale other than 1 puts a measured step time in place of the predicted one.
    """
    profile = cost.tables.costs.profile
    power = profile.power if profile.clock_mhz is None else profile.power.at(profile.clock_mhz)
    works = list(work_of(cost, steps, chunks))
    energy_j: defaultdict[str, float] = defaultdict(float)
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    spread_s: defaultdict[str, float] = defaultdict(float)
    drawn = limited(power, works, len(steps["repeats"]), time_scale)
    for work, joules in zip(works, drawn.by_work_j, strict=True):
        energy_j[work.kind] += joules
        spent_s = time_scale * work.total(work.seconds)
        spread_s[work.kind] += work.spread * spent_s
        beyond_s = time_scale * work.total(np.where(work.outside, work.seconds, 0.0)) if np.any(work.outside) else 0.0
        for how, some_s in ((work.evidence, spent_s - beyond_s), ("extrapolated", beyond_s)):
            if some_s > 0:
                seconds[work.kind, how] += some_s
    flops = sum(work.total(work.flops) for work in works)
    bytes_moved = sum(work.total(work.bytes_moved) for work in works)
    possible = None
    if profile.clock_mhz is not None:
        variants = [profile.power.at(profile.clock_mhz, variant) for variant in CLOCK_VARIANTS]
        totals = [sum(limited(each, works, len(steps["repeats"]), time_scale).by_work_j) for each in variants]
        possible = min(totals), max(totals)
    by_step = drawn.by_step_j, drawn.by_step_s
    return Accounting(dict(energy_j), flops, bytes_moved, dict(seconds), possible, dict(spread_s), *by_step)


class RunningAccount:
    """Adds up the work of a run a block of rows at a time; its totals are those of ``account``, without the rows'."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self.total = Accounting({}, 0.0, 0.0, {})

    def add(self, steps: Columns, chunks: Columns) -> dict[str, NDArray[Any]]:
        """The rows of steps again, each with its joules and its device seconds of work."""
        part = account(self._cost, steps, chunks)
        self.total = _summed(self.total, part)
        return {**steps, "energy_j": part.step_j, "working_s": part.step_s}


def _summed(one: Accounting, other: Accounting) -> Accounting:
    ranges = [each.energy_range_j for each in (one, other) if each.energy_range_j]
    return Accounting(
        _both(one.energy_j, other.energy_j),
        one.flops + other.flops,
        one.bytes_moved + other.bytes_moved,
        _both(one.seconds, other.seconds),
        (sum(least for least, _ in ranges), sum(most for _, most in ranges)) if ranges else None,
        _both(one.spread_s, other.spread_s),
    )


def _both(one: Mapping[Key, float], other: Mapping[Key, float]) -> dict[Key, float]:
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}


def worked_s(cost: StepCost, steps: Table, pipeline_ns: int) -> float:
    """Device seconds of work of a whole run: the same to the last bit however decode steps were put into rows.

    Steps with prompts have a row each. Those that only decode add up in whole nanoseconds: on one stage of a replica
    their rows say how long they took, ``pipeline_ns`` is what they took on all stages of a pipeline.
    """
    decode_ns = pipeline_ns
    if cost.stages == 1:
        times = blocks(steps, "start_ns", "end_ns", "chunk_tokens")
        decode_ns = sum(int((end - start)[prompts == 0].sum()) for start, end, prompts in times)
    parts = blocks(steps, "working_s", "chunk_tokens")
    prompts_s = math.fsum(chain.from_iterable(spent_s[prompts > 0].tolist() for spent_s, prompts in parts))
    return prompts_s + decode_ns * cost.lowered.stage_devices / NS_PER_S
