"""Goodput: the highest rate that lasts, found by bisection over runs that are long enough to tell.

A rate lasts when attainment reaches the target and waits do not lengthen. A run is long enough when its arrivals reach
all three of:

- ``LEAST_SPAN_S`` seconds,
- ``PER_REPLICA`` requests a replica,
- ``E2ES`` end-to-end times, of the plan whose median at low load is the largest.

So every plan of a search is asked the same. A shorter run rewards bursts. With 512 requests at 150 requests/s all have
come within 3.4 s, and a queue that would grow for ever has not grown yet.

Every probe takes the first requests of the same supply and scales their times. Short probes of all plans come first.
They show where to look, and which plans are worth a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from apexsim.search.outcomes import Figures
from apexsim.search.trial import Trial

LEAST_SPAN_S = 60.0
PER_REPLICA = 4_000
E2ES = 10
# Requests a replica of the short probes, how narrow they make the bracket, and the first step from there.
BRIEF = 400
BRIEF_TOLERANCE = 0.1
FIRST_STEP = 1.1
RATE_TOLERANCE = 0.02  # the bracket of the answer is this narrow
MAX_DOUBLINGS = 12  # of the rate, up or down, within which goodput is looked for
LOW_LOAD_REQUESTS = 64
# Of the best rate per device that short probes let pass, the share below which a plan is not probed at length.
# Short probes flatter all plans. That they flatter none twice as much as another is an assumption: nothing measured it.
WITHIN_REACH = 0.5


def scout(trial: Trial) -> Figures:
    """A first look at a plan: its end-to-end time at low load, and the rate per device that short probes let pass."""
    few = trial.supply.requests.head(min(LOW_LOAD_REQUESTS, len(trial.supply.requests)))
    rate_per_s = highest_passing(
        lambda rate_per_s: _keeps(trial, rate_per_s, BRIEF * trial.replicas),
        trial.supply.requests.rate_per_s,
        tolerance=BRIEF_TOLERANCE,
    )
    return {
        "low_load_e2e_s": trial.run(few.closed_loop(1))["e2e_s"]["p50"],
        "brief_per_device_per_s": rate_per_s and rate_per_s / trial.devices,
    }


def goodput(trial: Trial) -> Figures:
    """The highest lasting rate of a plan, in all and per device, and over which span of arrivals it was kept.

    A plan that a short probe, which flatters it, finds far behind the best is given that rate, and no span.
    """
    assert trial.scouted is not None, "goodput looks at all plans first"
    own_per_s, best_per_s = trial.scouted.own_per_s or 0.0, trial.scouted.best_per_s or 0.0
    rate_per_s: float | None = own_per_s * trial.devices or None
    span_s = None
    if rate_per_s and own_per_s >= WITHIN_REACH * best_per_s:
        rate_per_s = highest_passing(
            lambda rate_per_s: _keeps(trial, rate_per_s, probe_requests(trial, rate_per_s)),
            rate_per_s,
            step=FIRST_STEP,
            doublings=1,
        )
        span_s = rate_per_s and trial.supply.at_least(probe_requests(trial, rate_per_s)).at_rate(rate_per_s).span_s
    return {
        "goodput_requests_per_s": rate_per_s,
        "goodput_span_s": span_s,
        "goodput_per_device_per_s": rate_per_s and rate_per_s / trial.devices,
    }


def probe_requests(trial: Trial, rate_per_s: float) -> int:
    """How many requests it takes to tell whether a rate lasts."""
    e2e_s = (trial.scouted and trial.scouted.e2e_s) or 0.0
    span_s = max(LEAST_SPAN_S, E2ES * e2e_s)
    return max(PER_REPLICA * trial.replicas, 1 + math.ceil(span_s * rate_per_s))


def highest_passing(
    passes: Callable[[float], bool],
    start: float,
    *,
    step: float = 2.0,
    tolerance: float = RATE_TOLERANCE,
    doublings: int = MAX_DOUBLINGS,
) -> float | None:
    """The highest value seen to pass, within ``tolerance`` of one that does not.

    Looks from ``start`` by ``step``, then by its square and so on, as far as ``doublings`` up or ``MAX_DOUBLINGS``
    down: where nothing changes on the way, the answer is that far end, or None when it does not pass either. Assumes
    that what passes at a value passes below it. No value is tried twice.
    """
    first = passes(start)
    factor = step if first else 1 / step
    end = start * 2.0 ** (doublings if first else -MAX_DOUBLINGS)
    near, far = start, start
    while near == start or passes(near) == first:
        if near == end:
            return end if first else None
        far, near = near, near * factor
        near = min(near, end) if first else max(near, end)
        factor *= factor
    low, high = sorted((near, far))
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def _keeps(trial: Trial, rate_per_s: float, count: int) -> bool:
    summary = trial.run(trial.supply.at_least(count).at_rate(rate_per_s), until_lost=True)
    attainment = summary["slo"]["attainment"]
    return attainment is not None and attainment >= trial.slo.target and not summary["waits_grow"]
