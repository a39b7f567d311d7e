"""Calibration: host terms found again from runs that were simulated with them, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apexsim import calibration, catalog
from apexsim.calibration import Group, calibrate, drawn_groups
from apexsim.cli.main import main
from apexsim.errors import BadInput
from apexsim.specs.engine import EngineProfile
from apexsim.validation.replay import replay
from apexsim.validation.runs import MeasuredRun, read_runs

TRUTH = {"step_s": 1.6e-3, "per_sequence_s": 30e-6, "response_s": 12e-3, "launch_s": 45e-6}
HEADER = (
    "run_id,engine,engine_version,model,device,weight_dtype,workload,concurrency,prompt_tokens,output_tokens,"
    "num_requests,tensor,ttft_mean_s,tpot_mean_s,exclude"
)
LOADS = [(1, 200, 1), (4, 900, 1), (16, 200, 1), (32, 900, 2), (2, 600, 4), (8, 700, 4)]


def profile() -> EngineProfile:
    found = catalog.load("engine", "vllm-v1-sync")
    assert isinstance(found, EngineProfile)
    return found


def line(model: str, at: int, measured: str = ",", exclude: str = "") -> str:
    clients, prompt, tensor = LOADS[at]
    load = f"closed_loop,{clients},{prompt},24,{3 * clients},{tensor}"
    return f"{model}-{at},vllm,0.11.0,{model},h100-sxm,bf16,{load},{measured},{exclude}"


def written(path: Path, lines: list[str]) -> list[MeasuredRun]:
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return read_runs(path)


def runs_as_simulated(
    path: Path, models: Sequence[str] = ("llama-3.1-8b", "qwen3-8b"), truth: Mapping[str, float] = TRUTH
) -> list[MeasuredRun]:
    """Runs whose measured figures are those of a simulation under ``truth``."""
    lines = []
    for model in models:
        for at in range(len(LOADS)):
            (run,) = written(path, [line(model, at)])
            figures = replay(run, engine_options=truth).figures
            lines.append(line(model, at, f"{figures['ttft_mean_s']:.6g},{figures['tpot_mean_s']:.6g}"))
    return written(path, lines)


def test_terms_are_found_again(tmp_path: Path) -> None:
    groups = drawn_groups(runs_as_simulated(tmp_path / "runs.csv"), profile(), 20, 0)
    assert [group.name for group in groups] == ["llama-3.1-8b on h100-sxm", "qwen3-8b on h100-sxm"]
    fitted = calibrate(profile(), groups, terms=list(TRUTH), jobs=1)
    report = fitted.calibration
    assert report is not None
    assert set(report.terms) == set(TRUTH)
    for term, value in TRUTH.items():
        assert getattr(fitted.host, term) == pytest.approx(value, rel=0.1), term
        assert report.terms[term].began == getattr(profile().host, term)
    assert fitted.evidence == "serving"
    assert report.fitted.tpot_mape is not None
    assert report.before.tpot_mape is not None
    assert report.fitted.tpot_mape < 1 < report.before.tpot_mape
    for errors in report.left_out.values():
        assert errors.tpot_mape is not None
        assert errors.tpot_mape < 2


def test_what_a_layer_of_experts_takes_is_told_from_what_a_step_does(tmp_path: Path) -> None:
    """Only one of two groups sees the layers: part of them may be that group's own error."""
    truth = {"step_s": 1.2e-3, "expert_choice_s": 12e-6}
    runs = runs_as_simulated(tmp_path / "runs.csv", ("llama-3.1-8b", "qwen3-30b-a3b"), truth)
    fitted = calibrate(profile(), drawn_groups(runs, profile(), 20, 0), terms=list(truth), jobs=1)
    assert fitted.host.step_s == pytest.approx(truth["step_s"], rel=0.1)
    assert fitted.host.expert_choice_s == pytest.approx(truth["expert_choice_s"], rel=0.25)


def test_a_calibrated_profile_begins_where_the_first_calibration_did(tmp_path: Path) -> None:
    groups = drawn_groups(runs_as_simulated(tmp_path / "runs.csv"), profile(), 2, 0)
    once = calibrate(profile(), groups, terms=["step_s", "response_s"], jobs=1)
    again = calibrate(once, groups, terms=["step_s", "response_s"], jobs=1)
    assert again == once


def test_rows_are_drawn_the_same_every_time_and_excluded_ones_never(tmp_path: Path) -> None:
    lines = [line("llama-3.1-8b", at, "0.1,0.01", "why" if at == 3 else "") for at in range(len(LOADS))]
    runs = written(tmp_path / "runs.csv", lines)
    (group,) = drawn_groups(runs, profile(), 4, seed=5)
    assert len(group.runs) == 4
    assert drawn_groups(runs, profile(), 4, seed=5) == [group]
    assert all(not run.row.exclude for run in group.runs)
    assert drawn_groups(runs, catalog.load("engine", "sglang-0.5"), 4, 0) == []  # type: ignore[arg-type]


def test_terms_that_one_load_cannot_separate_are_refused(tmp_path: Path) -> None:
    """One client: a step's host time is the same whether it is paid by the step or by its only sequence."""
    runs = written(tmp_path / "runs.csv", [line("llama-3.1-8b", 0, "0.1,0.01")] * 3)
    groups = drawn_groups(runs, profile(), 20, 0)
    with pytest.raises(BadInput, match=r"2 figures.*terms need more figures than that"):
        calibrate(profile(), [Group("one", groups[0].runs[:1])], jobs=1)
    with pytest.raises(BadInput, match="the rows cannot tell step_s from per_sequence_s"):
        calibrate(profile(), groups, terms=["step_s", "per_sequence_s"], jobs=1)
    with pytest.raises(BadInput, match=r"expert_launch_s.*no row is moved by it"):
        calibrate(profile(), groups, terms=["expert_launch_s"], jobs=1)
    with pytest.raises(BadInput, match="no such term"):
        calibrate(profile(), groups, terms=["step"], jobs=1)


def test_figures_that_get_lost_on_the_way_are_not_fitted_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies leaves rows without a prediction: a fit on what is left would look like one on all."""
    groups = drawn_groups(runs_as_simulated(tmp_path / "runs.csv"), profile(), 2, 0)
    rounds, predict = [], calibration._Fit._predict

    def losing(self: Any, terms: Any, rows: Any) -> Any:
        rounds.append(len(rows))
        return predict(self, terms, rows) * (np.nan if len(rounds) > 1 else 1.0)

    monkeypatch.setattr(calibration._Fit, "_predict", losing)
    with pytest.raises(BadInput, match=r"figures.*start over"):
        calibrate(profile(), groups, terms=["step_s"], jobs=1)


def test_a_refusal_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "runs.csv", [line("llama-3.1-8b", 0, "0.1,0.01")])
    out = tmp_path / "engine.yaml"
    assert main(["calibrate", str(tmp_path / "runs.csv"), "--engine", "trtllm-1.0", "--out", str(out)]) == 2
    assert "no clean row" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_writes_a_profile_that_simulate_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs_as_simulated(tmp_path / "runs.csv")
    out = tmp_path / "engine.yaml"
    asked = ["--engine", "vllm-v1-sync", "--terms", "step_s,response_s", "--rows-per-group", "2", "--jobs", "1"]
    assert main(["calibrate", str(tmp_path / "runs.csv"), *asked, "--out", str(out)]) == 0
    assert "left out: qwen3-8b on h100-sxm" in capsys.readouterr().out
    again = catalog.load("engine", out)
    assert isinstance(again, EngineProfile)
    assert again.calibration is not None
    assert again.host.step_s == again.calibration.terms["step_s"].value
