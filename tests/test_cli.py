"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import apexsim
from apexsim.cli import main as entry
from apexsim.cli.main import COMMANDS, main
from apexsim.cli.options import parse_engine_options
from apexsim.errors import BadInput, InfeasiblePlan
from apexsim.io.deployments import (
    DeploymentFile,
    deployment_from,
    load_deployment,
    read_deployment,
    resolve_deployment,
    write_deployment,
)
from apexsim.io.saved import load
from apexsim.specs.deployment import Deployment

BASE = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload"]
ROWS = "arrival_s,prompt_tokens,output_tokens\n0.0,100,5\n0.5,200,1\n1.0,300,20\n"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "three.csv"
    path.write_text(ROWS)
    return str(path)


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with 2, one line on stderr, nothing on stdout and no new file; gives the line."""

    def run(*args: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status = main(list(args))
        said = capsys.readouterr()
        assert (status, said.out) == (2, "")
        assert said.err.startswith("apexsim: ")
        assert said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n2,1,1\n1,1,1\n", ["arrival_s", "row 3", "sort"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n,1,1\n", ["arrival_s", "row 2", "got nothing"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,0,1\n", ["prompt_tokens", "row 2", "got 0"]),
        ("arrival_s,prompt_tokens\n0,1\n", ["output_tokens", "missing"]),
        ("arrival_s,prompt_tokens,output_tokens\n", ["no request"]),
        ("", ["is empty"]),
    ],
)
def test_bad_traces_are_told_by_row_and_column(
    tmp_path: Path, fails: Callable[..., str], rows: str, told: list[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(rows)
    line = fails(*BASE, str(path), "--json", str(tmp_path / "out.json"))
    for part in ["bad.csv", *told]:
        assert part in line


def test_an_unreadable_trace_is_told(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "none.parquet" in fails(*BASE, str(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("not parquet")
    assert "cannot be read" in fails(*BASE, str(tmp_path / "text.parquet"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "llama-3.1-80b"], ["unknown model", "llama-3.1-8b or llama-3.1-70b"]),
        (["--device", "h100-sxn"], ["unknown device", "h100-sxm"]),
        (["--engine", "vllm-v1-asinc"], ["unknown engine", "vllm-v1-async"]),
        (["--router", "round_robbin"], ["router", "round_robin"]),
        (["--weights", "fp9"], ["weights", "fp8"]),
        (["--tensor", "3"], ["tensor degree 3", "32 attention heads", "1, 2"]),
        (["--tensor", "0"], ["tensor", "got 0"]),
        (["--expert", "2", "--tensor", "2"], ["without experts"]),
        (["--nodes", "1", "--devices-per-node", "2", "--replicas", "4"], ["4 devices", "1 x 2"]),
        (["--rate-per-s", "-1"], ["--rate-per-s", "got -1.0", "above 0"]),
        (["--rate-per-s", "nan"], ["--rate-per-s"]),
        (["--concurrency", "0"], ["--concurrency", "at least 1"]),
        (["--requests", "0"], ["--requests"]),
        (["--seed", "-1"], ["--seed"]),
        (["--engine-option", "max_num_seq=4"], ["engine option", "max_num_seqs"]),
        (["--engine-option", "max_num_seqs=many"], ["max_num_seqs", "got 'many'"]),
        (["--engine-option", "max_num_seqs"], ["--engine-option", "key=value"]),
        (["--engine-option", "policy=chunked"], ["policy", "chunked_prefill"]),
        (["--engine-option", "policy=1"], ["policy", "got 1", "string"]),
        (["--engine-option", "policy=:"], ["policy", "got ':'", "module:Name"]),
        (["--engine-option", "policy=..a:b"], ["policy", "module:Name"]),
        (["--engine-option", "policy=json:JSONDecoder"], ["policy", "give a subclass of BatchPolicy"]),
        (["--engine-option", "step_s=nan"], ["engine_options.step_s: got nan; give a finite number"]),
        (["--engine-option", "response_s=1e10"], ["response_s", "60"]),
        (["--router", "no_such_module:Name"], ["router", "No module named"]),
        (["--router", "os:path"], ["router", "give a class with a method choose"]),
        (["--replicas", "10001"], ["replicas", "10000"]),
        (["--tensor", "1000000000000"], ["tensor", "got 1000000000000", "up to 10000 devices"]),
        (["--requests", "100000000000000000000"], ["--requests", "at most 10000000"]),
        (["--slo", "tfft_s=1"], ["--slo", "ttft_s"]),
        (["--slo", "ttft_s=fast"], ["--slo", "got 'fast'"]),
        (["--slo", ""], ["--slo", "at least one limit"]),
        (["--slo", "ttft_s=nan"], ["--slo", "ttft_s"]),
        (["--slo", "ttft_s=-1"], ["--slo", "ttft_s", "got -1.0"]),
        (["--json", "/no/such/folder/out.json"], ["--json", "folder does not exist"]),
        (["--json", "a" * 300], ["--json", "can be written"]),
        (["--json", "same", "--timeline", "./same"], ["--timeline", "is the file of --json too"]),
        (["--timeline", "/"], ["--timeline", "can be written"]),
        (["--requests-out", "rows.csv"], ["--requests-out", ".parquet"]),
        (["--plot", "figure.jpeg2"], ["--plot", ".png"]),
        (["--out", "/dev/null"], ["--out", "cannot be made a folder"]),
        (["--tensor", "two"], ["simulate", "--tensor", "valid integer"]),
        (["--tenser", "2"], ["simulate", "--tenser", "--tensor"]),
    ],
)
def test_bad_flags_are_told(trace: str, fails: Callable[..., str], flags: list[str], told: list[str]) -> None:
    line = fails(*BASE, trace, *flags)
    for part in told:
        assert part in line


def test_unknown_workloads_and_commands_name_the_nearest(fails: Callable[..., str]) -> None:
    assert "did you mean chat?" in fails(*BASE, "chatt")
    assert "did you mean simulate?" in fails("simulat")
    assert "did you mean" not in fails(*BASE, "")
    assert "--workload" in fails(*BASE[:-1])
    assert "--model" in fails("simulate", "--workload", "chat")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: llama-3.1-8b\ndevice: h100-sxm\ntensr: 2\n", ["bad.yaml", "tensr", "did you mean tensor"]),
        ("device: h100-sxm\n", ["model"]),
        ("model: llama-3.1-8b\nmodel: llama-3.1-8b\ndevice: h100-sxm\n", ["bad.yaml", "model", "line 2"]),
        ("model: llama-3.1-88b\ndevice: h100-sxm\n", ["bad.yaml", "model", "llama-3.1-8b"]),
        ("model: llama-3.1-8b\ndevice: h100-sxm\nengine_options: {blocksize: 8}\n", ["bad.yaml", "block_size"]),
        ("model: llama-3.1-8b\ndevice: h100-sxm\ntensor: 3\n", ["bad.yaml", "tensor degree 3"]),
        (
            "model: llama-3.1-8b\ndevice: h100-sxm\nengine_options: {step_s: [1]}\n",
            ["options.step_s: got [1]; give a num"],
        ),
        ("model: llama-3.1-8b\ndevice: h100-sxm\nengine_options: {policy: null}\n", ["bad.yaml", "policy", "got None"]),
        ("model: [", ["bad.yaml", "line"]),
    ],
)
def test_bad_deployment_files_are_told_by_file_and_key(
    tmp_path: Path, trace: str, fails: Callable[..., str], text: str, told: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = fails("simulate", str(path), "--workload", trace)
    for part in told:
        assert part in line


def test_a_missing_deployment_file_is_told(tmp_path: Path, trace: str, fails: Callable[..., str]) -> None:
    assert "none.yaml" in fails("simulate", str(tmp_path / "none.yaml"), "--workload", trace)


def test_show_list_and_import_refuse_what_they_do_not_know(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "did you mean gpt-oss-20b" in fails("show", "model", "gpt-oss-21b")
    assert "models" in fails("list", "modells")
    assert "--graph" in fails("show", "engine", "vllm-0.6", "--graph")
    assert "give the name of a device" in fails("show", "device")
    assert "--tensor" in fails("show", "model", "gpt-oss-20b", "--tensor", "2")
    assert "--device" in fails("show", "model", "gpt-oss-20b", "--graph", "--device", "h100-sxm")
    assert "only memory" in fails("show", "model", "gpt-oss-20b", "--json", "-")
    assert "--device" in fails("show", "memory", "--model", "gpt-oss-20b")
    assert "show: tensor: got 0" in fails("show", "model", "gpt-oss-20b", "--graph", "--tensor", "0")
    for text in ("{}", '{"a":' * 5000):
        (tmp_path / "config.json").write_text(text)
        out = str(tmp_path / "out.yaml")
        assert "config.json" in fails("import-model", str(tmp_path / "config.json"), "--out", out)
    assert "--device" in fails("fit")
    assert "--device" in fails("fit", "--device", "")
    assert "h100-sxm" in fails("fit", "--device", "h101-sxm", "--out", str(tmp_path / "out.yaml"))


# -- how a run ends ----------------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let ``apexsim list`` raise ``error``."""

    def broken() -> None:
        raise error

    monkeypatch.setattr("apexsim.cli.inspect.list_names", broken)
    monkeypatch.setattr(entry.app.info, "cls", type("Fresh", (entry.LazyGroup,), {}))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InfeasiblePlan(["weights need 9 GiB"]), 1, "apexsim: infeasible: weights need 9 GiB\n"),
        (BadInput("say more", where="file", key="key"), 2, "apexsim: file: key: say more\n"),
    ],
)
def test_exit_status_says_how_it_went(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    stand_in(monkeypatch, error)
    assert main(["list"]) == status
    assert capsys.readouterr() == ("", line)


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, KeyboardInterrupt())
    assert main(["list"]) == 130


