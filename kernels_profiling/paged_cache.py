"""Which physical KV blocks a job holds: the simulator's block manager says how many, this says which."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager

Ids = npt.NDArray[np.int32]


class BlockTables:
    """A row of physical block ids for each seated job.

    ``rows`` has a line a seat, ``width`` blocks long; what a job does not hold names ``spare``, a block of nobody,
    where padding may be written to. Invariant after ``check``: free ids + ids held == blocks of the manager, which
    counts as many free.
    """

    def __init__(self, manager: BlockManager, *, seats: int, width: int) -> None:
        self.spare = manager.total
        self.rows: Ids = np.full((seats, width), self.spare, dtype=np.int32)
        self._manager = manager
        self._free_ids = list(range(manager.total - 1, -1, -1))
        self._free_rows = list(range(seats - 1, -1, -1))
        self._row_of: dict[Job, int] = {}
        self._held: dict[Job, int] = {}

    def row(self, job: Job) -> int:
        """The line of ``rows`` that is this job's."""
        return self._row_of[job]

    def grow(self, job: Job) -> int:
        """Give ``job`` the ids of the blocks it holds by now; returns its line."""
        row = self._row_of.get(job)
        if row is None:
            row = self._row_of[job] = self._free_rows.pop()
            self._held[job] = 0
        held = self._held[job]
        while held < job.blocks:
            self.rows[row, held] = self._free_ids.pop()
            held += 1
        self._held[job] = held
        return row

    def release(self, job: Job) -> None:
        """Take back every id of a job that has been preempted or has left."""
        row, held = self._row_of.pop(job), self._held.pop(job)
        self._free_ids.extend(self.rows[row, :held][::-1].tolist())
        self.rows[row, :held] = self.spare
        self._free_rows.append(row)

    def check(self) -> None:
        """Assert that ids and the manager's count agree."""
        assert len(self._free_ids) == self._manager.free, (
            f"{len(self._free_ids)} block ids are free, the block manager counts {self._manager.free}"
        )
