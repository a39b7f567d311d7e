"""The stops that a request makes on its way: phases of it, each at one replica of a pool.

Served by one pool a request has one stop; with one pool for prompts and another for decoding it has two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from apexsim.serving.job import Job
from apexsim.serving.request import Request
from apexsim.specs.deployment import COLOCATED
from apexsim.specs.plan import Phase


class Stop(NamedTuple):
    """``phases`` of a request, done as one job at a replica of the pool with that number.

    It begins once all stops have ended whose places in the itinerary it ``needs``. ``carries``: the KV entries that it
    computes are carried to the stops that need it.
    """

    phases: tuple[Phase, ...] = COLOCATED
    pool: int = 0
    needs: tuple[int, ...] = ()
    carries: bool = False


Itinerary = tuple[Stop, ...]
Itineraries = Callable[[Request], Itinerary]
"""Says where a request goes; it is asked once, when the request comes."""

WHOLE: Itinerary = (Stop(),)
"""Pool 0 serves the request from its prompt to its last token."""


class PromptsApart:
    """One pool computes prompts and samples first tokens; another goes on, where there are more."""

    def __init__(self, *, prefill: int = 0, decode: int = 1) -> None:
        self._one_token: Itinerary = (Stop(("prefill",), prefill),)
        self._more: Itinerary = (
            Stop(("prefill",), prefill, carries=True),
            Stop(("decode",), decode, needs=(0,)),
        )

    def __call__(self, request: Request) -> Itinerary:
        return self._more if request.output_tokens > 1 else self._one_token


class Journey:
    """How far a request with several stops has come: the jobs that have ended, by the place of their stop."""

    __slots__ = ("_fetched", "ended", "stops")

    def __init__(self, stops: Itinerary) -> None:
        self.stops = stops
        self.ended: dict[int, Job] = {}
        self._fetched = [0] * len(stops)

    @property
    def over(self) -> bool:
        """Whether all stops have ended."""
        return len(self.ended) == len(self.stops)

    def end(self, job: Job) -> list[int]:
        """A job has ended. Returns the places of the stops that can begin now."""
        self.ended[job.stop] = job
        return [
            place
            for place, stop in enumerate(self.stops)
            if job.stop in stop.needs and all(need in self.ended for need in stop.needs)
        ]

    def kept_for(self, stop: Stop) -> list[Job]:
        """The jobs whose KV entries a stop goes on from."""
        return [self.ended[need] for need in stop.needs if self.stops[need].carries]

    def fetch(self, job: Job) -> bool:
        """What a job has kept has come to a stop that needs it. Returns whether it has to all that do."""
        self._fetched[job.stop] += 1
        return self._fetched[job.stop] == sum([job.stop in stop.needs for stop in self.stops])
