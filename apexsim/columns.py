"""Rows of whole numbers that grow while a clock runs, and are looked at as columns, a block of rows at a time."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Columns = dict[str, npt.NDArray[Any]]
Table = npt.NDArray[np.int64]

# Rows that are looked at together: figures over rows are sums over blocks, so that a table need not be held whole.
BLOCK_ROWS = 1 << 15
# Bytes of rows that are held in memory; more are kept in a file. 16 MB are 200,000 requests.
_MEMORY_BYTES = 1 << 24
_BYTES = 8


class Rows:
    """Rows of one 64-bit whole number for each of ``names``, written at the end or at a place.

    Few rows are held in memory, more in a temporary file without a name: a run that fails leaves nothing behind.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._row_bytes = _BYTES * len(self.names)
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115 - kept open
        weakref.finalize(self, self._file.close)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, packed: bytes | memoryview) -> None:
        """Add rows at the end."""
        self._file.seek(self._length * self._row_bytes)
        self._file.write(packed)
        self._length += len(packed) // self._row_bytes

    def put(self, rows: Table) -> None:
        """Write ``rows`` at the places that their first columns say; what lies between is nothing yet."""
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        for part in np.split(rows, np.flatnonzero(np.diff(rows[:, 0]) != 1) + 1):
            self._file.seek(int(part[0, 0]) * self._row_bytes)
            self._file.write(part.tobytes())
        self._length = max(self._length, int(rows[-1, 0]) + 1)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Columns]:
        """All rows in order, as columns of at most ``rows``; one block at least."""
        for first in range(0, max(1, self._length), rows):
            yield self.read(first, min(first + rows, self._length))

    def read(self, first: int, last: int) -> Columns:
        """Rows ``first`` ... ``last`` - 1 as columns."""
        self._file.seek(first * self._row_bytes)
        read = self._file.read((last - first) * self._row_bytes)
        table = np.frombuffer(read, dtype=np.int64).reshape(-1, len(self.names))
        return {name: table[:, column].copy() for column, name in enumerate(self.names)}


def joined(blocks: Iterator[Columns]) -> Columns:
    """Blocks of columns as columns of all rows."""
    parts = list(blocks)
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
