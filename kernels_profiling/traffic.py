"""When requests come: at the times of a workload, or from the clients of a closed loop. Wall-clock nanoseconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from apexsim.serving.request import Request
from apexsim.specs.workload import Requests
from apexsim.units import NS_PER_S, to_ns


class Traffic:
    """Requests of a workload in order of arrival, in nanoseconds since the start of the run.

    Clients of a closed loop send as those of the simulator do: their next request comes just after their last answer
    ended, and so after the step that is composed at that moment.
    """

    def __init__(self, workload: Requests) -> None:
        lengths = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
        self.requests = [Request(index, prompt, output) for index, (prompt, output) in enumerate(lengths)]
        self._coming = deque(self.requests)
        self._due: deque[Request] = deque()
        self._clients = workload.concurrency
        self._turnaround_ns = max(1, to_ns(workload.turnaround_s))
        self._waves = workload.waves
        self._out = 0
        if workload.arrival_s is None:
            self._send(0)
            return
        arrivals_ns = np.rint(workload.arrival_s * NS_PER_S).astype(np.int64).tolist()
        for request, arrival_ns in zip(self.requests, arrivals_ns, strict=True):
            request.arrival_ns = arrival_ns
        self._due, self._coming = self._coming, self._due

    @property
    def next_ns(self) -> int | None:
        """When the next request comes; None when none is known to come."""
        return self._due[0].arrival_ns if self._due else None

    def arrived(self, now_ns: int) -> list[Request]:
        """Requests that have come by now."""
        found = []
        while self._due and self._due[0].arrival_ns <= now_ns:
            found.append(self._due.popleft())
        return found

    def answered(self, requests: Sequence[Request], now_ns: int) -> None:
        """These requests have their last token: clients of a closed loop send others."""
        if self._clients is None:
            return
        self._out -= len(requests)
        if not (self._waves and self._out):
            self._send(now_ns + self._turnaround_ns)

    def _send(self, at_ns: int) -> None:
        """Every client without a request sends one."""
        assert self._clients is not None
        while self._coming and self._out < self._clients:
            request = self._coming.popleft()
            request.arrival_ns = at_ns
            self._due.append(request)
            self._out += 1
