"""Requests of a measured trace one by one: how far each simulated request is from the served one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from apexsim.reading import check_regular
from apexsim.results import SimulationResult
from apexsim.validation.runs import MeasuredRun

# Latency of a request: the columns of a per-request file that may hold it, the first that is there counting.
_COLUMNS = {"ttft_s": ("ttft_from_arrival_s", "ttft_s"), "tpot_s": ("tpot_s",), "e2e_s": ("e2e_s",)}


def request_errors(run: MeasuredRun, result: SimulationResult) -> dict[str, float | None]:
    """Mean absolute relative error over requests, in percent, of each latency that was measured request by request.

    The measured requests of a run stand beside its file, in ``<run_id>.csv``, in the order of its trace; nothing is
    returned where there is no such file.
    """
    path = run.beside / f"{run.row.run_id}.csv"
    if run.row.requests_file is None or not path.is_file():
        return {}
    served = _read(path)
    found: dict[str, float | None] = {}
    for latency, names in _COLUMNS.items():
        measured = next((served[name] for name in names if name in served), None)
        if measured is not None and len(measured) == len(result.request_columns[latency]):
            known = np.isfinite(measured) & (measured > 0)
            errors = np.abs(result.request_columns[latency][known] / measured[known] - 1)
            found[f"request_{latency.removesuffix('_s')}_error_percent"] = float(100 * errors.mean())
    return found


def _read(path: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    check_regular(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
