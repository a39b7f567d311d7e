"""The arithmetic of a summary: distributions, interval unions and time-weighted means. Numpy in, plain numbers out.

Percentiles interpolate linearly between order statistics (numpy's default; definition 7 of Hyndman and Fan 1996).
A figure of no observations is NaN, which JSON shows as null.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from apexsim.quantiles import Floats, Integers, Parts, Span, quantiles

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
_KEYS = ("mean", *PERCENTILES, "max")


def distribution(parts: Parts) -> dict[str, float]:
    """Mean, percentiles and maximum of the finite values of all ``parts``."""
    span = Span.of(parts)
    if not span.known:
        return dict.fromkeys(_KEYS, math.nan)
    marks = quantiles(parts, list(PERCENTILES.values()), span)
    return dict(zip(_KEYS, [span.total / span.known, *marks, span.most], strict=True))


def weighted_distribution(values: Integers, counts: Integers, scale: float) -> dict[str, float]:
    """Exactly ``distribution(np.repeat(values, counts) * scale)``, without writing the repetition out."""
    seen = counts > 0
    order = np.argsort(values[seen], kind="stable")
    ranked, until = values[seen][order], np.cumsum(counts[seen][order])
    if not len(ranked):
        return dict.fromkeys(_KEYS, math.nan)
    total = int(until[-1])
    place = (total - 1) * np.array(list(PERCENTILES.values()))
    low = np.floor(place).astype(np.int64)
    below = ranked[np.searchsorted(until, low, side="right")]
    above = ranked[np.searchsorted(until, np.minimum(low + 1, total - 1), side="right")]
    marks = below + (above - below) * (place - low)
    mean = float(np.dot(ranked.astype(np.float64), counts[seen][order].astype(np.float64))) / total
    figures = [mean, *map(float, marks), float(ranked[-1])]
    return {key: figure * scale for key, figure in zip(_KEYS, figures, strict=True)}


def held_ns(start_ns: Integers, end_ns: Integers) -> Integers:
    """Time each interval is the latest one in force: until the next one starts or, before a gap, until all have ended.

        ==== a ====              a counts until b starts
             ==== b ====         b until the last of those begun has ended
                           = c = nothing counts in between
    ``start_ns`` must ascend. The sum is the length of the union of the intervals.
    """
    if not len(start_ns):
        return np.zeros(0, dtype=np.int64)
    over = np.maximum.accumulate(end_ns)
    following = np.append(start_ns[1:], np.iinfo(np.int64).max)
    held: Integers = np.minimum(over, following) - start_ns
    return held


def binned_level(times: tuple[Integers, Integers], level: npt.NDArray[Any], edges: Floats) -> Floats:
    """Mean of a level over each bin between ``edges``, when interval i = [start, start + held) adds ``level[i]`` to it.

    ``times`` are start and held; intervals may come in any order and overlap (several replicas add up).
    """
    start, held = times
    at = np.concatenate((start, start + held)).astype(np.float64)
    change = np.concatenate((level, -level)).astype(np.float64)
    order = np.argsort(at, kind="stable")
    at, height = at[order], np.cumsum(change[order])
    area = np.concatenate(([0.0], np.cumsum(height[:-1] * np.diff(at))))
    means: Floats = np.diff(np.interp(edges, at, area)) / np.diff(edges)
    return means


def spread_until(times: tuple[npt.NDArray[Any], npt.NDArray[Any]], amounts: npt.NDArray[Any], edges: Floats) -> Floats:
    """How much of ``amounts`` has come by each of ``edges``, each spread evenly from its start to its end.

    One whose start is its end comes in one piece, at that moment.
    """
    start, end = times
    until = np.empty(len(edges))
    for place, edge in enumerate(edges.tolist()):
        under_way = (start < edge) & (edge < end)
        begun = start[under_way]
        part = amounts[under_way] * ((edge - begun) / (end[under_way] - begun))
        until[place] = amounts[end <= edge].sum() + part.sum()
    return until


def ratio(part: float, whole: float) -> float:
    """``part / whole``, NaN when there is no whole."""
    return part / whole if whole else math.nan
