"""What a proof found: predicted beside measured latencies, their errors, and whether these keep within bounds.

The measured figure of a load is the median of its repeats, and so is the score; the error of each stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

LATENCIES, STATISTICS = ("ttft", "tpot", "e2e"), ("mean", "p50", "p90")
# A change of speed between measuring and serving from which errors say as much of the machine as of the simulator.
NOTABLE_DRIFT = 0.10


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A statistic of a latency: predicted once, measured in every repeat. Seconds."""

    latency: str
    statistic: str
    predicted_s: float
    repeats_s: tuple[float, ...]

    @property
    def measured_s(self) -> float:
        """The median of the repeats."""
        return median(self.repeats_s)

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.measured_s - 1

    @property
    def errors(self) -> tuple[float, ...]:
        """The same of every repeat by itself."""
        return tuple(self.predicted_s / repeat_s - 1 for repeat_s in self.repeats_s)


@dataclass(frozen=True, kw_only=True)
class LoadVerdict:
    """A load: what it was, its figures, and the speed of the machine while it was served.

    ``slowness`` of each repeat is the time that fixed kernels took around it, over the time they took around the
    measuring.
    """

    name: str
    scored: bool
    rate_per_s: float
    requests: int
    figures: tuple[Figure, ...]
    slowness: tuple[float, ...]

    @property
    def role(self) -> str:
        """What it served for."""
        return "scored" if self.scored else "the host term was fitted on it"

    def broken(self, bounds: Mapping[str, float]) -> list[str]:
        """Means of a scored load that are further off than their bounds (by latency), in words."""
        means = [figure for figure in self.figures if figure.statistic == "mean"] if self.scored else []
        return [
            f"{self.name}: {figure.latency} mean is off by {figure.error:+.1%}, beyond {bounds[figure.latency]:.0%}"
            for figure in means
            if not abs(figure.error) <= bounds[figure.latency]
        ]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A whole proof. ``bounds`` are the largest errors of means that pass, by latency; ``spread`` is the least and the
    greatest time of the fixed kernels around the measuring, over their median."""

    device: str
    loads: Sequence[LoadVerdict]
    bounds: Mapping[str, float]
    step_s: float
    spread: tuple[float, float]
    wall_s: Mapping[str, float]

    @property
    def broken(self) -> list[str]:
        """Every bound that does not hold, in words."""
        return [line for load in self.loads for line in load.broken(self.bounds)]

    def said(self) -> list[str]:
        """What there is to say below the figures, a line each."""
        low, high = self.spread
        lines = [
            f"{self.device}; predicted with a host time of {1e3 * self.step_s:.2f} ms a step",
            f"fixed kernels took {low:.2f} to {high:.2f} of their median around the measuring, and around the serving "
            + ", ".join(f"{load.name} {' '.join(f'{x:.2f}' for x in load.slowness)}" for load in self.loads),
            ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.wall_s.items()),
        ]
        worst = max(abs(median(load.slowness) - 1) for load in self.loads)
        if worst > NOTABLE_DRIFT:
            lines.append(f"the machine changed its speed by {worst:.0%} between measuring and serving")
        limits = ", ".join(f"{latency} {limit:.0%}" for latency, limit in self.bounds.items())
        held = f"errors of means, median of {len(self.loads[0].slowness)} repeats, keep within {limits}"
        return [*lines, *(f"BROKEN {line}" for line in self.broken)] if self.broken else [*lines, held]

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        loads = [
            asdict(load)
            | {"figures": [{**asdict(f), "measured_s": f.measured_s, "error": f.error} for f in load.figures]}
            for load in self.loads
        ]
        return {**asdict(self), "loads": loads, "broken": self.broken}
