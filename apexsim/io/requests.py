"""Request files in and out, and the one place that turns a workload's name or path into requests.

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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from apexsim import catalog
from apexsim.atomic import atomic_path
from apexsim.errors import BadInput, nearest, printable
from apexsim.io.bounds import check_csv, check_ids, check_jsonl, check_parquet
from apexsim.reading import check_regular
from apexsim.specs.laws import MAX_CONCURRENCY, ClosedLoop, Floats, PoissonArrivals, RenewalArrivals
from apexsim.specs.supply import Supply
from apexsim.specs.workload import (
    DEADLINE,
    MAX_REQUESTS,
    Requests,
    Workload,
    check_count,
    check_rate,
    checked_arrivals,
    checked_counts,
    checked_deadlines,
)

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
# Optional whole numbers and the least that makes sense.
_COUNTS = {"turn": 0, "num_images": 0, "image_tokens": 0, "num_samples": 1}
_IDS = ("session_id", "client_id")
_PREFIX = "prefix_hash_ids"
OPTIONAL = (*_COUNTS, *_IDS, _PREFIX, DEADLINE)
_FLAT_LIST = re.compile(r"\s*\[[^\[\]]*\]\s*")

_Wanted = PoissonArrivals | ClosedLoop


def resolve_workload(
    name_or_path: str | os.PathLike[str],
    *,
    rate_per_s: float | None = None,
    concurrency: int | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Requests:
    """The requests of ``resolve_supply``, for whoever needs no more of them."""
    return resolve_supply(
        name_or_path, rate_per_s=rate_per_s, concurrency=concurrency, requests=requests, seed=seed
    ).requests


def resolve_supply(
    name_or_path: str | os.PathLike[str],
    *,
    rate_per_s: float | None = None,
    concurrency: int | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Supply:
    """Requests of a shipped workload (by name), a workload YAML or a request file (by path).

    ``rate_per_s`` or ``concurrency``, not both, replaces the workload's own arrivals. A rate stretches the time of a
    trace, of the ``requests`` first rows where those are asked for. Where there is no time to stretch (no arrival
    times, all at once, closed loop) Poisson arrivals are drawn from ``seed``, and a note says so.
    Raises BadInput in one line naming the flag, or the file, column and row.
    """
    if requests is not None:
        check_count(requests, "--requests", most=MAX_REQUESTS)
    check_count(seed, "--seed", least=0)
    wanted = _wanted_arrivals(rate_per_s, concurrency)
    found = _find(os.fspath(name_or_path), lengths_will_do=wanted is not None)
    if isinstance(found, Workload):
        return _drawn(found, wanted, requests, seed)
    return Supply(requests=_replay(found, wanted, requests, seed))


def _wanted_arrivals(rate_per_s: float | None, concurrency: int | None) -> _Wanted | None:
    """The arrivals that the flags ask for; ``None`` for the workload's own."""
    if rate_per_s is not None and concurrency is not None:
        raise BadInput("give one of them: each sets the arrivals", where="--rate-per-s --concurrency")
    if rate_per_s is not None:
        check_rate(rate_per_s, "--rate-per-s")
        return PoissonArrivals(rate_per_s=rate_per_s)
    if concurrency is not None:
        check_count(concurrency, "--concurrency", most=MAX_CONCURRENCY)
        return ClosedLoop(concurrency=concurrency)
    return None


def _find(text: str, *, lengths_will_do: bool) -> Workload | Requests:
    known = catalog.names("workload")
    path = Path(text)
    if text in known or path.suffix in (".yaml", ".yml"):
        return catalog.load("workload", text)
    if path.suffix in _READERS or os.sep in text or (text and os.path.exists(path)):
        return read_requests(path, lengths_will_do=lengths_will_do)
    would_do = f"unknown workload; {nearest(text, known)} The path of a request file ({_formats()}) would do as well"
    raise BadInput(would_do, where="--workload", got=text)


