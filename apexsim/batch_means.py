"""Means over batches of a run, and how far they may be off.

A run is cut into batches of equal length; their values are taken as draws around a mean, independent or, where said,
with the correlation of neighbours counted. Half-widths are of 95 % intervals by Student's law.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from apexsim.metrics import ratio
from apexsim.quantiles import Floats


class Estimate(NamedTuple):
    """A figure and the half-width of its 95 % interval; NaN where not known."""

    value: float
    half_width: float

    @property
    def relative(self) -> float:
        """The half-width as a share of the figure."""
        return abs(self.half_width / self.value) if self.value else math.nan


UNKNOWN = Estimate(math.nan, math.nan)


def regressed(controls: Floats, values: Floats, at: Floats) -> tuple[Estimate, Floats]:
    """Where the least-squares plane of ``values`` over ``controls`` lies ``at`` a point, and its slopes."""
    centre, middle = controls.mean(axis=0), float(values.mean())
    left, lengths, right = np.linalg.svd(controls - centre, full_matrices=False)
    seen = lengths > 1e-9 * np.linalg.norm(controls)  # what never changes tells nothing
    left, lengths, right = left[:, seen], lengths[seen], right[seen]
    along = left.T @ (values - middle)
    shift = right @ (at - centre) / lengths
    free = len(values) - 1 - len(lengths)
    residuals = values - middle - left @ along
    variance = float(residuals @ residuals) / free * (1 / len(values) + float(shift @ shift))
    slopes: Floats = right.T @ (along / lengths)
    return Estimate(middle + float(shift @ along), student(free) * math.sqrt(variance)), slopes


def risen(level: Floats) -> float:
    """By how much a straight line through a level, at equal steps of time, rises; 0 where that may be chance.

    One-sided, at 99 %; the correlation of neighbours counts.
    """
    count = len(level)
    along = np.linspace(-0.5, 0.5, count)
    rise = float(along @ level) / float(along @ along)
    left = level - level.mean() - rise * along
    error = math.sqrt(float(left @ left) / (count - 2) / float(along @ along) * _inflation(left))
    return rise if rise > student(count - 2, 0.99) * error else 0.0


def ratio_of(parts: Floats, wholes: Floats) -> Estimate:
    """The sum of ``parts`` over that of ``wholes``, one of each a batch; the correlation of neighbours counts."""
    value = ratio(float(parts.sum()), float(wholes.sum()))
    left = parts - value * wholes
    count = len(parts)
    sd = float(left.std(ddof=1)) * math.sqrt(_inflation(left) / count)
    return Estimate(value, student(count - 1) * sd / float(wholes.mean()) if wholes.any() else math.nan)


def _inflation(left: Floats) -> float:
    """By what the variance of a mean grows because neighbours are alike: (1 + r) / (1 - r), r their correlation."""
    power = float(left @ left)
    alike = float(left[1:] @ left[:-1]) / power if power else 0.0
    alike = min(max(alike, 0.0), 0.9)
    return (1 + alike) / (1 - alike)


def student(free: int, probability: float = 0.975) -> float:
    """Quantile of Student's law with ``free`` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(free, probability))
