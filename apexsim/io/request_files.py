"""Request files in and out.

A file is parquet, CSV or JSON lines with one request a row:

    required   arrival_s, prompt_tokens, output_tokens
    optional   turn, num_images, image_tokens, num_samples   whole numbers
               session_id, client_id                         any value, or none
               prefix_hash_ids                               list of whole numbers (in CSV: JSON text such as "[0, 7]")

Rows are numbered from 1 in every message; a CSV header is not a row. Columns of other names are left out and the
``notes`` of the result name them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from apexsim.atomic import atomic_path
from apexsim.errors import BadInput, nearest, printable
from apexsim.io.bounds import check_csv, check_ids, check_jsonl, check_parquet
from apexsim.reading import check_regular
from apexsim.specs.laws import Floats
from apexsim.specs.streamed import Figures, StreamedRequests
from apexsim.specs.workload import DEADLINE, Requests, checked_arrivals, checked_counts, checked_deadlines

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
# Optional whole numbers and the least that makes sense.
_COUNTS = {"turn": 0, "num_images": 0, "image_tokens": 0, "num_samples": 1}
_IDS = ("session_id", "client_id")
_PREFIX = "prefix_hash_ids"
OPTIONAL = (*_COUNTS, *_IDS, _PREFIX, DEADLINE)
_NO_ARRIVALS = "holds no arrival times; ask for a rate or a concurrency"
_FLAT_LIST = re.compile(r"\s*\[[^\[\]]*\]\s*")
# A parquet file of more rows is read in parts of so many.
MANY_ROWS, PART_ROWS = 1 << 19, 1 << 16


def open_requests(path: Path, *, lengths_will_do: bool = False) -> Requests:
    """As ``read_requests``, but the rows of a large parquet file are read a part at a time and never held together.

    Where a part does not make sense by itself the file is read as a whole, which tells what is wrong with which row.
    """
    if path.suffix == ".parquet" and path.is_file():
        read = partial(_parts, path)
        try:
            names, rows = _shape(path)
            if rows > MANY_ROWS:
                notes = _not_used(path, [name for name in names if not _known(name)])
                return StreamedRequests(printable(path.stem), read, Figures.of(read()), notes)
        except (BadInput, pa.ArrowException, OSError):
            pass
    return read_requests(path, lengths_will_do=lengths_will_do)


def read_requests(path: str | os.PathLike[str], *, lengths_will_do: bool = False) -> Requests:
    """Read a request file (columns: see the module).

    A file without arrival times is refused, unless ``lengths_will_do``: then all requests arrive at time 0 and a note
    says so. Raises BadInput naming the file, column, row (from 1), what was got and what would do.
    """
    path = Path(path)
    table, dropped = _read_table(path)
    rows = replace(_requests(table, path), notes=_not_used(path, dropped))
    arrival_s = _arrivals(table, path)
    if arrival_s is not None:
        return replace(rows, arrival_s=arrival_s)
    if not lengths_will_do:
        raise BadInput(_NO_ARRIVALS, where=path, key="arrival_s")
    return replace(rows, notes=(*rows.notes, f"{path.name} holds no arrival times"))


def _requests(table: pa.Table, path: Path) -> Requests:
    """The rows of a table, all arriving at time 0."""
    return Requests(
        name=printable(path.stem),
        prompt_tokens=checked_counts(_numbers(table, "prompt_tokens", path), "prompt_tokens", path),
        output_tokens=checked_counts(_numbers(table, "output_tokens", path), "output_tokens", path),
        arrival_s=np.zeros(table.num_rows),
        extra=_extra(table, path),
    )


def _parts(path: Path) -> Iterator[Requests]:
    """The rows of a parquet file, so many at a time; rows in a message are then counted within a part."""
    with pq.ParquetFile(path, read_dictionary=_ids(pq.read_schema(path))) as file:
        known = [name for name in file.schema_arrow.names if _known(name)]
        check_parquet(file, known, path)
        for group in range(file.num_row_groups):  # asked for all groups at once, pyarrow fetches them at once
            for batch in file.iter_batches(PART_ROWS, row_groups=[group], columns=known, use_threads=False):
                table = pa.Table.from_batches([batch])
                arrival_s = _arrivals(table, path)
                if arrival_s is None:
                    raise BadInput(_NO_ARRIVALS, where=path, key="arrival_s")
                yield replace(_requests(table, path), arrival_s=arrival_s)


def _shape(path: Path) -> tuple[list[str], int]:
    """Names of the columns of a parquet file, and how many rows there are."""
    with pq.ParquetFile(path) as file:
        _check_header(file.schema_arrow.names, path)
        return file.schema_arrow.names, file.metadata.num_rows


def _known(name: str) -> bool:
    return name in REQUIRED or name in OPTIONAL


def _not_used(path: Path, dropped: list[str]) -> tuple[str, ...]:
    return (f"columns of {path.name} not used: {', '.join(dropped)}",) if dropped else ()


def _ids(schema: pa.Schema) -> list[str]:
    """Columns that stay dictionaries until their lengths are known: a file may hold one long text a million times."""
    return [name for name in schema.names if name in _IDS and pa.types.is_string(schema.field(name).type)]


def write_requests(path: str | os.PathLike[str], requests: Requests) -> None:
    """Write a request file in the format of the extension; the arrival times of a closed loop are left empty."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise BadInput(f"give a file ending in {formats()}", where=path)
    columns: dict[str, Any] = {
        "arrival_s": pa.nulls(len(requests), pa.float64()) if requests.arrival_s is None else requests.arrival_s,
        "prompt_tokens": requests.prompt_tokens,
        "output_tokens": requests.output_tokens,
        **{key: values.tolist() if values.dtype == object else values for key, values in requests.extra.items()},
    }
    table = pa.table(columns)
    with atomic_path(path) as scratch:
        _WRITERS[path.suffix](table, scratch)


