"""Which plans tie, what breaks the tie, and what may be said of the first one.

Two plans tie where their figures differ by no more than

    max(resolution x the larger figure, t sd(d) / sqrt(n))

with d the differences of the n parts that both runs know (``batches.py``: same requests, so what they share cancels)
and t Student's quantile at 95 %. Runs that share no parts (a closed loop: the plan sets the pace) have the half-widths
of their steady figures, as of independent runs, in place of the second term. Where those are not known either, the
first term alone counts, and the headline says so.

The leaders are the best plan by its figure and all that tie with it. They are put in order by the objective's
``breaks``; those behind them stay in order of their figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apexsim.batch_means import student
from apexsim.search.judging import Row
from apexsim.search.objective import Break, Objective

# ``win``: the first plan is best. ``tie``: it ties with others, and a break decides. ``equal``: no break decides.
# ``short``: the steady window of a plan that may be best is too short to say. ``none``: no plan qualifies.
Decision = Literal["win", "tie", "equal", "short", "none"]

RANK_OF_VERDICT = {"ok": 0, "misses_slo": 1, "failed": 2, "infeasible": 3, "unlawful": 4}
FEWEST_PARTS = 5


def rank(rows: Iterable[Row], objective: Objective) -> tuple[Row, ...]:
    """Rows in the order that ``Study`` promises."""

    def key(row: Row) -> tuple[int, tuple[float, ...], str]:
        return RANK_OF_VERDICT[row.outcome.verdict], _score(row, objective), row.candidate.name

    found = sorted(rows, key=key)
    ahead = leaders(found, objective)
    return (*ahead, *(row for row in found if not any(row is leader for leader in ahead)))


def leaders(rows: Sequence[Row], objective: Objective) -> tuple[Row, ...]:
    """The best plan and those that tie with it, in order; none where no plan qualifies."""
    ran = [row for row in rows if row.outcome.verdict == "ok"]
    if not ran:
        return ()
    best = min(ran, key=lambda row: _score(row, objective))
    tied = [row for row in ran if row is best or ties(best, row, objective)]
    return tuple(sorted(tied, key=lambda row: (*_broken(row, objective.breaks), row.candidate.name)))


def ties(one: Row, other: Row, objective: Objective) -> bool:
    """Whether two plans that ran cannot be told apart by the figure that counts."""
    values = [objective.value(row.outcome.figures) for row in (one, other)]
    mine, theirs = values
    if mine is None or theirs is None:
        return mine is theirs
    allowed = objective.resolution * max(abs(mine), abs(theirs))
    return abs(mine - theirs) <= max(allowed, sampling_error(one, other, objective) or 0.0)


def may_be_best(row: Row, rows: Iterable[Row], objective: Objective) -> bool:
    """Whether sampling errors leave open that no other of ``rows`` is better; so too where a figure is not known."""
    sign = -1 if objective.highest else 1

    def reach(other: Row) -> tuple[float, float]:
        value, error = objective.value(other.outcome.figures), objective.error(other.outcome.figures)
        if value is None or error is None:
            return -math.inf, math.inf
        return sign * value - error, sign * value + error

    best = min((reach(other)[1] for other in rows if other.outcome.verdict == "ok"), default=math.inf)
    return reach(row)[0] <= best


def sampling_error(one: Row, other: Row, objective: Objective) -> float | None:
    """Half-width of the 95 % interval of the difference of two plans; None where their runs do not tell it."""
    parts = (row.outcome.batches.get(objective.column, ()) for row in (one, other))
    pairs = [(a, b) for a, b in zip(*parts, strict=False) if a is not None and b is not None]
    if len(pairs) < FEWEST_PARTS:
        errors = [objective.error(row.outcome.figures) for row in (one, other)]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) if len(known) == len(errors) else None
    return half_width(np.subtract(*np.array(pairs).T))


def half_width(values: NDArray[np.float64]) -> float:
    """Half-width of the 95 % interval of a mean of two or more independent values."""
    return student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def broken_by(ahead: Sequence[Row], breaks: Sequence[Break]) -> Break | None:
    """The first figure by which the first of the leaders is ahead of the second; None where there is none."""
    first, second = (_broken(row, breaks) for row in ahead[:2])
    return next((each for each, a, b in zip(breaks, first, second, strict=True) if a != b), None)


def decide(rows: Sequence[Row], objective: Objective) -> Decision:
    """What may be said of the first of the ranked rows."""
    ahead = leaders(rows, objective)
    if not ahead:
        return "none"
    if short_rivals(rows, objective):
        return "short"
    if len(ahead) == 1:
        return "win"
    return "tie" if broken_by(ahead, objective.breaks) else "equal"


def short_rivals(rows: Sequence[Row], objective: Objective) -> list[Row]:
    """Plans that keep the SLO and may be best, and whose steady window is too short to say."""
    short = [row for row in rows if row.outcome.verdict == "ok" and row.outcome.window == "short"]
    return [row for row in short if objective.window and may_be_best(row, rows, objective)]


def _score(row: Row, objective: Objective) -> tuple[float, ...]:
    """The least first: the figure that counts, or attainment where that was missed; then what breaks ties."""
    figures = row.outcome.figures
    missed = row.outcome.verdict == "misses_slo"
    value = figures.get("attainment") if missed else objective.value(figures)
    sign = -1 if missed or objective.highest else 1
    return (math.inf if value is None else sign * value, *_broken(row, objective.breaks), row.candidate.devices)


def _broken(row: Row, breaks: Sequence[Break]) -> tuple[float, ...]:
    values = [(row.outcome.figures.get(each.column), each.highest) for each in breaks]
    return tuple(math.inf if value is None else -value if highest else value for value, highest in values)
