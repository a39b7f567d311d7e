"""What a proof says of its figures and how it ends, and whole proofs on a machine whose times are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from kernels_profiling.commands import main
from kernels_profiling.prove import BOUNDS, TOO_NOISY, WORKLOADS
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


MODEL = """
name: mini
source: test
layers: 2
hidden: 128
heads: 4
kv_heads: 2
head_dim: 64
ffn: 256
vocab: 128
max_context: 512
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A proof of a small model, on few points and with a cache soon full."""
    pytest.importorskip("torch")
    from kernels_profiling import machine, points

    grid = points.QUICK._replace(
        tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256), survivors=(1, 4, 16, 32), chunks=(4, 16, 32, 64, 128, 256),
        batches=(1, 4, 16, 32), rounds=2,
    )  # fmt: skip
    monkeypatch.setattr(points, "QUICK", grid)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 18)
    (tmp_path / "mini.yaml").write_text(MODEL)
    where = ["--model", str(tmp_path / "mini.yaml"), "--out", str(tmp_path / "out")]
    return ["prove", "--device", "cpu", "--quick", "--seconds", "1", *where]


def on_made_up_machine(flags: list[str], monkeypatch: pytest.MonkeyPatch, **machine: float) -> int:
    """The exit status of a proof that takes its times from a machine that is made up."""
    from made_up_machine import MadeUpMachine

    with MadeUpMachine(**machine) as clock:
        monkeypatch.setattr("kernels_profiling.clock.HostClock", lambda: clock)
        return main(flags)


def test_a_proof_on_a_machine_of_a_known_law_holds(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it: measure, fit, simulate, serve by real forward passes, fit the host term, compare."""
    assert on_made_up_machine([*small, "--repeats", "2", "--json", "-"], monkeypatch, spread=0.05) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == []
    assert [(load["name"], load["scored"]) for load in found["loads"]] == [
        ("light", True), ("middle", False), ("heavy", True),
    ]  # fmt: skip
    for load in found["loads"]:
        assert load["requests"] >= 8
        errors = {figure["latency"]: figure["error"] for figure in load["figures"] if figure["statistic"] == "mean"}
        assert abs(errors["ttft"]) < 0.15
        assert abs(errors["tpot"]) < 0.05
        assert abs(errors["e2e"]) < 0.05
    # The law knows no host: what the term holds are small kernels that no table has.
    assert 0 <= found["step_s"] < 1e-3
    assert all(0.8 < seconds < 1.25 for seconds in found["spread"])
    out = tmp_path / "out"
    assert len(pd.read_csv(out / "runs" / "runs.csv")) == 6
    assert (out / "device-profile.yaml").is_file()
    assert (out / "engine.yaml").is_file()


def test_a_machine_that_changes_its_speed_while_it_is_measured_proves_nothing(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_made_up_machine(small, monkeypatch, quick_s=20.0, slowness=5.0) == TOO_NOISY == 4
    printed = capsys.readouterr()
    assert not printed.out
    assert "too noisy, nothing proved: half of the" in printed.err.splitlines()[-1]


@pytest.mark.parametrize(("failed", "error"), [(0, "TooNoisyError"), (1, "TooFewRows")])
def test_too_few_rows_are_noise_unless_points_failed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: int, error: str
) -> None:
    from made_up_machine import MadeUpMachine

    from apexsim.fitting.own import TooFewRows
    from kernels_profiling import proof, session
    from kernels_profiling.serving_flags import ModelFlags

    def too_few(*_: object) -> None:
        raise TooFewRows("measure it again", where="tables", got=5)

    monkeypatch.setattr(proof, "fit_measured", too_few)
    monkeypatch.setattr(session.Session, "run", lambda *_: 0)
    monkeypatch.setattr(session.Session, "failed", failed)
    flags = ModelFlags(small[small.index("--model") + 1], "cpu", "bf16", None)
    plan = proof.Plan(
        folder=tmp_path / "out", model=flags, workload=WORKLOADS["cpu"], quick=True, repeats=1, seconds=1.0
    )
    with MadeUpMachine() as clock, pytest.raises(Exception, match="got 5; measure it again") as caught:
        proof.Proof(plan, lambda said: None, lambda share: None, clock=clock).verdict(STATED)
    assert caught.type.__name__ == error


def test_a_folder_of_other_runs_is_told_before_any_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "runs.csv").write_text("run_id\n")
    assert main(["prove", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 2
    assert "its columns are not those that are written here" in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()
