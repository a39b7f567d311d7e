"""Code that a file names is imported only where its reader says so; what they name themselves always is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apexsim.cli.main import main
from apexsim.errors import BadInput
from apexsim.io.saved import load
from apexsim.io.yaml_files import read_yaml, write_yaml
from apexsim.planning import deployment, search
from apexsim.serving.policies import ChunkedPrefill
from apexsim.serving.routing import LeastLoaded
from apexsim.specs.engine import SchedulerDefaults
from apexsim.sweep import sweep
from apexsim.testing import check_policy
from apexsim.validation.runs import read_runs

ENGINES = Path(__file__).resolve().parents[1] / "engine_profiles"
BASE = "model: llama-3.1-8b\ndevice: h100-sxm\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a router and a policy that leaves a file behind when it is imported."""
    code = f"""
from pathlib import Path
from apexsim.serving.policies import POLICIES
from apexsim.serving.routing import LeastLoaded
Path({str(tmp_path / "imported")!r}).touch()
class Mine(LeastLoaded): pass
Policy = POLICIES["chunked_prefill"]
"""
    (tmp_path / "my_plugin_for_tests.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_plugin_for_tests", raising=False)
    return "my_plugin_for_tests"


@pytest.fixture
def engine(tmp_path: Path, module: str) -> Path:
    """An engine profile whose policy is the module's."""
    data = read_yaml(ENGINES / "vllm-v1-async.yaml")
    data["scheduler"]["policy"] = f"{module}:Policy"
    write_yaml(tmp_path / "engine.yaml", data)
    return tmp_path / "engine.yaml"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line is refused, nothing being imported."""
    assert main(args) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "--allow-plugins" in line
    assert not (tmp_path / "imported").exists()
    return line


@pytest.mark.parametrize(
    "key", ["router: {}:Mine", "engine_options: {{policy: '{}:Policy'}}"], ids=["router", "policy"]
)
def test_a_deployment_file(tmp_path: Path, module: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "d.yaml", BASE + key.format(module))
    line = refused(tmp_path, ["simulate", str(file), "--workload", "chat"], capsys)
    assert str(file) in line
    assert module in line
    assert key.split(":", 1)[0] in line
    with pytest.raises(BadInput, match="allow_plugins=True"):
        load(file)
    with pytest.raises(BadInput, match="allow_plugins=True"):
        deployment(file)
    assert not (tmp_path / "imported").exists()
    assert main(["simulate", str(file), "--workload", "chat", "--requests", "2", "--allow-plugins"]) == 0
    assert (tmp_path / "imported").exists()


def test_a_key_that_the_reader_outweighs_does_not_count(tmp_path: Path, module: str) -> None:
    file = written(tmp_path / "d.yaml", f"{BASE}router: {module}:Mine\n")
    assert deployment(file, router="least_loaded").router == "least_loaded"
    assert not (tmp_path / "imported").exists()


def test_flags_and_python_need_no_leave(tmp_path: Path, module: str) -> None:
    assert deployment(model="llama-3.1-8b", device="h100-sxm", router=f"{module}:Mine").router == f"{module}:Mine"
    flags = ["--router", f"{module}:Mine", "--engine-option", f"policy={module}:Policy"]
    run = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--requests", "2"]
    assert main([*run, *flags]) == 0


def test_an_engine_file(tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--requests", "2"]
    assert "scheduler.policy" in refused(tmp_path, [*run, "--engine", str(engine)], capsys)
    rows = "run_id,engine,model,device,workload\n1,engine.yaml,llama-3.1-8b,h100-sxm,closed_loop\n"
    runs = written(tmp_path / "runs.csv", rows)
    with pytest.raises(BadInput):
        read_runs(runs)
    out = str(tmp_path / "out.yaml")
    refused(tmp_path, ["calibrate", str(runs), "--engine", str(engine), "--out", out], capsys)


def test_measured_runs_that_name_such_an_engine(
    tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "run_id,engine,model,device,workload,prompt_tokens,output_tokens,concurrency,num_requests"
    runs = written(tmp_path / "runs.csv", f"{header}\n1,{engine},llama-3.1-8b,h100-sxm,closed_loop,10,3,2,4\n")
    refused(tmp_path, ["validate", str(runs)], capsys)
    assert len(read_runs(runs, allow_plugins=True)) == 1


def test_sweeps(tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = "base: {model: llama-3.1-8b, device: h100-sxm, workload: chat, requests: 2}\n"
    file = written(tmp_path / "s.yaml", f"{base}grid: {{router: [round_robin, '{module}:Mine']}}\n")
    assert str(file) in refused(tmp_path, ["sweep", str(file), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()
    table = sweep(file, out=tmp_path / "out", jobs=1, allow_plugins=True)
    assert list(table["verdict"]) == ["ok", "ok"]


def test_a_search_says_so_in_its_best_plan(tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "model: llama-3.1-8b\ndevices: 1xh100-sxm\nworkload: chat\nrequests: 2\n"
    file = written(tmp_path / "s.yaml", f"{asked}router: {module}:Mine\n")
    refused(tmp_path, ["search", str(file)], capsys)
    search(file, out=tmp_path / "out", jobs=1, allow_plugins=True)
    best = tmp_path / "out" / "best.yaml"
    first = best.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert f"router {module}:Mine" in first
    assert "--allow-plugins" in first
    with pytest.raises(BadInput, match="--allow-plugins"):
        load(best)
    search(file, out=tmp_path / "plain", jobs=1, router="round_robin")
    assert not (tmp_path / "plain" / "best.yaml").read_text().startswith("#")


def fault_of(policy: object, key: str = "policy") -> str:
    choices: dict[str, object] = {"engine_options": {"policy": policy}} if key == "policy" else {"router": policy}
    with pytest.raises(BadInput) as caught:
        deployment(model="llama-3.1-8b", device="h100-sxm", **choices)
    return str(caught.value)


def test_a_module_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    elsewhere = "looked for in PYTHONPATH and installed packages, not in the current folder"
    said = f"deployment: policy: got 'no_policy:Mine'; cannot be imported (No module named 'no_policy'); {elsewhere}"
    assert fault_of("no_policy:Mine") == said
    monkeypatch.syspath_prepend(tmp_path)
    assert fault_of("no_policy:Mine").endswith("looked for in the current folder, PYTHONPATH and installed packages")


def test_a_module_that_fails_says_how_and_a_name_that_it_lacks_which_it_has(tmp_path: Path, module: str) -> None:
    assert fault_of(f"{module}:Polity").endswith(f"{module} has no Polity; known: Mine")
    assert fault_of(f"{module}:Policy.Inner").endswith("give module:Name")
    (tmp_path / "my_broken_plugin.py").write_text("1 / 0\n")
    assert fault_of("my_broken_plugin:Mine").endswith("cannot be imported (ZeroDivisionError: division by zero)")
    (tmp_path / "my_needy_plugin.py").write_text("import no_such_dependency\n")
    needy = fault_of("my_needy_plugin:Mine")
    assert needy.endswith("cannot be imported (No module named 'no_such_dependency')")


@pytest.mark.parametrize("key", ["policy", "router"])
def test_a_class_in_place_of_its_name_is_told_its_name(key: str) -> None:
    for given in (LeastLoaded, LeastLoaded()):
        assert "give 'module:Name', here 'apexsim.serving.routing:LeastLoaded'" in fault_of(given, key)


def test_a_key_of_a_section_at_the_top_of_an_engine_is_told_its_section(tmp_path: Path) -> None:
    data = read_yaml(ENGINES / "vllm-v1-async.yaml")
    write_yaml(tmp_path / "engine.yaml", {**data, "policy": "deadline"})
    with pytest.raises(BadInput, match=r"policy: unknown key; did you mean scheduler\.policy\?"):
        deployment(model="llama-3.1-8b", device="h100-sxm", engine=str(tmp_path / "engine.yaml"))


class Demanding(ChunkedPrefill):
    def __init__(self, scheduler: SchedulerDefaults, more: int) -> None:
        super().__init__(scheduler)


def test_a_policy_that_cannot_be_made_fails_without_a_case() -> None:
    with pytest.raises(BadInput, match="No module named") as caught:
        check_policy("no_such_module:Mine")
    assert "smallest case" not in str(caught.value)
    with pytest.raises(BadInput, match="its constructor takes the scheduler's settings"):
        check_policy(f"{__name__}:Demanding")
    with pytest.raises(TypeError, match="more"):
        check_policy(Demanding)  # type: ignore[arg-type]
