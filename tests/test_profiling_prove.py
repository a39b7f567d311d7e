"""What a proof says of its figures, and how it ends; ``scripts/check`` runs a whole one, alone, as its last step."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels_profiling.commands import main
from kernels_profiling.prove import BOUNDS
from kernels_profiling.verdict import LATENCIES, STATISTICS, Figure, LoadVerdict, Verdict

STATED = BOUNDS["cpu", "stated"]
# Measured in three repeats, one of them while the machine was slow.
REPEATS_S = (1.0, 1.02, 1.6)


def load(name: str, *, scored: bool, **off: float) -> LoadVerdict:
    """A load whose means are ``off`` by latency, as shares; what is not named is predicted as measured."""
    figures = tuple(
        Figure(
            latency=latency,
            statistic=statistic,
            predicted_s=1.02 * (1 + (off.get(latency, 0.0) if statistic == "mean" else 0.0)),
            repeats_s=REPEATS_S,
        )
        for latency in LATENCIES
        for statistic in STATISTICS
    )
    return LoadVerdict(name=name, scored=scored, rate_per_s=2.0, requests=8, figures=figures, slowness=(1.0, 1.02, 1.5))


def verdict(*loads: LoadVerdict) -> Verdict:
    return Verdict(device="cpu", loads=loads, bounds=STATED, step_s=1e-3, spread=(0.9, 1.2), wall_s={"serving": 1.0})


def test_the_median_repeat_is_scored_and_every_one_shown() -> None:
    figure = load("light", scored=True).figures[0]
    assert figure.measured_s == REPEATS_S[1]
    assert figure.error == pytest.approx(0.0)
    assert [round(error, 3) for error in figure.errors] == [0.02, 0.0, -0.363]


def test_errors_at_the_bounds_pass() -> None:
    found = verdict(load("light", scored=True, ttft=0.24, tpot=-0.14, e2e=0.14))
    assert not found.broken
    assert "median of 3 repeats, keep within ttft 25%, tpot 15%, e2e 15%" in found.said()[-1]


@pytest.mark.parametrize(("latency", "off"), [("ttft", -0.27), ("tpot", 0.16), ("e2e", -0.16), ("tpot", float("nan"))])
def test_a_broken_bound_is_named(latency: str, off: float) -> None:
    found = verdict(load("light", scored=True), load("heavy", scored=True, **{latency: off}))
    (line,) = found.broken
    assert line.startswith(f"heavy: {latency} mean")
    assert found.said()[-1] == f"BROKEN {line}"
    assert found.as_json()["broken"] == [line]


def test_the_load_that_host_time_was_fitted_on_is_not_scored() -> None:
    assert not verdict(load("middle", scored=False, tpot=0.9)).broken


def test_a_change_of_speed_is_told() -> None:
    slow = LoadVerdict(
        name="light", scored=True, rate_per_s=1.0, requests=8, figures=load("light", scored=True).figures,
        slowness=(1.3, 1.25, 1.0),
    )  # fmt: skip
    assert any("changed its speed by 25%" in line for line in verdict(slow).said())
    assert not any("changed its speed" in line for line in verdict(load("light", scored=True)).said())


def test_loose_bounds_are_wider_and_no_bound_is_endless() -> None:
    for device in ("cpu", "cuda"):
        for latency in LATENCIES:
            assert BOUNDS[device, "stated"][latency] < BOUNDS[device, "loose"][latency] < 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "deepseek-v3"], "deepseek-v3: the live engine has no latent attention"),
        (["--model", "llama-3.1-405b"], "--model: got 'llama-3.1-405b'; its weights take"),
        (["--workload", "nowhere"], "--workload: got 'nowhere'; unknown workload"),
        (["--workload", "long.csv"], "1 of 2 requests cannot be served; request 2: 1000001 tokens"),
        (["--seconds", "inf"], "'--seconds': Input should be less than or equal to 86400"),
        (["--json", "nowhere/proof.json"], "--json: got 'nowhere/proof.json'; its folder does not exist"),
    ],
)
def test_faults_come_before_any_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("long.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,4,2\n1,1000000,1\n")
    assert main(["prove", "--device", "cpu", "--quick", "--out", "out", *flags]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert not [path for path in Path().rglob("*") if path.is_file() and path.name != "long.csv"]


def test_a_folder_of_other_runs_is_told_before_any_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "runs.csv").write_text("run_id\n")
    assert main(["prove", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 2
    assert "its columns are not those that are written here" in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()
