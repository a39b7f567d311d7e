"""Exact percentiles of values that come in parts, few of which are held at a time.

Percentiles interpolate linearly between order statistics (numpy's default; definition 7 of Hyndman and Fan 1996).
Values are counted in bins first; then only those of the bins in which an order statistic lies are held and sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Parts = Callable[[], Iterable[Floats]]
"""Gives all values part by part, each time anew; those that are not finite do not count."""

# So many values are sorted at once; beyond, they are counted in so many bins.
FEW, BINS = 1 << 16, 1 << 14


class Span(NamedTuple):
    """How many finite values there are, their sum, the least and the most."""

    known: int
    total: float
    least: float
    most: float

    @classmethod
    def of(cls, parts: Parts) -> Span:
        """Read all parts once."""
        count, sums, least, most = 0, [], math.inf, -math.inf
        for known in _finite(parts):
            count += len(known)
            sums.append(float(np.sort(known).sum()))
            least, most = min(least, float(known.min())), max(most, float(known.max()))
        return cls(count, math.fsum(sums), least, most)


def quantiles(parts: Parts, probabilities: Sequence[float], span: Span) -> list[float]:
    """Quantiles of the finite values, whose ``span`` is known; NaN where there are none."""
    if not span.known:
        return [math.nan] * len(probabilities)
    place = (span.known - 1) * np.array(probabilities)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, span.known - 1)
    ranks = np.unique(np.concatenate((below, above)))
    values = dict(zip(ranks.tolist(), _ranked(parts, ranks, span).tolist(), strict=True))
    return [
        float(np.quantile([values[low], values[high]], share))
        for low, high, share in zip(below.tolist(), above.tolist(), place - below, strict=True)
    ]


def _ranked(parts: Parts, ranks: Integers, span: Span) -> Floats:
    """The values of these ranks, ascending, among all sorted values."""
    if span.known <= FEW or span.least == span.most:
        few = np.concatenate(list(_finite(parts))) if span.known <= FEW else np.full(span.known, span.least)
        return np.sort(few)[ranks]
    counts = np.zeros(BINS, dtype=np.int64)
    for known in _finite(parts):
        counts += np.bincount(_bins(known, span), minlength=BINS)
    ends = np.cumsum(counts)
    wanted = np.unique(np.searchsorted(ends, ranks, side="right"))
    held = np.sort(np.concatenate([known[np.isin(_bins(known, span), wanted)] for known in _finite(parts)]))
    # Of the values before a bin only those of wanted bins are held.
    at = np.searchsorted(wanted, np.searchsorted(ends, ranks, side="right"))
    held_before = np.concatenate(([0], np.cumsum(counts[wanted])))[at]
    return held[held_before + ranks - (ends - counts)[wanted][at]]


def _bins(values: Floats, span: Span) -> Integers:
    """The number of the bin of each value, which never falls as values rise."""
    place = (values - span.least) * (BINS / (span.most - span.least))
    return np.minimum(place.astype(np.int64), BINS - 1)


def _finite(parts: Parts) -> Iterator[Floats]:
    for part in parts():
        known = part[np.isfinite(part)]
        if len(known):
            yield known
