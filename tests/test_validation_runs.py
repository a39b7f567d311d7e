"""``apexsim validate``: the reader of runs.csv, rows as deployments and loads, statuses, scores and decisions."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog
from apexsim.cli.main import main
from apexsim.errors import BadInput, InfeasiblePlan
from apexsim.io.engines import with_engine_options
from apexsim.specs.server import Load
from apexsim.validation import decisions, scores
from apexsim.validation.cases import case_of, kind_of, version_known
from apexsim.validation.loads import STEADY_REQUESTS, requests_of
from apexsim.validation.recipes import launched, recipes, version_numbers
from apexsim.validation.replay import replay, run_rows
from apexsim.validation.runs import MEASURED, MeasuredRun, RunRow, read_runs, sampled, selected

CLOSED: dict[str, Any] = {
    "run_id": "closed", "engine": "vllm", "engine_version": "0.18.0", "model": "llama-3.1-8b", "device": "h100-sxm",
    "weight_dtype": "bf16", "tensor": 1, "gpus": 1, "workload": "closed_loop", "concurrency": 4, "prompt_tokens": 100,
    "output_tokens": 20, "length_range_ratio": 0.8, "num_requests": 12,
}  # fmt: skip
SATURATED = {
    **CLOSED, "run_id": "full", "workload": "saturated", "max_num_seqs": 8, "output_tokens": 300.25, "task": "gpqa",
    "concurrency": "", "prompt_tokens": "", "length_range_ratio": "", "num_requests": "",
}  # fmt: skip
TRACE = {**CLOSED, "run_id": "trace", "workload": "trace", "requests_file": "requests/few.csv"}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def runs_of(tmp_path: Path, *rows: dict[str, Any]) -> list[MeasuredRun]:
    return read_runs(write(tmp_path / "runs.csv", *rows))


def status_of(tmp_path: Path, **changes: Any) -> str:
    (run,) = runs_of(tmp_path, {**CLOSED, **changes})
    return replay(run).status


# -- the reader ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "column", "said"),
    [
        ({"tensor": "two"}, "tensor", "got 'two'; Input should be a valid integer"),
        ({"tensor": "1.5"}, "tensor", "got '1.5'"),
        ({"concurrency": 0}, "concurrency", "greater than or equal to 1"),
        ({"ttft_mean_s": "-1"}, "ttft_mean_s", "greater than or equal to 0"),
        ({"ttft_mean_s": "nan"}, "ttft_mean_s", "finite number"),
        ({"length_range_ratio": 1.2}, "length_range_ratio", "less than or equal to 1"),
        ({"chunked_prefill": "maybe"}, "chunked_prefill", "valid boolean"),
        ({"workload": "burst"}, "workload", "'trace', 'closed_loop' or 'saturated'"),
        ({"concurrency": ""}, "concurrency", "is empty; a closed_loop run needs it"),
        ({"workload": "trace"}, "requests_file", "is empty; a trace run needs it"),
        ({"workload": "saturated"}, "max_num_seqs", "is empty; a saturated run needs it"),
        ({"model": ""}, "model", "is empty; every run has one"),
    ],
)
def test_malformed_cells_name_file_row_and_column(
    tmp_path: Path, changes: dict[str, Any], column: str, said: str
) -> None:
    path = write(tmp_path / "runs.csv", CLOSED, {**CLOSED, **changes})
    with pytest.raises(BadInput) as error:
        read_runs(path)
    assert str(error.value).startswith(f"{path}: {column}, row 2 (the first data row is 1): ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no run"),
        ("run_id,engine,model,device,workload\n", "holds no run"),
        ("run_id,engine,modle,device,workload\na,b,c,d,e\n", "model: the column is missing; did you mean modle?"),
        ("run_id,engine,model,device,workload,model\na,b,c,d,e,f\n", "model: the column is there twice"),
        ("run_id,engine,model,device,workload\na,b,c,d,trace,f\n", "row 1: has 6 cells, the header 5"),
        ('run_id,engine,model,device,workload\n"a,b,c,d,trace\n', "cannot be read as CSV"),
    ],
)
def test_malformed_files_are_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        read_runs(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_absent_and_binary_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_runs(tmp_path / "none.csv")
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read as CSV"):
        read_runs(tmp_path / "runs.csv")


def test_unknown_columns_are_kept_and_whole_numbers_may_have_a_point(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, {**CLOSED, "tensor": "2.0", "colour": "red, blue"})
    assert run.row.tensor == 2
    assert (run.cells["tensor"], run.cells["colour"]) == ("2.0", "red, blue")
    assert (run.set_name, run.number) == (tmp_path.name, 1)


def test_rows_are_chosen_by_cell_and_by_lot(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, *({**CLOSED, "run_id": f"r{n}", "tensor": 1 + n % 2} for n in range(10)))
    path = tmp_path / "runs.csv"
    assert [run.row.run_id for run in selected(runs, ["tensor=2", "run_id=r1", "run_id=r3", "run_id=r4"], path)] == [
        "r1", "r3",
    ]  # fmt: skip
    few = sampled(runs, 4, seed=1)
    assert [run.number for run in few] == sorted(run.number for run in few)
    assert few == sampled(runs, 4, seed=1) != sampled(runs, 4, seed=2)
    assert sampled(runs, 99, seed=0) == runs
    with pytest.raises(BadInput, match="no such column; did you mean model"):
        selected(runs, ["modle=x"], path)


# -- rows as deployments -------------------------------------------------------------------------------------------


def case(**changes: Any) -> Any:
    given = {key: value for key, value in {**CLOSED, **changes}.items() if value != ""}
    return case_of(RunRow.model_validate(given))


def test_a_row_becomes_the_deployment_it_states() -> None:
    found = case(
        tensor=4, weight_dtype="fp8", kv_dtype="fp8", max_num_seqs=77, block_size=32, max_num_batched_tokens=1000,
        gpu_memory_utilization=0.8, kv_blocks=5000,
    ).deployment  # fmt: skip
    scheduler, memory = found.colocated_server().scheduler, found.engine.memory
    assert (found.model.name, found.cluster.device.name, found.weights, found.kv_cache) == (
        "llama-3.1-8b", "h100-sxm", "fp8", "fp8",
    )  # fmt: skip
    assert found.pools[0].plan.name == "tp4-pp1"
    assert (scheduler.max_num_seqs, scheduler.block_size, scheduler.token_budget) == (77, 32, 1000)
    assert (memory.gpu_memory_utilization, memory.kv_blocks) == (0.8, 5000)


@pytest.mark.parametrize(
    ("source", "prompt", "budget"),
    [("nvidia_gap_analysis", 2000, 2112), ("nvidia_gap_analysis", 100, 1152), ("elsewhere", 1000, 8192)],
)
def test_recipes_of_tensorrt_llm_set_its_token_budget(source: str, prompt: int, budget: int) -> None:
    """One prompt a step and a token for each of the others, in 64s, but 1,024 tokens of short prompts together."""
    row = {"engine": "trtllm", "engine_version": "1.0.0rc3", "source": source, "prompt_tokens": prompt}
    assert case(**row).deployment.colocated_server(Load(1000, 4)).scheduler.token_budget == budget
    stated = case(**row, max_num_batched_tokens=4096).deployment
    assert stated.colocated_server(Load(1000, 4)).scheduler.token_budget == 4096


@pytest.mark.parametrize(
    ("model", "clients", "seats"), [("llama-3.1-8b", 8, 7), ("llama-3.1-8b", 4, 2048), ("qwen3-32b", 8, 2048)]
)
def test_one_seat_is_missing_where_nvidia_served_llama_8b(model: str, clients: int, seats: int) -> None:
    row = {"engine": "trtllm", "engine_version": "1.0.0rc3", "source": "nvidia_gap_analysis", "model": model}
    assert case(**row, concurrency=clients).deployment.colocated_server().scheduler.max_num_seqs == seats


def test_every_recipe_can_be_launched_and_names_its_script() -> None:
    for recipe in recipes():
        options = {**recipe.options, **dict.fromkeys(recipe.rules, 64)}
        profile = with_engine_options(catalog.load("engine", recipe.engine), options, recipe.script)
        assert profile.engine == recipe.engine
        if recipe.when.sources != ("nvidia",):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", recipe.script or "")
        assert recipe.kv_dtype in (None, "fp8", "bf16")
        assert recipe.options or recipe.rules or recipe.plan


def inferencex(**changes: Any) -> Any:
    return case(**{"source": "inferencex_csv_dump", "prompt_tokens": 1024, "output_tokens": 1024, **changes})


R1: dict[str, Any] = {"engine": "sglang", "engine_version": "0.5.9", "model": "deepseek-r1", "device": "b200-sxm",
                      "tensor": 8, "weight_dtype": "nvfp4"}  # fmt: skip
MINIMAX: dict[str, Any] = {"engine_version": "0.19.0", "model": "minimax-m2.5", "device": "b200-sxm", "tensor": 4,
                           "weight_dtype": "fp8_block", "expert": 1, "moe_tensor": 4, "attention_data": 1}  # fmt: skip


def test_runs_of_inferencex_are_launched_as_its_scripts_do() -> None:
    launched = inferencex(**R1)
    assert (launched.deployment.colocated_server().scheduler.token_budget, launched.deployment.kv_cache) == (
        16_384,
        "fp8",
    )
    options = (
        "gpu_memory_utilization 0.85, max_num_batched_tokens 16384, max_num_seqs 256, "
        "fused_norm_max_bytes 33554432, receive_interval 10"
    )
    assert f"as its benchmark launches it: {options}" in launched.notes
    intervals = [
        inferencex(**R1 | {"device": device, "concurrency": clients})
        .deployment.colocated_server()
        .scheduler.receive_interval
        for device, clients in (("b200-sxm", 8), ("b200-sxm", 16), ("h200-sxm", 16))
    ]
    assert intervals == [10, 30, 1]
    elsewhere = case(**R1).deployment
    assert (elsewhere.colocated_server().scheduler.token_budget, elsewhere.kv_cache) == (8192, "bf16")
    assert inferencex(**R1, kv_dtype="bf16").deployment.kv_cache == "bf16"


def test_budgets_seats_and_graphs_follow_the_load() -> None:
    row = {"engine": "trtllm", "engine_version": "", "tensor": 8, "concurrency": 64, "device": "h200-sxm"}
    r1 = {**row, "model": "deepseek-r1", "weight_dtype": "fp8_block"}
    budgets = [
        inferencex(**r1 | {"engine_version": version, "prompt_tokens": prompt})
        .deployment.colocated_server()
        .scheduler.token_budget
        for version, prompt in (("", 8192), ("", 1024), ("1.2.0rc6", 1024), ("1.1.0rc2.post2", 1024))
    ]
    assert budgets == [8320, 8192, 8192, 1152]
    llama = {**row, "model": "llama-3.1-70b"}
    assert inferencex(**llama).deployment.colocated_server().scheduler.stream_interval == 1
    assert inferencex(**llama | {"tensor": 4}).deployment.colocated_server().scheduler.stream_interval == 20
    vllm = {"engine_version": "", "model": "llama-3.1-70b", "device": "h200-sxm", "tensor": 8, "weight_dtype": "fp8"}
    found = [inferencex(**vllm, concurrency=clients).deployment for clients in (8, 512)]
    assert [(each.colocated_server().scheduler.max_num_seqs, each.engine.host.graph_tokens) for each in found] == [
        (8, 16),
        (512, 512),
    ]
    assert inferencex(**MINIMAX, prompt_tokens=8192).deployment.colocated_server().scheduler.token_budget == 16_384


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("0.17.0", ("bf16", 0.95, 512)), ("0.18.1", ("bf16", 0.95, 512)), ("0.19.0", ("fp8", 0.9, 2048)),
     ("v0.19.1-cu130", ("fp8", 0.9, 2048)), ("", ("fp8", 0.9, 2048)), ("nightly-1", ("fp8", 0.9, 2048))],
)  # fmt: skip
def test_recipes_hold_for_their_versions(version: str, wanted: tuple[str, float, int]) -> None:
    row = RunRow.model_validate(
        {**CLOSED, **MINIMAX, "source": "inferencex", "engine_version": version, "prompt_tokens": 1024}
    )
    launch = launched(row)
    options = launch.options
    assert (launch.kv_dtype, options["gpu_memory_utilization"], options.get("graph_tokens", 512)) == wanted


def test_a_tensor_degree_that_is_written_squared_is_found_again() -> None:
    row = {"engine": "trtllm", "engine_version": "gpt-oss-dev", "source": "inferencex", "model": "gpt-oss-120b"}
    found = case(**row, device="h200-sxm", tensor=16, expert=4, moe_tensor=4, weight_dtype="bf16", moe_dtype="mxfp4")
    plan = found.deployment.pools[0].plan
    assert (plan.tensor, plan.expert) == (4, 1)
    assert any("tensor 4 instead of 16, expert 1 instead of 4" in note for note in found.notes)
    asked = {**row, "device": "h200-sxm", "weight_dtype": "bf16", "moe_dtype": "mxfp4"}
    assert launched(RunRow.model_validate({**CLOSED, **asked, "tensor": 16, "expert": 2})).degrees == {}


def test_versions_compare_by_their_numbers() -> None:
    versions = ["0.9.2", "0.10", "0.10.2rc1", "v0.11.0-cu130", "1.0.0rc3"]
    numbers = [version_numbers(version) for version in versions]
    assert numbers == sorted(numbers) == [(0, 9, 2), (0, 10), (0, 10, 2), (0, 11, 0), (1, 0, 0)]
    assert version_numbers("") == version_numbers("nightly-5b8c30d") > version_numbers("999.0")


def test_versions_without_numbers_may_have_a_recipe_of_their_own() -> None:
    row = {**CLOSED, **MINIMAX, "source": "inferencex", "weight_dtype": "nvfp4", "prompt_tokens": 1024}
    budgets = [
        launched(RunRow.model_validate({**row, "engine_version": version})).options.get("max_num_batched_tokens")
        for version in ("nightly-5b8c30d62b754b57", "nightly-6")
    ]
    assert budgets == [None, 2048]


@pytest.mark.parametrize(
    ("changes", "plan", "note"),
    [
        ({"engine_version": "0.17.0"}, (4, 1, 4), "expert 4 instead of 1"),
        ({}, (4, 1, 1), None),
        ({"expert": 4, "moe_tensor": 1}, (4, 1, 4), None),
        ({"tensor": 2, "attention_data": 2, "expert": 4, "moe_tensor": 1}, (2, 1, 2),
         "attention_data 1 instead of 2, expert 2 instead of 4"),
        ({"tensor": 2, "attention_data": 2, "expert": 4, "moe_tensor": 1, "weight_dtype": "nvfp4"}, (1, 2, 2),
         "tensor 1 instead of 2, expert 2 instead of 4"),
        ({"model": "kimi-k2.5", "engine_version": "0.17.0", "weight_dtype": "nvfp4", "expert": 4, "moe_tensor": 1},
         (4, 1, 1), "expert 1 instead of 4"),
    ],
)  # fmt: skip
def test_scripts_lay_plans_out(changes: dict[str, Any], plan: tuple[int, int, int], note: str | None) -> None:
    found = inferencex(**MINIMAX | changes)
    laid_out = found.deployment.pools[0].plan
    assert (laid_out.tensor, laid_out.attention_data, laid_out.expert) == plan
    said = [each for each in found.notes if "instead of" in each]
    assert said == ([f"as its benchmark launches it: {note}"] if note else [])


def test_what_a_row_states_outweighs_its_recipe() -> None:
    stated = inferencex(**R1, flags="--max-num-batched-tokens 4096")
    assert stated.deployment.colocated_server().scheduler.token_budget == 4096
    assert (
        "as its benchmark launches it: gpu_memory_utilization 0.85, max_num_seqs 256, "
        "fused_norm_max_bytes 33554432, receive_interval 10"
    ) in stated.notes
    budget = case(engine="trtllm", engine_version="1.0.0rc3", source="nvidia_gap_analysis",
                  flags="--max-num-batched-tokens 4096").deployment  # fmt: skip
    assert budget.colocated_server(Load(1000, 4)).scheduler.token_budget == 4096


def test_everything_taken_for_granted_of_a_row_is_listed() -> None:
    found = case(tensor="", pipeline=1, expert=1, replicas=1, attention_data="", weight_dtype="")
    assert set(found.notes) == {
        "tensor not known: 1", "attention_data not known: 1", "weight_dtype not known: bf16",
        "kv_dtype not known: the engine default, bf16",
    }  # fmt: skip
    stated = {"tensor": 8, "pipeline": 1, "expert": 1, "replicas": 1, "attention_data": 1, "kv_dtype": "bf16"}
    stated["prompts"] = "text"
    blocks = case(**stated, model="qwen3-235b-a22b", weight_dtype="fp8")
    assert blocks.notes == ("weight_dtype fp8: scaled by blocks, as the checkpoint of the model is",)
    experts = case(**stated, model="gpt-oss-120b", weight_dtype="mxfp4")
    assert experts.notes == ("weight_dtype mxfp4: that of the experts alone, bf16 elsewhere",)


def test_flags_become_engine_options_and_the_rest_is_listed() -> None:
    flags = (
        "vllm 0.6.0 (docker vllm/vllm-openai:v0.6.0); --max-model-len 24272 --disable-custom-all-reduce "
        "--kv-cache-dtype fp8 --fancy-new-flag 3 # a remark"
    )
    found = case(flags=flags)
    assert found.deployment.colocated_server().context_limit == 24272
    assert not found.deployment.engine.communication.custom_all_reduce
    assert "flags without effect here: --fancy-new-flag 3" in found.notes
    eager = case(engine="sglang", engine_version="0.4.4.post2", flags="--disable-cuda-graph").deployment
    assert not eager.engine.host.cuda_graphs
    ahead = case(engine_version="0.11.1", flags="--async-scheduling true").deployment
    assert ahead.engine.host.overlapped
    assert ahead.colocated_server().scheduler.lookahead_steps == 1


@pytest.mark.parametrize(
    ("model", "engine", "weight", "moe", "wanted"),
    [
        ("gpt-oss-120b", "vllm", "mxfp4", None, ("bf16", "mxfp4")),
        ("gpt-oss-120b", "vllm", "bf16", None, ("bf16", "mxfp4")),
        ("qwen3-235b-a22b", "vllm", "fp8", None, ("fp8_block", "fp8_block")),
        ("qwen3-235b-a22b", "trtllm", "fp8", None, ("fp8", "fp8")),
        ("qwen3-235b-a22b", "trtllm", "bf16", "fp8_block", ("bf16", "fp8_block")),
    ],
)
def test_dtypes_of_checkpoints(model: str, engine: str, weight: str, moe: str | None, wanted: tuple[str, str]) -> None:
    version = {"vllm": "0.18.0", "trtllm": "1.0.0rc3"}[engine]
    found = case(
        model=model, engine=engine, engine_version=version, weight_dtype=weight, moe_dtype=moe, tensor=8
    ).deployment
    assert (found.weights, found.expert_dtype) == wanted


def test_versions_that_say_nothing_take_the_newest_profile() -> None:
    newest = case(engine_version="0.33.0")
    assert not [note for note in newest.notes if "newest" in note]
    for version in ("", "nightly-5b8c30d62b754b57", "gpt-oss-dev"):
        found = case(engine_version=version)
        assert found.deployment.engine == newest.deployment.engine
        assert "not listed: its newest profile" in "; ".join(found.notes)
        assert not version_known(RunRow.model_validate({**CLOSED, "engine_version": version}))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "llama-9"}, BadInput, "unknown model"),
        ({"device": "tpu-v9"}, BadInput, "unknown device"),
        ({"engine": "tgi"}, BadInput, "unknown engine"),
        ({"engine_version": "0.1"}, BadInput, "no profile lists it"),
        ({"weight_dtype": "fp3"}, BadInput, "weights"),
        ({"tensor": 16}, InfeasiblePlan, "crosses nodes"),
        ({"tensor": 5}, InfeasiblePlan, "does not divide"),
        ({"model": "gpt-oss-120b", "tensor": 8, "expert": 8, "moe_tensor": 8}, InfeasiblePlan, "moe_tensor is 8"),
    ],
)
def test_rows_that_cannot_be_laid_out_say_why(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        case(**changes)


def test_whatever_stands_in_the_way_is_a_status(tmp_path: Path) -> None:
    assert status_of(tmp_path, model="llama-9").startswith("unknown: run: model: got 'llama-9'; unknown model")
    assert status_of(tmp_path, tensor=5).startswith("infeasible: ")
    assert status_of(tmp_path, model="llama-3.1-8b", weight_dtype="nvfp4").startswith("unsupported: ")
    assert "weights of" in status_of(tmp_path, model="llama-3.1-405b")
    assert "12 of 12 requests were not served" in status_of(tmp_path, prompt_tokens=200_000)
    assert "none.csv" in status_of(tmp_path, workload="trace", requests_file="none.csv")
    assert status_of(tmp_path) == "ok"


def test_kinds_of_models() -> None:
    kinds = {"llama-3.1-8b": "dense", "gpt-oss-20b": "moe", "deepseek-r1": "mla", "glm-5": "hybrid", "x": "unknown"}
    assert {name: kind_of(name) for name in kinds} == kinds


# -- loads ---------------------------------------------------------------------------------------------------------


def test_closed_loops_draw_their_lengths_from_the_seed(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, {**CLOSED, "num_requests": 3000})
    found, notes = requests_of(run, longest=10_000, seed=3)
    assert (found.concurrency, len(found), notes) == (4, 3000, [])
    assert (found.prompt_tokens.min(), found.prompt_tokens.max()) == (80, 100)
    assert (found.output_tokens.min(), found.output_tokens.max()) == (16, 20)
    assert found.output_tokens.mean() == pytest.approx(18, rel=0.01)
    again, other = (requests_of(run, longest=10_000, seed=seed)[0] for seed in (3, 4))
    assert (again.prompt_tokens == found.prompt_tokens).all()
    assert (other.prompt_tokens != found.prompt_tokens).any()


def test_what_a_closed_loop_leaves_open_is_said(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, {**CLOSED, "num_requests": "", "length_range_ratio": ""})
    found, notes = requests_of(run, longest=10_000, seed=0)
    assert len(found) == 40
    assert set(found.prompt_tokens) == {100}
    assert notes == ["num_requests not known: 10 for every request in flight",
                     "length_range_ratio not known: fixed lengths"]  # fmt: skip


def test_a_full_server_is_found_in_the_middle_of_its_life(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, {**SATURATED, "max_num_seqs": 2000})
    found, notes = requests_of(run, longest=10_000, seed=0)
    assert len(found) == 4000
    assert set((found.prompt_tokens + found.output_tokens).tolist()) == {550}
    assert found.prompt_tokens[:2000].mean() == pytest.approx(250 + 150, abs=8)
    assert set(found.prompt_tokens[2000:]) == {250}
    assert "prompt lengths not known: 250 tokens (gpqa)" in notes
    (small,) = runs_of(tmp_path, {**SATURATED, "max_num_seqs": 10})
    assert len(requests_of(small, longest=10_000, seed=0)[0]) == 10 + STEADY_REQUESTS
    cut, _ = requests_of(run, longest=300, seed=0)
    assert (cut.prompt_tokens + cut.output_tokens).max() == 300


# -- replays -------------------------------------------------------------------------------------------------------


def test_a_full_server_is_scored_while_it_is_full(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, {**SATURATED, "itl_mean_s": 0.02})
    figures = replay(run).figures
    assert figures["mean_batch"] == pytest.approx(8, rel=0.01)
    # A client that has its answer takes a response and a frontend to be back: now and then 7 decode.
    assert figures["output_tokens_per_s"] == pytest.approx(8 / figures["itl_mean_s"], rel=0.02)
    assert figures["energy_per_output_token_j"] == pytest.approx(figures["power_w"] / figures["output_tokens_per_s"])
    slowed = replay(run, itl="measured").figures
    assert slowed["itl_mean_s"] == pytest.approx(0.02)
    scale = 0.02 / figures["itl_mean_s"]
    assert slowed["output_tokens_per_s"] == pytest.approx(figures["output_tokens_per_s"] / scale)
    assert slowed["power_w"] < figures["power_w"]
    assert slowed["energy_per_output_token_j"] > figures["energy_per_output_token_j"]


def test_traces_are_replayed_and_compared_request_by_request(tmp_path: Path) -> None:
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "few.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,20\n1,200,30\n")
    (run,) = runs_of(tmp_path, TRACE)
    plain = replay(run).figures
    assert not [name for name in plain if name.startswith("request_")]
    ttft_s, e2e_s = plain["ttft_mean_s"], plain["e2e_mean_s"]
    (tmp_path / "trace.csv").write_text(f"ttft_s,e2e_s\n{ttft_s},{2 * e2e_s}\n{ttft_s},{2 * e2e_s}\n")
    found = replay(run).figures
    assert found["request_ttft_error_percent"] < 30
    assert 30 < found["request_e2e_error_percent"] < 70
    assert "request_tpot_error_percent" not in found


def test_the_table_keeps_every_row_and_column_whatever_the_jobs(tmp_path: Path) -> None:
    rows = [{**CLOSED, "colour": "red"}, {**CLOSED, "model": "llama-9"}, SATURATED, {**CLOSED, "concurrency": 8}]
    runs = runs_of(tmp_path, *rows)
    seen: list[float] = []
    table = run_rows(runs, jobs=1, progress=seen.append)
    assert list(table["run_id"]) == [row["run_id"] for row in rows]
    assert list(table.columns[: len(runs[0].cells)]) == list(runs[0].cells)
    assert {f"predicted_{name}" for name in MEASURED} | {"status"} <= set(table.columns)
    assert list(table["status"] == "ok") == [True, False, True, True]
    assert table["predicted_tpot_mean_s"].notna().tolist() == [True, False, True, True]
    assert seen[-1] == 1.0
    pd.testing.assert_frame_equal(table, run_rows(runs, jobs=2))


# -- scores --------------------------------------------------------------------------------------------------------


def measured_table(**columns: list[Any]) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    common = {"set": "s", "engine": "e", "device": "d", "model": "m", "model_kind": "dense", "version_known": True,
              "status": "ok", "assumed": "", "gpus": 1, "workload": "closed_loop"}  # fmt: skip
    filled = {name: [value] * count for name, value in common.items()}
    return scores.with_parts(pd.DataFrame({**filled, **columns}))


def test_errors_by_hand() -> None:
    table = measured_table(
        tpot_mean_s=["0.1", "0.2", "0.4", ""],
        predicted_tpot_mean_s=[0.11, 0.19, None, 1.0],
        peer_tpot_mean_s=["0.12", "", "0.4", "1"],
    )
    (found,) = scores.score(table, scores.BY_CLASS).to_dict("records")
    assert (found["rows"], found["predicted"], found["peer_rows"]) == (3, 2, 1)
    assert found["mape"] == pytest.approx(7.5)
    assert found["median"] == pytest.approx(7.5)
    assert found["bias"] == pytest.approx(2.5)
    assert (found["on_peer_rows"], found["peer_mape"]) == (pytest.approx(10), pytest.approx(20))


def test_rows_of_another_kind_are_reported_apart() -> None:
    table = measured_table(
        ttft_mean_s=["1"] * 5,
        predicted_ttft_mean_s=[1.0] * 5,
        exclude=["", "flags unknown", "", "", ""],
        exclude_ttft=["", "", "start-up inside the run", "", ""],
        version_known=[True, True, True, False, False],
        task=["", "", "", "", "image-chat"],
    )
    assert list(table["part"]) == [
        scores.SCORED, scores.EXCLUDED, scores.SCORED, scores.UNVERSIONED, scores.MULTIMODAL,
    ]  # fmt: skip
    counts = scores.score(table, ["part"]).set_index("part")["rows"].to_dict()
    assert counts == {scores.SCORED: 1, scores.EXCLUDED: 2, scores.UNVERSIONED: 1, scores.MULTIMODAL: 1}


def test_groups_ahead_of_the_peer() -> None:
    table = measured_table(
        model=["a", "a", "b", "c"],
        tpot_mean_s=["1"] * 4,
        predicted_tpot_mean_s=[1.1, 0.9, 1.3, 1.0],
        peer_tpot_mean_s=["1.2", "1.2", "1.2", ""],
    )
    assert scores.ahead_of_peer(scores.score(table, scores.BY_UNIT)) == {"tpot_mean_s": (1, 2)}


def test_constant_power_is_the_yardstick_of_energy() -> None:
    table = measured_table(
        power_w=["400", "1200"], gpus=[1, 2], output_tokens_per_s=["100", "100"], predicted_power_w=[400.0, 1200.0]
    )
    assert list(table["peer_power_w"]) == [500, 1000]
    assert list(table["peer_energy_per_output_token_j"]) == [5, 10]


# -- decisions -----------------------------------------------------------------------------------------------------


def questions(predicted_tpot_s: list[float]) -> pd.DataFrame:
    """Two plans of 1 and 2 devices, two concurrencies each; outputs of one token's time each but for TTFT."""
    return measured_table(
        tensor=[1, 1, 2, 2],
        gpus=[1, 1, 2, 2],
        weight_dtype=["bf16"] * 4,
        concurrency=[1, 8, 1, 8],
        prompt_tokens=[100] * 4,
        output_tokens=[101] * 4,
        length_range_ratio=[1.0] * 4,
        ttft_mean_s=["0.1"] * 4,
        tpot_mean_s=["0.020", "0.040", "0.012", "0.024"],
        predicted_ttft_mean_s=[0.1] * 4,
        predicted_tpot_mean_s=predicted_tpot_s,
    )


