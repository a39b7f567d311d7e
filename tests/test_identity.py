"""What a refactoring must not change. Hashes of runs, a search and a sweep stand in ``identity.json``.

``python benchmarks/identity.py > tests/identity.json`` writes them anew, after a change meant to change results.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORED = json.loads((ROOT / "tests" / "identity.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def identity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("identity", ROOT / "benchmarks" / "identity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _differing(found: dict[str, str], *, drawn: bool) -> list[str]:
    stored = {key: value for key, value in STORED["hashes"].items() if key.startswith("drawn/") == drawn}
    return sorted(key for key in stored.keys() | found.keys() if stored.get(key) != found.get(key))


def test_runs_with_integer_costs_are_those_of_before(identity: ModuleType) -> None:
    assert _differing(identity.integer_hashes(), drawn=True) == []


def test_runs_with_fitted_costs_are_those_of_before(identity: ModuleType) -> None:
    """Fitted costs end in bits of numpy and the processor; elsewhere two trees are compared by the command."""
    if identity.machine() != STORED["machine"]:
        pytest.skip(f"hashes of {STORED['machine']}; compare by benchmarks/identity.py --against REVISION")
    assert _differing(identity.fitted_hashes(), drawn=False) == []
