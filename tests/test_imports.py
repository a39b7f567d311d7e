"""What ``import apexsim`` and the start of the command load, told by the names of modules in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import apexsim

# Slow or optional, and none of a simulation's business.
NEVER = {"torch", "matplotlib", "ray", "typer", "rich", "scipy.optimize"}


def loaded_by(code: str) -> set[str]:
    """Modules in memory after ``code`` ran in an interpreter of its own."""
    report = "import json, sys; sys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr))


def test_import_loads_nothing_heavy() -> None:
    modules = loaded_by("import apexsim")
    assert "apexsim" in modules
    assert not modules & (NEVER | {"numpy", "pandas", "pydantic", "simpy"})


def test_public_names_load_nothing_heavy() -> None:
    modules = loaded_by("import apexsim\nfor name in apexsim.__all__: getattr(apexsim, name)")
    assert {"apexsim.serving.simulator", "apexsim.search.study", "simpy", "pandas"} <= modules
    assert not modules & NEVER


def test_a_run_needs_nothing_heavy() -> None:
    modules = loaded_by(
        "import apexsim\n"
        "pair = apexsim.deployment(model='llama-3.1-8b', device='h100-sxm')\n"
        "apexsim.simulate(pair, apexsim.workload('chat', requests=3)).summary()"
    )
    assert "apexsim.results" in modules
    assert not modules & NEVER


def test_help_does_not_wait_for_the_simulator() -> None:
    modules = loaded_by("from apexsim.cli.main import main\nassert main(['--help']) == 0")
    assert "typer" in modules
    assert not modules & {"numpy", "pandas", "simpy", "matplotlib", "apexsim.serving"}


def test_public_names_are_few_and_exist() -> None:
    assert len(apexsim.__all__) <= 20
    assert len(set(apexsim.__all__)) == len(apexsim.__all__)
    assert all(getattr(apexsim, name).__doc__ for name in apexsim.__all__)
    assert set(apexsim.__all__) <= set(dir(apexsim))


def test_search_is_the_function_whatever_is_imported_first() -> None:
    loaded_by("import apexsim.search.study\nassert callable(apexsim.search)")
    loaded_by("from apexsim.search import study\nimport apexsim\nassert callable(apexsim.search)")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'simulator'"):
        apexsim.simulator  # noqa: B018
