"""The Pareto front: what nothing else beats on every count."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]


def pareto_front(points: Sequence[Point]) -> tuple[bool, ...]:
    """For each point, whether no other one is at least as low on every axis and lower on one."""
    return tuple(not any(_dominates(other, point) for other in points) for point in points)


def _dominates(one: Point, other: Point) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
