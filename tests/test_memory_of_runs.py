"""What a run holds does not grow with the number of its requests; what it tells does not depend on how it is held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apexsim
from apexsim.results import SimulationResult
from apexsim.specs.workload import Requests
from apexsim.tables import StoredTable

ROOT = Path(__file__).resolve().parents[1]
# A process of its own with small limits: beyond a few thousand rows everything is in files.
PEAK = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r} + "/benchmarks")
import apexsim.columns, apexsim.io.request_files, apexsim.tables, memory
apexsim.columns._MEMORY_BYTES, apexsim.tables.FEW_ROWS, apexsim.io.request_files.MANY_ROWS = 1 << 18, 4_000, 4_000
folder = Path({folder!r})
memory.write_load(folder / "load.parquet", requests={requests}, rate_per_s=memory.RATE_PER_S)
print(json.dumps(memory.measure(folder, requests={requests}, replicas=1)))
"""


def peak(folder: Path, requests: int) -> dict[str, Any]:
    folder.mkdir()
    script = PEAK.format(root=str(ROOT), folder=str(folder), requests=requests)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="peaks are read from getrusage")
def test_peak_memory_hardly_grows_with_the_number_of_requests(tmp_path: Path) -> None:
    """60,000 more add a column of numbers and some distinct times between tokens, not 2.8 kB each, which is 168 MB."""
    few, many = (peak(tmp_path / str(requests), requests) for requests in (30_000, 90_000))
    assert (few["finished"], many["finished"]) == (30_000, 90_000)
    assert many["peak_mb"] < few["peak_mb"] + 20


def served() -> SimulationResult:
    rng = np.random.default_rng(3)
    requests = Requests(
        name="many",
        arrival_s=np.cumsum(rng.exponential(0.02, 600)),
        prompt_tokens=rng.integers(1, 900, 600),
        output_tokens=rng.integers(1, 40, 600),
    )
    return apexsim.simulate(
        apexsim.deployment(model="llama-3.1-8b", device="h100-sxm", replicas=2),
        requests,
        slo=apexsim.SLO(ttft_s=0.1),
    )


def test_a_run_in_files_tells_what_one_in_memory_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = served()
    for name, few in (
        ("apexsim.columns._MEMORY_BYTES", 1_000),
        ("apexsim.tables.FEW_ROWS", 100),
        ("apexsim.tables.BLOCK_ROWS", 64),
        ("apexsim.serving.recording.LOT_ROWS", 16),
        ("apexsim.serving.recording.BLOCK_ROWS", 64),
        ("apexsim.serving.recording._MOST_GAPS", 40),
        ("apexsim.serving.request_rows._LOT_ROWS", 10),
        ("apexsim.serving.flow.LOT", 10),
        ("apexsim.serving.fast.blocks.SPANS", 12),
        ("apexsim.serving.fast.cohort.MOST_MOVES", 12),
        ("apexsim.serving.fast.cohort.MOST_NOTED", 5),
        ("apexsim.serving.fast.blocks.MOST_STEPS", 60),
        ("apexsim.costs.durations.SPANS", 12),
        ("apexsim.serving.recording.SPANS", 12),
    ):
        monkeypatch.setattr(name, few)
    monkeypatch.setattr("apexsim.columns.Rows.blocks.__defaults__", (64,))
    stored = served()
    assert isinstance(stored.request_columns, StoredTable)
    assert isinstance(stored.step_columns, StoredTable)
    assert stored.requests.equals(held.requests)
    assert stored.steps.drop(columns=["energy_j", "working_s"]).equals(
        held.steps.drop(columns=["energy_j", "working_s"])
    )
    assert np.allclose(stored.steps["energy_j"], held.steps["energy_j"], rtol=1e-12)
    assert [column.tolist() for column in stored.gaps] == [column.tolist() for column in held.gaps]
    assert stored.block_ns == held.block_ns
    assert flat(stored.summary()) == pytest.approx(flat(held.summary()), rel=1e-9, nan_ok=True)
    stored.save(tmp_path / "run")
    read = apexsim.load(tmp_path / "run")
    assert isinstance(read.request_columns, StoredTable)
    assert flat(read.summary()) == flat(stored.summary())


def flat(summary: Any, at: str = "") -> dict[str, Any]:
    """The figures of a summary by their path, without timing."""
    if isinstance(summary, dict):
        parts = [flat(inner, f"{at}/{name}") for name, inner in summary.items() if name != "timing"]
        return {key: value for part in parts for key, value in part.items()}
    return {at: summary} if isinstance(summary, int | float) else {}


def test_temporary_files_go_with_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apexsim.tables.FEW_ROWS", 100)
    result = served()
    tables = [table for table in (result.request_columns, result.step_columns) if isinstance(table, StoredTable)]
    paths = [table.path for table in tables]
    assert len(paths) == 2
    assert all(path.exists() for path in paths)
    del result, tables
    assert not any(path.exists() for path in paths)
