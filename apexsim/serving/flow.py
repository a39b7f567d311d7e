"""Where a request goes: to which replica, through its frontend, and back to the client when its job is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apexsim.serving.clock import ARRIVAL, Clock
from apexsim.serving.job import Job
from apexsim.serving.messages import Arrive, View
from apexsim.serving.replica import Replica
from apexsim.serving.request import Request
from apexsim.serving.request_rows import RequestRows
from apexsim.serving.routing import Router

LOT = 1 << 10
"""Requests that have ended before their rows are written: together, between steps, that is quicker."""


class Flow:
    """Sends the jobs of requests to replicas, and closes the row of each request whose last job is done.

    ``living`` requests have come and not ended. ``request_ns`` is their number integrated over time (L x T of Little's
    law), kept as each leaves. ``on_end``, where set, is told of each that has ended.
    """

    def __init__(self, clock: Clock, router: Router, rows: RequestRows, *, stream_interval: int) -> None:
        self.living: dict[int, Request] = {}
        self.request_ns = 0
        self.on_end: Callable[[Request], None] | None = None
        self._clock = clock
        self._router = router
        self._rows = rows
        self._ended: list[Request] = []
        self._stream_interval = stream_interval
        self._views: list[View] = []
        self._frontends: list[Frontend] = []

    def serve_with(self, replicas: Sequence[Replica], *, frontend_ns: int) -> None:
        """These replicas serve from now on, each behind a frontend of its own."""
        self._views = [View(replica) for replica in replicas]
        self._frontends = [Frontend(self._clock, replica, frontend_ns) for replica in replicas]

    @property
    def alone(self) -> Frontend | None:
        """The only frontend that there is, where nothing is to be routed."""
        return self._frontends[0] if len(self._frontends) == 1 else None

    def begin(self, request: Request) -> None:
        """A request comes, at this moment."""
        job = self._job_of(request)
        chosen = self._router.choose(job, self._views)
        self._views[chosen].unfinished += 1
        self._frontends[chosen].take(job)

    def taken_in(self, request: Request) -> None:
        """A request has come, and leaves the only frontend at this moment."""
        self._views[0].unfinished += 1
        self._frontends[0].replica.deliver(Arrive(self._job_of(request)))

    def _job_of(self, request: Request) -> Job:
        """All of a request as one job."""
        self.living[request.index] = request
        job = request.job = Job(request, stream_interval=self._stream_interval)
        return job

    def done(self, job: Job) -> None:
        """A replica says that the last token of a job exists, at the end of a step."""
        request, replica, end_ns = job.request, job.replica, job.last_token_ns
        assert replica is not None
        assert end_ns is not None
        self._views[replica].unfinished -= 1
        del self.living[request.index]
        self.request_ns += end_ns - request.arrival_ns
        see(request, job)
        self._ended.append(request)
        if len(self._ended) >= LOT:
            self.close_rows()
        if self.on_end is not None:
            self.on_end(request)

    def close_rows(self) -> None:
        """Write the rows of those who have ended since the last time."""
        self._rows.finish(self._ended)
        for request in self._ended:
            if request.job is not None:
                del request.job.request  # each would keep the other: nobody looks for such circles during a run
        self._ended.clear()


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
