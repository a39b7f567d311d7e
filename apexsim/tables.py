"""Tables of a result: columns in memory while they are few, in a parquet file beyond, looked at a block at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apexsim.atomic import atomic_path
from apexsim.columns import BLOCK_ROWS, Columns, joined

Array = npt.NDArray[Any]
Table = Mapping[str, Array]

# Rows of a table that are held in memory: about 20 MB of a table of requests.
FEW_ROWS = 1 << 17


class StoredTable(Mapping[str, Array]):
    """Columns in a parquet file: each is read when it is asked for, and not kept."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with pq.ParquetFile(path) as file:
            self._empty = file.schema_arrow.empty_table()
            self._groups = file.num_row_groups
            self.rows = int(file.metadata.num_rows)

    def __getitem__(self, name: str) -> Array:
        if name not in self._empty.column_names:
            raise KeyError(name)
        column, end = np.empty(0), 0
        for (block,) in self.blocks((name,)):  # one block stands beside the column, not a second column
            column = column if end else np.empty(self.rows, dtype=block.dtype)
            column[end : end + len(block)] = block
            end += len(block)
        return column

    def __contains__(self, name: object) -> bool:
        return name in self._empty.column_names  # a mapping's own would read the column

    def __iter__(self) -> Iterator[str]:
        return iter(self._empty.column_names)

    def __len__(self) -> int:
        return len(self._empty.column_names)

    def blocks(self, names: tuple[str, ...], *, backwards: bool = False) -> Iterator[tuple[Array, ...]]:
        """These columns, so many rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._groups:
            yield tuple(_array(self._empty[name]) for name in names)
        words = [name for name in names if pa.types.is_string(self._empty.schema.field(name).type)]
        with pq.ParquetFile(self.path, read_dictionary=words, pre_buffer=False) as file:
            for number in reversed(range(self._groups)) if backwards else range(self._groups):
                group = file.read_row_group(number, columns=list(names), use_threads=False)
                yield tuple(_array(group[name]) for name in names)


def blocks(table: Table, *names: str, backwards: bool = False) -> Iterator[tuple[Array, ...]]:
    """Columns of a table, so many rows at a time; one block at least."""
    if isinstance(table, StoredTable):
        yield from table.blocks(names, backwards=backwards)
        return
    firsts = range(0, max(1, rows_of(table)), BLOCK_ROWS)
    for first in reversed(firsts) if backwards else firsts:
        yield tuple(table[name][first : first + BLOCK_ROWS] for name in names)


def rows_of(table: Table) -> int:
    """How many rows a table has."""
    return table.rows if isinstance(table, StoredTable) else len(next(iter(table.values())))


def kept(parts: Iterable[Columns]) -> Table:
    """A table of these rows: in memory while they are few, else in a temporary file that goes with the table."""
    held: list[Columns] = []
    rows, rest = 0, iter(parts)
    for part in rest:
        held.append(part)
        rows += len(next(iter(part.values())))
        if rows > FEW_ROWS:
            return _stored(chain(held, rest))
    return joined(iter(held))


def _stored(parts: Iterable[Columns]) -> StoredTable:
    handle, name = tempfile.mkstemp(prefix="apexsim.", suffix=".parquet")
    os.close(handle)
    try:
        _write(Path(name), parts)
        table = StoredTable(Path(name))
    except BaseException:
        _remove(name)
        raise
    weakref.finalize(table, _remove, name)
    return table


def _remove(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name)


def write_table(path: Path | str, table: Table) -> None:
    """Write a table as a parquet file, atomically."""
    with atomic_path(path) as scratch:
        if isinstance(table, StoredTable):
            shutil.copyfile(table.path, scratch)
        else:
            names = tuple(table)
            _write(scratch, (dict(zip(names, part, strict=True)) for part in blocks(table, *names)))


def read_table(path: Path) -> Table:
    """A table that was written: in memory where it is small, else column by column as asked for."""
    table = StoredTable(path)
    return dict(table) if table.rows <= FEW_ROWS else table


def _write(path: Path, parts: Iterable[Columns]) -> None:
    """A parquet file with one group of rows a block, so that equal tables are equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for part in parts:
            table = pa.table({name: pa.array(values, from_pandas=False) for name, values in part.items()})
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=BLOCK_ROWS)
    finally:
        if writer is not None:
            writer.close()


def _array(column: Any) -> Array:
    """A column of arrow as numpy's; words are few, so that each is one object however often it stands."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        values: Array = column.to_numpy()
        return values
    column = column.unify_dictionaries().combine_chunks()
    chunk = column if isinstance(column, pa.DictionaryArray) else column.chunk(0)
    words = np.array(chunk.dictionary.to_pylist(), dtype=object)
    found: Array = words[chunk.indices.to_numpy(zero_copy_only=False)]
    return found
