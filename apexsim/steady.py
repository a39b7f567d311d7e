"""The steady part of a run: what a token costs, in money and joules, once the system has filled and before it drains.

Window. An open loop: from the first arrival plus the time in which 99 % of requests leave once they are scheduled (at
most half of the arrivals' span), to the last arrival. A closed loop: from the end of the last answer of the first wave
(as many requests as there are clients) to the last arrival. Requests that all come at once have no steady part.

Flows. A request's tokens are spread evenly from its first to its last one, its prompt from when it was scheduled to
its first token, a row of steps evenly over its time. The window is cut into 10 to 20 batches of equal length, as long
as the 90th percentile of the end-to-end time where there are that few.

Tokens a second. o tokens a second are offered in the long run: by the law of a drawn workload, by the rows of a
trace. In the window of W seconds requests of X tokens came, and T tokens were made:

    tokens/s = o + (T - X) / W          half-width t sqrt(2) s / W

T - X is what the backlog lost. The chance of which requests happened to come cancels; what stays is the backlog's
at two moments, s its standard deviation at the ends of batches. t is Student's quantile at 95 %.
Joules a second: a straight line through the batches' tokens and prompt tokens a second (least squares), read at the
rates of the long run. Its half-width is that of a regression, and that of tokens/s beside it.
Where that is not known (a closed loop, requests refused or unfinished) both are plain ratios over the window; their
half-widths come from batch means, widened by the correlation of neighbouring batches.

Growth. The backlog grows where a straight line through it, in requests or in tokens still to make, rises beyond its
error (one-sided, 99 %, neighbours' correlation counted) and by more than 2 % of what came in the window. In a
window shorter than 5 times in which 99 % of requests leave the system may still be filling. There only requests that
were not scheduled yet tell growth, where they grow by more than 10 % of what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from apexsim.batch_means import UNKNOWN, Estimate, ratio_of, regressed, risen, student
from apexsim.flows import Flows, flows_of
from apexsim.metrics import ratio, spread_until
from apexsim.quantiles import Floats, Parts, Span, quantiles
from apexsim.tables import blocks, rows_of

if TYPE_CHECKING:
    from apexsim.results import SimulationResult

Kind = Literal["steady", "short", "growing", "all_at_once"]

LEAST_E2ES = 5.0  # a window holds as many 90th percentiles of the end-to-end time
WIDEST = 0.03  # relative half-width of a figure that may decide
LEAST_QUEUE_GROWTH = 0.1  # of what came in: a queue that grows more in a short window is no chance of a busy server
LEAST_GROWTH = 0.02  # of what came in the window; a backlog that grows less moves no figure by more
FEWEST_BATCHES, MOST_BATCHES = 10, 20
SPARE = 1.1  # of requests that are asked for beyond those that would just do
COST, ENERGY = "usd_per_million_output_tokens", "energy_per_output_token_j"
_WORDS = {COST: "cost", ENERGY: "energy"}
BY_LAW = "offered load, corrected by what the backlog changed over the window"
BY_RUN = "whole run"
BY_BATCHES = "ratio over the window, half-widths by batch means"


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What may be said of the steady part of a run.

    ``kind`` is one of:
    ``steady``: the figures stand.
    ``short``: they stand but decide nothing. The window is shorter than 5 end-to-end times (90th percentile), or a
    half-width is above 3 %.
    ``growing``: the backlog grows, so that there is no steady figure.
    ``all_at_once``: the figures are those of the whole run.

    ``reason``: why it is not ``steady``, and what would do.
    ``from_s`` and ``to_s``: the window on the run's clock; ``share`` of the duration lies in it.
    ``requests`` came in the window, ``output_tokens`` were made in it.
    ``half_width``: relative, at 95 %, of each figure.
    ``wanted_requests``: about how many of this workload would make the window long enough.
    ``estimator``: how the figures were had.
    ``kind`` and ``wanted_requests`` are of both figures, as strict as the stricter.
    ``short_of`` and ``wanted_of``: the same of each figure alone; None where the window is long enough for it.
    """

    kind: Kind
    reason: str
    from_s: float | None = None
    to_s: float | None = None
    window_s: float | None = None
    share: float = 0.0
    requests: int = 0
    output_tokens: int = 0
    output_tokens_per_s: float | None = None
    usd_per_million_output_tokens: float | None = None
    energy_per_output_token_j: float | None = None
    half_width: dict[str, float | None] = field(default_factory=lambda: {COST: None, ENERGY: None})
    wanted_requests: int | None = None
    short_of: dict[str, str | None] = field(default_factory=lambda: {COST: None, ENERGY: None})
    wanted_of: dict[str, int | None] = field(default_factory=lambda: {COST: None, ENERGY: None})
    estimator: str = ""