def test_the_truth_decides_right_and_rules_have_their_regret() -> None:
    decided = decisions.decisions(questions([0.020, 0.040, 0.012, 0.024]))
    assert list(decided["percentile"]) == [20, 35, 50, 65, 80]
    assert (decided["apexsim"] == 0).all()
    assert decided["peer"].isna().all()
    # At the median limit of 22 ms: rates per device are 47.6 (1 device, C 1) and 38.8 (2 devices, C 1).
    middle = decided[decided["percentile"] == 50].iloc[0]
    assert middle["limit_s"] == pytest.approx(0.022)
    rates = 101 / (0.1 + 100 * np.array([0.020, 0.012])) / np.array([1, 2])
    assert middle["largest tensor"] == pytest.approx(1 - rates[1] / rates[0])
    assert middle["fewest devices"] == 0
    summary = decisions.summary(decided).set_index("chooser")
    assert summary.loc["apexsim", "right"] == 100
    assert "peer" not in summary.index
    (by_model,) = decisions.summary_by_model(decided).to_dict("records")
    assert (by_model["model_kind"], by_model["questions"], by_model["right"]) == ("dense", 5, 100)


def test_a_choice_that_breaks_its_limit_loses_all() -> None:
    decided = decisions.decisions(questions([0.020, 0.010, 0.012, 0.024]))
    assert (decided["apexsim"] == 1).sum() >= 4
    nobody = decisions.decisions(questions([0.9, 0.9, 0.8, 0.9]))
    # It believes in no row, so it takes the one it believes to be the fastest.
    assert (nobody["apexsim"] < 1).all()


