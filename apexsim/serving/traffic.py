"""Who asks when: requests are made as they are sent, in an open loop one arrival ahead, and refused at the door.

open loop      every request comes at its own time
closed loop    each of so many clients sends its next request some time after its last answer ended
waves          they wait for one another's answers and send together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from simpy import Event

from apexsim.costs.memory import MemoryPlan
from apexsim.serving.clock import ARRIVAL, Clock
from apexsim.serving.flow import Flow
from apexsim.serving.request import Request
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.workload import DEADLINE, Requests
from apexsim.units import NS_PER_S, to_ns

# Rows of a workload that are turned into Python's numbers at a time.
_LOT = 1 << 12
Row = tuple[int, int, int | None, int | None]


class Source:
    """The requests of a workload, made one by one; those refused at the door are passed over.

    ``patience_ns`` is the time from arrival to deadline of requests without a deadline of their own; None where they
    have none. ``refuse`` is told of each request that is turned away, and why.
    """

    def __init__(
        self,
        requests: Requests,
        door: Door,
        refuse: Callable[[Request, str], None],
        *,
        patience_ns: int | None,
    ) -> None:
        self.count = len(requests)
        self.made = 0
        self._door = door
        self._refuse = refuse
        self._patience_ns = patience_ns
        self._rows = _rows(requests)

    def next(self, now_ns: int | None = None) -> Request | None:
        """The next request that is served; it comes at ``now_ns``, else at its own time. None when all are made."""
        while (request := self._make(now_ns)) is not None:
            reason = self._door.refuses(request)
            if not reason:
                return request
            self._refuse(request, reason)
        return None

    def rest(self) -> Iterator[Request]:
        """The requests that were never sent, whoever may be let in; without an own time they come at 0."""
        while (request := self._make(None)) is not None:
            yield request

    def _make(self, now_ns: int | None) -> Request | None:
        row = next(self._rows, None)
        if row is None:
            return None
        prompt, output, arrival_ns, patience_ns = row
        request = Request(self.made, prompt, output)
        self.made += 1
        request.arrival_ns = (arrival_ns or 0) if now_ns is None else now_ns
        patience_ns = self._patience_ns if patience_ns is None else patience_ns
        if patience_ns is not None:
            request.deadline_ns = request.arrival_ns + patience_ns
        return request


def _rows(requests: Requests) -> Iterator[Row]:
    """Prompt, output, arrival and patience of every request; times in nanoseconds, None where there is none."""
    for part in requests.parts():
        yield from _rows_of(part)


def _rows_of(requests: Requests) -> Iterator[Row]:
    arrival_s, patience_s = requests.arrival_s, requests.extra.get(DEADLINE)
    for first in range(0, len(requests), _LOT):
        part = slice(first, first + _LOT)
        prompts, outputs = requests.prompt_tokens[part].tolist(), requests.output_tokens[part].tolist()
        nothing: list[None] = [None] * len(prompts)
        arrivals_ns = nothing if arrival_s is None else np.rint(arrival_s[part] * NS_PER_S).astype(np.int64).tolist()
        patience_ns = nothing if patience_s is None else [to_ns(seconds) for seconds in patience_s[part].tolist()]
        yield from zip(prompts, outputs, arrivals_ns, patience_ns, strict=True)


class Traffic(Protocol):
    """Sends the requests of a source on their way."""

    waits: bool
    """Whether somebody waits for a request to end."""

    def begin(self) -> None:
        """Ask for the first arrival."""

    def ended(self) -> None:
        """A request that was sent has ended, at this moment."""


class OpenLoop:
    """Every request comes at its own time; only the next one is known.

    Behind a single frontend there is nothing to route: one event says that it has come and has been taken in.
    """

    waits = False

    def __init__(self, source: Source, clock: Clock, flow: Flow) -> None:
        self._source = source
        self._clock = clock
        self._flow = flow
        self._alone = flow.alone
        self._each_ns = self._alone.each_ns if self._alone else 0
        self._coming: Request | None = None
        self._comes_ns = 0

    def begin(self) -> None:
        self._look_ahead()
        self._await()

    def ended(self) -> None:
        """Nobody waits for it."""

    def _look_ahead(self) -> None:
        self._coming = self._source.next()
        if self._coming is not None:
            self._comes_ns = max(self._comes_ns, self._coming.arrival_ns) + self._each_ns

    def _await(self) -> None:
        if self._coming is not None:
            self._clock.at(self._comes_ns, ARRIVAL, self._arrive)

    def _arrive(self, _: Event) -> None:
        """All requests of this instant arrive, then the next arrival is awaited."""
        now_ns, alone = self._comes_ns, self._alone
        while (request := self._coming) is not None and self._comes_ns == now_ns:
            self._look_ahead()
            if alone is None:
                self._flow.begin(request)
            else:
                self._flow.taken_in(request, None if self._coming is None else self._comes_ns)
        self._await()


class ClosedLoop:
    """``clients`` send their next request ``pause_ns`` after their answer ended; in ``waves``, after all answers."""

    waits = True

    def __init__(self, source: Source, clock: Clock, flow: Flow, *, clients: int, pause_ns: int, waves: bool) -> None:
        self._source = source
        self._clock = clock
        self._flow = flow
        self._clients = clients
        self._pause_ns = pause_ns
        self._waves = waves
        self._out = 0

    def begin(self) -> None:
        self._clock.at(0, ARRIVAL, self._all_ask)

    def ended(self) -> None:
        self._out -= 1
        if self._source.made == self._source.count or (self._waves and self._out):
            return
        self._clock.at(self._clock.now_ns + self._pause_ns, ARRIVAL, self._all_ask if self._waves else self._ask)

    def _all_ask(self, event: Event) -> None:
        """All clients send a request."""
        for _ in range(min(self._clients, self._source.count)):
            self._ask(event)

    def _ask(self, _: Event) -> None:
        """A client sends the next request; one refused at the door is followed at once by another."""
        request = self._source.next(self._clock.now_ns)
        if request is not None:
            self._out += 1
            self._flow.begin(request)


class Door:
    """Refuses requests that no scheduler could ever serve, each with its reason."""

    def __init__(self, scheduler: SchedulerDefaults, context_limit: int, memory: MemoryPlan) -> None:
        self._context_limit = context_limit
        budget = scheduler.token_budget
        whole = budget if scheduler.max_chunk_tokens is None else min(budget, scheduler.max_chunk_tokens)
        self._prompt_limit = None if scheduler.chunked_prefill else whole
        self._memory_limit = memory.max_tokens
        holder = "a replica" if memory.ranks == 1 else "an attention-data rank"
        self._blocks = f"{memory.rank_blocks} KV blocks that {holder} has"

    def refuses(self, request: Request) -> str:
        """Why the request cannot be served; empty when it can."""
        prompt = request.prompt_tokens
        total = prompt + request.output_tokens
        if total > self._context_limit:
            return f"{total} tokens of prompt and output exceed the context limit of {self._context_limit}"
        if self._prompt_limit is not None and prompt > self._prompt_limit:
            limit = f"the budget of {self._prompt_limit} tokens a step"
            return f"a prompt of {prompt} tokens exceeds {limit}, and prompts are not chunked"
        if self._memory_limit is not None and total > self._memory_limit:
            return f"{total} tokens need more than the {self._blocks}"
        return ""
