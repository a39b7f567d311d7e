"""Where a request goes: from stop to stop, to which replica of each pool, and back to the client when it is done.

What a stop has computed is carried to the next one, if that is at another replica::

    step end at the first        1 ns later                        its KV entries have come
    the job is done          ->  the next stop begins: a router  ->  Fetched to the first, whose blocks are free now
    its blocks are kept          looks at the views of its pool      the second goes on

*Pushed*, KV entries travel as soon as the second replica is chosen, and its job arrives after them. *Pulled*, its job
lies in the queue there; it is given a seat and blocks, they travel to these, and ``Loaded`` lets it run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from simpy import Event

from apexsim.serving.clock import ARRIVAL, Clock
from apexsim.serving.itinerary import WHOLE, Itineraries, Itinerary, Journey, Stop
from apexsim.serving.job import Job
from apexsim.serving.links import NETWORKS, Path, Share, Transfer
from apexsim.serving.messages import Arrive, Fetched, Loaded, View
from apexsim.serving.replica import Replica
from apexsim.serving.request import Request
from apexsim.serving.request_rows import RequestRows
from apexsim.serving.routing import Router

LOT = 1 << 10
"""Requests that have ended before their rows are written: together, between steps, that is quicker."""


def served_whole(_: Request) -> Itinerary:
    """Where requests go whose deployment has one pool."""
    return WHOLE


class Carrier(NamedTuple):
    """How KV entries get from one replica to another, by their numbers.

    ``kv_bytes(tokens)`` are the bytes of so many tokens. ``pulls``: they travel once the receiver has room for them.
    ``share``: how transfers share links, see ``links``.
    """

    path: Callable[[int, int], Path]
    kv_bytes: Callable[[int], int]
    pulls: bool
    share: Share = "fifo"


class Pool(NamedTuple):
    """The replicas of a pool as they are seen and reached from outside."""

    router: Router
    views: Sequence[View]
    frontends: Sequence[Frontend]


class Flow:
    """Sends the jobs of requests to replicas, and closes the row of each request whose last job is done.

    ``living`` requests have come and not ended. ``request_ns`` is their number integrated over time (L x T of Little's
    law), kept as each leaves. ``on_end``, where set, is told of each that has ended. ``transfers`` are all that were
    asked for, in that order.
    """

    def __init__(
        self,
        clock: Clock,
        rows: RequestRows,
        *,
        itinerary: Itineraries = served_whole,
        carrier: Carrier | None = None,
        stream_interval: int = 1,
    ) -> None:
        self.living: dict[int, Request] = {}
        self.request_ns = 0
        self.on_end: Callable[[Request], None] | None = None
        self.transfers: list[Transfer] = []
        self._clock = clock
        self._rows = rows
        self._itinerary = itinerary
        self._carrier = carrier
        self._network = NETWORKS[carrier.share](clock) if carrier else None
        self._pulls = carrier is not None and carrier.pulls
        self._stream_interval = stream_interval
        self._ended: list[Request] = []
        self._journeys: dict[int, Journey] = {}  # of requests that have several stops and have not ended
        self._pools: list[Pool] = []
        self._views: list[View] = []  # of all pools, by the number of the replica
        self._frontends: list[Frontend] = []

    def serve_with(self, replicas: Sequence[Replica], router: Router, *, frontend_ns: int) -> None:
        """These replicas are the next pool, each behind a frontend of its own; replicas are numbered through."""
        views = [View(replica) for replica in replicas]
        frontends = [Frontend(self._clock, replica, frontend_ns) for replica in replicas]
        self._pools.append(Pool(router, views, frontends))
        self._views += views
        self._frontends += frontends

    @property
    def alone(self) -> Frontend | None:
        """The only frontend that there is, where nothing is to be routed."""
        return self._frontends[0] if len(self._frontends) == 1 else None

    # -- a request comes --------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """A request comes, at this moment."""
        for job, stop in self._first_jobs(request):
            self._choose(job, stop).take(job)

    def taken_in(self, request: Request, next_ns: int | None) -> None:
        """A request has come, and leaves the only frontend at this moment; the next one does at ``next_ns``, if any.

        With one replica there is nothing to choose: the router is not asked.
        """
        for job, _ in self._first_jobs(request):
            self._views[0].unfinished += 1
            self._frontends[0].replica.deliver(Arrive(job), next_ns)

    def _first_jobs(self, request: Request) -> list[tuple[Job, Stop]]:
        """What can begin as the request comes."""
        self.living[request.index] = request
        stops = self._itinerary(request)
        if len(stops) > 1:
            self._journeys[request.index] = Journey(stops)
        return [(self._job_of(request, place, stop), stop) for place, stop in enumerate(stops) if not stop.needs]

    def _job_of(self, request: Request, place: int, stop: Stop) -> Job:
        job = request.job = Job(request, stream_interval=self._stream_interval)
        job.stop = place
        job.kept = stop.carries
        if "decode" not in stop.phases:
            job.only_prefill()
        return job

    def _choose(self, job: Job, stop: Stop) -> Frontend:
        """The replica that serves a job, at the time at which its stop begins."""
        router, views, frontends = self._pools[stop.pool]
        chosen = router.choose(job, views)
        views[chosen].unfinished += 1
        return frontends[chosen]

    # -- a job is done ----------------------------------------------------------------------------------------------

    def done(self, job: Job) -> None:
        """A replica says that the last token of a job exists, at the end of a step."""
        request, replica, end_ns = job.request, job.replica, job.last_token_ns
        assert replica is not None
        assert end_ns is not None
        self._views[replica].unfinished -= 1
        see(request, job)
        if self._journeys and self._goes_on(job):
            return
        del self.living[request.index]
        self.request_ns += end_ns - request.arrival_ns
        self._ended.append(request)
        if len(self._ended) >= LOT:
            self.close_rows()
        if self.on_end is not None:
            self.on_end(request)

    def _goes_on(self, job: Job) -> bool:
        """Whether stops follow. Those that can begin do so 1 ns later: others are not to hear of a step end in it."""
        request = job.request
        journey = self._journeys.get(request.index)
        if journey is None:
            return False
        places = journey.end(job)
        if journey.over:
            del self._journeys[request.index]
            return False
        request.job = None

        def begin(_: Event) -> None:
            for place in places:
                self._begin(request, journey, place)

        if places:
            self._clock.at(self._clock.now_ns + 1, ARRIVAL, begin)
        return True

    def _begin(self, request: Request, journey: Journey, place: int) -> None:
        """A stop begins that others had to end for, and goes on from what they kept for it."""
        stop = journey.stops[place]
        kept, job = journey.kept_for(stop), self._job_of(request, place, stop)
        for before in kept:
            job.follow(before)
        frontend = self._choose(job, stop)
        replica = frontend.replica
        if not kept:
            frontend.take(job)
        elif self._pulls:
            job.fetch = lambda job: self._send(journey, kept, replica, lambda: replica.deliver(Loaded(job)))
            frontend.take(job)
        else:
            self._send(journey, kept, replica, lambda: frontend.take(job))

    def _send(self, journey: Journey, kept: Sequence[Job], receiver: Replica, then: Callable[[], None]) -> None:
        """Carry the KV entries of these jobs to a replica; when all have come, ``then`` is called."""
        carrier, network, on_the_way = self._carrier, self._network, set(kept)
        assert carrier is not None
        assert network is not None
        for job in kept:
            sender = job.replica
            assert sender is not None

            def arrived(_: Transfer, job: Job = job, sender: int = sender) -> None:
                if journey.fetch(job):
                    self._frontends[sender].replica.deliver(Fetched(job))
                on_the_way.remove(job)
                if not on_the_way:
                    then()

            transfer = Transfer(job.index, sender, receiver.index, carrier.kv_bytes(job.computed))
            self.transfers.append(transfer)
            network.send(transfer, carrier.path(sender, receiver.index), arrived)

    # -- rows -------------------------------------------------------------------------------------------------------

    def close_rows(self) -> None:
        """Write the rows of those who have ended since the last time."""
        self._rows.finish(self._ended)
        for request in self._ended:
            if request.job is not None:
                del request.job.request  # each would keep the other: nobody looks for such circles during a run
        self._ended.clear()

    def leave(self, request: Request) -> None:
        """The run is over, and a request has not ended."""
        if request.job is not None:
            see(request, request.job)
        self._rows.leave(request)


def see(request: Request, job: Job) -> None:
    """A job of a request has ended, or the run has: the first one says when it began, each what came last."""
    if request.scheduled_ns is None:
        request.replica, request.scheduled_ns = job.replica, job.scheduled_ns
    if request.first_token_ns is None:
        request.first_token_ns = job.shown_ns if job.shown else job.first_token_ns
    request.last_token_ns = job.last_token_ns
    request.preemptions += job.preemptions


class Frontend:
    """What takes requests in for one replica, one after another, ``each_ns`` each."""

    def __init__(self, clock: Clock, replica: Replica, each_ns: int) -> None:
        self.replica = replica
        self.each_ns = each_ns
        self._clock = clock
        self._free_ns = 0

    def take(self, job: Job) -> None:
        """A job comes; the replica hears of it once it has been taken in."""
        if not self.each_ns:
            self.replica.deliver(Arrive(job))
            return
        self._free_ns = max(self._clock.now_ns, self._free_ns) + self.each_ns
        self._clock.at(self._free_ns, ARRIVAL, lambda _: self.replica.deliver(Arrive(job)))
