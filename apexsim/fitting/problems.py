"""A fit as data, and how it is carried out: coefficients, residual, and the three hold-outs that judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients
from apexsim.costs.forms.residual import LogGrid
from apexsim.fitting.cleaning import Mask
from apexsim.fitting.fit import Knots, Stiffness, fit_coefficients, fit_residual
from apexsim.specs.device import Evidence, FittedOperator, HoldOut, ResidualGrid, ShapeResiduals

FIT_ROWS = 4000
RESIDUAL_ROWS = 20000
SEED = 20260101

# Scores of a fit (coefficients, residual) on other measurements.
Judge = Callable[[Coefficients, ResidualGrid], dict[str, HoldOut]]
# A fit's residual corrected by other measurements, and its scores on them (see ``inside``).
Refine = Callable[[Coefficients, ResidualGrid], tuple[ResidualGrid, dict[str, HoldOut]]]
# Operators by kind and key, as in a profile.
Operators = dict[str, dict[str, FittedOperator]]


# A shape has few rows, but they are its own: its correction follows them more closely than that of all shapes.
SHAPE_STIFFNESS = Stiffness(smooth=0.3, small=0.1)
# Mean error, as a fraction, that the correction of a shape must take away to be worth its place in the profile.
SHAPE_GAIN = 0.02


class OwnShapes(NamedTuple):
    """Shapes whose own rows correct a fit further: for every row of the problem the name of its shape and its weight.

    ``coordinates`` of the rows are those of the correction over ``knots``.
    """

    names: npt.NDArray[np.str_]
    weight: Array
    coordinates: Sequence[Array]
    knots: Knots


@dataclass(frozen=True, slots=True)
class Problem:
    """One operator of one dtype to fit.

    ``frame`` holds the cleaned rows with their ``seconds``; ``predict`` gives the form's seconds on rows as they were
    measured (caches hot); ``coordinates`` those of the residual over ``knots``. ``scan`` are constants tried in turn
    (a tile size), the best kept. ``holdouts`` maps a name to the rows kept out of that fit and the rows scored by
    score name; ``checks`` are scores found elsewhere that belong beside them, ``judge`` finds more from the fit itself,
    and ``refine`` corrects it last of all. ``shapes`` are the models whose own kernels the rows timed, which get a
    correction of their own; None where rows belong to no model.
    """

    kind: str
    key: str
    form: str
    source: str
    frame: pd.DataFrame
    dropped: dict[str, int]
    predict: Callable[[pd.DataFrame, Coefficients], Array]
    coefficients: Sequence[Coefficient]
    coordinates: Callable[[pd.DataFrame], Sequence[Array]]
    knots: Knots
    valid: Mapping[str, str]
    holdouts: Mapping[str, tuple[Mask, Mapping[str, Mask]]]
    weight: Array
    constants: Mapping[str, float] = field(default_factory=dict)
    scan: tuple[str, Sequence[float]] | None = None
    evidence: Evidence = "fitted"
    checks: Mapping[str, HoldOut] = field(default_factory=dict)
    refine: Refine | None = None
    judge: Judge | None = None
    shapes: OwnShapes | None = None


def random_fifth(rows: int) -> Mask:
    """One row in five, the same ones every time."""
    return np.asarray(np.random.default_rng(SEED).random(rows) < 0.2)


def solve(problem: Problem) -> FittedOperator:
    """Fit a problem on all its rows, and again without each hold-out to score it."""
    everything = np.ones(len(problem.frame), dtype=bool)
    quality: dict[str, HoldOut] = {}
    c, grid = _fit_rows(problem, everything, _choose_constants(problem))
    shapes = fit_shapes(problem, everything, c, grid)
    for test, scores in problem.holdouts.values():
        if not test.any() or test.all():
            continue
        # The search starts where that on all rows ended, which saves most of it; what it ends at is fitted without.
        without = _fit_rows(problem, ~test, c)
        errors = _errors(problem, *without, fit_shapes(problem, ~test, *without))
        quality |= {name: summary(errors[test & mask]) for name, mask in scores.items() if (test & mask).any()}
    quality |= problem.checks
    if problem.refine:
        grid, found = problem.refine(c, grid)
        quality |= found
    quality |= problem.judge(c, grid) if problem.judge else {}
    valid = {
        name: (float(problem.frame[col].min()), float(problem.frame[col].max())) for name, col in problem.valid.items()
    }
    return FittedOperator(
        form=problem.form,
        coefficients=c,
        residual=grid,
        shapes=shapes,
        valid=valid,
        evidence=problem.evidence,
        source=problem.source,
        rows_used=len(problem.frame),
        rows_dropped=problem.dropped,
        quality=quality,
    )


def fit_all_rows(problem: Problem) -> tuple[dict[str, float], ResidualGrid]:
    """Coefficients and residual of a problem, without judging them."""
    return _fit_rows(problem, np.ones(len(problem.frame), dtype=bool), _choose_constants(problem))


def _choose_constants(problem: Problem) -> dict[str, float]:
    """The scanned constant with the least median error, beside the fixed ones."""
    fixed = dict(problem.constants)
    if problem.scan is None:
        return fixed
    name, values = problem.scan
    everything = np.ones(len(problem.frame), dtype=bool)
    losses = []
    for value in values:
        c = _fit_form(problem, everything, {**fixed, name: value}, FIT_ROWS // 4)
        rows = _sample(everything, FIT_ROWS)
        error = np.abs(np.log(problem.predict(problem.frame.iloc[rows], c) / problem.frame["seconds"].to_numpy()[rows]))
        losses.append(float(np.mean(np.minimum(error, 0.5) * problem.weight[rows])))
    return {**fixed, name: values[int(np.argmin(losses))]}


def _fit_rows(problem: Problem, train: Mask, start: Coefficients) -> tuple[dict[str, float], ResidualGrid]:
    c = _fit_form(problem, train, start, FIT_ROWS)
    rows = _sample(train, RESIDUAL_ROWS)
    part = problem.frame.iloc[rows]
    log_error = np.log(part["seconds"].to_numpy() / problem.predict(part, c))
    return c, fit_residual(log_error, problem.weight[rows], problem.coordinates(part), problem.knots)


def _fit_form(problem: Problem, train: Mask, start: Coefficients, most_rows: int) -> dict[str, float]:
    rows = _sample(train, most_rows)
    part = problem.frame.iloc[rows]
    return fit_coefficients(
        lambda c: problem.predict(part, c),
        part["seconds"].to_numpy(),
        problem.weight[rows],
        problem.coefficients,
        start,
    )


def _sample(mask: Mask, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of the rows in ``mask``, drawn with a fixed seed, in order."""
    rows = np.flatnonzero(mask)
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(SEED).choice(rows, most, replace=False))


