"""Sweeps: the points of a grid, rows for failures, resuming, and the shipped example."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from apexsim.cli.main import main
from apexsim.cli.sweep import _format
from apexsim.errors import BadInput, InfeasiblePlan
from apexsim.sweep import TABLE, flatten, read_runs, sweep

SWEEP = """
base:
  model: llama-3.1-8b
  device: h100-sxm
  workload: chat
  requests: 5
  slo: {tpot_s: 0.05}
grid:
  tensor: [1, 2, 3]
  slo.ttft_s: [0.5, 1.0]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    return path


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Stands in for the simulator: two ranks crash, and every run is noted."""
    seen: list[tuple[int, Any]] = []

    def simulate(deployment: Any, requests: Any, *, slo: Any, seed: int) -> Any:
        tensor = deployment.pools[0].plan.tensor
        seen.append((tensor, slo.ttft_s))
        if tensor == 2 and slo.ttft_s == 0.5:
            raise RuntimeError("no luck")
        if tensor == 2:
            raise InfeasiblePlan(["too many bytes"])
        figures = {
            "requests": {"total": len(requests)},
            "ttft_s": {"p50": slo.ttft_s},
            "slo": {"attainment": 0.8995 if slo.ttft_s == 0.25 else 0.9},
            "timing": {"wall_s": 1.0},
        }
        return SimpleNamespace(summary=lambda: figures)

    monkeypatch.setattr("apexsim.sweep.simulate", simulate)
    return seen


def test_points_are_all_combinations_the_last_key_fastest(file: Path) -> None:
    runs = list(read_runs(file))
    assert [(run.point["tensor"], run.point["slo.ttft_s"]) for run in runs] == [
        (tensor, ttft_s) for tensor in (1, 2, 3) for ttft_s in (0.5, 1.0)
    ]
    assert all(run.slo.ttft_s == run.point["slo.ttft_s"] and run.slo.tpot_s == 0.05 for run in runs)
    assert len({run.identity for run in runs}) == 6
    assert len({id(run.requests) for run in runs}) == 1  # drawn once


def test_a_run_that_fails_is_a_row_with_its_error(file: Path, tmp_path: Path, simulated: list[Any]) -> None:
    table = sweep(file, out=tmp_path / "out", jobs=1)
    assert list(table["verdict"]) == ["ok", "ok", "failed", "infeasible", "failed", "failed"]
    assert table["error"][2] == "RuntimeError: no luck"
    assert table["error"][3] == "too many bytes"
    assert "32 attention heads" in table["error"][4]
    assert list(table["ttft_s.p50"][:2]) == [0.5, 1.0]
    assert not [column for column in table if column.startswith("timing")]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / TABLE), table)


def test_a_device_without_the_dtype_of_one_point_fails_that_point(tmp_path: Path, simulated: list[Any]) -> None:
    path = tmp_path / "sweep.yaml"
    base = "{model: llama-3.1-8b, device: h100-sxm, workload: chat, requests: 5, slo: {ttft_s: 1}}"
    path.write_text(f"base: {base}\ngrid: {{weights: [bf16, int8]}}\n")
    table = sweep(path, out=tmp_path / "out", jobs=1)
    assert list(table["verdict"]) == ["ok", "failed"]
    assert "run: weights: h100-sxm has no gemm cost for int8; it has: bf16, fp8" in table["error"][1]


def test_a_run_that_misses_its_slo_says_so_and_keeps_its_figures(
    file: Path, tmp_path: Path, simulated: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(SWEEP.replace("[1, 2, 3]", "[1]").replace("[0.5, 1.0]", "[0.25, 0.5]"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    table = pd.read_parquet(tmp_path / "out" / TABLE)
    assert list(table["verdict"]) == ["misses_slo", "ok"]
    assert list(table["error"]) == ["89.9% of requests keep the SLO, 90% wanted", ""]
    assert list(table["ttft_s.p50"]) == [0.25, 0.5]
    said = capsys.readouterr().out
    assert "2 of 2 runs done" in said
    assert "1 misses the SLO" in said


def test_a_row_without_limits_misses_none(file: Path, tmp_path: Path) -> None:
    plain = (
        SWEEP.replace("  slo: {tpot_s: 0.05}\n", "")
        .replace("  slo.ttft_s: [0.5, 1.0]\n", "")
        .replace("[1, 2, 3]", "[1]")
    )
    file.write_text(plain)
    table = sweep(file, out=tmp_path / "out", jobs=1)
    assert list(table["verdict"]) == ["ok"]
    assert table["steady.kind"][0] == "short"
    assert table["cost.billed_devices"][0] == 1


def test_the_table_shows_shares_in_percent_and_what_a_token_costs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figures as in the table of a search, in its formats; without an SLO there is no share."""
    grid = "grid:\n  tensor: [1]\n  slo: [{ttft_s: 5.0}, null]\n"
    base = SWEEP.partition("grid:")[0].replace("requests: 5", "requests: 400").replace("  slo: {tpot_s: 0.05}\n", "")
    file.write_text(base + grid.replace("null", "{}"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = pd.read_parquet(tmp_path / "out" / TABLE)
    shown = [line.split()[-6:] for line in lines if line.rstrip().endswith(" ok")]
    for row, kept in zip(table.to_dict("records"), ("100.0%", "-"), strict=True):
        seconds = [f"{row['ttft_s.p90']:.3f}", f"{row['tpot_s.p90']:.4f}"]
        rates = [f"{row['throughput.output_tokens_per_s']:.0f}", f"{row['steady.usd_per_million_output_tokens']:.3g}"]
        assert [kept, *seconds, *rates, "ok"] in shown
    assert sum("USD" in line for line in lines) == 1


@pytest.mark.parametrize(("share", "shown"), [(0.57, "57.0%"), (0.8999, "89.9%"), (1.0, "100.0%"), (None, "-")])
def test_shares_are_rounded_down(share: float | None, shown: str) -> None:
    assert _format(share, "{:.1%}") == shown


def test_resuming_runs_only_what_is_new(file: Path, tmp_path: Path, simulated: list[Any]) -> None:
    first = sweep(file, out=tmp_path / "out", jobs=1)
    simulated.clear()
    file.write_text(SWEEP.replace("[0.5, 1.0]", "[0.5, 1.0, 2.0]"))
    again = sweep(file, out=tmp_path / "out", jobs=1, resume=True)
    assert simulated == [(1, 2.0), (2, 2.0)]
    assert len(again) == 9
    old = again[again["slo.ttft_s"] < 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(old, first)


def test_a_folder_with_a_sweep_is_not_written_over(file: Path, tmp_path: Path, simulated: list[Any]) -> None:
    sweep(file, out=tmp_path / "out", jobs=1)
    before = (tmp_path / "out" / TABLE).read_bytes()
    with pytest.raises(BadInput, match=r"out: got 'sweep.parquet'; give --resume to go on with it, or another --out"):
        sweep(file, out=tmp_path / "out", jobs=1)
    assert (tmp_path / "out" / TABLE).read_bytes() == before


def test_equal_points_are_run_once_and_are_rows_each(file: Path, tmp_path: Path, simulated: list[Any]) -> None:
    file.write_text(SWEEP.replace("[1, 2, 3]", "[1, 1]"))
    assert len(sweep(file, out=tmp_path / "out", jobs=1)) == 4
    assert len(simulated) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tensor:", "tensr:", r"tensr: unknown key; did you mean tensor"),
        ("llama-3.1-8b", "llama-3.1-8", r"did you mean llama-3.1-8b"),
        ("slo.ttft_s", "workload.rate_per_s", r"grid.workload.rate_per_s: got 'chat'; workload holds no keys"),
        ("[1, 2, 3]", "[]", r"grid.tensor"),
        ("base:", "bass:", r"unknown key; did you mean base|base: is missing"),
        ("requests: 5", "requests: 0", r"requests: got 0"),
        ("slo: {tpot_s: 0.05}", "slo: {tpot: 0.05}", r"slo.tpot: unknown key; did you mean tpot_s"),
    ],
)
def test_bad_input_is_found_before_the_first_run(
    file: Path, tmp_path: Path, simulated: list[Any], old: str, new: str, said: str
) -> None:
    file.write_text(SWEEP.replace(old, new))
    with pytest.raises(BadInput, match=said):
        sweep(file, out=tmp_path / "out")
    assert simulated == []
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_cells_are_written_as_json(file: Path, tmp_path: Path, simulated: list[Any]) -> None:
    file.write_text(SWEEP.replace("tensor: [1, 2, 3]", "engine_options: [{max_num_seqs: 8}, {block_size: 32}]"))
    table = sweep(file, out=tmp_path / "out", jobs=1)
    assert table["engine_options"][0] == '{"max_num_seqs": 8}'


def test_values_too_large_for_a_column_are_written_as_json(file: Path, tmp_path: Path, simulated: list[Any]) -> None:
    file.write_text(SWEEP.replace("tensor: [1, 2, 3]", "seed: [1, 1000000000000000000000]"))
    sweep(file, out=tmp_path / "out", jobs=1)
    table = pd.read_parquet(tmp_path / "out" / TABLE)
    assert set(table["seed"]) == {"1", "1000000000000000000000"}


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": 2}) == {"a.b.c": 1, "a.d": None, "e": 2}


def test_the_command_says_how_many_runs_are_done(
    file: Path, tmp_path: Path, simulated: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert "2 of 6 runs done" in capsys.readouterr().out
    file.write_text(SWEEP.replace("[1, 2, 3]", "[2, 3]"))
    assert main(["sweep", str(file), "--out", str(tmp_path / "none"), "--jobs", "1"]) == 1


def test_the_example_is_twelve_runs_and_those_that_do_not_fit_say_so(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "sweep.yaml"
    table = sweep(example, out=tmp_path, jobs=1)
    assert len(table) == 12
    alone = (table["model"] == "llama-3.1-70b") & (table["tensor"] == 1)
    assert set(table[alone]["verdict"]) == {"infeasible"}
    ran = table[~alone]
    assert list(ran["verdict"] == "ok") == list(ran["slo.attainment"] >= 0.9)
    assert set(ran["verdict"]) == {"ok", "misses_slo"}
    assert table[~alone]["requests.finished"].eq(200).all()