def test_a_fault_of_ours_is_one_line_and_a_traceback_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, ZeroDivisionError("two\nlines"))
    monkeypatch.delenv("APEXSIM_TRACEBACK", raising=False)
    assert main(["list"]) == 3
    line = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: two lines; set APEXSIM_TRACEBACK=1" in line
    monkeypatch.setenv("APEXSIM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_help_is_there_for_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from apexsim.cli.main import main, COMMANDS; codes = [main([c, '--help']) for c in COMMANDS]; "
        "codes.append(main(['--help'])); heavy = {'torch', 'matplotlib', 'ray', 'scipy', 'pyarrow', 'simpy'}; "
        "print(codes, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == f"{[0] * (len(COMMANDS) + 1)} []"
    for command in COMMANDS:
        assert f"apexsim {command}" in done.stdout


def test_a_reader_that_leaves_early_is_no_fault() -> None:
    for command in (["list", "models"], ["show", "model", "llama-3.1-8b"], ["--help"]):
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-m", "apexsim.cli.main", *command], stdout=pipe, stderr=pipe) as done:
            assert done.stdout is not None
            assert done.stderr is not None
            done.stdout.close()
            assert (done.wait(), done.stderr.read()) == (0, b"")


def test_classes_of_the_user_are_found_in_the_working_directory(tmp_path: Path, trace: str) -> None:
    (tmp_path / "mine.py").write_text("class Last:\n    def choose(self, job, views):\n        return len(views) - 1\n")
    run = "from apexsim.cli.main import run; run()"
    command = [*BASE, trace, "--router", "mine:Last", "--replicas", "3", "--requests-out", "rows.parquet"]
    # As the console script: what is not on the path unasked is the working directory.
    done = subprocess.run(
        [sys.executable, "-P", "-c", run, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(pd.read_parquet(tmp_path / "rows.parquet")["replica"]) == {2}


# -- deployment files --------------------------------------------------------------------------------------------------


def test_a_deployment_file_survives_writing_and_reading(tmp_path: Path) -> None:
    file = DeploymentFile(
        model="mixtral-8x7b", device="h100-sxm", tensor=2, expert=2, engine_options={"max_num_seqs": 64}, kv_cache="fp8"
    )
    write_deployment(tmp_path / "best.yaml", file)
    assert read_deployment(tmp_path / "best.yaml") == file
    deployment = load_deployment(tmp_path / "best.yaml")
    assert deployment.engine.scheduler.max_num_seqs == 64
    assert (deployment.pools[0].plan.name, deployment.kv_cache) == ("tp2-pp1-ep2", "fp8")


@pytest.mark.parametrize(
    ("cluster", "devices"),
    [({}, (1, 6)), ({"replicas": 6}, (2, 8)), ({"devices_per_node": 4}, (2, 4)), ({"nodes": 2}, (2, 8))],
)
def test_the_cluster_holds_the_replicas_in_whole_nodes(cluster: dict[str, int], devices: tuple[int, int]) -> None:
    file = DeploymentFile(model="llama-3.1-8b", device="h100-sxm", tensor=2, **{"replicas": 3, **cluster})
    found = resolve_deployment(file, "test").cluster
    assert (found.nodes, found.devices_per_node) == devices


@pytest.mark.parametrize(
    ("choices", "billed"),
    [
        ({"replicas": 4}, 8),
        ({"replicas": 5}, 10),
        ({"replicas": 4, "bill": "node"}, 8),
        ({"replicas": 5, "bill": "node"}, 16),
        ({"replicas": 1, "bill": "node"}, 8),
        ({"replicas": 1, "bill": "node", "devices_per_node": 4}, 4),
        ({"replicas": 1, "bill": "node", "nodes": 3}, 8),
        ({"replicas": 1, "bill": "fleet", "nodes": 3}, 24),
        ({"replicas": 1, "bill": "fleet", "devices_per_node": 4}, 4),
    ],
)
def test_what_is_billed_does_not_jump_with_the_nodes(choices: dict[str, Any], billed: int) -> None:
    found = deployment_from(None, {"model": "llama-3.1-8b", "device": "h100-sxm", "tensor": 2, **choices})
    assert found.billed_devices == billed


def test_the_bill_is_a_flag_and_a_key(tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("model: llama-3.1-8b\ndevice: h100-sxm\ntensor: 2\nbill: node\n")
    assert main(["simulate", str(tmp_path / "plan.yaml"), "--workload", trace]) == 0
    said = capsys.readouterr().out
    assert "24 USD/hour for 8 billed devices" in said
    assert "6 of 8 devices stand idle; their power and price count (bill: node)" in " ".join(said.split())
    assert main([*BASE, trace, "--bill", "used"]) == 0
    assert "3 USD/hour for 1 billed device" in capsys.readouterr().out
    assert main([*BASE, trace, "--bill", "fleet"]) == 2
    assert "bill: got 'fleet'; give nodes and devices_per_node" in capsys.readouterr().err
    assert main([*BASE, trace, "--bill", "node-wise"]) == 2
    assert "bill: got 'node-wise'" in capsys.readouterr().err


def shown_lines(said: str) -> dict[str, str]:
    """Lines of the table of figures by their name, folded ones joined."""
    lines: dict[str, str] = {}
    for line in said.splitlines():
        name, _, rest = line.partition("  ")
        if name and line[:1].isalpha():
            last = name
            lines[name] = rest.strip()
        elif lines:
            lines[last] += f" {line.strip()}"
    return lines


def test_the_screen_shows_steady_figures_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--rate-per-s", "8"]
    assert main([*chats, "--requests", "400", "--json", str(tmp_path / "short.json")]) == 0
    lines = shown_lines(capsys.readouterr().out)
    summary = json.loads((tmp_path / "short.json").read_text())
    steady, energy = summary["steady"], summary["energy"]
    assert steady["kind"] == "short"
    assert lines["steady"].startswith("short:")
    assert f"about {steady['wanted_requests']:,} requests would do" in lines["steady"]
    assert max(steady["half_width"].values()) < 0.3
    assert lines["cost"].startswith(f"{steady['usd_per_million_output_tokens']:.3g} +- ")
    assert "USD/million output tokens (whole run " in lines["cost"]
    device, server = (
        energy[key]["per_output_token_j"] if key else energy["per_output_token_j"] for key in ("", "server")
    )
    head, whole = lines["energy"].split("; whole run: ")
    assert head.startswith(f"{steady['energy_per_output_token_j']:.3g} +- ")
    assert whole.startswith(f"{device:.3g} J/output token, with servers {server:.3g}, building ")


def test_a_figure_too_wide_to_mean_anything_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--rate-per-s", "8"]
    assert main([*chats[:-1], "4", "--requests", "10", "--json", str(tmp_path / "short.json")]) == 0
    lines = shown_lines(capsys.readouterr().out)
    summary = json.loads((tmp_path / "short.json").read_text())
    assert min(summary["steady"]["half_width"].values()) > 0.3
    cost, energy = summary["cost"], summary["energy"]
    alone = "(whole run; too short for a steady figure)"
    whole = cost["usd_per_million_output_tokens"]
    assert lines["cost"].startswith(f"{whole:.3g} USD/million output tokens {alone} at ")
    assert lines["energy"].startswith(f"{energy['per_output_token_j']:.3g} J/output token, with servers ")
    assert lines["energy"].endswith(f" W on average {alone}")
    assert "+-" not in lines["cost"] + lines["energy"]


def test_figures_of_a_burst_are_of_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    chats = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat"]
    assert main([*chats, "--requests", "9", "--concurrency", "9"]) == 0
    lines = shown_lines(capsys.readouterr().out)
    assert lines["steady"].startswith("all at once: all requests come at once: the figures are of the whole run")
    assert lines["energy"].endswith(" W on average (whole run)")


@pytest.mark.parametrize(
    ("twice", "said"),
    [
        (["max_num_seqs=1", "max_num_seqs=64"], "--engine-option: got 'max_num_seqs=64'; give it once"),
        (["max_num_seqs=1", "max-num-seqs=64"], "deployment: engine_options: max_num_seqs is given twice"),
        (
            ["max_running_requests=8", "max_num_seqs=9"],
            "deployment: engine_options: max_num_seqs is given twice",
        ),
    ],
)
def test_an_engine_option_is_given_once(twice: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for option in twice for word in ("--engine-option", option)]
    assert main(["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", *flags]) == 2
    assert capsys.readouterr().err == f"apexsim: {said}\n"


def test_engine_options_reach_the_profile_and_hold_for_long_contexts() -> None:
    options = parse_engine_options(["gpu-memory-utilization=0.97", "custom_all_reduce=false", "chunked_prefill=false"])
    assert options == {"gpu-memory-utilization": 0.97, "custom_all_reduce": False, "chunked_prefill": False}
    file = DeploymentFile(model="llama-3.1-8b", device="h100-sxm", engine="vllm-0.6", engine_options=options)
    deployment = resolve_deployment(file, "test")
    assert deployment.engine.memory.gpu_memory_utilization == 0.97
    assert not deployment.engine.communication.custom_all_reduce
    assert deployment.colocated_server().context_limit > 32768
    assert not deployment.colocated_server().scheduler.chunked_prefill


def test_load_takes_deployments_and_results(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("model: llama-3.1-8b\ndevice: h100-sxm\n")
    assert isinstance(load(tmp_path / "plan.yaml"), Deployment)
    for wrong in (tmp_path, tmp_path / "plan.txt"):
        with pytest.raises(BadInput, match=r"SimulationResult|deployment YAML"):
            load(wrong)


def test_models_beside_a_deployment_file_are_found(tmp_path: Path) -> None:
    assert main(["show", "model", "llama-3.1-8b"]) == 0
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "plan.yaml").write_text("model: mine.yaml\ndevice: h100-sxm\n")
    assert read_deployment(tmp_path / "plan.yaml").model == str(tmp_path / "mine.yaml")


# -- listing and showing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("models", "llama-3.1-70b"),
        ("devices", "h100-sxm"),
        ("engines", "vllm-v1-async"),
        ("workloads", "chat"),
        ("policies", "chunked_prefill"),
    ],
)
def test_list_names_what_there_is(capsys: pytest.CaptureFixture[str], what: str, name: str) -> None:
    assert main(["list", what]) == 0
    assert name in capsys.readouterr().out


def test_show_model_graph_has_collectives_only_under_tensor_parallelism(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "model", "gpt-oss-20b", "--graph"]) == 0
    alone = capsys.readouterr().out
    assert "12 layers: window of 128, experts" in alone
    assert "12 layers: full attention, experts" in alone
    assert "all_reduce" not in alone
    assert main(["show", "model", "gpt-oss-20b", "--graph", "--tensor", "2"]) == 0
    assert "all_reduce" in capsys.readouterr().out


def test_show_device_tells_fit_quality(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "device", "h100-sxm"]) == 0
    said = capsys.readouterr().out
    assert "Fit quality" in said
    gemm = [line for line in said.splitlines() if line.startswith("gemm ")]
    assert any("bf16" in line and "fitted" in line for line in gemm)
    assert any("bf16" in line and "served_shapes" in line and "%" in line for line in gemm)