def fit_shapes(problem: Problem, train: Mask, c: Coefficients, grid: ResidualGrid) -> ShapeResiduals | None:
    """What is left of the errors of single shapes on the rows in ``train``; None for a problem without such shapes."""
    own = problem.shapes
    if own is None:
        return None
    left = np.log(problem.frame["seconds"].to_numpy() / predicted_s(problem, c, grid))
    percent = {}
    for name in np.unique(own.names[train]).tolist():
        at = train & (own.names == name)
        where, weight = [x[at] for x in own.coordinates], own.weight[at]
        found = fit_residual(left[at], weight, where, own.knots, stiffness=SHAPE_STIFFNESS)
        gain = np.abs(left[at]) - np.abs(left[at] - LogGrid.of(found).log_factor(*where))
        if np.average(gain, weights=weight) >= SHAPE_GAIN:
            percent[name] = found.model_dump(mode="json")["percent"]
    axes = {name: tuple(float(x) for x in points) for name, points in own.knots.items()}
    return ShapeResiduals(axes=axes, percent=percent) if percent else None


def predicted_s(problem: Problem, c: Coefficients, grid: ResidualGrid, shapes: ShapeResiduals | None = None) -> Array:
    """What a fit says of every row, as it was measured."""
    log_factor = LogGrid.of(grid).log_factor(*problem.coordinates(problem.frame))
    if shapes is not None and problem.shapes is not None:
        log_factor = log_factor + _own_log_factor(problem.shapes, shapes)
    return np.asarray(problem.predict(problem.frame, c) * np.exp(log_factor))


def _own_log_factor(own: OwnShapes, shapes: ShapeResiduals) -> Array:
    """Log of the correction of every row's shape; 0 for shapes without one."""
    total = np.zeros(len(own.names))
    for name in shapes.percent:
        at = own.names == name
        total[at] = LogGrid.of(shapes.grid(name)).log_factor(*(x[at] for x in own.coordinates))
    return total


def _errors(problem: Problem, c: Coefficients, grid: ResidualGrid, shapes: ShapeResiduals | None) -> Array:
    """Absolute relative error of every row."""
    return np.asarray(np.abs(predicted_s(problem, c, grid, shapes) / problem.frame["seconds"].to_numpy() - 1))


def summary(errors: Array) -> HoldOut:
    """Median and 90th percentile of absolute errors."""
    median, p90 = np.quantile(errors, [0.5, 0.9])
    return HoldOut(median=round(float(median), 3), p90=round(float(p90), 3), rows=len(errors))
