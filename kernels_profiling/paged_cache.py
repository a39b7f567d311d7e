"""Which physical KV blocks a request holds: the simulator's block manager says how many, this says which."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request

Ids = npt.NDArray[np.int32]


class BlockTables:
    """A row of physical block ids for each seated request.

    ``rows`` has a line a seat, ``width`` blocks long; what a request does not hold names ``spare``, a block of nobody,
    where padding may be written to. Invariant after ``check``: free ids + ids held == blocks of the manager, which
    counts as many free.
    """

    def __init__(self, manager: BlockManager, *, seats: int, width: int) -> None:
        self.spare = manager.total
        self.rows: Ids = np.full((seats, width), self.spare, dtype=np.int32)
        self._manager = manager
        self._free_ids = list(range(manager.total - 1, -1, -1))
        self._free_rows = list(range(seats - 1, -1, -1))
        self._row_of: dict[Request, int] = {}
        self._held: dict[Request, int] = {}

    def row(self, request: Request) -> int:
        """The line of ``rows`` that is this request's."""
        return self._row_of[request]

    def grow(self, request: Request) -> int:
        """Give ``request`` the ids of the blocks it holds by now; returns its line."""
        row = self._row_of.get(request)
        if row is None:
            row = self._row_of[request] = self._free_rows.pop()
            self._held[request] = 0
        held = self._held[request]
        while held < request.blocks:
            self.rows[row, held] = self._free_ids.pop()
            held += 1
        self._held[request] = held
        return row

    def release(self, request: Request) -> None:
        """Take back every id of a request that has been preempted or has left."""
        row, held = self._row_of.pop(request), self._held.pop(request)
        self._free_ids.extend(self.rows[row, :held][::-1].tolist())
        self.rows[row, :held] = self.spare
        self._free_rows.append(row)

    def check(self) -> None:
        """Assert that ids and the manager's count agree."""
        assert len(self._free_ids) == self._manager.free, (
            f"{len(self._free_ids)} block ids are free, the block manager counts {self._manager.free}"
        )
