"""Device profiles are checked when they are loaded: what cannot be priced with is told with file and key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from apexsim import catalog
from apexsim.costs.forms import gemm, small
from apexsim.costs.forms.hardware import Coefficient
from apexsim.errors import BadInput
from apexsim.io.yaml_files import read_yaml, write_yaml

H100 = Path(__file__).resolve().parents[1] / "device_profiles" / "h100-sxm.yaml"
GEMM = "operators.gemm.bf16"


@cache
def _shipped() -> dict[str, Any]:
    return read_yaml(H100)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets the key at a dotted path, or takes it away where ``value`` is ``...``."""

    def change(data: dict[str, Any]) -> None:
        *parents, leaf = key.split(".")
        for parent in parents:
            data = data[parent]
        if value is ...:
            del data[leaf]
        else:
            data[leaf] = value

    return change


def told(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    data = copy.deepcopy(_shipped())
    change(data)
    write_yaml(tmp_path / "device.yaml", data)
    with pytest.raises(BadInput) as caught:
        catalog.load("device", tmp_path / "device.yaml")
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'device.yaml'}: ")
    return line


@pytest.mark.parametrize("name", catalog.names("device"))
def test_shipped_profiles_pass(name: str) -> None:
    assert catalog.load("device", name).name == name


@pytest.mark.parametrize("value", [-0.5, 0.0, 9.0, 1e300, float("nan"), float("inf"), True, "0.7", None, [0.7], ...])
def test_coefficients_that_make_no_sense(tmp_path: Path, value: Any) -> None:
    for operator, name in ((GEMM, "compute_efficiency"), ("operators.decode_attention.bf16_d128", "memory_efficiency")):
        key = f"{operator}.coefficients.{name}"
        assert f": {key}: " in told(tmp_path, put(key, value))


@pytest.mark.parametrize(
    ("kind", "form"), [("gemm", gemm.COEFFICIENTS), ("elementwise", small.ELEMENTWISE), ("sampling", small.SAMPLING)]
)
def test_what_a_fit_of_any_device_may_find_passes(tmp_path: Path, kind: str, form: tuple[Coefficient, ...]) -> None:
    """A kernel whose bytes all stay in the caches tells nothing of memory: the fit then ends at a bound."""
    for side in ("low", "high"):
        data = copy.deepcopy(_shipped())
        for operator in data["operators"][kind].values():
            loosest = {c.name: getattr(c.loosened, side) for c in form}
            given = operator["coefficients"]
            given |= {name: value for name, value in loosest.items() if name in given}
        write_yaml(tmp_path / f"{side}.yaml", data)
        assert catalog.load("device", tmp_path / f"{side}.yaml").operators[kind]


@pytest.mark.parametrize("name", ["launch_s", "wave_s"])
@pytest.mark.parametrize("value", [-1e-6, 5.0])
def test_times_that_no_kernel_takes(tmp_path: Path, name: str, value: float) -> None:
    key = f"{GEMM}.coefficients.{name}"
    assert told(tmp_path, put(key, value)).endswith("give a number from 0 to 1")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("operators.gem", {}, "did you mean gemm"),
        ("operators.gemm.bf17", _shipped()["operators"]["gemm"]["bf16"], "DTYPE"),
        ("operators.decode_attention.d128", _shipped()["operators"]["decode_attention"]["bf16_d128"], "DTYPE_d"),
        (f"{GEMM}.form", "moe", "give gemm"),
        ("operators.all_reduce.nccl_2.points", None, "is missing"),
        ("operators", [], "operators"),
        (f"{GEMM}.residual.percent", "9999 " * 500, "percent"),
        (f"{GEMM}.residual.percent", "one two", "whole numbers"),
        ("power.j_per_flop.bf16", -1e-12, "greater than or equal to 0"),
        ("power.j_per_flop.bf16", ..., "bf16 is missing"),
        ("power.idle_w", -1, "idle_w"),
        ("power.active_w", 1e9, "active_w"),
        ("power.clock.knee_mhz", 1e6, "knee_mhz"),
        ("datasheet.flops_per_s.bf16", ..., "bf16 is missing"),
        ("datasheet.flops_per_s.tf64", 1e15, "flops_per_s"),
        ("datasheet.memory_bytes", "80e9x", "memory_bytes"),
        ("datasheet.nccl_bytes", {2: -5}, "nccl_bytes"),
        ("sustained.factors", [0.5], "sustained"),
        ("price.usd_per_hour", -3, "usd_per_hour"),
        ("name", "[red]", "name"),
    ],
)
def test_what_else_is_refused(tmp_path: Path, key: str, value: Any, words: str) -> None:
    assert words in told(tmp_path, put(key, value))


@pytest.mark.parametrize("seconds", [0.0, -1e-6, 1e6])
def test_tables_of_times(tmp_path: Path, seconds: float) -> None:
    def change(data: dict[str, Any]) -> None:
        data["operators"]["all_reduce"]["nccl_2"]["points"]["seconds"][0] = seconds

    assert "operators.all_reduce.nccl_2.points" in told(tmp_path, change)
