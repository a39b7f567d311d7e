"""Request files are counted before they are read: rows, columns, values and levels, in bounded memory.

A small file can stand for a huge table: parquet keeps 3 x 10^8 equal numbers in a few megabytes, and a line of JSON
nested 20,000 levels deep kills pyarrow's reader together with the process.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from apexsim.errors import BadInput
from apexsim.reading import check_regular
from apexsim.specs.workload import MAX_REQUESTS

MAX_COLUMNS = 1_000
# Numbers of all columns that are read, those inside lists included: 8 bytes each.
MAX_VALUES = 2 * 10**8
# pyarrow takes the size of a block as a 32-bit integer, and a text file is read as one.
MAX_TEXT_BYTES = 2**31 - 2
# Ids of a session or client are names, not documents.
MAX_ID_CHARS = 256
_MAX_DEPTH = 32
_MAX_LINE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 20
# Patterns for many lines at once: Python looks at a line of its own only where one of them strikes.
_NO_OBJECT = re.compile(rb"^(?:\xef\xbb\xbf)?[ \t\r]*(?!\xef\xbb\xbf)[^{\s]", re.MULTILINE)
_MANY_BRACKETS = re.compile(rb"^(?:[^\n\[{]*[\[{]){%d}[^\n]*" % (_MAX_DEPTH + 1), re.MULTILINE)
_JSON_KEY = re.compile(rb'"([^"\\]{1,200})"\s*:')


def check_csv(path: Path) -> None:
    """Raise BadInput for a CSV file with too many rows or columns, or one that is not UTF-8 text."""
    _check_size(path)
    with path.open("rb") as file:
        columns = file.readline(_MAX_LINE_BYTES).count(b",") + 1
    _check_most(columns, "columns", MAX_COLUMNS, path)
    rows = sum(block.count(b"\n") for block in _blocks(path))
    _check_most(rows - 1, "rows", MAX_REQUESTS, path)


def check_jsonl(path: Path) -> None:
    """Raise BadInput for a file of JSON lines with too many of them, too many keys, or one nested too deep."""
    _check_size(path)
    keys: set[bytes] = set()
    above = 0  # lines
    for lines in _whole_lines(path):
        if found := _NO_OBJECT.search(lines):  # pyarrow dies of a file of nulls
            got = lines[found.start() : found.start() + 100].decode(errors="replace")
            raise BadInput("give one JSON object a line", where=path, key=_row(above, lines, found), got=got)
        for found in _MANY_BRACKETS.finditer(lines):
            _check_depth(found[0], path, _row(above, lines, found))
        keys.update(_JSON_KEY.findall(lines))
        _check_most(len(keys), "keys", MAX_COLUMNS, path)
        above += lines.count(b"\n")
    _check_most(above, "rows", MAX_REQUESTS, path)


def check_parquet(file: pq.ParquetFile, columns: list[str], path: Path) -> None:
    """Raise BadInput for a parquet file with too many rows or columns, or too many values in the known ``columns``."""
    _check_most(file.metadata.num_rows, "rows", MAX_REQUESTS, path)
    _check_most(len(file.schema_arrow.names), "columns", MAX_COLUMNS, path)
    values = size = 0
    for group in range(file.metadata.num_row_groups):
        for at in range(file.metadata.num_columns):
            column = file.metadata.row_group(group).column(at)
            if column.path_in_schema.split(".")[0] in columns:
                values += column.num_values
                size += column.total_uncompressed_size
    _check_most(values, "values", MAX_VALUES, path)
    _check_most(size, "bytes once unpacked", 16 * MAX_VALUES, path)


def check_ids(column: pa.ChunkedArray, name: str, path: Path) -> None:
    """Raise BadInput for ids that are lists or objects, or text too long for a name."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        raise BadInput("give text or numbers", where=path, key=name, got=str(kind))
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        return
    texts = column.unify_dictionaries().chunks if pa.types.is_dictionary(column.type) else [column]
    for each in texts:
        longest = pc.max(pc.binary_length(getattr(each, "dictionary", each))).as_py() or 0
        _check_most(longest, "bytes in an id", MAX_ID_CHARS, path, key=name)


def _check_most(count: int, what: str, most: int, path: Path, key: str | None = None) -> None:
    if count > most:
        raise BadInput(f"has {count:,} {what}; give at most {most:,}", where=path, key=key)


def _check_size(path: Path) -> None:
    _check_most(check_regular(path), "bytes", MAX_TEXT_BYTES, path)


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a text file in blocks; of bytes that are no text pyarrow complains on stderr by itself."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                raise BadInput("is not UTF-8 text", where=path) from None
            yield block


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, many at a time, each with its end; BadInput for one that is too long."""
    rest = b""
    for block in _blocks(path):
        lines, end, rest = (rest + block).rpartition(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise BadInput(f"give at most {_MAX_LINE_BYTES:,} bytes a line", where=path)
        yield lines + end
    if rest:
        yield rest + b"\n"


def _row(above: int, lines: bytes, found: re.Match[bytes]) -> str:
    number = above + lines.count(b"\n", 0, found.start()) + 1
    return f"row {number}"


def _check_depth(line: bytes, path: Path, row: str) -> None:
    try:
        depth = _depth(json.loads(line))
    except RecursionError:
        depth = _MAX_DEPTH + 1
    except ValueError:  # pyarrow tells what is wrong with it; brackets that nobody closes are deep all the same
        depth = line.count(b"[") + line.count(b"{") - line.count(b"]") - line.count(b"}")
    if depth > _MAX_DEPTH:
        raise BadInput(f"is nested too deep; give at most {_MAX_DEPTH} levels", where=path, key=row)


def _depth(value: Any) -> int:
    """How many lists and objects stand inside one another."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)
