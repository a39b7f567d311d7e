"""Attention windows of the members of a cohort, in sum."""

from __future__ import annotations

from heapq import heappop, heappush

from apexsim.serving.clock import FOREVER
from apexsim.serving.job import Job


class WindowSum:
    """The sum over the members of min(computed, window): of those below the window only their bases are summed."""

    __slots__ = ("_base", "_crossing", "_due", "_until", "full_at", "open", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.open = 0
        self.full_at = FOREVER  # the next step at which a member fills the window
        self._base = 0
        self._due: list[int] = []  # steps at which members fill the window: a heap of those counted below
        self._crossing: dict[int, int] = {}
        self._until = 0  # members who fill it up to this step are counted as full

    def join(self, job: Job, step: int) -> None:
        at = self.window - job.base
        self._until = max(self._until, step)
        if at <= self._until:
            return
        self.open += 1
        self._base += job.base
        if at not in self._crossing:
            heappush(self._due, at)
        self._crossing[at] = self._crossing.get(at, 0) + 1
        self._look()

    def leave(self, job: Job) -> None:
        at = self.window - job.base
        if at <= self._until:
            return
        self.open -= 1
        self._base -= job.base
        if self._crossing[at] > 1:
            self._crossing[at] -= 1
            return
        del self._crossing[at]
        self._look()

    def _look(self) -> None:
        due, crossing = self._due, self._crossing
        while due and due[0] not in crossing:
            heappop(due)
        self.full_at = due[0] if due else FOREVER

    def attended(self, size: int, step: int) -> int:
        """The sum at a step no earlier than any asked for before; those who fill the window by then are full."""
        while self.full_at <= step:
            count = self._crossing.pop(self.full_at)
            self.open -= count
            self._base -= count * (self.window - self.full_at)
            self._look()
        self._until = max(self._until, step)
        return (size - self.open) * self.window + self._base + self.open * step
