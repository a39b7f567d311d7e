"""Simulated time: whole nanoseconds, and a rank that orders events of the same instant."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from operator import attrgetter
from typing import TYPE_CHECKING

import simpy
from simpy.core import StopSimulation

Action = Callable[[simpy.Event], None]
"""What happens at a time; it is given the event, as SimPy's callbacks are."""

FOREVER = 1 << 62
"""A time that no run reaches, in nanoseconds."""

ARRIVAL = 0
"""Rank of arrivals, and of all else that comes from outside of replicas.

The step ends of replica ``i`` have rank ``1 + i``. At equal times a request arrives before any step ends, and step ends
happen in the order of the replicas, whether or not steps in between were simulated singly.
"""


class Alarm(simpy.Event):
    """An event that is certain to happen at its time unless silenced."""

    def __init__(self, clock: Clock, action: Action) -> None:
        # As simpy.Timeout does: triggered from the start, without the cost of being made pending first.
        self.env = clock
        self.callbacks = [action]
        self._value = None
        self._ok = True

    def silence(self) -> None:
        """Let the alarm pass without effect."""
        self.callbacks = []


class Clock(simpy.Environment):
    """A SimPy environment on integer nanoseconds with ranked ties."""

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.rank = ARRIVAL  # of what happens now: a replica that steps has its own

    if TYPE_CHECKING:

        @property
        def now_ns(self) -> int:
            """The time, in nanoseconds: every time asked for is a whole number."""

    else:
        now_ns = property(attrgetter("_now"), doc="The time, in nanoseconds.")  # quicker than a function of ours

    def reaches(self, time_ns: int, rank: int) -> bool:
        """Move on to ``time_ns`` unless something else happens before (or then, at a lower rank). True if it does not.

        What an event would do at that time can then be done at once, which spares the event.
        """
        if self._queue:
            next_ns, next_rank, _, _ = self._queue[0]
            if next_ns < time_ns or (next_ns == time_ns and next_rank < rank):
                return False
        self._now = time_ns
        return True

    def at(self, time_ns: int, rank: int, action: Action) -> Alarm:
        """Call ``action`` at ``time_ns``; among equal times lower ranks go first, then the order of asking."""
        alarm = Alarm(self, action)
        heappush(self._queue, (time_ns, rank, next(self._eid), alarm))  # type: ignore[misc]  # as Environment.schedule
        return alarm

    def stop(self) -> None:
        """Let nothing begin after this instant: what is going on at it ends the run."""
        self.at(self.now_ns, ARRIVAL, _end)


def _end(_: simpy.Event) -> None:
    raise StopSimulation(None)
