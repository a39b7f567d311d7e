"""Routers: which replica serves an arriving request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Router(Protocol):
    """Chooses a replica from the unfinished requests that each of them holds."""

    def choose(self, loads: Sequence[int]) -> int: ...


class RoundRobin:
    """Replicas in turn, whatever they hold."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, loads: Sequence[int]) -> int:
        chosen = self._next % len(loads)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The replica with the fewest unfinished requests; the first of equals."""

    def choose(self, loads: Sequence[int]) -> int:
        return min(range(len(loads)), key=loads.__getitem__)


ROUTERS: dict[str, type[RoundRobin] | type[LeastLoaded]] = {"round_robin": RoundRobin, "least_loaded": LeastLoaded}
"""Routers by the name a deployment uses."""
