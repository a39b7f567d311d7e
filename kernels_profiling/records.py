"""A served run as files: a row of ``runs.csv``, its requests and its steps; ``apexsim validate`` reads them.

    runs.csv                  one run a row; what ran, the load, what was measured
    requests/RUN_ID.csv       arrival_s, prompt_tokens, output_tokens: what was asked
    RUN_ID.csv                one request a row, with its stamps and latencies
    RUN_ID.steps.csv          one step a row, where the engine tells its steps

The row comes last, so that a run is there with all its files or not at all.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apexsim import catalog
from apexsim.atomic import atomic_path, make_folder
from apexsim.columns import Columns
from apexsim.errors import BadInput
from apexsim.io.request_files import write_requests
from apexsim.metrics import distribution, weighted_distribution
from apexsim.results import Gaps, with_latencies
from apexsim.specs.workload import Requests
from apexsim.units import NS_PER_S

COLUMNS = (
    "run_id", "source", "engine", "engine_version", "model", "device", "weight_dtype", "kv_dtype", "replicas", "gpus",
    "tensor", "pipeline", "attention_data", "expert", "max_num_seqs", "max_num_batched_tokens", "chunked_prefill",
    "prefix_caching", "block_size", "kv_blocks", "workload", "requests_file", "prompts", "sampling", "concurrency",
    "prompt_tokens", "output_tokens", "num_requests", "ttft_mean_s", "tpot_mean_s", "itl_mean_s", "itl_p50_s",
    "e2e_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p50_s", "tpot_p90_s", "tpot_p99_s", "e2e_p50_s",
    "e2e_p90_s", "e2e_p99_s", "output_tokens_per_s", "power_w", "energy_per_output_token_j", "exclude", "notes",
)  # fmt: skip
_REQUEST_COLUMNS = (
    "request_id", "arrival_s", "scheduled_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens",
    "preemptions", "queue_wait_s", "ttft_s", "tpot_s", "e2e_s",
)  # fmt: skip
_RUNS = "runs.csv"
# What the engines here are sent, and how they choose.
REQUESTS = {"prompts": "random_tokens", "sampling": "greedy"}


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a run leaves: ``requests`` as ``RequestRows`` gives them, token gaps, steps, mean watts if known."""

    load: Requests
    requests: Columns
    gaps: Gaps
    steps: Columns | None = None
    power_w: float | None = None


def write_run(folder: Path, served: Served, what: Mapping[str, Any]) -> str:
    """Add a run to ``folder``; ``what`` are the columns that say what ran, ``model`` as it was given.

    Returns its ``run_id``.
    """
    make_folder(folder / "requests")
    rows, what = read_rows(folder), {**what, "model": model_cell(folder, what["model"])}
    ran = "__".join(Path(what[key]).name.removesuffix(".yaml") for key in ("engine", "model", "device"))
    run_id = _new_id(f"{ran}__{_load_name(served.load)}", {row["run_id"] for row in rows})
    requests_file = f"requests/{run_id}.csv"
    write_requests(folder / requests_file, served.load)
    columns = with_latencies(served.requests, None)
    _write_csv(folder / f"{run_id}.csv", _request_rows(columns))
    if served.steps is not None:
        _write_csv(folder / f"{run_id}.steps.csv", pd.DataFrame(served.steps))
    named = {"run_id": run_id, "requests_file": requests_file, **REQUESTS}
    row = {**what, **_load(served.load), **_measured(columns, served), **named}
    _write_csv(
        folder / _RUNS, pd.DataFrame([*rows, {key: _cell(value) for key, value in row.items()}], columns=COLUMNS)
    )
    return run_id


