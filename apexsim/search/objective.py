"""What makes a plan good: the figure it is ranked by, and the further runs that some of these figures need.

The first run of every plan is the workload as given, so attainment and latencies mean the same under every objective.
``throughput`` runs the requests once more, all at once; ``goodput`` runs longer ones at as many rates as its bisection
asks for. ``cost`` and ``energy`` are those of the steady window: a whole run's hold its ramp and drain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from apexsim.errors import BadInput, nearest
from apexsim.search.goodput import RATE_TOLERANCE, goodput, scout
from apexsim.search.outcomes import Figures
from apexsim.search.trial import Trial
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests
from apexsim.steady import COST, ENERGY

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
    "requests": ("requests", "total"),
    "requests_finished": ("requests", "finished"),
    "requests_rejected": ("requests", "rejected"),
    "requests_unfinished": ("requests", "unfinished"),
    "duration_s": ("duration_s",),
    "steady_usd_per_million_output_tokens": ("steady", "usd_per_million_output_tokens"),
    "steady_usd_half_width": ("steady", "half_width", COST),
    "steady_usd_wanted_requests": ("steady", "wanted_of", COST),
    "steady_energy_per_output_token_j": ("steady", "energy_per_output_token_j"),
    "steady_energy_half_width": ("steady", "half_width", ENERGY),
    "steady_energy_wanted_requests": ("steady", "wanted_of", ENERGY),
    "steady_window_s": ("steady", "window_s"),
    "steady_share": ("steady", "share"),
    "energy_low_j": ("uncertainty", "energy_per_output_token_j", "low"),
    "energy_high_j": ("uncertainty", "energy_per_output_token_j", "high"),
}


class Break(NamedTuple):
    """A figure that breaks a tie: less is better unless ``highest``. ``form`` writes it for people."""

    column: str
    title: str
    form: str
    highest: bool = False


BREAKS = (
    Break("attainment", "SLO attainment", "{:.2%}", highest=True),
    Break("e2e_p90_s", "e2e p90", "{:.4g} s"),
    Break("devices", "devices", "{:.0f}"),
)

# A gap between two plans that is no larger is nobody's reason to choose: prices and costs are less sure than that.
LEAST_GAP = 0.005


@dataclass(frozen=True, slots=True)
class Objective:
    """Plans are ranked by the figure ``column``, least first or ``highest`` first.

    ``probe`` makes the further runs that the figure needs, after ``scout`` has had a first look at all plans; ``runs``
    is about how many a plan takes in all. ``own_rate`` says whether a plan must keep the SLO on the workload
    as given; goodput does not ask that, for it is itself a rate at which the SLO is kept. ``lasting``: a plan must keep
    up with the workload too, or its figure is none that lasts; ``window``: which figure of the steady window it is.
    ``resolution``: two plans tie where they differ by no larger a share. ``breaks``: ties go by these figures.
    ``half_width`` and ``range``: the figures that hold the relative half-width of the sampling error, and the least
    and most that the errors of the model allow, around ``whole``, the figure of the whole run. ``wanted``: that which
    holds how many requests would make the window long enough.
    """

    name: str
    column: str
    title: str
    unit: str
    highest: bool = False
    own_rate: bool = True
    lasting: bool = False
    window: str | None = None
    any_devices: bool = False
    runs: int = 1
    scout: Callable[[Trial], Figures] | None = None
    probe: Callable[[Trial], Figures] | None = None
    resolution: float = LEAST_GAP
    breaks: tuple[Break, ...] = BREAKS
    half_width: str | None = None
    wanted: str | None = None
    range: tuple[str, str] | None = None
    whole: str | None = None

    def value(self, figures: Mapping[str, float | None]) -> float | None:
        """The figure that counts; None when not known."""
        return figures.get(self.column)

    def error(self, figures: Mapping[str, float | None]) -> float | None:
        """Half-width of the sampling error of the figure that counts, in its unit; None when not known."""
        if self.any_devices:
            return 0.0  # devices are counted
        value, share = self.value(figures), figures.get(self.half_width) if self.half_width else None
        return None if value is None or share is None else share * abs(value)

    def window_of(self, steady: Mapping[str, Any]) -> str:
        """The kind of a run's steady part, for the figure that counts: others may be short."""
        if self.window is None or steady["kind"] not in ("steady", "short"):
            return str(steady["kind"])
        return "short" if steady["short_of"][self.window] else "steady"

    def wanted_requests(self, figures: Mapping[str, float | None]) -> float | None:
        """About how many requests would make the window long enough; None where it is, or where that is not known."""
        return figures.get(self.wanted) if self.wanted else None

    def accepts(self, figures: Mapping[str, float | None], window: str, slo: SLO) -> bool:
        """Whether a plan with these figures is good enough to be chosen; ``window`` is the kind of its steady part."""
        if not self.own_rate:
            return self.value(figures) is not None
        attainment = figures["attainment"]
        keeps = attainment is not None and attainment >= slo.target
        return keeps and not (self.lasting and window == "growing")

    def explain(self, figures: Mapping[str, float | None], steady: Mapping[str, Any], slo: SLO) -> str:
        """Why a plan with these figures is not accepted, or what to know about one that is; mostly nothing."""
        if not self.own_rate:
            if not self.accepts(figures, steady["kind"], slo):
                return f"at no rate tried {slo.target_words} of requests keep the SLO"
            return "" if figures["goodput_span_s"] else "by short probes, which flatter: it is far behind the best"
        attainment = figures["attainment"]
        if attainment is None:
            return "no request tells the attainment"
        if missed := slo.missed(attainment):
            return missed
        if self.window and steady["kind"] in ("steady", "short"):
            return steady["short_of"][self.window] or ""
        return str(steady["reason"]) if self.window or (self.lasting and steady["kind"] == "growing") else ""

    def check(self, requests: Requests, slo: SLO) -> None:
        """Raise ``BadInput`` where the objective has no meaning for the workload or the SLO."""
        if (self.any_devices or not self.own_rate) and not slo.limited:
            would_do = f"{self.name} needs a limit to keep: give --slo, as in ttft_s=0.5,tpot_s=0.05"
            raise BadInput(would_do, where="slo")
        if not self.own_rate and not math.isfinite(requests.rate_per_s):
            raise BadInput("goodput scales arrival times: give a workload that has them", where=requests.name)


