"""How the KV blocks of a cohort grow: what is asked of its books, and those of caches where members differ.

A member at ``base + step`` tokens crosses a block boundary whenever that is a multiple of the block size, so members
are kept by ``-base`` modulo the block size.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.durations import SPANS, WeightedTimes
from apexsim.costs.timing import RunTimes
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager

MOST_NOTED = 1 << 10
"""Stretches of a cohort that are noted before they are packed."""
MOST_MOVES = 1 << 15
"""Members that have joined before all that was noted is added up."""
MOST_STEPS = 1 << 18
"""Common steps after which it is: there is a count of crossings for each."""


class Taking(Protocol):
    """When the compositions of a stretch take blocks: ``early`` ones (0 or 1) at ``early_ns``, before a run of steps.

    The others come when 0, 1, 2 ... steps of the run have ended, which begins at ``from_ns``; the stretch ends at
    ``next_end_ns``.
    """

    early: int
    early_ns: int
    run: RunTimes
    from_ns: int
    next_end_ns: int

    def composed_ns(self, number: int) -> int:
        """When a composition happens, the first being number 0."""


class Growth(Protocol):
    """Blocks of a cohort's members, whose count of common steps is ``step``."""

    members: int
    """Those who may still take blocks."""

    def join(self, job: Job) -> None: ...

    def missing(self, step: int, steps: int) -> int:
        """Blocks that the members lack to march ``steps`` steps from count ``step``."""

    def march(self, step: int) -> None:
        """Take those of one step."""

    def march_over(self, step: int, steps: int, taking: Taking) -> None:
        """Take them at their times, which have passed; the block manager is told the time of the last alone."""

    def march_at(self, step: int, times_ns: Sequence[int], now_ns: int) -> None:
        """The same at these times, one step each; the manager is told ``now_ns`` alone."""

    def takes(self, job: Job, step: int) -> int:
        """Blocks that a member takes when it is composed at count ``step``."""

    def late_block_ns(self) -> int:
        """What ``block_ns`` of the manager lacks, because blocks were taken before it was told the time."""

    def leave(self, job: Job) -> None:
        """Let a member go."""


class MemberGrowth:
    """Sliding windows make crossings unequal: each member that crosses is looked at."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self.members = 0
        self._due: list[list[Job]] = [[] for _ in range(blocks.block_size)]

    def join(self, job: Job) -> None:
        self.members += 1
        self._due[-job.base % len(self._due)].append(job)

    def missing(self, step: int, steps: int) -> int:
        return sum(self._blocks.missing(job, tokens) for job, tokens in self._growing(step, steps))

    def march(self, step: int) -> None:
        for job, tokens in self._growing(step, 1):
            self._blocks.grow(job, tokens)

    def march_over(self, step: int, steps: int, taking: Taking) -> None:
        now_ns = taking.next_end_ns - taking.from_ns
        if taking.early:
            self.march_at(step, (taking.early_ns,), taking.next_end_ns)
            step, steps = step + 1, steps - 1
        self._march(step, taking.run.ends_ns(steps), steps, now_ns)

    def march_at(self, step: int, times_ns: Sequence[int], now_ns: int) -> None:
        self._march(step, times_ns, len(times_ns), now_ns)

    def _march(self, step: int, times_ns: Sequence[int], steps: int, now_ns: int) -> None:
        """Let members take blocks as they cross, at the times at which steps were composed, up to now."""
        due, size, blocks, used_ns = self._due, len(self._due), self._blocks, 0
        for number in range(steps):
            crossing = due[(step + number) % size]
            if not crossing:
                continue
            if taken := blocks.cross(crossing, step + number):
                used_ns += taken * (now_ns - times_ns[number])
        blocks.used(used_ns)

    def takes(self, job: Job, step: int) -> int:
        before = job.base + step
        return self._blocks.needed(before + 1) - self._blocks.needed(before) if before >= job.capacity else 0

    def late_block_ns(self) -> int:
        return 0

    def leave(self, job: Job) -> None:
        self.members -= 1
        self._due[-job.base % len(self._due)].remove(job)

    def _growing(self, step: int, steps: int) -> Iterator[tuple[Job, int]]:
        """Members that cross within ``steps`` steps, and the tokens they will have computed then."""
        size = len(self._due)
        for ahead in range(min(steps, size)):
            for job in self._due[(step + ahead) % size]:
                yield job, job.base + step + steps


class LateBlocks:
    """Times for which crossing members had blocks that were taken afterwards: noted, and added up many at a time.

    ``joined`` and ``left``: the common steps at which those who came and went cross next. ``noted``: stretches, as
    ``WeightedTimes`` has them. They count from common step ``origin`` on, before which there stood those who crossed at
    each of ``size`` steps.
    """

    def __init__(self, size: int) -> None:
        self.joined, self.left = array("q"), array("q")
        self._spans = WeightedTimes()
        self.noted = self._spans.noted
        self._size = size
        self._origin, self._stood, self._sum_ns = 0, np.zeros(size, dtype=np.int64), 0

    def sum(self) -> int:
        """Of every crossing the time from when it was to the end of its stretch, in nanoseconds."""
        crossing = self._crossings(max(self._spans.steps, self._origin))
        return self._sum_ns + self._spans.sum(crossing, self._origin)

    def settle(self, step: int) -> None:
        """Make room: the stretches so far all end by common step ``step``."""
        self._spans.pack()
        far = step - self._origin >= MOST_STEPS
        if far or self._spans.count >= SPANS or len(self.joined) >= MOST_MOVES:
            self._add_up(step)

    def _crossings(self, step: int) -> NDArray[np.int64]:
        """Members who cross at each common step from the origin to ``step`` at least, as long as all have moved."""
        size = self._size
        change = np.zeros(((step - self._origin) // size + 1) * size, dtype=np.int64)
        change[:size] = self._stood
        for moves, by in ((self.joined, 1), (self.left, -1)):
            at = np.array(moves, dtype=np.int64) - self._origin
            change += by * np.bincount(at[at < len(change)], minlength=len(change))
        return np.cumsum(change.reshape(-1, size), axis=0).ravel()

    def _add_up(self, step: int) -> None:
        crossing, passed = self._crossings(step), (step - self._origin) // self._size * self._size
        self._sum_ns += self._spans.sum(crossing, self._origin)
        if passed:
            self._stood = crossing[passed - self._size : passed]
            self._origin += passed
        self.joined, self.left = (
            array("q", [at for at in moves if at >= self._origin]) for moves in (self.joined, self.left)
        )
        self._spans = WeightedTimes()
        self.noted = self._spans.noted