class Short(NamedTuple):
    """Why a window is too short, and about how many requests would do; empty and None where it is long enough."""

    reason: str = ""
    wanted: int | None = None


class Verdict(NamedTuple):
    """What may be said, and why; how the figures were had; how the window is too short, for both and for each."""

    kind: Kind
    reason: str
    estimator: str = ""
    wanted: int | None = None
    each: Mapping[str, Short] = {COST: Short(), ENERGY: Short()}


class Window(NamedTuple):
    """Where the steady part of a run may lie, on its clock; ``ramp_s`` from ``first_s`` on the system fills."""

    first_s: float
    from_s: float
    to_s: float
    ramp_s: float

    @property
    def length_s(self) -> float:
        return self.to_s - self.from_s

    @property
    def filled(self) -> bool:
        """Whether the system has filled before the window begins."""
        return self.from_s >= self.first_s + self.ramp_s


def steady_part(result: SimulationResult) -> Steady:
    """The steady figures of a run, or why there are none."""
    if result.arrivals_s[0] == result.arrivals_s[1]:
        return _all_at_once(result)
    window = _window(result)
    e2e_s = _quantile(partial(_column, result, "e2e_s"), 0.9)
    if not window.length_s > 0 or math.isnan(e2e_s):
        return _no_window(result, e2e_s)
    least = window.length_s / e2e_s if e2e_s else math.inf
    batches = int(np.clip(least, FEWEST_BATCHES, MOST_BATCHES))
    flows = flows_of(result, np.linspace(window.from_s, window.to_s, batches + 1))
    if reason := _growth(result, window):
        return _told(result, flows, (UNKNOWN, UNKNOWN), Verdict("growing", reason))
    by_law = _by_law_known(result)
    figures = (_by_law if by_law else _by_batches)(result, flows)
    estimator = BY_LAW if by_law else BY_BATCHES
    of_window = partial(_shortness, result, window, e2e_s, figures)
    reason, wanted = of_window((COST, ENERGY))
    each = {figure: of_window((figure,)) for figure in (COST, ENERGY)}
    return _told(result, flows, figures, Verdict("short" if reason else "steady", reason, estimator, wanted, each))


# -- window and flows ------------------------------------------------------------------------------------------------


def _window(result: SimulationResult) -> Window:
    """See the module. Times to leave are counted from when a request was scheduled: a queue that grows is no ramp."""
    first_s, to_s = result.arrivals_s
    if result.concurrency is not None:
        ends = Span.of(partial(_first_ends, result, result.concurrency))
        from_s = ends.most if ends.known else to_s
        return Window(first_s, from_s, to_s, from_s - first_s)
    ramp_s = _quantile(partial(_stays, result), 0.99)
    if math.isnan(ramp_s):
        return Window(first_s, to_s, to_s, ramp_s)
    return Window(first_s, first_s + min(ramp_s, (to_s - first_s) / 2), to_s, ramp_s)


def _column(result: SimulationResult, name: str) -> Iterator[Floats]:
    """A column of the requests, so many rows at a time."""
    for (values,) in blocks(result.request_columns, name):
        yield values


def _stays(result: SimulationResult) -> Iterator[Floats]:
    """Times from when requests were scheduled to their last tokens."""
    for scheduled_s, last_s in blocks(result.request_columns, "scheduled_s", "last_token_s"):
        yield last_s - scheduled_s


def _first_ends(result: SimulationResult, count: int) -> Iterator[Floats]:
    """When the last tokens of the first ``count`` requests became visible."""
    for (last_s,) in blocks(result.request_columns, "last_token_s"):
        yield last_s[:count]
        count -= len(last_s)
        if count <= 0:
            return


def _by_law_known(result: SimulationResult) -> bool:
    """Whether the long run's load is known and all of it was served."""
    return result.concurrency is None and bool(result.finished.all())


