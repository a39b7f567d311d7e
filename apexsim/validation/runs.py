"""Reader of ``runs.csv``: one measured serving run a row, units in the names of columns, empty = not known.

A row says what ran (engine, model, device, plan, dtypes, scheduler settings, flags), the load (``workload``) and what
was measured. Columns of other names are kept as they are.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from apexsim.errors import BadInput, nearest
from apexsim.io.deployments import beside
from apexsim.io.engines import check_engine
from apexsim.reading import check_regular
from apexsim.specs.base import Cells
from apexsim.specs.server import Prompts, TokenChoice

MEASURED = (
    "ttft_mean_s", "tpot_mean_s", "itl_mean_s", "itl_p50_s", "e2e_mean_s", "output_tokens_per_s", "power_w",
    "energy_per_output_token_j",
)  # fmt: skip
"""Measured figures that are predicted, each as ``predicted_<name>``."""

PEER_SCORED = ("ttft_mean_s", "tpot_mean_s", "e2e_mean_s")
"""Measured figures for which a row may carry another simulator's prediction, as ``peer_<name>``."""

# What each kind of load cannot be replayed without.
_NEEDED = {
    "trace": ("requests_file",),
    "closed_loop": ("concurrency", "prompt_tokens", "output_tokens"),
    "saturated": ("max_num_seqs", "output_tokens"),
}


class RunRow(Cells):
    """The columns of a run that mean something here; ``None`` = not known. ``run_id`` and what ran are required.

    ``engine``, ``model`` and ``device`` are names, or paths of YAML files, looked for beside the runs first. ``expert``
    degree 0 occurs where a source did not know it. ``output_tokens`` may be a mean. A closed loop with a
    ``requests_file`` sends those requests.
    """

    run_id: str
    source: str = ""
    engine: str
    engine_version: str = ""
    model: str
    device: str
    workload: Literal["trace", "closed_loop", "saturated"]
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    moe_dtype: str | None = None
    replicas: int | None = Field(None, ge=1)
    gpus: int | None = Field(None, ge=1)
    tensor: int | None = Field(None, ge=1)
    pipeline: int | None = Field(None, ge=1)
    expert: int | None = Field(None, ge=0)
    moe_tensor: int | None = Field(None, ge=1)
    attention_data: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    chunked_prefill: bool | None = None
    prefix_caching: bool | None = None
    block_size: int | None = Field(None, ge=1)
    kv_blocks: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    flags: str = ""
    task: str = ""
    requests_file: str | None = None
    concurrency: int | None = Field(None, ge=1)
    prompt_tokens: int | None = Field(None, ge=1)
    output_tokens: float | None = Field(None, ge=1)
    length_range_ratio: float | None = Field(None, gt=0, le=1)
    num_requests: int | None = Field(None, ge=1)
    ttft_mean_s: float | None = Field(None, ge=0)
    tpot_mean_s: float | None = Field(None, ge=0)
    itl_mean_s: float | None = Field(None, ge=0)
    itl_p50_s: float | None = Field(None, ge=0)
    e2e_mean_s: float | None = Field(None, ge=0)
    output_tokens_per_s: float | None = Field(None, ge=0)
    mean_batch: float | None = Field(None, ge=0)
    power_w: float | None = Field(None, ge=0)
    energy_per_output_token_j: float | None = Field(None, ge=0)
    prompts: Prompts | None = None
    sampling: TokenChoice | None = None
    exclude: str = ""
    exclude_ttft: str = ""
    peer: str = ""
    peer_ttft_mean_s: float | None = Field(None, ge=0)
    peer_tpot_mean_s: float | None = Field(None, ge=0)
    peer_e2e_mean_s: float | None = Field(None, ge=0)


@dataclass(frozen=True)
class MeasuredRun:
    """A row: the file it stands in, the set (folder) the file belongs to, and every cell as it was written."""

    source: Path
    set_name: str
    number: int
    row: RunRow
    cells: Mapping[str, str]

    @property
    def beside(self) -> Path:
        """The folder that paths of the row are relative to."""
        return self.source.parent