def _write_csv(table: pa.Table, path: Path) -> None:
    if _PREFIX in table.column_names:  # CSV has no lists
        texts = [json.dumps(ids) for ids in table.column(_PREFIX).to_pylist()]
        table = table.set_column(table.column_names.index(_PREFIX), _PREFIX, pa.array(texts))
    pa_csv.write_csv(table, path)


def _write_jsonl(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")


_WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".parquet": pq.write_table,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}


def formats() -> str:
    """The endings of request files, for a person."""
    return " or ".join(FORMATS)


def _read_table(path: Path) -> tuple[pa.Table, list[str]]:
    """The known columns of a file and the names of the others; BadInput unless every required one is there."""
    if not path.is_dir() and path.suffix not in FORMATS:
        raise BadInput(f"unknown extension; give a file ending in {formats()}", where=path, got=path.suffix)
    if not check_regular(path, would_do=f"give a file ending in {formats()}"):
        raise BadInput("is empty; give at least one request", where=path)
    try:
        table = FORMATS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"cannot be read as {path.suffix[1:]}: {_reason(error)}", where=path) from None
    if not table.num_rows:
        raise BadInput("holds no request; give at least one row", where=path)
    _check_header(table.column_names, path)
    kept = [name for name in table.column_names if _known(name)]
    return table.select(kept), [name for name in table.column_names if name not in kept]


def _check_header(names: list[str], path: Path) -> None:
    for column in REQUIRED:
        if column not in names:
            others = [name for name in names if name not in REQUIRED]
            hint = nearest(column, others) if others else f"the file has {', '.join(names)}"
            raise BadInput(f"the column is missing; {hint}", where=path, key=column)
    for column in names:
        if names.count(column) > 1:
            raise BadInput("the column is there twice; keep one", where=path, key=column)


def _reason(error: Exception) -> str:
    """What the system or pyarrow says, in one line, pyarrow's rows counted from 1."""
    number = getattr(error, "errno", None)
    if number:
        return os.strerror(number)
    text = str(error).split("\n", 1)[0].rstrip(". ")
    return re.sub(r"in row (\d+)$", lambda match: f"in row {int(match[1]) + 1} (the first data row is 1)", text)


def _read_parquet(path: Path) -> pa.Table:
    with pq.ParquetFile(path, read_dictionary=_ids(pq.read_schema(path))) as file:
        known = [name for name in file.schema_arrow.names if _known(name)]
        check_parquet(file, known, path)
        table = file.read(columns=known, use_threads=False)
        for name in file.schema_arrow.names:
            if name not in known:  # its name is all that is needed
                table = table.append_column(name, pa.nulls(table.num_rows))
        return table


def _read_csv(path: Path) -> pa.Table:
    check_csv(path)
    ragged: list[Any] = []

    def note(row: Any) -> str:
        if not ragged:
            ragged.append(row)
        return "skip"

    table = pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=_block_bytes(path)),
        parse_options=pa_csv.ParseOptions(invalid_row_handler=note),
    )
    if ragged:
        row = ragged[0]
        key = f"row {row.number - 1} (the first data row is 1)"  # pyarrow counts the header
        would_do = f"give {row.expected_columns} values, as in the header"
        raise BadInput(would_do, where=path, key=key, got=row.text)
    return table


