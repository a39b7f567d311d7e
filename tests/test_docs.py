"""The documents do what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from apexsim.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_shows_what_its_first_command_prints() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    shown = script["SHOWN"].search(README)
    assert shown
    assert shown[0] == script["output_of_main_job"](), "run scripts/update_readme.py"


def test_readme_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "attainment" in capsys.readouterr().out


def test_readme_names_commands_that_exist() -> None:
    named = set(re.findall(r"^apexsim ([a-z-]+)", README, re.MULTILINE))
    assert named == set(COMMANDS)


@pytest.mark.parametrize(
    "page",
    sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]),
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