def test_one_plan_is_no_question() -> None:
    assert decisions.decisions(questions([0.1] * 4).query("tensor == 1")).empty


@pytest.mark.parametrize("absent", ["length_range_ratio", "weight_dtype", "gpus", "tensor"])
def test_files_without_a_column_still_get_a_report(absent: str) -> None:
    decided = decisions.decisions(questions([0.020, 0.040, 0.012, 0.024]).drop(columns=absent))
    assert decided.empty == (absent in ("gpus", "tensor"))


def test_where_nothing_is_scored_there_is_no_question() -> None:
    table = questions([0.1] * 4)
    assert decisions.decisions(table.assign(part=scores.EXCLUDED)).empty
    assert decisions.decisions(table.assign(ttft_mean_s=np.nan)).empty


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**CLOSED, "tpot_mean_s": 0.01, "ttft_mean_s": 0.05}, {**CLOSED, "run_id": "x", "device": "tpu-v9"},
            {**SATURATED, "power_w": 500, "itl_p50_s": 0.01, "output_tokens_per_s": 800}]  # fmt: skip
    path, out, plot = write(tmp_path / "runs.csv", *rows), tmp_path / "rows.csv", tmp_path / "errors.png"
    assert main(["validate", str(path), "--jobs", "1", "--json", "-", "--out", str(out), "--plot", str(plot)]) == 0
    said, tables = capsys.readouterr()
    found = json.loads(said)
    assert (found["rows"], found["predicted"]) == (3, 2)
    assert sum(found["statuses"].values()) == 3
    assert "What became of the rows" in tables
    assert "unknown device" in tables
    written = pd.read_csv(out)
    assert list(written["run_id"]) == ["closed", "x", "full"]
    assert list(written.columns)[-1] == "status"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["validate", str(path), "--where", "device=tpu-v9"]) == 0
    assert "1  unknown" in capsys.readouterr().out


