"""The clock by which kernels are timed and loads are served.

It is handed in, so that whatever measures can be tried on times that do not depend on what else a machine does.
"""

from __future__ import annotations

import time
from typing import Protocol

from apexsim.units import NS_PER_S

# The operating system wakes a sleeper late by up to this: the rest of a wait is spent looking at the clock.
_WAKING_NS = 300_000


class Clock(Protocol):
    """Time in nanoseconds since some moment."""

    def now_ns(self) -> int:
        """What time it is."""
        ...

    def wait_until(self, at_ns: int) -> None:
        """Return when it is ``at_ns``, or at once if that is past."""
        ...


class HostClock:
    """The clock of the host that runs this."""

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def wait_until(self, at_ns: int) -> None:
        left_ns = at_ns - self.now_ns() - _WAKING_NS
        if left_ns > 0:
            time.sleep(left_ns / NS_PER_S)
        while self.now_ns() < at_ns:
            pass


def seconds_since(clock: Clock, begun_ns: int) -> float:
    """Seconds that have passed on a clock."""
    return (clock.now_ns() - begun_ns) / NS_PER_S
