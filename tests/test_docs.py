"""The documents do what they say."""

from __future__ import annotations

import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apexsim.cli.main import COMMANDS, main
from apexsim.io.saved import load
from apexsim.serving.job import Job
from apexsim.serving.ledger import Ledger
from apexsim.serving.messages import View
from apexsim.serving.policies import POLICIES, BatchPolicy
from apexsim.specs.deployment import Deployment
from apexsim.testing import Case, check_case, check_policy

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


INPUTS = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")


def test_groups_and_pools_run_as_the_page_says(tmp_path: Path) -> None:
    grouped, pooled = (tmp_path / name for name in ("grouped.yaml", "pooled.yaml"))
    for path, text in zip((grouped, pooled), re.findall(r"```yaml\n(.*?)```", INPUTS, re.DOTALL), strict=True):
        path.write_text(text)
    asked = ["--workload", "chat", "--requests", "5"]
    assert main(["simulate", str(grouped), *asked]) == 0
    assert main(["simulate", str(pooled), *asked]) == 2
    found = load(pooled)
    assert isinstance(found, Deployment)
    assert [(server.pool, server.device.name) for server in found.servers()] == [
        ("prefill", "h100-sxm"),
        ("decode", "a100-sxm"),
    ]


ENGINES = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8").partition("### A policy of your own")[2]


@pytest.fixture
def own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the example policy of docs/engines.md, the deployment that names it, and the example router."""
    policy, _, _, _, router = blocks_of("python")
    (tmp_path / "mypol.py").write_text(policy)
    (tmp_path / "mine.py").write_text(router)
    (tmp_path / "mine.yaml").write_text(blocks_of("yaml")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("mypol", "mine"):
        sys.modules.pop(name, None)


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ENGINES, re.DOTALL)


@pytest.mark.usefixtures("own_policy")
def test_the_policy_of_ones_own_runs_as_shown() -> None:
    shown: dict[str, Any] = {}
    exec(compile(blocks_of("python")[1], "engines.md", "exec"), shown)
    assert shown["result"].deployment.engine.scheduler.policy == "mypol:ShortestPrompt"
    assert shown["result"].finished.sum() == 200
    for line in blocks_of("bash")[0].splitlines():
        assert main([*line.split()[1:], "--requests", "20"]) == 0


@pytest.mark.usefixtures("own_policy")
def test_the_policy_of_ones_own_orders_as_it_says() -> None:
    """At one moment the shortest prompt is first; a prompt of 9 tokens is served before one of 8 that comes 2 ms on."""
    case = Case(arrivals_ns=[0, 0, 0, 2_000_000], lengths=[(40, 9), (9, 9), (7, 9), (8, 9)], seats=1)
    run = replace(case, policy="mypol:ShortestPrompt").run(exact_steps=False)
    scheduled = sorted(run.requests, key=lambda request: request.scheduled_ns or 0)
    assert [request.index for request in scheduled] == [2, 1, 3, 0]


@pytest.mark.usefixtures("own_policy")
def test_the_router_of_ones_own_sends_where_most_is_free() -> None:
    """The long prompt holds one replica, so that all others go to the second."""
    case = Case(arrivals_ns=[0, 1, 9_000_000, 15_000_000], lengths=[(400, 50), (20, 2), (20, 2), (20, 2)], replicas=2)
    case = replace(case, router="mine:Emptiest")
    check_case(case)
    assert [request.replica for request in case.run(exact_steps=False).requests] == [0, 1, 1, 1]


@pytest.fixture
def deciders() -> dict[str, Any]:
    """The policies of docs/engines.md that decide everything themselves."""
    shown: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of("python")[2:4]:
        exec(compile(block, "engines.md", "exec"), shown)
    return shown


@pytest.mark.parametrize("name", ["Patient", "Quick"])
def test_policies_of_the_page_keep_every_promise(deciders: dict[str, Any], name: str) -> None:
    check_policy(deciders[name], cases=40)


@pytest.mark.parametrize("name", ["Patient", "Quick"])
@pytest.mark.parametrize("exact_steps", [False, True])
def test_in_a_pipeline_nobody_is_preempted_for_a_token_in_flight(
    deciders: dict[str, Any], name: str, exact_steps: bool
) -> None:
    case = Case(arrivals_ns=[at * 300_000 for at in range(60)], lengths=[(90, 40)] * 60, stages=2)
    run = case.run(exact_steps=exact_steps, policy=deciders[name](case.scheduler()))
    assert [request.job and request.job.preemptions for request in run.requests] == [0] * 60


def test_quick_takes_many_steps_at_once(deciders: dict[str, Any]) -> None:
    """Both promises are worth something: five requests that only decode pass in a few events."""
    case = Case(arrivals_ns=[0] * 5, lengths=[(20, 500)] * 5)
    composed = {name: ledgers_filled(case, deciders[name]) for name in ("Patient", "Quick")}
    assert composed["Quick"] * 20 < composed["Patient"]


def ledgers_filled(case: Case, policy: Any) -> int:
    """How many ledgers a policy fills in a case."""
    filled = Counter[str]()

    class Counting(policy):
        def fill(self, *what: Any) -> None:
            filled["ledgers"] += 1
            super().fill(*what)

    case.run(exact_steps=False, policy=Counting(case.scheduler()))
    return filled["ledgers"]


def test_every_shipped_policy_is_described() -> None:
    listed = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8").partition("## Policies")[2]
    named = re.findall(r"^\| `(\w+)` \|", listed.partition("### A policy")[0], re.MULTILINE)
    assert set(named) == set(POLICIES)


@pytest.mark.parametrize("cls", [BatchPolicy, Ledger, Job, View])
def test_what_policies_are_given_is_there(cls: type) -> None:
    """Names in the tables of docs/engines.md exist, and those of a policy are all there."""
    said = set(
        re.findall(r"`(\w+)(?:\([^`]*\))?`", ENGINES.partition("| of a policy")[2].partition("## What shapes")[0])
    )
    has = {name for name in (*dir(cls), *getattr(cls, "__slots__", ())) if not name.startswith("_")}
    wanted = {
        BatchPolicy: has,
        Ledger: {
            "tokens",
            "seats",
            "sequences",
            "blocks",
            "wants",
            "can_give",
            "give",
            "give_decodes",
            "can_admit",
            "admit",
            "fetch",
            "preempt",
            "together",
            "decodes",
            "chunks",
            "preempted",
        },
        Job: {"prompt_tokens", "output_tokens", "deadline_ns", "preemptions", "request"},
        View: has,
    }[cls]
    assert wanted <= has
    assert wanted <= said