def test_bad_input_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "runs.csv", {**CLOSED, "tensor": "two"})
    assert main(["validate", str(path)]) == 2
    assert "tensor, row 1" in capsys.readouterr().err
    good = write(tmp_path / "good.csv", CLOSED)
    assert main(["validate", str(good), "--where", "run_id=none"]) == 2
    assert "no row" in capsys.readouterr().err


# -- measured rows -------------------------------------------------------------------------------------------------


def test_a_few_measured_rows_of_each_set(data: Path) -> None:
    limits = {
        "apex_h100": ("llama_lmsys_025_validation_8TP", "itl_mean_s", 6),
        "silicon": (None, "tpot_mean_s", 15),
    }
    for name, (run_id, figure, percent) in limits.items():
        runs = read_runs(data / "ground_truth" / name / "runs.csv")
        wanted = [r for r in runs if r.row.run_id == run_id] if run_id else _dense_on_h100(runs)
        assert wanted
        table = run_rows(wanted[:4], jobs=1)
        assert set(table["status"]) == {"ok"}
        errors = table[f"predicted_{figure}"] / pd.to_numeric(table[figure]) - 1
        assert errors.abs().mean() < percent / 100


@pytest.fixture(scope="module")
def silicon(data: Path) -> pd.DataFrame:
    """Scores of every seventh row of the set, by kind of model."""
    runs = read_runs(data / "ground_truth" / "silicon" / "runs.csv")[::7]
    found = scores.score(scores.with_parts(run_rows(runs, jobs=1)), scores.BY_CLASS)
    return found[found["part"] == scores.SCORED].set_index(["model_kind", "figure"])


