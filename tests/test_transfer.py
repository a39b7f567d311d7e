"""Devices that nobody measured: what carries over, what is refused, and how far a device left out is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apexsim import catalog
from apexsim.cli.main import main
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.operators import Gemm
from apexsim.costs.tables import RowTable, tables_for
from apexsim.errors import BadInput
from apexsim.fitting.relatives import Sheet, by_distance, carried, scaled_points
from apexsim.fitting.transfer import left_out, left_out_errors, operator_errors, profile_from_datasheet
from apexsim.fitting.transfer_runs import run_errors
from apexsim.io.yaml_files import format_yaml, load_spec
from apexsim.specs.base import parse_spec
from apexsim.specs.device import DeviceProfile, Points

MEASURED = [catalog.load("device", name) for name in ("a100-sxm", "h100-sxm", "h200-sxm")]
A100, H100, H200 = MEASURED

HOPPER = ("h100-sxm", "h200-sxm")
SHEET: dict[str, Any] = {
    "generation": "hopper",
    "memory_bytes": 96 * 2**30,
    "memory_bytes_per_s": 4.0e12,
    "flops_per_s": {"bf16": 148e12, "fp8": 296e12},
    "l2_bytes": 60 * 2**20,
    "sms": 78,
    "tdp_w": 400,
    "intra_node_bytes_per_s": 450e9,
    "inter_node_bytes_per_s": 50e9,
    "pcie_bytes_per_s": 64e9,
    "usd_per_hour": 2.0,
}


def sheet(**other: Any) -> Sheet:
    return parse_spec(Sheet, {**SHEET, **other}, "sheet")


def test_the_nearest_relative_is_the_most_alike() -> None:
    assert [profile.name for profile in by_distance(Sheet.of(H200), [A100, H100])] == ["h100-sxm", "a100-sxm"]
    assert by_distance(Sheet.of(A100), MEASURED)[0] is A100
    # Without tensor cores for fp8, and with the bytes a FLOP of an A100.
    old = sheet(generation="ampere", flops_per_s={"bf16": 300e12}, memory_bytes_per_s=1.9e12, sms=108)
    assert by_distance(old, MEASURED)[0] is A100


def test_a_device_with_its_own_sheet_gets_its_own_costs() -> None:
    """Nothing but the datasheet tells devices apart: the sheet of a measured one gives back its kernels and power."""
    copy = carried(Sheet.of(H200), "copy", MEASURED)
    assert copy.datasheet == H200.datasheet
    errors = operator_errors(H200, copy)
    assert {"gemm", "prefill_attention", "decode_attention", "moe", "all_reduce"} <= set(errors)
    for kind in errors:
        assert np.abs(errors[kind]).max() < 1e-3, kind
    assert copy.power.active_w == pytest.approx(H200.power.active_w, rel=0.01)


def test_everything_lent_says_so() -> None:
    profile = profile_from_datasheet(sheet(), "new", MEASURED)
    for kind, by_key in profile.operators.items():
        for operator in by_key.values():
            assert operator.evidence == "estimated"
            assert operator.source in {f"as on {relative.name}" for relative in MEASURED}
            assert operator.rows_used == 0
            if kind in ("gemm", "moe", "prefill_attention", "decode_attention", "all_reduce"):
                assert list(operator.quality) == ["device_left_out"]
    assert set(profile.power.evidence.values()) == {"scaled"}
    assert profile.power.limit_w == pytest.approx(H200.power.limit_w * 400 / 700, rel=0.01)
    assert profile.power.clock is None
    assert profile.sustained.evidence == "estimated"
    assert profile.price.usd_per_hour == 2.0


def test_an_unknown_generation_is_scored_without_whole_generations() -> None:
    profile = profile_from_datasheet(sheet(generation="other"), "new", MEASURED)
    assert list(profile.operators["gemm"]["bf16"].quality) == ["generation_left_out"]


def test_costs_follow_the_datasheet() -> None:
    """Compute-bound products go with FLOP/s, reading weights with bytes/s, and no time beats the new roofline."""
    slow = OperatorCosts(carried(sheet(), "slow", MEASURED), sustained=False)
    fast = OperatorCosts(
        carried(sheet(flops_per_s={"bf16": 1480e12, "fp8": 2960e12}), "fast", MEASURED), sustained=False
    )
    large, thin = (8192.0, 8192, 8192), (1.0, 28672, 8192)
    assert float(slow.gemm_s(*large, "bf16") / fast.gemm_s(*large, "bf16")) == pytest.approx(10, rel=0.25)
    assert float(slow.gemm_s(*thin, "bf16") / fast.gemm_s(*thin, "bf16")) < 1.4
    assert slow.gemm_s(*large, "bf16") >= 2 * 8192**3 / 148e12


def test_dtypes_without_tensor_cores_are_not_lent() -> None:
    profile = carried(sheet(flops_per_s={"bf16": 148e12}), "old", MEASURED)
    assert "fp8" not in profile.operators["gemm"]
    assert not [key for key in profile.operators["decode_attention"] if key.startswith("fp8")]
    assert "bf16" in profile.operators["moe"]


def test_collectives_keep_their_latency_and_scale_beyond() -> None:
    points = Points(bytes=(1024, 2048, 2**20), seconds=(10e-6, 11e-6, 110e-6))
    slower = scaled_points(points, 3.0)
    assert slower.bytes == points.bytes
    assert slower.seconds == pytest.approx((10e-6, 13e-6, 310e-6))
    half = carried(sheet(intra_node_bytes_per_s=225e9), "half", [H100, H200]).operators["all_reduce"]["nccl_8"].points
    whole = carried(sheet(), "whole", [H100, H200]).operators["all_reduce"]["nccl_8"].points
    assert half
    assert whole
    assert half.seconds[0] == whole.seconds[0]
    assert half.seconds[-1] / whole.seconds[-1] == pytest.approx(2, rel=0.05)


def test_left_out_devices_are_as_near_as_the_docs_say() -> None:
    """Hopper from Hopper is close; without its generation it is not, which the errors show."""
    near = {(error.device, error.kind): error.held_out for error in left_out_errors([H100, H200, A100])}
    assert near["h200-sxm", "gemm"].median < 0.12
    assert near["h200-sxm", "decode_attention"].median < 0.08
    assert near["h200-sxm", "all_reduce"].p90 < 0.12
    far = {(e.device, e.kind): e.held_out for e in left_out_errors(MEASURED, whole_generation=True)}
    assert far["h200-sxm", "prefill_attention"].median > near["h200-sxm", "prefill_attention"].median
    assert far["h200-sxm", "gemm"].median < 0.4


def test_the_profile_of_a_device_left_out_never_saw_it() -> None:
    for device, guess in left_out(MEASURED):
        assert device.name not in guess.provenance.tables
        sources = {op.source for by_key in guess.operators.values() for op in by_key.values()}
        assert f"as on {device.name}" not in sources


def test_whole_runs_of_a_hopper_left_out_are_close() -> None:
    runs = {(run.device, run.deployment): run for run in run_errors([H100, H200])}
    dense = runs["h200-sxm", "llama-3.1-70b on 4"]
    assert dense.status == "ok"
    assert dense.tpot is not None
    assert abs(dense.tpot) < 0.1
    assert dense.ttft is not None
    assert abs(dense.ttft) < 0.15
    assert dense.joules is not None
    assert abs(dense.joules) < 0.15


def test_the_command_prints_the_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    every = catalog.names
    monkeypatch.setattr(catalog, "names", lambda kind: HOPPER if kind == "device" else every(kind))
    assert main(["device", "--errors"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["gemm"]] == ["any", *HOPPER]
    assert len([line for line in lines if line[-1:] == ["ok"]]) == 6


def test_a_device_without_products_of_its_own_lends_nothing() -> None:
    borrowed = carried(Sheet.of(H200), "borrowed", [H100])
    names = [device.name for device, _ in left_out([*MEASURED, borrowed])]
    assert names == [device.name for device in MEASURED]
    assert "borrowed" not in profile_from_datasheet(sheet(), "new", [*MEASURED, borrowed]).provenance.tables


def test_one_measured_device_is_not_enough() -> None:
    with pytest.raises(BadInput, match="two or more measured devices"):
        profile_from_datasheet(sheet(), "new", [H100])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_bytes_per_s": None}, "memory_bytes_per_s: is missing"),
        ({"memory_bytes_per_s": 1}, "memory_bytes_per_s: got 1; Input should be greater than or equal to 1"),
        ({"memory_bytes": 80}, "memory_bytes: got 80; "),
        ({"flops_per_s": {"fp8": 1e15}}, "flops_per_s needs bf16"),
        ({"flops_per_s": {"bf16": 989}}, "flops_per_s.bf16: got 989"),
        ({"flops_per_s": {"bf16": 1e15, "fp9": 1e15}}, "fp9 is no rate of tensor cores; did you mean fp8"),
        ({"sms": 0}, "sms: got 0"),
        ({"smss": 132}, "smss: unknown key; did you mean sms?"),
        ({"generation": "hoper"}, "generation: got 'hoper'"),
        ({"usd_per_hour": -1}, "usd_per_hour: got -1"),
    ],
)
def test_bad_datasheets_are_one_line(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {key: value for key, value in {**SHEET, **change}.items() if value is not None}
    path = tmp_path / "sheet.yaml"
    path.write_text(format_yaml(data))
    status = main(["device", "--from-datasheet", str(path), "--name", "new", "--out", str(tmp_path / "new.yaml")])
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert str(path) in printed.err
    assert said in printed.err
    assert not (tmp_path / "new.yaml").exists()


def test_the_command_writes_a_profile_that_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "sheet.yaml", tmp_path / "new.yaml"
    source.write_text(format_yaml(SHEET))
    assert main(["device", "--from-datasheet", str(source), "--name", "new", "--out", str(target)]) == 0
    assert "device_left_out" in capsys.readouterr().out
    assert load_spec(DeviceProfile, target).name == "new"
    flags = ["--model", "llama-3.1-8b", "--device", str(target), "--workload", "chat", "--requests", "20"]
    assert main(["simulate", *flags]) == 0
    assert "estimated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--from-datasheet: give a datasheet, a name and a file"),
        (["--from-datasheet", "x.yaml", "--name", "new"], "--out: give a datasheet, a name and a file"),
        (["--from-datasheet", "x.yaml", "--name", "", "--out", "o.yaml"], "--name: give a datasheet, a name"),
        (["--from-datasheet", "x.yaml", "--name", "h100-sxm", "--out", "o.yaml"], "a measured device has that name"),
        (["--errors", "--name", "new"], "--errors: leave --name and --out away"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", *flags]) == 2
    assert said in capsys.readouterr().err


def test_profiles_with_absurd_figures_are_refused() -> None:
    data = H100.model_dump(mode="json", exclude_defaults=True)
    data["datasheet"]["memory_bytes_per_s"] = 1.0
    with pytest.raises(BadInput, match=r"datasheet\.memory_bytes_per_s: got 1\.0"):
        parse_spec(DeviceProfile, data, "mine.yaml")


def test_times_beyond_the_clock_are_refused() -> None:
    """A profile may pass field by field and still give times that no clock can count."""
    data = H100.model_dump(mode="json", exclude_defaults=True)
    data["operators"]["gemm"]["bf16"]["coefficients"]["memory_efficiency"] = 1e-15
    tables = tables_for(parse_spec(DeviceProfile, data, "mine.yaml"))
    with pytest.raises(BadInput, match="longer than the clock can count"):
        RowTable(tables, [[(Gemm("o", 8192, 8192, "bf16"), 80)]])[1]
