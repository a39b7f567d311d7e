"""Routers: which replica serves an arriving request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from apexsim.serving.job import Job
from apexsim.serving.messages import View


class Router(Protocol):
    """Chooses the replica of a job, by its position among those that are to be seen."""

    def choose(self, job: Job, views: Sequence[View]) -> int: ...


class RoundRobin:
    """Replicas in turn, whatever they hold."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, job: Job, views: Sequence[View]) -> int:
        chosen = self._next % len(views)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The replica with the fewest unfinished requests; the first of equals."""

    def choose(self, job: Job, views: Sequence[View]) -> int:
        loads = [view.unfinished for view in views]
        return loads.index(min(loads))


ROUTERS: dict[str, type[RoundRobin] | type[LeastLoaded]] = {"round_robin": RoundRobin, "least_loaded": LeastLoaded}
"""Routers by the name a deployment uses."""