def _read_jsonl(path: Path) -> pa.Table:
    check_jsonl(path)
    options = pa_json.ReadOptions(use_threads=False, block_size=_block_bytes(path))
    return pa_json.read_json(path, read_options=options)


def _block_bytes(path: Path) -> int:
    """One block for a whole file: types are then inferred over all rows."""
    return path.stat().st_size + 1


FORMATS: dict[str, Callable[[Path], pa.Table]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}


def _numbers(table: pa.Table, column: str, path: Path) -> npt.NDArray[Any]:
    """A column as numbers, NaN where a value is missing; BadInput names the first value that is no number."""
    data = table.column(column)
    kind = data.type
    if pa.types.is_null(kind):
        return np.full(len(data), np.nan)
    if pa.types.is_decimal(kind):
        data = data.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        values = list(enumerate(data.to_pylist(), 1))
        row, value = next((at for at in values if not _reads_as_number(at[1])), values[0])
        raise BadInput("give a number", where=path, key=f"{column}, row {row} (the first data row is 1)", got=value)
    numbers: npt.NDArray[Any] = data.to_numpy()
    return numbers


def _reads_as_number(value: object) -> bool:
    """Whether a CSV field of a column that is not all numbers could have been one of the numbers."""
    if value is None:
        return True
    try:
        float(str(value))
    except ValueError:
        return False
    return not isinstance(value, bool)


def _arrivals(table: pa.Table, path: Path) -> Floats | None:
    """Arrival times, or ``None`` where no row has one."""
    numbers = _numbers(table, "arrival_s", path).astype(np.float64)
    return None if np.isnan(numbers).all() else checked_arrivals(numbers, path)


def _extra(table: pa.Table, path: Path) -> dict[str, npt.NDArray[Any]]:
    """Optional columns; one without any value is as good as absent."""
    extra: dict[str, npt.NDArray[Any]] = {}
    for name in (name for name in OPTIONAL if name in table.column_names):
        column = table.column(name)
        if column.null_count == len(column):
            continue
        if name in _COUNTS:
            extra[name] = checked_counts(_numbers(table, name, path), name, path, least=_COUNTS[name])
        elif name == DEADLINE:
            extra[name] = checked_deadlines(_numbers(table, name, path), path)
        elif name == _PREFIX:
            extra[name] = _id_lists(column, path)
        else:
            check_ids(column, name, path)
            extra[name] = _objects(column.to_pylist()) if column.null_count else np.array(column.to_pylist())
    return extra


def _id_lists(column: pa.ChunkedArray, path: Path) -> npt.NDArray[Any]:
    """One int64 array a row; ids above 2**63 wrap, which keeps equal ones equal."""
    if pa.types.is_string(column.type):
        column = _parsed_lists(column, path)
    if column.null_count:
        row = column.to_pylist().index(None) + 1
        raise BadInput("give a list, [] for none", where=path, key=f"{_PREFIX}, row {row} (the first data row is 1)")
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not lists or not (pa.types.is_integer(column.type.value_type) or pa.types.is_null(column.type.value_type)):
        raise BadInput("give lists of whole numbers", where=path, key=_PREFIX, got=str(column.type))
    array = column.combine_chunks()
    ids = array.flatten().cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False)
    ends = np.cumsum(array.value_lengths().to_numpy(zero_copy_only=False))
    return _objects(np.split(ids, ends[:-1]))


def _parsed_lists(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    """Lists from a CSV column of JSON text, parsed in one go."""
    texts = column.to_pylist()
    for row, text in enumerate(texts, 1):
        if text is not None and not _FLAT_LIST.fullmatch(text):
            key = f"{_PREFIX}, row {row} (the first data row is 1)"
            raise BadInput("give a list of whole numbers as JSON text such as [0, 7]", where=path, key=key, got=text)
    try:
        lists = pa.array(json.loads(f"[{','.join('null' if text is None else text for text in texts)}]"))
    except (ValueError, pa.ArrowException):
        lists = ()
    if len(lists) != len(column):
        raise BadInput("give lists of whole numbers as JSON text such as [0, 7]", where=path, key=_PREFIX)
    return pa.chunked_array([lists])


def _objects(values: list[Any]) -> npt.NDArray[Any]:
    return np.fromiter(values, dtype=object, count=len(values))