def test_lists_fit_a_screen_and_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == "USD/hour"
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert main(["list", "policies"]) == 0
    said = capsys.readouterr().out
    assert "`" not in said
    assert "if the scheduler knows_output." in said


def test_only_a_model_with_experts_says_their_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for model in ("llama-3.1-8b", "gpt-oss-20b"):
        assert main(["show", "model", model]) == 0
        said[model] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights, ")]
    assert [line.split("  ")[0] for line in said["llama-3.1-8b"]] == ["weights, bf16"]
    assert [line.split("  ")[0] for line in said["gpt-oss-20b"]] == ["weights, bf16 (experts mxfp4)"]


def test_show_memory_needs_no_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "qwen3-32b", "--device", "h100-sxm", "--engine", "vllm@0.7.3"]
    assert main(["show", "memory", *flags]) == 0
    said = capsys.readouterr().out
    assert "KV tokens" in said
    assert "note: max_model_len" in said
    assert main(["show", "memory", *flags, "--json", "-"]) == 0
    written = capsys.readouterr()
    found = json.loads(written.out)
    assert found["memory"]["max_model_len"] == found["memory"]["kv_tokens"]
    assert found["notes"][0].startswith("max_model_len")
    assert "KV tokens" in written.err
    file = tmp_path / "one.yaml"
    file.write_text("model: qwen3-32b\ndevice: h100-sxm\ntensor: 2\n")
    assert main(["show", "memory", str(file)]) == 0
    assert "tp2-pp1" in capsys.readouterr().out
    assert main(["show", "memory", "--model", "llama-3.1-70b", "--device", "h100-sxm"]) == 1
    assert "starts with tensor degree 2" in capsys.readouterr().err