# -- figures ---------------------------------------------------------------------------------------------------------


def _by_law(result: SimulationResult, flows: Flows) -> tuple[Estimate, Estimate]:
    """Tokens a second and joules a token where the long run's load is known and all of it was served."""
    offered, count = result.offered, len(flows.tokens)
    assert offered.rate_per_s is not None
    rate = offered.rate_per_s * offered.output_tokens
    backlog = np.concatenate(([0.0], np.cumsum(flows.offered_tokens - flows.tokens)))
    sd = float(backlog.std(ddof=1))
    tokens = Estimate(rate - backlog[-1] / flows.window_s, student(count) * math.sqrt(2) * sd / flows.window_s)
    if not tokens.value > 0:
        return UNKNOWN, UNKNOWN
    if np.isnan(flows.joules).any():
        return tokens, UNKNOWN
    per_s = np.stack((flows.tokens, flows.prompt_tokens), axis=1) / flows.batch_s
    at = np.array([tokens.value, offered.rate_per_s * offered.prompt_tokens])
    watts, slopes = regressed(per_s, flows.joules / flows.batch_s, at)
    # joules / token = watts / tokens a second: an error of the rate moves both.
    turns = abs(slopes[0] * tokens.value / watts.value - 1) * tokens.relative
    energy = watts.value / tokens.value
    return tokens, Estimate(energy, energy * math.hypot(watts.relative, turns))


def _by_batches(result: SimulationResult, flows: Flows) -> tuple[Estimate, Estimate]:
    """The same by plain ratios over the window."""
    return ratio_of(flows.tokens, np.full(len(flows.tokens), flows.batch_s)), ratio_of(flows.joules, flows.tokens)


# -- verdicts --------------------------------------------------------------------------------------------------------


def _growth(result: SimulationResult, window: Window) -> str:
    """Why the backlog grows over the window, as a sentence; empty where it does not, or cannot be told from a ramp."""
    if result.concurrency is not None:
        return ""
    if window.length_s < LEAST_E2ES * window.ramp_s:
        return _growing_queue(result, window)
    at = np.linspace(window.from_s, window.to_s, 2 * MOST_BATCHES + 1)
    came, gone = np.zeros((2, len(at))), np.zeros((2, len(at)))  # of requests, and of their output tokens
    columns = "arrival_s", "first_token_s", "last_token_s", "output_tokens", "status"
    for arrival, first, last, outputs, status in blocks(result.request_columns, *columns):
        taken, done = status != "rejected", status == "finished"
        one, comes, ends = np.ones(len(status)), (arrival[taken],) * 2, (last[done],) * 2
        came += spread_until(comes, one[taken], at), spread_until(comes, outputs[taken], at)
        gone += spread_until(ends, one[done], at), spread_until((first[done], last[done]), outputs[done], at)
    share = max(risen(level) / float(total[-1] - total[0]) for level, total in zip(came - gone, came, strict=True))
    if share <= LEAST_GROWTH:
        return ""
    return _grown("backlog", share, window)


def _growing_queue(result: SimulationResult, window: Window) -> str:
    """The same of requests that were never scheduled yet: a server that only fills does not let them wait."""
    at = np.linspace(window.from_s, window.to_s, 2 * MOST_BATCHES + 1)
    came, went = np.zeros((2, len(at)))
    for arrival_s, scheduled_s, status in blocks(result.request_columns, "arrival_s", "scheduled_s", "status"):
        taken = status != "rejected"
        comes, goes = arrival_s[taken], scheduled_s[taken & np.isfinite(scheduled_s)]
        came += spread_until((comes, comes), np.ones(len(comes)), at)
        went += spread_until((goes, goes), np.ones(len(goes)), at)
    share = ratio(risen(came - went), float(came[-1] - came[0]))
    return _grown("queue", share, window) if share > LEAST_QUEUE_GROWTH else ""


def _grown(what: str, share: float, window: Window) -> str:
    would_do = "the deployment does not keep up; a lower rate or more replicas would do"
    return f"the {what} grows by {share:.1%} of what comes in over {window.length_s:.3g} s: {would_do}"


