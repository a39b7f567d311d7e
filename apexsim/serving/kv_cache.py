"""The paged KV cache of one replica, counted in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from apexsim.serving.job import Job


class Timed(Protocol):
    """What tells the time."""

    @property
    def now_ns(self) -> int: ...


class _Standing:
    """A clock for whoever does not ask for ``block_ns``."""

    now_ns = 0


class BlockManager:
    """Hands out a fixed number of KV blocks; a job holds as many as its computed tokens need.

    ``blocks_for(tokens)`` says how many blocks that many cached tokens take (sliding-window layers hold less). It may
    only rise at multiples of ``block_size``. ``steady``: every ``block_size`` tokens take as many (no windows).
    Invariant after every call: ``free`` + those of all jobs + those a group has taken == ``total``. ``block_ns`` is the
    number of blocks in use, integrated over the time of ``clock``: what is taken counts from then on, and what is given
    back no more.

    With ``remembers`` a preempted job finds again what nobody has taken of its blocks meanwhile. Free blocks form a
    queue as in vLLM: taken at the head, given back at the tail, those of a job last block first. Positions in it
    count from the start of time, so that a block is there as long as the head has not passed it; blocks found again
    leave gaps::

        taken already | head ... free ... | gap | ... free ... | tail
    """

    def __init__(
        self, total: int, block_size: int, blocks_for: Callable[[int], int], *, steady: bool = True,
        remembers: bool = False, clock: Timed | None = None,
    ) -> None:  # fmt: skip
        self.total = total
        self.free = total
        self.block_size = block_size
        self.blocks_for = blocks_for
        self.steady = steady
        self._each = blocks_for(1)
        self._needed = [0]  # blocks for 0, 1, 2 ... block sizes of tokens
        self._clock: Timed = clock or _Standing()
        self._given_ns = 0  # of every block given back when that was, less when each was taken
        self._remembers = remembers and steady
        self._tail = total
        self._gaps: list[tuple[int, int]] = []  # position and length, ascending
        self._left: dict[Job, tuple[int, int, int]] = {}  # position and number of blocks given back, tokens in them

    @property
    def held(self) -> int:
        """Blocks in use."""
        return self.total - self.free

    def block_ns(self, until_ns: int) -> int:
        """Blocks in use, integrated over the time up to then, since when nothing has changed.

        Raises RuntimeError where no clock was given.
        """
        if isinstance(self._clock, _Standing):
            raise RuntimeError("a KV cache without a clock does not know blocks over time")
        return self._given_ns + self.held * until_ns

    def needed(self, tokens: int) -> int:
        """Blocks that ``tokens`` cached tokens take, remembered."""
        needed, index = self._needed, -(-tokens // self.block_size)
        if self.steady:
            return index * self._each
        while index >= len(needed):
            needed.append(self.blocks_for(len(needed) * self.block_size))
        return needed[index]

    def missing(self, job: Job, tokens: int) -> int:
        """Blocks that ``job`` lacks to hold ``tokens`` cached tokens."""
        return self.needed(tokens) - job.blocks if tokens > job.capacity else 0

    def grow(self, job: Job, tokens: int) -> None:
        """Give ``job`` the blocks it lacks to hold ``tokens`` cached tokens."""
        if tokens <= job.capacity:
            return
        needed = self.needed(tokens)
        missing = needed - job.blocks
        if missing > self.free:
            raise RuntimeError(f"{job} needs {missing} blocks, {self.free} are free")
        self.free -= missing
        self._given_ns -= missing * self._clock.now_ns
        job.blocks = needed
        job.capacity = -(-tokens // self.block_size) * self.block_size

    def take(self, count: int, block_ns: int = 0) -> None:
        """Take blocks for members of a group, to be accounted for when each is handed over, or is released.

        ``block_ns`` are those that they were in use before now, where they were taken at times that have passed.
        """
        if count > self.free:
            raise RuntimeError(f"a group needs {count} blocks, {self.free} are free")
        self.free -= count
        self._given_ns += block_ns - count * self._clock.now_ns

    def cross(self, jobs: Iterable[Job], step: int) -> int:
        """Give members of a group, each of which has ``base + step`` tokens computed, the blocks for one more.

        For caches that are not ``steady``. Returns how many were given; a member that has room is given none.
        """
        size, needed, taken = self.block_size, self._needed, 0
        for job in jobs:
            before = job.base + step
            if before < job.capacity:
                continue
            index = before // size + 1
            blocks = needed[index] if index < len(needed) else self.needed(before + 1)
            taken += blocks - job.blocks
            job.blocks, job.capacity = blocks, index * size
        if taken:
            self.take(taken)
        return taken

    def used(self, block_ns: int) -> None:
        """Add block-nanoseconds of blocks that were taken before anybody said so."""
        self._given_ns += block_ns

    def hand_over(self, job: Job) -> None:
        """Put on a member's own account what it holds: the blocks of its computed tokens."""
        job.blocks = self.needed(job.computed)
        job.capacity = -(-job.computed // self.block_size) * self.block_size

    def release(self, job: Job) -> None:
        """Take back every block of ``job``; where a group took them for it, those of its computed tokens."""
        blocks = job.blocks if job.computed <= job.capacity else self.needed(job.computed)
        self.free += blocks
        self._given_ns += blocks * self._clock.now_ns
        self._tail += blocks
        job.blocks = 0
        job.capacity = 0

    def preempt(self, job: Job) -> None:
        """Take back every block of ``job``, which may come for them again."""
        if self._remembers:
            self._left[job] = (self._tail, job.blocks, job.computed)
        self.release(job)

    def cached(self, job: Job, free: int) -> int:
        """Tokens of a waiting job that it finds computed in its old blocks once only ``free`` blocks are left.

        Full blocks count, from the first on, and it must compute its last known token anew.
        """
        if job not in self._left:
            return 0
        position, blocks, tokens = self._left[job]
        there = blocks - max(0, self._head(free) - position)
        each = self.needed(1)
        return (
            max(0, min(there // each, tokens // self.block_size, (job.known - 1) // self.block_size)) * self.block_size
        )

    def recover(self, job: Job, tokens: int) -> None:
        """Give ``job`` its old blocks of its first ``tokens`` tokens; the others are forgotten."""
        position, blocks, _ = self._left.pop(job, (0, 0, 0))
        found = self.needed(tokens)
        if found:
            head = self._head(self.free)
            self._gaps = sorted(
                [*((at, size) for at, size in self._gaps if at >= head), (position + blocks - found, found)]
            )
            self.free -= found
            self._given_ns -= found * self._clock.now_ns
            job.blocks, job.capacity = found, tokens

    def _head(self, free: int) -> int:
        """Position of the next block to be taken if ``free`` are left."""
        head = self._tail - free - sum(size for _, size in self._gaps)
        for position, size in self._gaps:
            if position >= head:
                break
            head += size
        return head
