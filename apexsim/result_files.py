"""The folder of a saved result: sealed when it is written, and told damaged from whole before anything is believed.

``result.json`` holds the SHA-256 of the tables beside it; it and ``timing.json`` end with one of their own content.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from apexsim.atomic import json_text, write_json
from apexsim.errors import BadInput
from apexsim.reading import check_regular, read_object

T = TypeVar("T")

# Goes up whenever the files come to hold something else.
FORMAT = 2
TABLES = ("requests.parquet", "steps.parquet", "gaps.parquet")
FILES = (*TABLES, "timing.json", "result.json")
_SEAL = "sha256"
_WOULD_DO = "give a folder that SimulationResult.save wrote"


def seal_folder(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``result.json``, once the tables are there."""
    sums = {name: _sum_of(folder / name) for name in TABLES}
    write_sealed(folder / "result.json", {"format": FORMAT, **record, "tables": sums})


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON that ends with the SHA-256 of all before it."""
    write_json(path, {**data, _SEAL: _seal_of(data)})


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``result.json`` and ``timing.json`` hold. BadInput where a file is missing, damaged or of another format."""
    if not (folder / "result.json").exists():
        raise BadInput(f"holds no result.json; {_WOULD_DO}", where=folder)
    record = _read_sealed(folder / "result.json")
    if record.get("format") != FORMAT:
        would_do = f"another version of apexsim saved this; this one reads format {FORMAT}: run it again"
        raise BadInput(would_do, where=folder / "result.json", key="format", got=record.get("format"))
    for name in TABLES:
        if _sum_of(folder / name) != record["tables"].get(name):
            raise BadInput(f"is damaged: it is not the file that was saved; {_WOULD_DO}", where=folder / name)
    return record, _read_sealed(folder / "timing.json")


def one_fault(load: Callable[[type[T], Path | str], T]) -> Callable[[type[T], Path | str], T]:
    """Let a loader raise BadInput at its folder for whatever it stumbles over in files that are not what it takes."""

    @functools.wraps(load)
    def loaded(cls: type[T], folder: Path | str) -> T:
        try:
            return load(cls, folder)
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise BadInput(f"holds no whole result ({type(error).__name__}); {_WOULD_DO}", where=folder) from None

    return loaded


def _read_sealed(path: Path) -> dict[str, Any]:
    data = read_object(path, would_do=_WOULD_DO)
    seal = data.pop(_SEAL, None)
    if seal is None:
        raise BadInput(f"has no {_SEAL}: another version of apexsim saved it, or nobody; {_WOULD_DO}", where=path)
    if seal != _seal_of(data):
        raise BadInput(f"is damaged: it is not what was saved; {_WOULD_DO}", where=path)
    return data


def _seal_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(data).encode("utf-8", "surrogatepass")).hexdigest()


def _sum_of(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