def _shortness(
    result: SimulationResult,
    window: Window,
    e2e_s: float,
    figures: tuple[Estimate, Estimate],
    asked: tuple[str, ...],
) -> Short:
    """How the window is too short for the figures that are ``asked``, COST, ENERGY or both."""
    widths = {figure: each.relative for figure, each in zip((COST, ENERGY), figures, strict=True) if figure in asked}
    wide = {_WORDS[figure]: width for figure, width in widths.items() if width > WIDEST}
    length_s = f"the window of {window.length_s:.3g} s"
    if not window.filled:
        why = f"{length_s} begins before the system has filled"
    elif window.length_s < LEAST_E2ES * e2e_s:
        why = f"{length_s} is shorter than {LEAST_E2ES:g} end-to-end times of {e2e_s:.3g} s (90th percentile)"
    elif math.isnan(figures[0].value):
        why = f"{length_s} holds too few requests to tell their rate"
    elif wide:
        said = " and ".join(f"{width:.1%} of {what}" for what, width in wide.items())
        why = f"the half-width over {length_s} is {said}, above {WIDEST:.0%}"
    else:
        return Short()
    needed_s = LEAST_E2ES * e2e_s
    if window.length_s >= needed_s and window.filled:
        # The backlog's part of an error falls with the length of the window, chance among batches with its root.
        powers = {"cost": 1 if _by_law_known(result) else 2, "energy": 2}
        times = ((width / WIDEST) ** powers[what] for what, width in wide.items())
        needed_s = window.length_s * max(times, default=2.0)
    per_s = rows_of(result.request_columns) / (window.to_s - window.first_s)
    wanted = math.ceil(SPARE * per_s * (window.ramp_s + needed_s))
    return Short(f"{why}; about {wanted:,} requests would do", wanted)


def _all_at_once(result: SimulationResult) -> Steady:
    first_s = result.arrivals_s[0]
    if not result.end_s > first_s:
        return Steady(kind="all_at_once", reason="nothing was served")
    flows = flows_of(result, np.array([first_s, result.end_s]))
    tokens = float(flows.tokens[0])
    figures = tuple(Estimate(value, math.nan) for value in (tokens / flows.window_s, ratio(flows.joules[0], tokens)))
    reason = "all requests come at once: the figures are of the whole run; give arrivals at a rate for steady ones"
    return _told(result, flows, (figures[0], figures[1]), Verdict("all_at_once", reason, BY_RUN))


def _no_window(result: SimulationResult, e2e_s: float) -> Steady:
    if math.isnan(e2e_s) or result.concurrency is None:
        return _without_figures("no request finished, so nothing is known of a steady part", None)
    wanted = math.ceil(SPARE * result.concurrency * (2 + LEAST_E2ES))
    why = "the last request is sent before the first wave has ended"
    return _without_figures(f"{why}; about {wanted:,} requests would do", wanted)


def _without_figures(reason: str, wanted: int | None) -> Steady:
    """A run too short for any figure."""
    figures = COST, ENERGY
    short_of: dict[str, str | None] = dict.fromkeys(figures, reason)
    wanted_of: dict[str, int | None] = dict.fromkeys(figures, wanted)
    return Steady(kind="short", reason=reason, wanted_requests=wanted, short_of=short_of, wanted_of=wanted_of)


def _told(result: SimulationResult, flows: Flows, figures: tuple[Estimate, Estimate], said: Verdict) -> Steady:
    tokens, energy = figures
    return Steady(
        kind=said.kind,
        reason=said.reason,
        from_s=float(flows.edges[0]),
        to_s=float(flows.edges[-1]),
        window_s=flows.window_s,
        share=ratio(flows.window_s, result.duration_s),
        requests=round(flows.arrived.sum()),
        output_tokens=round(flows.tokens.sum()),
        output_tokens_per_s=_known(tokens.value),
        usd_per_million_output_tokens=_known(ratio(result.deployment.usd_per_s * 1e6, tokens.value)),
        energy_per_output_token_j=_known(energy.value),
        half_width={COST: _known(tokens.relative), ENERGY: _known(energy.relative)},
        wanted_requests=said.wanted,
        short_of={figure: short.reason or None for figure, short in said.each.items()},
        wanted_of={figure: short.wanted for figure, short in said.each.items()},
        estimator=said.estimator,
    )


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _quantile(parts: Parts, probability: float) -> float:
    return quantiles(parts, [probability], Span.of(parts))[0]
