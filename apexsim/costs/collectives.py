"""Collectives: measured (bytes, seconds) points, log-log between them, linear in bytes beyond the last two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from apexsim.costs.forms.hardware import Array
from apexsim.specs.device import Points


class CollectiveTable:
    """Seconds of one collective on one group size, as a non-decreasing function of message bytes."""

    def __init__(self, points: Points) -> None:
        self.bytes, self.seconds = np.array(points.bytes, dtype=float), np.array(points.seconds)
        rise = self.seconds[-1] - self.seconds[-2]
        self._s_per_byte = max(0.0, float(rise / (self.bytes[-1] - self.bytes[-2])))

    def __call__(self, message_bytes: Any) -> Array:
        """Seconds at ``message_bytes``; below the first point its time holds (latency)."""
        size = np.maximum(np.asarray(message_bytes, dtype=float), 1.0)
        inside = np.exp(np.interp(np.log(size), np.log(self.bytes), np.log(self.seconds)))
        return np.asarray(inside + self._s_per_byte * np.maximum(0.0, size - self.bytes[-1]))


def copies_sent(topk: Any, ranks: int) -> Any:
    """Ranks that the ``topk`` experts of a token lie on, expected for experts spread evenly: a rank gets it once."""
    return ranks * (1.0 - (1.0 - 1.0 / ranks) ** topk)


def clean_points(
    points: Sequence[tuple[float, float]], tolerance: float = 1.15
) -> tuple[list[tuple[float, float]], int]:
    """Drop points slower than ``tolerance`` x the fastest larger message, then make the rest monotone.

    A larger message contains the smaller one, so a much slower small message is an artefact of the measurement.
    Returns the points kept and how many were dropped; small inversions are levelled down, not dropped.
    """
    kept: list[tuple[float, float]] = []
    fastest = float("inf")
    for size, seconds in sorted(points, reverse=True):
        if seconds <= tolerance * fastest:
            fastest = min(fastest, seconds)
            kept.append((size, fastest))
    return kept[::-1], len(points) - len(kept)


def thin_points(points: Sequence[tuple[float, float]], tolerance: float = 0.01) -> list[tuple[float, float]]:
    """Leave out points that log-log interpolation between those kept gives back within ``tolerance``."""
    kept = [points[0]]
    start = 0
    while start < len(points) - 1:
        end = start + 1
        while end + 1 < len(points) and _on_the_line(points[start : end + 2], tolerance):
            end += 1
        kept.append(points[end])
        start = end
    return kept


def _on_the_line(points: Sequence[tuple[float, float]], tolerance: float) -> bool:
    """Whether all points lie within ``tolerance`` of the log-log line from the first to the last."""
    size, seconds = np.log(np.array(points, dtype=float)).T
    line = np.interp(size, size[[0, -1]], seconds[[0, -1]])
    return bool(np.abs(np.expm1(line - seconds)).max() <= tolerance)
