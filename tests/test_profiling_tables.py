"""Tables of measurements: schema, parts, resuming, faults; no torch is needed for these."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from apexsim.errors import BadInput
from kernels_profiling import commands
from kernels_profiling.tables import MEASURED, ROUND, SIZES, Tables, as_frame, key_of

POINT = {"m": 4, "n": 256, "k": 512, "dtype": "bf16", "round": 0}
ROW = {**POINT, "status": "ok", "latency_s": 1e-4, "latency_p10_s": 9e-5, "kernel_source": "torch linear"}
WHOLE = dict.fromkeys(MEASURED) | ROW


def test_a_table_has_every_column_of_the_schema() -> None:
    """Sizes first, then what was measured; what is not known is null, not zero."""
    frame = as_frame("gemm", [ROW])
    assert tuple(frame.columns) == (*SIZES["gemm"], ROUND, *MEASURED)
    assert pd.isna(frame.loc[0, "power_w"])
    assert pd.isna(frame.loc[0, "error"])
    assert frame["m"].dtype == "float64"


@pytest.mark.parametrize("name", sorted(SIZES))
def test_documented_columns_are_those_that_are_written(name: str) -> None:
    """docs/profiling.md names every table and every column."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "profiling.md").read_text(encoding="utf-8")
    missing = [column for column in (name, *SIZES[name], ROUND, *MEASURED) if f"`{column}`" not in text]
    assert not missing


def test_rows_outlive_a_kill(tmp_path: Path) -> None:
    """What was flushed is done, whatever happens next; merging makes one file."""
    tables = Tables(tmp_path)
    tables.add("gemm", ROW)
    tables.flush()
    again = Tables(tmp_path)
    assert again.done("gemm") == {key_of("gemm", POINT)}
    again.add("gemm", {**ROW, "m": 8})
    again.merge()
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["gemm.parquet"]
    assert not list((tmp_path / "parts").iterdir())
    assert sorted(pd.read_parquet(tmp_path / "gemm.parquet")["m"]) == [4, 8]


@pytest.mark.parametrize("where", ["gemm.parquet", "parts/gemm-00000.parquet"])
def test_a_corrupt_file_is_refused_by_name(tmp_path: Path, where: str) -> None:
    tables = Tables(tmp_path)
    (tmp_path / where).write_bytes(b"PAR1 not a table")
    with pytest.raises(BadInput, match=Path(where).name):
        tables.done("gemm")


@pytest.mark.parametrize(
    ("row", "said"),
    [({"m": 4}, "gemm.parquet: n: the table lacks it"), (WHOLE | {"m": "four"}, "not a readable table of gemm")],
)
def test_a_table_of_other_columns_is_refused_by_name(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    tables, path = Tables(tmp_path), tmp_path / "gemm.parquet"
    pd.DataFrame([row]).to_parquet(path)
    with pytest.raises(BadInput, match=said):
        tables.done("gemm")


def test_without_torch_one_line_says_which_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert commands.main(["measure", "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'apexsim[profiling]'" in said


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["mesure"]) == 2
    assert "measure" in capsys.readouterr().err