def _drawn(workload: Workload, wanted: _Wanted | None, requests: int | None, seed: int) -> Supply:
    """Requests drawn by a generator; a rate keeps its law of arrivals where it has one."""
    own = workload.arrivals
    notes: tuple[str, ...] = ()
    if isinstance(wanted, PoissonArrivals) and isinstance(own, RenewalArrivals):
        workload = workload.model_copy(update={"arrivals": own.model_copy(update={"rate_per_s": wanted.rate_per_s})})
    elif wanted is not None:
        workload = workload.model_copy(update={"arrivals": wanted})
        notes = (f"arrivals of {workload.name} ({own.kind}) replaced: {wanted!r}",)
    rows = replace(workload.sample(requests, seed=seed), notes=notes)
    return Supply(requests=rows, law=workload, seed=seed, fixed=requests is not None)


def _replay(rows: Requests, wanted: _Wanted | None, requests: int | None, seed: int) -> Requests:
    """Rows of a file, their arrivals replaced or stretched."""
    rows = rows if requests is None else rows.head(requests)
    if isinstance(wanted, ClosedLoop):
        return rows.closed_loop(wanted.concurrency)
    if isinstance(wanted, PoissonArrivals):
        return rows.at_rate(wanted.rate_per_s) if rows.span_s else rows.arriving(wanted, seed=seed)
    return rows


def read_requests(path: str | os.PathLike[str], *, lengths_will_do: bool = False) -> Requests:
    """Read a request file (columns: see the module).

    A file without arrival times is refused, unless ``lengths_will_do``: then all requests arrive at time 0 and a note
    says so. Raises BadInput naming the file, column, row (from 1), what was got and what would do.
    """
    path = Path(path)
    table, dropped = _read_table(path)
    rows = Requests(
        name=printable(path.stem),
        prompt_tokens=checked_counts(_numbers(table, "prompt_tokens", path), "prompt_tokens", path),
        output_tokens=checked_counts(_numbers(table, "output_tokens", path), "output_tokens", path),
        arrival_s=np.zeros(table.num_rows),
        extra=_extra(table, path),
        notes=(f"columns of {path.name} not used: {', '.join(dropped)}",) if dropped else (),
    )
    arrival_s = _arrivals(table, path)
    if arrival_s is not None:
        return replace(rows, arrival_s=arrival_s)
    if not lengths_will_do:
        would_do = "holds no arrival times; ask for a rate or a concurrency"
        raise BadInput(would_do, where=path, key="arrival_s")
    return replace(rows, notes=(*rows.notes, f"{path.name} holds no arrival times"))


def write_requests(path: str | os.PathLike[str], requests: Requests) -> None:
    """Write a request file in the format of the extension; the arrival times of a closed loop are left empty."""
    path = Path(path)
    if path.suffix not in _READERS:
        raise BadInput(f"give a file ending in {_formats()}", where=path)
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


def _formats() -> str:
    return " or ".join(_READERS)


def _read_table(path: Path) -> tuple[pa.Table, list[str]]:
    """The known columns of a file and the names of the others; BadInput unless every required one is there."""
    if not path.is_dir() and path.suffix not in _READERS:
        raise BadInput(f"unknown extension; give a file ending in {_formats()}", where=path, got=path.suffix)
    if not check_regular(path, would_do=f"give a file ending in {_formats()}"):
        raise BadInput("is empty; give at least one request", where=path)
    try:
        table = _READERS[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"cannot be read as {path.suffix[1:]}: {_reason(error)}", where=path) from None
    if not table.num_rows:
        raise BadInput("holds no request; give at least one row", where=path)
    _check_header(table.column_names, path)
    kept = [name for name in table.column_names if name in (*REQUIRED, *OPTIONAL)]
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
    # Ids stay dictionaries until their lengths are known: a file may hold one long text a million times.
    schema = pq.read_schema(path)
    ids = [name for name in schema.names if name in _IDS and pa.types.is_string(schema.field(name).type)]
    with pq.ParquetFile(path, read_dictionary=ids) as file:
        known = [name for name in file.schema_arrow.names if name in (*REQUIRED, *OPTIONAL)]
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


_READERS: dict[str, Callable[[Path], pa.Table]] = {
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