def test_simulate_tells_the_memory_of_a_replica(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", trace]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
    assert "15 GiB of weights a replica" in line


def test_import_model_writes_a_spec_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, out = str(tmp_path / "config.json"), str(tmp_path / "tiny.yaml")
    assert main(["import-model", source, "--out", out, "--name", "tiny"]) == 0
    assert main(["import-model", source, "--name", "tiny"]) == 0
    assert capsys.readouterr().out == Path(out).read_text()
    assert main(["show", "model", out]) == 0


# -- simulate ----------------------------------------------------------------------------------------------------------


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apexsim.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def without_timing(text: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(text)
    assert summary.pop("timing")["wall_s"] > 0
    return summary


def test_simulate_prints_one_json_object_and_the_same_again(trace: str) -> None:
    flags = [*BASE, trace, "--slo", "ttft_s=0.5,tpot_s=0.05", "--json", "-"]
    first, second = run(*flags), run(*flags, "--exact-steps", PYTHONHASHSEED="7")
    assert (first.returncode, second.returncode) == (0, 0)
    summary = without_timing(first.stdout)
    assert summary["requests"] == {"total": 3, "finished": 3, "rejected": 0, "unfinished": 0}
    assert summary["slo"]["attainment"] == 1.0
    assert summary["energy"]["total_j"] > 0
    assert sum(sum(shares.values()) for shares in summary["provenance"].values()) == pytest.approx(1)
    assert "TTFT" in first.stderr
    assert without_timing(run(*flags).stdout) == summary
    exact = without_timing(second.stdout)
    for key in ("requests", "duration_s", "ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s", "slo"):
        assert exact[key] == summary[key]


def test_simulate_writes_what_it_is_asked_for(tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "--json": "s.json",
        "--requests-out": "r.parquet",
        "--timeline": "t.json",
        "--plot": "p.png",
        "--out": "all",
    }
    flags = [part for flag, name in names.items() for part in (flag, str(tmp_path / name))]
    assert main([*BASE, trace, "--replicas", "2", "--slo", "ttft_s=0.5", *flags]) == 0
    assert "requests/s" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names.values(), "three.csv"])
    rows = pd.read_parquet(tmp_path / "r.parquet")
    assert list(rows["output_tokens"]) == [5, 1, 20]
    assert (rows["ttft_s"] > 0).all()
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    bars = [event for event in events if event["ph"] == "X"]
    assert (
        sum(event["args"]["chunk_tokens"] + event["args"]["decodes"] * event["args"]["repeats"] for event in bars)
        >= 623
    )
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    result = apexsim.load(tmp_path / "all")
    assert result.requests.equals(rows)
    assert without_timing(json.dumps(result.summary())) == without_timing((tmp_path / "s.json").read_text())


