"""What the devices of pools did in a run: joules, work and seconds, of each pool and of all together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apexsim.metrics import ratio

if TYPE_CHECKING:
    from apexsim.costs.accounting import Accounting
    from apexsim.costs.memory import MemoryPlan


@dataclass(frozen=True)
class Usage:
    """What the devices did, all of them together: joules while working, work done, and working seconds by operator.

    ``seconds`` maps operator -> evidence (fitted, estimated, extrapolated) -> device seconds. None of it is known for
    a cost model that was injected. ``energy_range_j``: least and most joules at a clock that was not measured.
    ``spread_s``: standard deviation of the seconds of each operator. ``clock_s``: working seconds by the clock of the
    run, whose integers add up to the same whichever way steps were simulated; NaN where no run kept it.
    """

    energy_j: dict[str, float] = field(default_factory=dict)
    flops: float = math.nan
    bytes_moved: float = math.nan
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    energy_range_j: tuple[float, float] | None = None
    spread_s: dict[str, float] = field(default_factory=dict)
    clock_s: float = math.nan

    @classmethod
    def of(cls, accounting: Accounting, clock_s: float = math.nan) -> Usage:
        """The same figures, operators in alphabetical order so that equal runs are written alike."""
        seconds: dict[str, dict[str, float]] = {}
        for (operator, evidence), spent_s in sorted(accounting.seconds.items()):
            seconds.setdefault(operator, {})[evidence] = float(spent_s)
        energy_j = {operator: float(joules) for operator, joules in sorted(accounting.energy_j.items())}
        spread_s = {operator: float(spent_s) for operator, spent_s in sorted(accounting.spread_s.items())}
        work = float(accounting.flops), float(accounting.bytes_moved)
        return cls(energy_j, *work, seconds, accounting.energy_range_j, spread_s, clock_s)

    @classmethod
    def total(cls, usages: Sequence[Usage]) -> Usage:
        """Of several pools together; errors of an operator are the same on all of them. Unknown where one of them is.

        A pool at a measured clock draws what it draws at the least and at the most.
        """
        if len(usages) == 1 or not all(usage.seconds for usage in usages):
            return usages[0] if len(usages) == 1 else cls()
        drawn_j = [math.fsum(usage.energy_j.values()) for usage in usages]
        ranges_j = [usage.energy_range_j or (j, j) for usage, j in zip(usages, drawn_j, strict=True)]
        low_j, high_j = (math.fsum(ends) for ends in zip(*ranges_j, strict=True))
        operators = sorted({operator for usage in usages for operator in usage.seconds})
        return cls(
            energy_j=_summed([usage.energy_j for usage in usages]),
            flops=math.fsum(usage.flops for usage in usages),
            bytes_moved=math.fsum(usage.bytes_moved for usage in usages),
            seconds={each: _summed([usage.seconds.get(each, {}) for usage in usages]) for each in operators},
            energy_range_j=(low_j, high_j) if any(usage.energy_range_j for usage in usages) else None,
            spread_s=_summed([usage.spread_s for usage in usages]),
            clock_s=math.fsum(usage.working_s for usage in usages),
        )

    @property
    def working_s(self) -> float:
        """Device seconds of work: by the clock where one was kept, else those of all operators."""
        if not math.isnan(self.clock_s):
            return self.clock_s
        return math.fsum(spent for by_evidence in self.seconds.values() for spent in by_evidence.values())

    @property
    def estimated_share(self) -> float:
        """Share of the working time whose cost was not fitted for what it was used for."""
        return math.fsum(share for by in self.shares.values() for how, share in by.items() if how != "fitted")

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """``seconds`` as shares of all working time."""
        total = self.working_s
        return {
            operator: {evidence: ratio(spent, total) for evidence, spent in by_evidence.items()}
            for operator, by_evidence in self.seconds.items()
        }


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = sorted({key for part in parts for key in part})
    return {key: math.fsum(part[key] for part in parts if key in part) for key in keys}


@dataclass(frozen=True)
class PoolRecord:
    """What the replicas of a pool had and did.

    ``kv_blocks``: size of one replica's KV cache. ``memory``: what a replica holds (``MemoryPlan.figures``). ``usage``:
    of all devices of the pool.
    """

    kv_blocks: int
    memory: dict[str, Any]
    usage: Usage

    @classmethod
    def of(cls, memory: MemoryPlan, context_limit: int, accounting: Accounting | None, worked_s: float) -> PoolRecord:
        """The record of a pool that served requests of up to ``context_limit`` tokens."""
        usage = Usage.of(accounting, worked_s) if accounting else Usage()
        return cls(memory.blocks, memory.figures(context_limit), usage)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> PoolRecord:
        """What ``asdict`` made of one, from JSON."""
        saved = dict(record["usage"])
        possible = saved.pop("energy_range_j")
        known: dict[str, Any] = {key: math.nan if value is None else value for key, value in saved.items()}
        usage = Usage(**known, energy_range_j=tuple(possible) if possible else None)
        return cls(record["kv_blocks"], record["memory"], usage)
