"""Inputs that were made to do harm: each is refused in one line that names the file, or read in bounded memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apexsim.cli.main import main
from apexsim.errors import BadInput
from apexsim.io import bounds
from apexsim.io.deployments import DeploymentFile
from apexsim.io.request_files import read_requests
from apexsim.io.yaml_files import load_spec, read_yaml
from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.laws import GammaArrivals, GammaLength, LognormalLength
from apexsim.specs.model import ModelSpec
from apexsim.specs.workload import MAX_REQUESTS
from apexsim.sweep import read_runs

HEADER = "arrival_s,prompt_tokens,output_tokens"
ROW = '{"arrival_s":0,"prompt_tokens":1,"output_tokens":1'
BASE = "model: llama-3.1-8b\ndevice: h100-sxm\n"
LAUGHS = tuple(zip("abcdefg", "bcdefgh", strict=True))
MODEL = {
    "name": "m", "source": "s", "layers": 2, "hidden": 64, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn": 128,
    "vocab": 100, "max_context": 128,
}  # fmt: skip


def file(tmp_path: Path, content: str | bytes, ending: str) -> Path:
    path = tmp_path / f"input.{ending}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def told(path: Path) -> str:
    """The line with which a request file is refused."""
    with pytest.raises(BadInput) as caught:
        read_requests(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert line.isprintable()
    assert len(line) < 600
    return line


def parquet(tmp_path: Path, **more: Any) -> Path:
    columns = {"arrival_s": [0.0, 1.0], "prompt_tokens": [1, 2], "output_tokens": [1, 2]}
    pq.write_table(pa.table({**columns, **more}), tmp_path / "input.parquet")
    return tmp_path / "input.parquet"


# -- request files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nested",
    ["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 20_000, "[" * 40 + "]" * 40],
    ids=["lists", "objects", "open", "forty"],
)
def test_json_lines_nested_deep(tmp_path: Path, nested: str) -> None:
    path = file(tmp_path, f'{ROW}}}\n{ROW},"x":{nested}}}\n', "jsonl")
    assert told(path) == f"{path}: row 2: is nested too deep; give at most 32 levels"


def test_brackets_inside_text_nest_nothing(tmp_path: Path) -> None:
    path = file(tmp_path, f'{ROW},"x":"{"[" * 1000}"}}\n', "jsonl")
    assert len(read_requests(path)) == 1


@pytest.mark.parametrize("line", ["null", "[1]", "3", '"a"', "// note"])
def test_lines_that_are_no_objects(tmp_path: Path, line: str) -> None:
    assert "row 2" in told(file(tmp_path, f"{ROW}}}\n{line}\n", "jsonl"))


def test_deep_prefix_ids(tmp_path: Path) -> None:
    path = file(tmp_path, f'{HEADER},prefix_hash_ids\n0,1,1,[7]\n0,1,1,"{"[" * 5000}{"]" * 5000}"\n', "csv")
    assert "prefix_hash_ids, row 2 (the first data row is 1)" in told(path)


def test_prefix_ids_that_spill_into_the_next_row(tmp_path: Path) -> None:
    path = file(tmp_path, f'{HEADER},prefix_hash_ids\n0,1,1,"[1],[2"\n0,1,1,3]\n', "csv")
    assert "prefix_hash_ids, row 1" in told(path)


def test_fifty_thousand_columns(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(50_000)]
    path = file(tmp_path, f"{HEADER},{','.join(names)}\n0,1,1{',1' * 50_000}\n", "csv")
    assert told(path) == f"{path}: has 50,003 columns; give at most 1,000"
    keys = ",".join(f'"{name}":1' for name in names)
    assert "keys; give at most 1,000" in told(file(tmp_path, f"{ROW},{keys}}}", "jsonl"))
    own = "\n".join(f'{ROW},"{name}":1}}' for name in names[:2000])  # each row a column of its own
    assert "keys; give at most 1,000" in told(file(tmp_path, own, "jsonl"))
    many = {name: [1, 2] for name in names[:1000]}
    assert "has 1,003 columns" in told(parquet(tmp_path, **many))


def test_rows_are_counted_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_REQUESTS", 3)
    rows = "0,1,1\n" * 4
    assert "has 4 rows; give at most 3" in told(file(tmp_path, f"{HEADER}\n{rows}", "csv"))
    assert "has 4 rows; give at most 3" in told(file(tmp_path, f"{ROW}}}\n" * 4, "jsonl"))
    assert len(read_requests(file(tmp_path, f"{HEADER}\n{rows[:18]}", "csv"))) == 3


def test_a_parquet_file_of_millions_of_equal_rows(tmp_path: Path) -> None:
    """A few kilobytes that stand for more rows than a run can hold."""
    count = MAX_REQUESTS + 1
    zeros = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([1]))
    table = pa.table(dict.fromkeys(HEADER.split(","), zeros))
    pq.write_table(table, tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1_000_000
    assert "has 10,000,001 rows; give at most 10,000,000" in told(tmp_path / "bomb.parquet")


def test_values_inside_lists_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_VALUES", 1000)
    assert "values; give at most 1,000" in told(parquet(tmp_path, prefix_hash_ids=[[0] * 2000, []]))


@pytest.mark.parametrize("ids", [["x" * 300, "y"], [{"a": 1}, {"a": 2}], [[1], [2]]], ids=["long", "objects", "lists"])
def test_ids_are_names(tmp_path: Path, ids: list[Any]) -> None:
    assert "session_id" in told(parquet(tmp_path, session_id=ids))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        os.mkfifo(tmp_path / f"pipe.{ending}")
        assert "is a pipe" in told(tmp_path / f"pipe.{ending}")
        os.symlink("/dev/zero", tmp_path / f"zero.{ending}")
        assert "is a device" in told(tmp_path / f"zero.{ending}")
    os.mkfifo(tmp_path / "pipe.yaml")
    pipe, table = str(tmp_path / "pipe.yaml"), str(tmp_path / "pipe.csv")
    out = str(tmp_path / "out")
    for args in (
        ["simulate", pipe, "--workload", "chat"],
        ["search", pipe],
        ["sweep", pipe, "--out", out],
        ["show", "model", pipe],
        ["import-model", pipe],
        ["device", "--from-datasheet", pipe, "--name", "x", "--out", out],
        ["validate", table],
        ["calibrate", table, "--engine", "vllm-v1-async", "--out", out],
        ["calibrate-intervals", table, "--out", out],
    ):
        assert main(args) == 2, args
        line = capsys.readouterr().err
        assert "is a pipe" in line
        assert line.count("\n") == 1


# -- YAML and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 300_000,
        "a: " + "- " * 50_000 + "1",
        "a: &a [1, 1, 1]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in LAUGHS),
        "a: &a [*a]",
        "a: !!bool maybe",
        "a: !!int x",
        "a: !!timestamp x",
        "a: !!set {b}",
        "a: !!binary YQ==",
        "a: !!python/object/apply:os.getcwd []",
        "? [a]\n: b",
        "a: " + "9" * 5000,
        "x" * 2_000_000,
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_yaml_that_harms(tmp_path: Path, text: str) -> None:
    path = file(tmp_path, text, "yaml")
    with pytest.raises(BadInput) as caught:
        read_yaml(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert line.isprintable()
    assert len(line) < 600


@pytest.mark.parametrize("value", ["true", "'2'", "1.5", ".nan", "[1]", "null", "9" * 40])
def test_only_whole_numbers_are_whole_numbers(tmp_path: Path, value: str) -> None:
    with pytest.raises(BadInput, match=r"tensor"):
        load_spec(DeploymentFile, file(tmp_path, f"{BASE}tensor: {value}\n", "yaml"))


@pytest.mark.parametrize("value", ["true", "'900'", ".inf", "[900]"])
def test_only_numbers_are_numbers(tmp_path: Path, value: str) -> None:
    with pytest.raises(BadInput, match="clock_mhz"):
        load_spec(DeploymentFile, file(tmp_path, f"{BASE}clock_mhz: {value}\n", "yaml"))


def test_strictness_reaches_everywhere() -> None:
    class Inner(Spec):
        sizes: dict[int, tuple[float, ...]]
        on: bool = False

    class Outer(Spec):
        inner: Inner | None = None

    fine = {"inner": {"sizes": {"1": [1, 2.5]}}}  # JSON has no other keys than text
    assert parse_spec(Outer, fine, "x").inner == Inner(sizes={1: (1.0, 2.5)})
    for wrong in ({"sizes": {1: ["1"]}}, {"sizes": {1: [True]}}, {"sizes": {}, "on": 1}, {"sizes": {}, "on": "yes"}):
        with pytest.raises(BadInput):
            parse_spec(Outer, {"inner": wrong}, "x")


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert parse_spec(ModelSpec, {**MODEL, "max_context": 1.28e2}, "x").max_context == 128


@pytest.mark.parametrize("name", ["[/bold]x", "a\x1b[31m", "a\nb", "", "x" * 100_000, "a\u202eb"])
def test_names_can_stand_in_a_table(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, json.dumps({**MODEL, "name": name}), "yaml")
    assert main(["show", "model", str(path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.strip().isprintable()
    assert "name: got" in line
    assert len(line) < 600


@pytest.mark.parametrize("name", ["x" * 100_000, "a\x1b]0;title\x07", "[bold]", "a\0b/c.yaml"])
def test_names_that_are_not_known(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, json.dumps({"model": name, "device": "h100-sxm"}), "yaml")
    assert main(["simulate", str(path), "--workload", "chat"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.strip().isprintable()
    assert len(line) < 3000


def test_points_of_a_sweep_are_counted_first(tmp_path: Path) -> None:
    grid = "".join(f"  k{number}: [{', '.join(map(str, range(100)))}]\n" for number in range(6))
    path = file(tmp_path, f"base: {{model: llama-3.1-8b}}\ngrid:\n{grid}", "yaml")
    with pytest.raises(BadInput, match="grid: has 1,000,000,000,000 points; give at most 100,000"):
        next(read_runs(path))


@pytest.mark.parametrize("cv", [1e-200, 1e200, 0.0, -1.0])
def test_ratios_that_no_law_can_have(cv: float) -> None:
    for law, more in ((GammaLength, {"mean_tokens": 10}), (GammaArrivals, {"rate_per_s": 1})):
        with pytest.raises(BadInput, match="cv"):
            parse_spec(law, {**more, "cv": cv}, "x")


@pytest.mark.parametrize("cv", [1e-3, 100.0])
def test_the_furthest_ratios_still_draw(cv: float) -> None:
    score = np.linspace(-4, 4, 1001)
    assert GammaLength(mean_tokens=10, cv=cv, max_tokens=10**6).draw(score).min() >= 1
    assert np.isfinite(GammaArrivals(rate_per_s=1, cv=cv).draw_s(np.random.default_rng(0), 1000)).all()


def test_lognormal_laws_beyond_all_lengths() -> None:
    with pytest.raises(BadInput, match="log_mean"):
        parse_spec(LognormalLength, {"log_mean": 1e308, "log_sd": 1e308}, "x")


@pytest.mark.parametrize(
    "flags",
    [
        ["--requests", "100000000"],
        ["--rate-per-s", "1e-300"],
        ["--rate-per-s", "1e300"],
        ["--concurrency", "1000000000000"],
    ],
)  # fmt: skip
def test_flags_beyond_all_measure(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat"]
    assert main([*run, *flags]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert flags[0] in line


def test_want_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def starved(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("apexsim.serving.simulator.simulate", starved)
    run = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--requests", "2"]
    assert main(run) == 2
    assert capsys.readouterr().err.startswith("apexsim: there is not enough memory")