@pytest.mark.parametrize("name", ["result.json", "gaps.parquet", "best.yaml", "sweep.parquet", "journal.jsonl"])
def test_a_folder_with_results_is_not_written_over(
    tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / name).write_text("mine")
    assert main([*BASE, trace, "--out", str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"--out: got '{name}'; {folder} holds results; give another --out")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]


def test_flags_outweigh_the_deployment_file(tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("model: llama-3.1-70b\ndevice: h100-sxm\ntensor: 4\nreplicas: 2\n")
    hourly = []
    for flags in ([], ["--replicas", "1"]):
        assert main(["simulate", str(tmp_path / "plan.yaml"), "--workload", trace, *flags, "--json", "-"]) == 0
        hourly.append(json.loads(capsys.readouterr().out)["cost"]["usd_per_hour"])
    assert hourly[0] == pytest.approx(2 * hourly[1])


def test_a_prompt_beyond_the_context_is_a_rejected_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,color,turn\n0,200000,5,red,0\n1,100,5,blue,1\n"
    )
    out = tmp_path / "r.parquet"
    assert main([*BASE, str(tmp_path / "long.csv"), "--requests-out", str(out), "--json", "-"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["requests"] == {"total": 2, "finished": 1, "rejected": 1, "unfinished": 0}
    assert any("not used: color" in note for note in summary["notes"])
    assert any("without effect here: turn" in note for note in summary["notes"])
    rows = pd.read_parquet(out)
    assert list(rows["status"]) == ["rejected", "finished"]
    assert "context" in rows["reason"][0]


def test_a_model_that_does_not_fit_ends_with_1_and_says_which_bytes(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "llama-3.1-405b", "--device", "h100-sxm", "--workload", trace]
    assert main(["simulate", *flags, "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("apexsim: infeasible: ")
    assert "weights" in said.err
    assert not (tmp_path / "out.json").exists()