def read_runs(path: Path | str, *, allow_plugins: bool = False) -> list[MeasuredRun]:
    """Every row of a ``runs.csv``. Raises BadInput naming the file, the column and the row; the first data row is 1.

    An engine's file that names code to import (``module:Name``) is refused unless ``allow_plugins``.
    """
    source = Path(path)
    header, *lines = _lines(source)
    _check_header(header, source)
    runs = [_run(source, number, header, cells) for number, cells in enumerate(lines, start=1)]
    for engine in sorted({run.row.engine for run in runs}):
        if os.path.isfile(engine):
            check_engine(engine, allowed=allow_plugins)
    return runs


def selected(runs: Sequence[MeasuredRun], conditions: Sequence[str], path: Path) -> list[MeasuredRun]:
    """The runs whose cells are as every condition (``column=value``) says; a column given twice may have either."""
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or column not in runs[0].cells:
            hint = nearest(column, runs[0].cells) if equals else "give column=value"
            raise BadInput(f"{path.name} has no such column; {hint}", where="--where", got=condition)
        wanted.setdefault(column, []).append(value)
    chosen = [run for run in runs if all(run.cells[column] in values for column, values in wanted.items())]
    if not chosen:
        raise BadInput(f"no row of {path.name} is so", where="--where", got=" ".join(conditions))
    return chosen


def sampled(runs: Sequence[MeasuredRun], count: int, seed: int) -> list[MeasuredRun]:
    """So many runs, drawn without replacement, in their order; all of them where there are no more."""
    if count < 1:
        raise BadInput("give at least 1", where="--sample", got=count)
    chosen = sorted(random.Random(seed).sample(range(len(runs)), min(count, len(runs))))
    return [runs[at] for at in chosen]


def _lines(path: Path) -> Iterator[list[str]]:
    """The lines of a CSV file as lists of cells, the header first; at least one row."""
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"cannot be read as CSV: {said}", where=path) from None
    if len(lines) < 2:
        raise BadInput("holds no run; give a header and at least one row", where=path)
    return iter(lines)


def _check_header(header: Sequence[str], path: Path) -> None:
    required = [name for name, field in RunRow.model_fields.items() if field.is_required()]
    for column in required:
        if column not in header:
            raise BadInput(f"the column is missing; {nearest(column, header)}", where=path, key=column)
    for column in header:
        if header.count(column) > 1:
            raise BadInput("the column is there twice; keep one", where=path, key=column)


def _run(path: Path, number: int, header: Sequence[str], line: Sequence[str]) -> MeasuredRun:
    if len(line) != len(header):
        raise BadInput(f"has {len(line)} cells, the header {len(header)}", where=path, key=f"row {number}")
    cells = dict(zip(header, line, strict=True))
    known = {name: cell.strip() for name, cell in cells.items() if name in RunRow.model_fields and cell.strip()}
    try:
        row = RunRow.model_validate(known)
    except ValidationError as error:
        fault = error.errors()[0]
        column = str(fault["loc"][0])
        if fault["type"] == "missing":
            raise BadInput("is empty; every run has one", where=path, key=_place(column, number)) from None
        raise BadInput(str(fault["msg"]), where=path, key=_place(column, number), got=known[column]) from None
    for column in _NEEDED[row.workload]:
        if getattr(row, column) is None:
            said = f"is empty; a {row.workload} run needs it"
            raise BadInput(said, where=path, key=_place(column, number))
    named = {column: beside(getattr(row, column), path) for column in ("engine", "model", "device")}
    return MeasuredRun(path, _set_name(path), number, row.model_copy(update=named), cells)


def _place(column: str, number: int) -> str:
    return f"{column}, row {number} (the first data row is 1)"


def _set_name(path: Path) -> str:
    """A set is named after its folder where the file is called ``runs.csv``, else after the file."""
    return path.resolve().parent.name if path.stem == "runs" else path.stem
