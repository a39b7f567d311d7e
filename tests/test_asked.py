"""What requests are besides their lengths: how tokens are chosen (top-p, greedy) and what prompts are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apexsim import catalog
from apexsim.calibration import calibrate, drawn_groups
from apexsim.cli.main import main
from apexsim.costs.experts import routed_part
from apexsim.costs.lowering import lower
from apexsim.costs.operators import Experts, Sampling
from apexsim.costs.steps import BatchStats, build_step_cost
from apexsim.errors import BadInput
from apexsim.io.deployments import deployment_from, read_deployment, write_deployment
from apexsim.io.engines import with_engine_options
from apexsim.io.search_files import SearchFile, resolve_search
from apexsim.serving.simulator import simulate
from apexsim.specs.deployment import Deployment
from apexsim.specs.workload import Requests
from apexsim.validation.asked import prompts_of, sampling_of
from apexsim.validation.cases import case_of
from apexsim.validation.replay import replay
from apexsim.validation.runs import MeasuredRun, RunRow

VOCAB, PASSES = 128_256, 200.0
CHOICES = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "vllm-v1-sync"}
FULL: dict[str, Any] = {
    "run_id": "full", "engine": "vllm", "engine_version": "0.11.1", "model": "llama-3.1-8b", "device": "h100-sxm",
    "tensor": 1, "gpus": 1, "workload": "saturated", "max_num_seqs": 64, "output_tokens": 60.0,
    "task": "lm-arena-chat", "flags": "--async-scheduling true",
}  # fmt: skip


def deployed(sampling: str, passes: float = PASSES, **choices: Any) -> Deployment:
    options = {"top_p_passes": passes}
    return deployment_from(None, {**CHOICES, "engine_options": options, "sampling": sampling, **choices})


def step_ns(deployment: Deployment, decodes: int) -> int:
    cost = build_step_cost(deployment.colocated_server())
    return sum(cost.stage_ns(BatchStats(decodes, 1000 * decodes, survivors=decodes)))


def run_of(**changes: Any) -> MeasuredRun:
    cells = {**FULL, **changes}
    return MeasuredRun(Path("made_up/runs.csv"), "made_up", 1, RunRow.model_validate(cells), {})


# -- the operator --------------------------------------------------------------------------------------------------


def test_a_step_pays_passes_over_every_logit_at_the_peak_of_memory() -> None:
    device = catalog.load("device", "h100-sxm").datasheet
    for batch in (1, 64, 512):
        extra_ns = step_ns(deployed("top_p"), batch) - step_ns(deployed("greedy"), batch)
        assert extra_ns == pytest.approx(1e9 * 4 * VOCAB * batch * PASSES / device.memory_bytes_per_s, abs=2)


def test_greedy_is_the_default_and_pays_nothing_whatever_the_engine_would_take() -> None:
    plain = deployment_from(None, CHOICES)
    assert plain.sampling == "greedy"
    assert step_ns(deployed("greedy", 0.0), 64) == step_ns(deployed("greedy", 900.0), 64)
    assert step_ns(deployed("top_p", 0.0), 64) == step_ns(deployed("greedy", 0.0), 64)


def test_a_sort_moves_fewer_passes_than_it_takes() -> None:
    """Time is passes at the peak; bytes are those of a radix sort and what surrounds it, at most."""
    for passes, moved in ((222.0, 41), (10.0, 11), (0.0, 1)):
        assert Sampling("sampling", VOCAB, passes).bytes_moved(np.ones(1)) == moved * 4 * VOCAB


def test_tensor_parallelism_does_not_split_the_search() -> None:
    for tensor in (1, 4):
        deployment = deployed("top_p", tensor=tensor)
        head = lower(deployment.colocated_server()).stages[-1].head
        (sampling,) = [operator for operator in head if isinstance(operator, Sampling)]
        assert (sampling.vocab, sampling.passes) == (VOCAB, PASSES)


def test_the_search_scales_with_the_memory_of_the_device() -> None:
    found = {}
    for device in ("h100-sxm", "b200-sxm"):
        extra_ns = step_ns(deployed("top_p", device=device), 256) - step_ns(deployed("greedy", device=device), 256)
        found[device] = extra_ns * catalog.load("device", device).datasheet.memory_bytes_per_s
    assert found["h100-sxm"] == pytest.approx(found["b200-sxm"], rel=1e-3)


def test_time_and_energy_of_the_search_are_those_of_sampling_and_estimated() -> None:
    requests = Requests(name="few", prompt_tokens=np.full(64, 100), output_tokens=np.full(64, 50), concurrency=64)
    greedy, searched = (simulate(deployed(sampling), requests).usage for sampling in ("greedy", "top_p"))
    assert searched.seconds["sampling"]["estimated"] > 10 * greedy.seconds["sampling"]["estimated"]
    assert searched.energy_j["sampling"] > 10 * greedy.energy_j["sampling"]
    assert searched.bytes_moved > greedy.bytes_moved


# -- ways to ask for it --------------------------------------------------------------------------------------------


def test_files_flags_and_searches_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text("model: llama-3.1-8b\ndevice: h100-sxm\nengine: vllm-v1-sync\nsampling: top_p\n")
    file = read_deployment(path)
    write_deployment(tmp_path / "again.yaml", file)
    assert read_deployment(tmp_path / "again.yaml") == file
    search = SearchFile(model="llama-3.1-8b", devices="2xh100-sxm", workload="chat", sampling="top_p", requests=4)
    assert resolve_search(search, "search").space.base.sampling == "top_p"
    with pytest.raises(BadInput, match="sampling"):
        deployment_from(path, {"sampling": "beam"})
    assert main(["simulate", str(path), "--workload", "chat", "--requests", "4", "--sampling", "beam"]) == 2
    assert "sampling" in capsys.readouterr().err


def test_a_flag_makes_a_run_slower(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--engine", "vllm-v1-sync"]
    common += ["--workload", "chat", "--requests", "32", "--concurrency", "32", "--json", "-"]
    shown = []
    for sampling in ("greedy", "top_p"):
        assert main([*common, "--sampling", sampling]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]


# -- measured runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "top_p"),
        ({"model": "qwen3-32b", "task": "gpqa"}, "top_p"),
        ({"model": "gpt-oss-120b"}, "top_p"),
        ({"task": ""}, "greedy"),
        ({"workload": "closed_loop", "concurrency": 8, "prompt_tokens": 100}, "greedy"),
    ],
)
def test_requests_of_a_task_sample_as_their_client_asks(changes: dict[str, Any], expected: str) -> None:
    row = run_of(**changes).row
    assert sampling_of(row) == expected
    case = case_of(row)
    assert case.deployment.sampling == expected
    assert any("the client of its benchmark asks" in note for note in case.notes) == (expected == "top_p")


def test_an_engine_whose_search_costs_nothing_known_says_so() -> None:
    requests = Requests(name="few", prompt_tokens=np.full(2, 10), output_tokens=np.full(2, 3), concurrency=2)
    for passes, sampling, said in ((0.0, "top_p", True), (200.0, "top_p", False), (0.0, "greedy", False)):
        notes = simulate(deployed(sampling, passes), requests).summary()["notes"]
        assert any("no top_p_passes" in note for note in notes) == said


# -- what prompts are made of --------------------------------------------------------------------------------------


def test_random_tokens_touch_fewer_experts_and_dense_models_do_not_care() -> None:
    for device in ("h100-sxm", "b200-sxm"):
        for batch in (4, 16, 64):
            text, random = (
                step_ns(deployed("greedy", model="qwen3-30b-a3b", device=device, prompts=prompts), batch)
                for prompts in ("text", "random_tokens")
            )
            assert random < text
    assert step_ns(deployed("greedy", prompts="random_tokens"), 64) == step_ns(deployed("greedy", prompts="text"), 64)


def test_prompts_pick_the_exponent_of_the_model() -> None:
    for model, expected in (
        ("qwen3-30b-a3b", {"text": 0.5, "random_tokens": 1.0}),
        ("deepseek-v3", {"text": 0.5, "random_tokens": 0.75}),
    ):
        for prompts, exponent in expected.items():
            deployment = deployed("greedy", model=model, prompts=prompts, tensor=8, expert=8)
            (experts,) = [
                op
                for op in routed_part(deployment.colocated_server(), deployment.model.layer_kinds[-1])
                if isinstance(op, Experts)
            ]
            assert experts.layer.routing_exponent == exponent


def test_prompts_are_said_in_files_searches_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deployment_from(None, CHOICES).prompts == "text"
    path = tmp_path / "deployment.yaml"
    path.write_text("model: qwen3-30b-a3b\ndevice: h100-sxm\nprompts: random_tokens\n")
    file = read_deployment(path)
    write_deployment(tmp_path / "again.yaml", file)
    assert read_deployment(tmp_path / "again.yaml") == file
    search = SearchFile(
        model="qwen3-30b-a3b", devices="2xh100-sxm", workload="chat", prompts="random_tokens", requests=4
    )
    assert resolve_search(search, "search").space.base.prompts == "random_tokens"
    shown = []
    for prompts in ("text", "random_tokens"):
        asked = ["simulate", str(path), "--workload", "chat", "--requests", "8", "--json", "-", "--prompts", prompts]
        assert main(asked) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]
    assert main(["simulate", str(path), "--workload", "chat", "--requests", "4", "--prompts", "noise"]) == 2
    assert "prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "text"),
        ({"workload": "trace", "requests_file": "requests.csv"}, "text"),
        ({"workload": "closed_loop", "concurrency": 8, "requests_file": "requests.csv"}, "text"),
        ({"workload": "closed_loop", "concurrency": 8, "prompt_tokens": 100}, "random_tokens"),
    ],
)
def test_prompts_of_a_closed_loop_of_nominal_lengths_are_random(changes: dict[str, Any], expected: str) -> None:
    row = run_of(model="qwen3-30b-a3b", **changes).row
    assert prompts_of(row) == expected
    case = case_of(row)
    assert case.deployment.prompts == expected
    assert f"prompts not known: {expected}" in case.notes
    assert not any("prompts" in note for note in case_of(run_of(**changes).row).notes)


def test_a_row_may_say_what_its_requests_were() -> None:
    loop = {"model": "qwen3-30b-a3b", "workload": "closed_loop", "concurrency": 8, "prompt_tokens": 100}
    case = case_of(run_of(**loop, prompts="text", sampling="top_p").row)
    assert (case.deployment.prompts, case.deployment.sampling) == ("text", "top_p")
    assert not any("prompts" in note or "sampling" in note for note in case.notes)


# -- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_finds_passes_that_full_servers_were_made_with() -> None:
    """Rows of a server with 400 passes and 1 ms exposed a step, made up by the simulator itself."""
    truth = {"top_p_passes": 400.0, "exposed_step_s": 1e-3}
    runs = []
    for model in ("llama-3.1-8b", "qwen3-32b"):
        for seats in (8, 64):
            run = run_of(model=model, max_num_seqs=seats, tensor=2, gpus=2, run_id=f"{model}-{seats}")
            figures = replay(run, engine_options=truth).figures
            measured = {"mean_batch": figures["mean_batch"], "output_tokens_per_s": figures["output_tokens_per_s"]}
            runs.append(run_of(**{**run.row.model_dump(exclude_none=True), **measured}))
    profile = with_engine_options(catalog.load("engine", "vllm-v1-sync"), {"top_p_passes": 100.0}, "test")
    groups = drawn_groups(runs, profile, most=20, seed=0)
    fitted = calibrate(profile, groups, terms=list(truth), jobs=1)
    assert fitted.sampler.top_p_passes == pytest.approx(400, rel=0.08)
    assert fitted.host.exposed_step_s == pytest.approx(1e-3, rel=0.15)
    assert fitted.host.step_s == profile.host.step_s
    report = fitted.calibration
    assert report is not None
    assert report.terms["top_p_passes"].value == fitted.sampler.top_p_passes
    assert set(report.left_out) == {"llama-3.1-8b on h100-sxm", "qwen3-32b on h100-sxm"}
    before = report.before.tpot_mape or 0.0
    assert before > 10
    assert all((errors.tpot_mape or 100.0) < before / 2 for errors in report.left_out.values())


def test_rows_without_a_sampled_token_cannot_say_what_sampling_costs() -> None:
    profile = catalog.load("engine", "vllm-v1-sync")
    groups = drawn_groups([run_of(task="", mean_batch=60.0, output_tokens_per_s=6000.0)], profile, 20, 0)
    with pytest.raises(BadInput, match="no row is moved by it"):
        calibrate(profile, groups, terms=["top_p_passes"], jobs=1)
