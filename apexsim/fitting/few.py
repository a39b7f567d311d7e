"""Fits to tables of any size and to devices of any kind: fewer knots for fewer rows, wider bounds off the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from apexsim.costs.forms.hardware import Array, Coefficient
from apexsim.fitting.fit import Knots
from apexsim.fitting.problems import Problem

# Rows that a knot of the residual should rest on.
ROWS_A_KNOT = 2
# A median so much (in logarithms) above the 10th percentile was disturbed: its row counts half.
DISTURBED = 0.1


def fitted_to_rows(problem: Problem, *, loose: bool) -> Problem:
    """The problem with as many knots as its rows bear, steady rows first, and bounds for any device where ``loose``."""
    knots = few_knots(problem.knots, problem.coordinates(problem.frame), len(problem.frame))
    coefficients = loosened(problem.coefficients) if loose else problem.coefficients
    return replace(problem, knots=knots, coefficients=coefficients, weight=problem.weight * _steadiness(problem.frame))


def _steadiness(rows: pd.DataFrame) -> Array:
    """Weights from 0 to 1: by how far the median of a row's repeats lies above their 10th percentile."""
    above = np.log(rows["latency_s"].to_numpy() / rows["latency_p10_s"].to_numpy())
    return np.asarray(1 / (1 + (above / DISTURBED) ** 2))


def few_knots(knots: Knots, coordinates: Sequence[Array], rows: int) -> dict[str, tuple[float, ...]]:
    """Knots among the measured values of every coordinate: at most as many as ``knots`` has, and half as many as rows.

    The last axis (tokens, keys), along which forms bend most, keeps its own as long as another has more than two.
    """
    values = [np.unique(np.broadcast_to(each, rows)) for each in coordinates]
    counts = [min(len(found), len(usual)) for found, usual in zip(values, knots.values(), strict=True)]
    while np.prod(counts) > max(1, rows // ROWS_A_KNOT):
        others = counts[:-1]
        axis = int(np.argmax(others if max(others, default=0) > 2 else counts))
        counts[axis] -= 1
    return {
        name: tuple(float(x) for x in found[np.linspace(0, len(found) - 1, count).round().astype(int)])
        if count > 1
        else (float(np.median(found)),)
        for name, found, count in zip(knots, values, counts, strict=True)
    }


def loosened(coefficients: Sequence[Coefficient]) -> list[Coefficient]:
    """The coefficients with bounds that hold for any device."""
    return [c.loosened for c in coefficients]
