"""How far a figure of a run may be off: from the errors of its kernels' fits, and from measured runs left out.

Kernels. Every operator has a relative standard deviation s_i (``OperatorCosts.spread``). Its errors go the same way in
all of a run, those of different operators have nothing to do with each other; with T_i its seconds on all devices:

    s = sqrt(sum (s_i T_i)^2) / T,  T = sum T_i,    interval = figure x exp(+- z s)

with z the quantile of the normal law. Latencies and joules are taken to go with the device's time, rates against it.

Measured runs. Of runs that were measured, r = ln(measured / predicted). A group (model, device, engine) counts as one
draw: a row weighs 1 / rows of its group. With m the weighted median of r and K groups, the interval of a run of a group
that nobody measured is

    figure x exp(m +- q),  q = weighted quantile of |r - m| at level (K + 1) / K

which is split-conformal prediction over groups (hierarchical conformal prediction: Lee, Barber, Willett,
arXiv 2306.06342). The class of a run is its engine and kind of model; where that has fewer than ``LEAST_GROUPS``
groups, any engine's runs of that kind stand in, then all runs. So they do where q would rest on the worst rows alone
(level (K + 1) / K > 0.95); where all do, the first of them whose worst row is enough (<= 1). What a class that was
passed over says at 0.95 stays inside, so that a higher level is never a narrower interval.

A result's interval reaches as far as either.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from apexsim.errors import BadInput, nearest
from apexsim.specs.base import Spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apexsim.results import SimulationResult
    from apexsim.usage import Usage

Figure = Literal["ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s", "energy_per_output_token_j"]
FIGURES: tuple[Figure, ...] = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s", "energy_per_output_token_j")
# The level of the intervals in a summary.
LEVEL = 0.8
ANY = "any"
# The highest quantile taken from a class while a wider one has a lower; the fewest groups that keep within it at 0.8.
MOST_PROBABLE = 0.95
LEAST_GROUPS = 6
TABLE = "intervals.json"


class Interval(NamedTuple):
    """Where a figure lies at a level of confidence; ``basis`` says what that rests on."""

    low: float
    high: float
    basis: str


class Coverage(Spec):
    """Share of the rows of a group left out that lay inside the intervals the others gave, mean over ``groups``.

    Of the classes' own groups, whatever stood in for a class that was too small.
    """

    level: float
    share: float
    groups: int


class Residuals(Spec):
    """ln(measured / predicted) of one figure over the runs of one class; ``any`` pools engines or kinds of model.

    ``median`` is weighted by group, ``spread`` the quantiles of |r - median| at the ``probabilities`` of the table.
    """

    engine: str
    model_kind: str
    figure: Figure
    groups: int = Field(ge=1)
    rows: int = Field(ge=1)
    median: float
    spread: tuple[float, ...]
    coverage: tuple[Coverage, ...] = ()


class IntervalTable(Spec):
    """Residuals of measured runs by class and figure; ``devices`` are those they ran on."""

    source: str
    devices: tuple[str, ...]
    probabilities: tuple[float, ...]
    residuals: tuple[Residuals, ...]

    @model_validator(mode="after")
    def _quantiles_pair_up(self) -> IntervalTable:
        if any(len(each.spread) != len(self.probabilities) for each in self.residuals):
            raise ValueError("every spread needs a quantile for each of the probabilities")
        return self

    def range_of(self, figure: Figure, level: float, engine: str, model_kind: str) -> tuple[float, float, str] | None:
        """Factors on a prediction, least and most, and the class they come from; None where all have too few groups."""
        classes = [(engine, model_kind), (ANY, model_kind), (ANY, ANY)]
        enough = [each for each in self.residuals if each.figure == figure and each.groups >= LEAST_GROUPS]
        mine = [each for each in enough if (each.engine, each.model_kind) in classes]
        mine.sort(key=lambda each: classes.index((each.engine, each.model_kind)))
        low, high = math.inf, -math.inf
        for most in (MOST_PROBABLE, 1.0):
            for found in mine:
                probability = level * (found.groups + 1) / found.groups
                reach = float(np.interp(min(probability, most), self.probabilities, found.spread))
                low, high = min(low, found.median - reach), max(high, found.median + reach)
                if probability <= most:
                    return math.exp(low), math.exp(high), _named(found)
        return None


def _named(found: Residuals) -> str:
    engine = "any engine" if found.engine == ANY else found.engine
    kind = "any kind of model" if found.model_kind == ANY else f"{found.model_kind} models"
    return f"{found.groups} groups of measured runs, {engine}, {kind}"


@cache
def shipped_table() -> IntervalTable:
    """The table that comes with apexsim, made by ``apexsim calibrate-intervals``."""
    text = (resources.files("apexsim") / TABLE).read_text(encoding="utf-8")
    return read_table(text, TABLE)


def read_table(text: str, where: object) -> IntervalTable:
    """The table in a JSON text."""
    import json

    try:
        data = json.loads(text)
    except ValueError as error:
        raise BadInput(f"not valid JSON: {error}", where=where) from None
    return parse_spec(IntervalTable, data, where)


def kernel_spread(usage: Usage) -> float:
    """Relative standard deviation of the time of all devices; NaN where the operators are not known."""
    if not usage.seconds:
        return math.nan
    return math.sqrt(math.fsum(spread_s**2 for spread_s in usage.spread_s.values())) / usage.working_s


def interval(
    result: SimulationResult, predicted: float | None, figure: str, level: float, table: IntervalTable | None = None
) -> Interval | None:
    """The interval around the ``predicted`` mean (or rate) of a run; None where the run has no such figure.

    ``table``: the shipped one unless given. Raises BadInput for a figure that is not one of ``FIGURES`` or a level
    outside of 0 to 1.
    """
    if figure not in FIGURES:
        raise BadInput(nearest(figure, FIGURES), key="figure", got=figure)
    if not 0 < level < 1:
        raise BadInput("give a share between 0 and 1, as 0.8", key="level", got=level)
    sigma, table = kernel_spread(result.usage), table or shipped_table()
    if predicted is None or not math.isfinite(predicted) or not math.isfinite(sigma):
        return None
    kernels = math.exp(NormalDist().inv_cdf((1 + level) / 2) * sigma)
    low, high, basis = 1 / kernels, kernels, f"kernels, {sigma:.1%} of device time"
    server, *others = result.servers
    # No run of several pools was measured.
    measured = None if others else table.range_of(figure, level, server.engine.engine, server.model.kind)
    if measured is None:
        return Interval(predicted * low, predicted * high, f"{basis}; too few measured runs are like it")
    low, high = min(low, measured[0]), max(high, measured[1])
    device = server.device.name
    apart = "" if device in table.devices else f"; none on {device}"
    return Interval(predicted * low, predicted * high, f"{basis}; {measured[2]}{apart}")


def predictions(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What the summary of a run says of each figure."""
    return {
        "ttft_s": summary["ttft_s"]["mean"],
        "tpot_s": summary["tpot_s"]["mean"],
        "e2e_s": summary["e2e_s"]["mean"],
        "output_tokens_per_s": summary["throughput"]["output_tokens_per_s"],
        "energy_per_output_token_j": summary["energy"]["per_output_token_j"],
    }


def intervals(result: SimulationResult, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data for a summary: the level, the spread of device time, and ``low``, ``high``, ``basis`` by figure."""
    around = {figure: interval(result, value, figure, LEVEL) for figure, value in predictions(summary).items()}
    plain: dict[str, Any] = {figure: found._asdict() if found else None for figure, found in around.items()}
    return {"level": LEVEL, "device_time_spread": kernel_spread(result.usage), **plain}
