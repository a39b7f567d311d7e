"""How the KV blocks of a marching cohort grow.

A member at ``base + step`` tokens crosses a block boundary whenever that is a multiple of the block size, so members
are kept by ``-base`` modulo the block size.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.durations import SPANS, WeightedTimes
from apexsim.costs.timing import RunTimes
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request


class Taking(Protocol):
    """When the compositions of a stretch take blocks: ``early`` ones (0 or 1) before a run of steps begins.

    The others come when 0, 1, 2 ... steps of the run have ended, which begins at ``from_ns``; the stretch ends at
    ``next_end_ns``.
    """

    early: int
    run: RunTimes
    from_ns: int
    next_end_ns: int

    def composed_ns(self, number: int) -> int:
        """When a composition happens, the first being number 0."""


class Growth(Protocol):
    """Blocks of a cohort's members, whose count of common steps is ``step``."""

    def join(self, request: Request) -> None: ...

    def missing(self, step: int, steps: int) -> int:
        """Blocks that the members lack to march ``steps`` steps from count ``step``."""

    def most_missing(self, steps: int) -> int:
        """No fewer blocks than the members lack for ``steps`` steps, from whatever count."""

    def march(self, step: int, steps: int) -> None:
        """Take those blocks."""

    def march_over(self, step: int, steps: int, taking: Taking) -> None:
        """Take them at their times, which have passed; the block manager is told the time of the last alone."""

    def late_block_ns(self) -> int:
        """What ``block_ns`` of the manager lacks, because blocks were taken before it was told the time."""

    def leave(self, request: Request) -> None:
        """Let a member go, with its blocks (of its ``computed`` tokens) on its own account again."""


def growth_of(blocks: BlockManager) -> Growth:
    """The quickest way to keep the books of this cache."""
    return SteadyGrowth(blocks) if blocks.steady else MemberGrowth(blocks)


class SteadyGrowth:
    """Every crossing takes the same number of blocks: crossings are counted, members are not touched."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._size = blocks.block_size
        self._each = blocks.needed(1)
        self._members = 0
        self._crossing = [0] * (2 * self._size)  # twice over, so that what crosses in a row stands in a row
        # What happened from common step ``origin`` on, to be added up many at a time: at which common steps those who
        # joined and left cross next, and all stretches. Before it stood those who crossed at each of ``size`` steps.
        self._joined, self._left, self._spans = array("q"), array("q"), WeightedTimes()
        self._origin, self._stood, self._late_ns = 0, np.zeros(self._size, dtype=np.int64), 0

    def join(self, request: Request) -> None:
        if request.capacity < request.total:  # else it holds all the blocks it will ever need
            self._members += 1
            at = -request.base % self._size
            self._crossing[at] += 1
            self._crossing[at + self._size] += 1
            self._joined.append(request.computed - request.base + -request.computed % self._size)
            if len(self._joined) >= SPANS:
                self._add_up(request.computed - request.base)

    def missing(self, step: int, steps: int) -> int:
        size, crossing = self._size, self._crossing
        if steps == 1:
            return self._each * crossing[step % size]
        first, rest = step % size, steps % size
        crossings = sum(crossing[first : first + rest])
        if steps >= size:
            crossings += steps // size * self._members
        return self._each * crossings

    def most_missing(self, steps: int) -> int:
        return self._each * self._members * (steps // self._size + 1)

    def march(self, step: int, steps: int) -> None:
        missing = self.missing(step, steps)
        if missing:
            self._blocks.take(missing)

    def march_over(self, step: int, steps: int, taking: Taking) -> None:
        missing = self.missing(step, steps)
        if not missing:
            return
        self._blocks.take(missing)
        if taking.early:
            taken = self._each * self._crossing[step % self._size]
            self._blocks.block_ns += taken * (taking.next_end_ns - taking.composed_ns(0))
            step, steps = step + 1, steps - 1
        if steps:
            if self._spans.count >= SPANS:
                self._add_up(step)
            self._spans.add(step, steps, taking.next_end_ns - taking.from_ns, taking.run)

    def late_block_ns(self) -> int:
        crossing = self._crossings(max(self._spans.steps, self._origin))
        return self._each * (self._late_ns + self._spans.sum(crossing, self._origin))

    def _crossings(self, step: int) -> NDArray[np.int64]:
        """Members who cross at each common step from the origin to ``step`` at least, as long as all have moved."""
        size = self._size
        change = np.zeros(((step - self._origin) // size + 1) * size, dtype=np.int64)
        change[:size] = self._stood
        for moves, by in ((self._joined, 1), (self._left, -1)):
            at = np.array(moves, dtype=np.int64) - self._origin
            change += by * np.bincount(at[at < len(change)], minlength=len(change))
        return np.cumsum(change.reshape(-1, size), axis=0).ravel()

    def _add_up(self, step: int) -> None:
        """Add up the stretches so far, all of which end by common step ``step``, and begin anew there."""
        crossing, passed = self._crossings(step), (step - self._origin) // self._size * self._size
        self._late_ns += self._spans.sum(crossing, self._origin)
        if passed:
            self._stood = crossing[passed - self._size : passed]
            self._origin += passed
        self._joined, self._left = (
            array("q", [at for at in moves if at >= self._origin]) for moves in (self._joined, self._left)
        )
        self._spans = WeightedTimes()

    def leave(self, request: Request) -> None:
        if request.capacity < request.total:
            self._members -= 1
            at = -request.base % self._size
            self._crossing[at] -= 1
            self._crossing[at + self._size] -= 1
            self._left.append(request.computed - request.base + -request.computed % self._size)
            self._blocks.hand_over(request)


class MemberGrowth:
    """Sliding windows make crossings unequal: each member that crosses is looked at."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._members = 0
        self._due: list[list[Request]] = [[] for _ in range(blocks.block_size)]

    def join(self, request: Request) -> None:
        self._members += 1
        self._due[-request.base % len(self._due)].append(request)

    def missing(self, step: int, steps: int) -> int:
        return sum(self._blocks.missing(request, tokens) for request, tokens in self._growing(step, steps))

    def most_missing(self, steps: int) -> int:
        return self._blocks.needed(1) * self._members * (steps // len(self._due) + 1)

    def march(self, step: int, steps: int) -> None:
        for request, tokens in self._growing(step, steps):
            self._blocks.grow(request, tokens)

    def march_over(self, step: int, steps: int, taking: Taking) -> None:
        size, needed = len(self._due), self._blocks.needed
        for first in range(min(steps, size)):
            for request in self._due[(step + first) % size]:
                for number in range(first, steps, size):
                    before = request.base + step + number
                    if before >= request.capacity:
                        taken = needed(before + 1) - needed(before)
                        self._blocks.block_ns += taken * (taking.next_end_ns - taking.composed_ns(number))
        self.march(step, steps)

    def late_block_ns(self) -> int:
        return 0

    def leave(self, request: Request) -> None:
        self._members -= 1
        self._due[-request.base % len(self._due)].remove(request)

    def _growing(self, step: int, steps: int) -> Iterator[tuple[Request, int]]:
        """Members that cross within ``steps`` steps, and the tokens they will have computed then."""
        size = len(self._due)
        for ahead in range(min(steps, size)):
            for request in self._due[(step + ahead) % size]:
                yield request, request.base + step + steps
