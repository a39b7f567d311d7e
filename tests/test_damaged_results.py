"""A saved result that is not whole any more is told from one that is, whatever happened to it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import apexsim
from apexsim.errors import BadInput
from apexsim.result_files import FORMAT, TABLES, write_sealed
from apexsim.results import SimulationResult

FILES = (*TABLES, "result.json", "timing.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    deployment = apexsim.deployment(model="llama-3.1-8b", device="h100-sxm")
    result = apexsim.simulate(deployment, apexsim.workload("chat", requests=20))
    result.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def told(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        apexsim.load(folder)
    line = str(caught.value)
    assert line.startswith(str(folder))
    assert "\n" not in line
    return line


def test_the_whole_one_is_read(folder: Path) -> None:
    result = apexsim.load(folder)
    assert isinstance(result, SimulationResult)
    assert result.summary()["requests"]["finished"] == 20


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path, draw: path.unlink(),
        lambda path, draw: path.write_bytes(b""),
        lambda path, draw: path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)]),
        lambda path, draw: path.write_bytes(path.read_bytes() + b"{}"),
        lambda path, draw: path.write_bytes(draw.randbytes(1000)),
        lambda path, draw: (path.unlink(), path.mkdir()),
    ],
    ids=["deleted", "emptied", "cut", "lengthened", "replaced", "a folder"],
)
def test_files_that_are_not_what_they_were(folder: Path, name: str, damage: Callable[[Path, Any], Any]) -> None:
    damage(folder / name, random.Random(name))
    assert name in told(folder)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_is_enough(folder: Path, name: str) -> None:
    """A bit that turns a blank of JSON into another blank, or nothing else that JSON can tell, may pass."""
    whole, draw = (folder / name).read_bytes(), random.Random(name)
    for _ in range(60):
        at = draw.randrange(len(whole))
        changed = bytearray(whole)
        changed[at] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(changed)
        if name.endswith(".json") and _reads_the_same(whole, bytes(changed)):
            continue
        told(folder)


def _reads_the_same(whole: bytes, changed: bytes) -> bool:
    try:
        return bool(json.loads(whole) == json.loads(changed))
    except ValueError:
        return False


@pytest.mark.parametrize("table", TABLES)
def test_tables_written_anew(folder: Path, table: str) -> None:
    frame = pd.read_parquet(folder / table)
    for changed in (frame.iloc[:, 1:], frame.assign(**{frame.columns[0]: None}), frame.iloc[1:], frame.astype(str)):
        changed.to_parquet(folder / table)
        assert "is damaged" in told(folder)


def sealed_anew(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change ``result.json`` as one would who seals it again."""
    record = json.loads((folder / "result.json").read_text())
    del record["sha256"]
    change(record)
    write_sealed(folder / "result.json", record)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["pools"]["serve"].pop("usage"),
        lambda record: record["pools"].update(serve=3),
        lambda record: record.update(slo=[1]),
        lambda record: record.update(tables=[]),
        lambda record: record.update(notes=None),
        lambda record: record["deployment"].pop("model"),
        lambda record: record["deployment"]["model"].update(layers="two"),
    ],
    ids=["no usage", "pool", "slo", "tables", "notes", "no model", "layers"],
)
def test_records_of_another_shape(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    sealed_anew(folder, change)
    told(folder)


def test_another_format_is_told(folder: Path) -> None:
    sealed_anew(folder, lambda record: record.update(format=FORMAT + 1))
    assert "another version of apexsim" in told(folder)


def test_saves_from_before_seals_are_told(folder: Path) -> None:
    record = json.loads((folder / "result.json").read_text())
    del record["sha256"]
    (folder / "result.json").write_text(json.dumps(record))
    assert "another version of apexsim" in told(folder)