def check_folder(folder: Path, model: str) -> None:
    """Raise BadInput now rather than after serving where a run of ``model`` could not be added to ``folder``."""
    read_rows(folder)
    if (folder / "requests").exists():
        make_folder(folder / "requests")
    if model not in catalog.names("model"):
        _check_copy(folder, model)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the ``runs.csv`` in a folder, as they were written; BadInput where it is not one of ours."""
    path = folder / _RUNS
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [cells for cells in csv.reader(file) if cells]
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"cannot be read as CSV ({error}); give another folder", where=path) from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise BadInput("its columns are not those that are written here; give another folder", where=path)
    for number, cells in enumerate(lines[1:], 1):
        if len(cells) != len(COLUMNS):
            said = f"a row has {len(COLUMNS)} cells; mend it, or give another folder"
            raise BadInput(said, where=path, key=f"row {number}", got=f"{len(cells)} cells")
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in lines[1:]]


def model_cell(folder: Path, name: str) -> str:
    """How a row names a model: as the catalog does, or as a copy of its YAML beside the runs."""
    if name in catalog.names("model"):
        return name
    source, target = _check_copy(folder, name)
    if not target.exists():
        with atomic_path(target) as scratch:
            shutil.copyfile(source, scratch)
    return target.name


def _check_copy(folder: Path, name: str) -> tuple[Path, Path]:
    """A model's YAML, and the path of its copy, which is not there or the same. Raises BadInput if not."""
    source, target = catalog.locate("model", name, "--model"), folder / Path(name).name
    if target.exists() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
        raise BadInput(f"{target} is another model of that name; give another folder", where="--model", got=name)
    return source, target


def profile_cell(folder: Path, kind: catalog.Kind, name: str, flag: str) -> str:
    """How a row names a profile: as the catalog does, or by the path of its YAML from the folder of the runs."""
    path = catalog.locate(kind, name, flag)
    return name if name in catalog.names(kind) else os.path.relpath(path, folder)


def _new_id(stem: str, taken: set[str]) -> str:
    """A file name that no run has."""
    plain = re.sub(r"[^\w.@+-]+", "-", stem).strip("-.")
    number = 1
    while f"{plain}__{number:02d}" in taken:
        number += 1
    return f"{plain}__{number:02d}"


def _load_name(load: Requests) -> str:
    return f"{load.name}-c{load.concurrency}" if load.concurrency else f"{load.name}-{load.rate_per_s:.3g}-per-s"


def _load(load: Requests) -> dict[str, Any]:
    """The columns that say how a run was loaded. Lengths of a closed loop are means: it has its requests beside it."""
    return {
        "workload": "closed_loop" if load.concurrency else "trace",
        "concurrency": load.concurrency,
        "prompt_tokens": max(1, round(float(load.prompt_tokens.mean()))),
        "output_tokens": float(load.output_tokens.mean()),
        "num_requests": len(load),
    }


def _measured(columns: Columns, served: Served) -> dict[str, Any]:
    """The columns that say what was measured."""
    found: dict[str, Any] = {}
    for latency in ("ttft_s", "tpot_s", "e2e_s"):
        name, figures = latency.removesuffix("_s"), distribution([columns[latency]].copy)
        found |= {f"{name}_{key}_s": figures[key] for key in ("mean", "p50", "p90", "p99")}
    gaps = weighted_distribution(*served.gaps, scale=1 / NS_PER_S)
    tokens = int(columns["output_tokens"].sum())
    seconds = float(columns["last_token_s"].max() - columns["arrival_s"].min())
    energy = None if served.power_w is None else served.power_w * seconds / tokens
    return {
        **found,
        "itl_mean_s": gaps["mean"],
        "itl_p50_s": gaps["p50"],
        "output_tokens_per_s": tokens / seconds,
        "power_w": served.power_w,
        "energy_per_output_token_j": energy,
    }


def _request_rows(columns: Columns) -> pd.DataFrame:
    renamed = {**columns, "request_id": columns["request"], "queue_wait_s": columns["queue_s"]}
    return pd.DataFrame({name: renamed[name] for name in _REQUEST_COLUMNS})


def _cell(value: Any) -> Any:
    """A cell as text; what is not known stays empty."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as scratch:
        table.to_csv(scratch, index=False)