@pytest.mark.parametrize(("kind", "tpot", "ttft"), [("dense", 8, 17), ("moe", 11, 22), ("mla", 13, 32)])
def test_errors_of_served_runs_stay_within_the_bars_of_their_kind(
    silicon: pd.DataFrame, kind: str, tpot: float, ttft: float
) -> None:
    errors = silicon.loc[(kind, "tpot_mean_s")]
    assert errors["mape"] <= tpot
    assert abs(errors["bias"]) <= 5
    assert errors["on_peer_rows"] < errors["peer_mape"]
    assert silicon.loc[(kind, "ttft_mean_s"), "mape"] <= ttft


@pytest.mark.parametrize("device", ["rtx-4090", "rtx-pro-6000"])
def test_a_burst_of_vllm_runs_is_met_request_by_request(data: Path, device: str) -> None:
    runs = read_runs(data / "ground_truth" / "vllm_runs" / "runs.csv")
    found = replay(next(run for run in runs if run.row.device == device))
    measured = next(run.row.e2e_mean_s for run in runs if run.row.device == device)
    assert found.status == "ok"
    assert found.figures["e2e_mean_s"] == pytest.approx(measured, rel=0.02)
    assert found.figures["request_ttft_error_percent"] <= 8


def _dense_on_h100(runs: list[MeasuredRun]) -> list[MeasuredRun]:
    return [r for r in runs if (r.row.model, r.row.device, r.row.engine) == ("llama-3.1-70b", "h100-sxm", "vllm")]
