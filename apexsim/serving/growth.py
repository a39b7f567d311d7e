"""How the KV blocks of a marching cohort grow.

A member at ``base + step`` tokens crosses a block boundary whenever that is a multiple of the block size, so members
are kept by ``-base`` modulo the block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request


class Growth(Protocol):
    """Blocks of a cohort's members, whose count of common steps is ``step``."""

    def join(self, request: Request) -> None: ...

    def missing(self, step: int, steps: int) -> int:
        """Blocks that the members lack to march ``steps`` steps from count ``step``."""

    def most_missing(self, steps: int) -> int:
        """At least as many as they lack, told at once."""

    def march(self, step: int, steps: int, missing: int | None = None) -> None:
        """Take the blocks that the members lack: so many, where that is known."""

    def takes(self, step: int, steps: int) -> list[int]:
        """How many of those blocks each of the steps takes."""

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
        self._crossing = [0] * self._size

    def join(self, request: Request) -> None:
        if request.capacity < request.total:  # else it holds all the blocks it will ever need
            self._members += 1
            self._crossing[-request.base % self._size] += 1

    def missing(self, step: int, steps: int) -> int:
        size, crossing = self._size, self._crossing
        if steps == 1:
            return self._each * crossing[step % size]
        first, rest = step % size, steps % size
        crossings = steps // size * self._members + sum(crossing[first : first + rest])
        if first + rest > size:
            crossings += sum(crossing[: first + rest - size])
        return self._each * crossings

    def most_missing(self, steps: int) -> int:
        return self._each * self._members * (1 + steps // self._size)

    def march(self, step: int, steps: int, missing: int | None = None) -> None:
        if missing is None:
            missing = self.missing(step, steps)
        if missing:
            self._blocks.take(missing)

    def takes(self, step: int, steps: int) -> list[int]:
        crossing, first, each = self._crossing, step % self._size, self._each
        if first + steps > self._size:
            crossing = crossing * (1 + (first + steps) // self._size)
        taken = crossing[first : first + steps]
        return taken if each == 1 else [each * count for count in taken]

    def leave(self, request: Request) -> None:
        if request.capacity < request.total:
            self._members -= 1
            self._crossing[-request.base % self._size] -= 1
            self._blocks.hand_over(request)


class MemberGrowth:
    """Sliding windows make crossings unequal: each member that crosses is looked at."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._due: list[list[Request]] = [[] for _ in range(blocks.block_size)]

    def join(self, request: Request) -> None:
        self._due[-request.base % len(self._due)].append(request)

    def missing(self, step: int, steps: int) -> int:
        return sum(self._blocks.missing(request, tokens) for request, tokens in self._growing(step, steps))

    def most_missing(self, steps: int) -> int:
        return sum(map(len, self._due)) * self._blocks.needed(steps + self._blocks.block_size)

    def march(self, step: int, steps: int, missing: int | None = None) -> None:
        for request, tokens in self._growing(step, steps):
            self._blocks.grow(request, tokens)

    def takes(self, step: int, steps: int) -> list[int]:
        taken, size, needed = [0] * steps, len(self._due), self._blocks.needed
        for first in range(min(steps, size)):
            for request in self._due[(step + first) % size]:
                for at in range(first, steps, size):
                    before = request.base + step + at
                    if before >= request.capacity:
                        taken[at] += needed(before + 1) - needed(before)
        return taken

    def leave(self, request: Request) -> None:
        self._due[-request.base % len(self._due)].remove(request)

    def _growing(self, step: int, steps: int) -> Iterator[tuple[Request, int]]:
        """Members that cross within ``steps`` steps, and the tokens they will have computed then."""
        size = len(self._due)
        for ahead in range(min(steps, size)):
            for request in self._due[(step + ahead) % size]:
                yield request, request.base + step + steps
