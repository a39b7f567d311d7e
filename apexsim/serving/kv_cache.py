"""The paged KV cache of one replica, counted in blocks."""

from __future__ import annotations

from collections.abc import Callable

from apexsim.serving.request import Request


class BlockManager:
    """Hands out a fixed number of KV blocks; a request holds as many as its computed tokens need.

    ``blocks_for(tokens)`` says how many blocks that many cached tokens take (sliding-window layers hold less); it may
    only rise at multiples of ``block_size``, by the same number each time if ``steady``. Invariant after every call:
    ``free`` + those of all requests + those a cohort has taken == ``total``. ``block_ns`` is the number of blocks in
    use, integrated over time: it is kept by ``pass_time``, and by whoever takes blocks for times that have passed.

    With ``remembers`` a preempted request finds again what nobody has taken of its blocks meanwhile. Free blocks form a
    queue as in vLLM: taken at the head, given back at the tail, those of a request last block first. Positions in it
    count from the start of time, so that a block is there as long as the head has not passed it; blocks found again
    leave gaps::

        taken already | head ... free ... | gap | ... free ... | tail
    """

    def __init__(
        self, total: int, block_size: int, blocks_for: Callable[[int], int], *, steady: bool = True,
        remembers: bool = False,
    ) -> None:  # fmt: skip
        self.total = total
        self.free = total
        self.block_size = block_size
        self.blocks_for = blocks_for
        self.steady = steady
        self._needed = [0]  # blocks for 0, 1, 2 ... block sizes of tokens
        self.block_ns = 0
        self._until_ns = 0
        self._remembers = remembers and steady
        self._tail = total
        self._gaps: list[tuple[int, int]] = []  # position and length, ascending
        self._left: dict[Request, tuple[int, int, int]] = {}  # position and number of blocks given back, tokens in them

    @property
    def held(self) -> int:
        """Blocks in use."""
        return self.total - self.free

    def pass_time(self, now_ns: int) -> None:
        """Until now as many blocks were in use as are."""
        self.block_ns += (self.total - self.free) * (now_ns - self._until_ns)
        self._until_ns = now_ns

    def needed(self, tokens: int) -> int:
        """Blocks that ``tokens`` cached tokens take, remembered."""
        needed, index = self._needed, -(-tokens // self.block_size)
        while index >= len(needed):
            needed.append(self.blocks_for(len(needed) * self.block_size))
        return needed[index]

    def missing(self, request: Request, tokens: int) -> int:
        """Blocks that ``request`` lacks to hold ``tokens`` cached tokens."""
        return self.needed(tokens) - request.blocks if tokens > request.capacity else 0

    def grow(self, request: Request, tokens: int) -> None:
        """Give ``request`` the blocks it lacks to hold ``tokens`` cached tokens."""
        if tokens <= request.capacity:
            return
        needed = self.needed(tokens)
        missing = needed - request.blocks
        if missing > self.free:
            raise RuntimeError(f"{request} needs {missing} blocks, {self.free} are free")
        self.free -= missing
        request.blocks = needed
        request.capacity = -(-tokens // self.block_size) * self.block_size

    def take(self, count: int) -> None:
        """Take blocks for members of a cohort, to be accounted for when each is handed over or released."""
        if count > self.free:
            raise RuntimeError(f"a cohort needs {count} blocks, {self.free} are free")
        self.free -= count

    def hand_over(self, request: Request) -> None:
        """Put on a member's own account what it holds: the blocks of its computed tokens."""
        request.blocks = self.needed(request.computed)
        request.capacity = -(-request.computed // self.block_size) * self.block_size

    def release(self, request: Request) -> None:
        """Take back every block of ``request``."""
        self.free += request.blocks
        self._tail += request.blocks
        request.blocks = 0
        request.capacity = 0

    def preempt(self, request: Request) -> None:
        """Take back every block of ``request``, which may come for them again."""
        if self._remembers:
            self._left[request] = (self._tail, request.blocks, request.computed)
        self.release(request)

    def cached(self, request: Request, free: int) -> int:
        """Tokens of a waiting request that it finds computed in its old blocks once only ``free`` blocks are left.

        Full blocks count, from the first on, and it must compute its last known token anew.
        """
        if request not in self._left:
            return 0
        position, blocks, tokens = self._left[request]
        there = blocks - max(0, self._head(free) - position)
        each = self.needed(1)
        return (
            max(0, min(there // each, tokens // self.block_size, (request.known - 1) // self.block_size))
            * self.block_size
        )

    def recover(self, request: Request, tokens: int) -> None:
        """Give ``request`` its old blocks of its first ``tokens`` tokens; the others are forgotten."""
        position, blocks, _ = self._left.pop(request, (0, 0, 0))
        found = self.needed(tokens)
        if found:
            head = self._head(self.free)
            self._gaps = sorted(
                [*((at, size) for at, size in self._gaps if at >= head), (position + blocks - found, found)]
            )
            self.free -= found
            request.blocks, request.capacity = found, tokens

    def _head(self, free: int) -> int:
        """Position of the next block to be taken if ``free`` are left."""
        head = self._tail - free - sum(size for _, size in self._gaps)
        for position, size in self._gaps:
            if position >= head:
                break
            head += size
        return head