def read_figures(summary: Mapping[str, Any]) -> Figures:
    """The figures of a plan, read from the summary of a run; NaN becomes None."""
    return {column: _number(_at(summary, path)) for column, path in FIGURES.items()}


def _all_at_once(trial: Trial) -> Figures:
    saturated = read_figures(trial.run(trial.supply.requests.all_at_once()))
    return {"saturated_output_tokens_per_s": saturated["output_tokens_per_s"]}


def _at(summary: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = summary
    for key in path:
        value = None if value is None else value[key]  # the interval of a figure that is not known is None
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
            runs=100,
            scout=scout,
            probe=goodput,
            resolution=RATE_TOLERANCE,
        ),
        Objective(
            "energy",
            "steady_energy_per_output_token_j",
            "energy per output token",
            "J",
            lasting=True,
            window=ENERGY,
            half_width="steady_energy_half_width",
            wanted="steady_energy_wanted_requests",
            range=("energy_low_j", "energy_high_j"),
            whole="energy_per_output_token_j",
        ),
        Objective(
            "cost",
            "steady_usd_per_million_output_tokens",
            "cost per million output tokens",
            "USD",
            lasting=True,
            window=COST,
            half_width="steady_usd_half_width",
            wanted="steady_usd_wanted_requests",
        ),
        Objective(
            "devices",
            "devices",
            "devices",
            "",
            lasting=True,
            window=COST,
            wanted="steady_usd_wanted_requests",
            any_devices=True,
            resolution=0.0,
            breaks=(BREAKS[0], Break("steady_energy_per_output_token_j", "energy per output token", "{:.4g} J")),
        ),
    )
}


def objective_named(name: str, where: object = "--objective") -> Objective:
    """The objective of that name; ``BadInput`` at ``where`` when there is none."""
    if name not in OBJECTIVES:
        raise BadInput(f"unknown objective; {nearest(name, OBJECTIVES)}", where=where, got=name)
    return OBJECTIVES[name]
