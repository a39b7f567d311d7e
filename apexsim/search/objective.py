"""What makes a plan good: the figure it is ranked by, and the further runs that some of these figures need.

The first run of every plan is the workload as given, so attainment and latencies mean the same under every objective.
``throughput`` runs the requests once more, all at once; ``goodput`` at as many rates as its bisection asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apexsim.errors import BadInput, nearest
from apexsim.search.outcomes import Figures
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests

Run = Callable[[Requests], Mapping[str, Any]]  # simulates one plan: requests in, summary out

# Figure of a plan: where a run's summary holds it.
FIGURES: dict[str, tuple[str, ...]] = {
    "attainment": ("slo", "attainment"),
    "good_requests_per_s": ("slo", "good_requests_per_s"),
    **{f"{key}_{q}_s": (f"{key}_s", q) for key in ("ttft", "tpot", "e2e") for q in ("p50", "p90", "p99")},
    "requests_per_s": ("throughput", "requests_per_s"),
    "output_tokens_per_s": ("throughput", "output_tokens_per_s"),
    "energy_per_output_token_j": ("energy", "per_output_token_j"),
    "mean_power_w": ("energy", "mean_power_w"),
    "usd_per_million_output_tokens": ("cost", "usd_per_million_output_tokens"),
    "usd_per_hour": ("cost", "usd_per_hour"),
    "mfu": ("utilization", "mfu"),
    "mbu": ("utilization", "mbu"),
    "kv_cache_peak": ("utilization", "kv_cache_peak"),
    "preemptions": ("preemptions",),
    "requests_finished": ("requests", "finished"),
    "requests_rejected": ("requests", "rejected"),
    "requests_unfinished": ("requests", "unfinished"),
    "duration_s": ("duration_s",),
}

RATE_TOLERANCE = 0.02  # goodput is bisected until its bracket is this narrow
MAX_DOUBLINGS = 12  # of the rate, up or down, within which goodput is looked for
STEADY_E2ES = 3  # arrivals over fewer end-to-end times than this are a burst, and their goodput is not a lasting one


@dataclass(frozen=True, slots=True)
class Objective:
    """Plans are ranked by the figure ``column``, least first or ``highest`` first.

    ``probe`` makes the further runs that the figure needs; ``runs`` is about how many a plan takes in all.
    ``own_rate`` says whether a plan must keep the SLO on the workload as given; goodput does not ask that, for it is
    itself a rate at which the SLO is kept.
    """

    name: str
    column: str
    title: str
    unit: str
    highest: bool = False
    own_rate: bool = True
    runs: int = 1
    probe: Callable[[Run, Requests, SLO, int], Figures] | None = None

    def measure(self, run: Run, requests: Requests, slo: SLO, devices: int) -> Figures:
        """All figures of a plan on ``devices`` devices, from as many runs as the objective needs."""
        figures = read_figures(run(requests))
        return figures | self.probe(run, requests, slo, devices) if self.probe else figures

    def value(self, figures: Mapping[str, float | None]) -> float | None:
        """The figure that counts; None when not known."""
        return figures.get(self.column)

    def accepts(self, figures: Mapping[str, float | None], slo: SLO) -> bool:
        """Whether a plan with these figures is good enough to be chosen."""
        if not self.own_rate:
            return self.value(figures) is not None
        attainment = figures["attainment"]
        return attainment is not None and attainment >= slo.target

    def explain(self, figures: Mapping[str, float | None], slo: SLO) -> str:
        """Why a plan with these figures is not accepted, or what to know about one that is; mostly nothing."""
        if self.own_rate:
            attainment = figures["attainment"]
            short = "" if attainment is None else f"attainment {attainment:.3f} is below the target {slo.target:g}"
            return "" if self.accepts(figures, slo) else short or "no request tells the attainment"
        if not self.accepts(figures, slo):
            return f"no rate tried keeps attainment at the target {slo.target:g}"
        span_s, e2e_s = figures["goodput_span_s"] or 0.0, figures["e2e_p90_s"] or 0.0
        brief = f"at its goodput all requests come within {span_s:.3g} s: more of them would tell the lasting rate"
        return brief if span_s < STEADY_E2ES * e2e_s else ""

    def check(self, requests: Requests, slo: SLO) -> None:
        """Raise ``BadInput`` where the objective has no meaning for the workload or the SLO."""
        if self.own_rate:
            return
        if slo.ttft_s is slo.tpot_s is slo.e2e_s is None:
            raise BadInput("goodput needs a limit to keep: give --slo, as in ttft_s=0.5,tpot_s=0.05", where="slo")
        if not math.isfinite(requests.rate_per_s):
            raise BadInput("goodput scales arrival times: give a workload that has them", where=requests.name)


def read_figures(summary: Mapping[str, Any]) -> Figures:
    """The figures of a plan, read from the summary of a run; NaN becomes None."""
    return {column: _number(_at(summary, path)) for column, path in FIGURES.items()}


def highest_passing(passes: Callable[[float], bool], start: float) -> float | None:
    """The highest value seen to pass, within ``RATE_TOLERANCE`` of one that does not.

    Looks from ``start`` as far as ``MAX_DOUBLINGS`` up or down first: where nothing changes on the way, the answer is
    that far end, or None when it does not pass either. Assumes that what passes at a value passes below it.
    """
    first = passes(start)
    factor = 2.0 if first else 0.5
    far = start * factor**MAX_DOUBLINGS
    if passes(far) == first:
        return far if first else None
    value = start
    while passes(value * factor) == first:
        value *= factor
    low, high = sorted((value, value * factor))
    while high > low * (1 + RATE_TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def _all_at_once(run: Run, requests: Requests, slo: SLO, devices: int) -> Figures:
    return {"saturated_output_tokens_per_s": read_figures(run(requests.all_at_once()))["output_tokens_per_s"]}


def _goodput(run: Run, requests: Requests, slo: SLO, devices: int) -> Figures:
    def keeps_slo(rate_per_s: float) -> bool:
        attainment = read_figures(run(requests.at_rate(rate_per_s)))["attainment"]
        return attainment is not None and attainment >= slo.target

    rate_per_s = highest_passing(keeps_slo, requests.rate_per_s)
    per_device = None if rate_per_s is None else rate_per_s / devices
    return {
        "goodput_requests_per_s": rate_per_s,
        "goodput_span_s": None if rate_per_s is None else requests.span_s * requests.rate_per_s / rate_per_s,
        "goodput_per_device_per_s": per_device,
    }


def _at(summary: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = summary
    for key in path:
        value = value[key]
    return value


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("latency", "e2e_p90_s", "e2e p90", "s"),
        Objective(
            "throughput",
            "saturated_output_tokens_per_s",
            "throughput with all requests at once",
            "tokens/s",
            highest=True,
            runs=2,
            probe=_all_at_once,
        ),
        Objective(
            "goodput",
            "goodput_per_device_per_s",
            "goodput per device",
            "requests/s",
            highest=True,
            own_rate=False,
            runs=12,
            probe=_goodput,
        ),
        Objective("energy", "energy_per_output_token_j", "energy per output token", "J"),
        Objective("cost", "usd_per_million_output_tokens", "cost per million output tokens", "USD"),
    )
}


def objective_named(name: str, where: object = "--objective") -> Objective:
    """The objective of that name; ``BadInput`` at ``where`` when there is none."""
    if name not in OBJECTIVES:
        raise BadInput(f"unknown objective; {nearest(name, OBJECTIVES)}", where=where, got=name)
    return OBJECTIVES[name]
