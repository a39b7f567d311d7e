"""The paged KV cache of one replica, counted in blocks."""

from __future__ import annotations

from collections.abc import Callable

from apexsim.serving.request import Request


class BlockManager:
    """Hands out a fixed number of KV blocks; a request holds as many as its computed tokens need.

    ``blocks_for(tokens)`` says how many blocks that many cached tokens take (sliding-window layers hold less); it may
    only rise at multiples of ``block_size``, by the same number each time if ``steady``. Invariant after every call:
    ``free`` + those of all requests + those a cohort has taken == ``total``.
    """

    def __init__(self, total: int, block_size: int, blocks_for: Callable[[int], int], *, steady: bool = True) -> None:
        self.total = total
        self.free = total
        self.block_size = block_size
        self.blocks_for = blocks_for
        self.steady = steady
        self._needed = [0]  # blocks for 0, 1, 2 ... block sizes of tokens

    @property
    def held(self) -> int:
        """Blocks in use."""
        return self.total - self.free

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
        request.blocks = 0
        request.capacity = 0
