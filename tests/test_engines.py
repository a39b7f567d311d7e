"""Engines: versions to profiles, defaults that depend on device, weights and load, and what each setting does."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from apexsim import catalog
from apexsim.errors import BadInput
from apexsim.io.deployments import deployment_from
from apexsim.specs.engine import HostTerms, token_budget

ENGINES = [catalog.load("engine", name) for name in catalog.names("engine")]


@pytest.mark.parametrize(
    ("asked", "profile"),
    [
        ("vllm@0.6.0", "vllm-0.6"),
        ("vllm@0.11.1", "vllm-v1-sync"),
        ("vllm@0.19.0", "vllm-v1-async"),
        ("vllm@nightly-5b8c30d62b754b57", "vllm-v1-async"),
        ("vllm", "vllm-v1-async"),
        ("sglang@0.4.4.post2", "sglang-0.4"),
        ("sglang@0.5.1.post1", "sglang-0.5"),
        ("sglang@", "sglang-0.5"),
        ("trtllm@1.0.0rc3", "trtllm-1.0"),
        ("trtllm@1.3.0rc5", "trtllm-1.0"),
        ("vllm-v1-sync", "vllm-v1-sync"),
    ],
)
def test_an_engine_is_named_by_version_wherever_a_profile_is(asked: str, profile: str) -> None:
    assert catalog.load("engine", asked).name == profile
    made = deployment_from(None, {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": asked})
    assert made.engine == catalog.load("engine", profile)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("vllm@0.3.1", "no profile lists it; known: 0.4, 0.5, 0.6, "),
        ("vllm@9.0", "no profile lists it; known: 0.4, 0.5, 0.6, "),
        ("vlm@0.11", "did you mean vllm"),
        ("vlm", "did you mean vllm-0.6"),
    ],
)
def test_unknown_versions_are_refused_with_the_known_ones(tmp_path: Path, asked: str, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: llama-3.1-8b\ndevice: h100-sxm\nengine: {asked}\n")
    with pytest.raises(BadInput) as refused:
        deployment_from(file, {})
    assert str(refused.value).startswith(f"{file}: engine: ")
    assert told in str(refused.value)


def test_every_engine_has_few_profiles() -> None:
    assert {profile.engine for profile in ENGINES} == {"vllm", "sglang", "trtllm"}
    assert len(ENGINES) <= 8


@pytest.mark.parametrize(
    ("engine", "device", "budget", "seats"),
    [
        ("vllm-v1-async", "h100-sxm", 8192, 1024),
        ("vllm-v1-sync", "a100-sxm", 2048, 256),
        ("vllm-0.6", "h100-sxm", 512, 256),
    ],
)
def test_scheduler_defaults_follow_device_and_context(engine: str, device: str, budget: int, seats: int) -> None:
    scheduler = deployment_from(None, {"model": "llama-3.1-8b", "device": device, "engine": engine}).scheduler
    assert (scheduler.token_budget, scheduler.max_num_seqs) == (budget, seats)


def test_small_devices_take_a_smaller_step() -> None:
    sheet = catalog.load("device", "h100-sxm").datasheet
    small = sheet.model_copy(update={"memory_bytes": 48 << 30})
    profile = catalog.load("engine", "vllm-v1-async")
    assert profile.scheduler_for(4096, "l40s", small).token_budget == 2048
    assert profile.scheduler_for(4096, "rtx-pro-6000", sheet).token_budget == 8192


def test_what_is_asked_for_outweighs_what_an_engine_does_by_itself() -> None:
    choices = {"model": "llama-3.1-8b", "device": "a100-sxm", "engine_options": {"max_num_batched_tokens": 4096}}
    scheduler = deployment_from(None, choices).scheduler
    assert (scheduler.token_budget, scheduler.max_num_seqs) == (4096, 256)


def test_kv_dtype_is_the_engines_unless_asked_for() -> None:
    hopper = catalog.load("device", "h100-sxm").datasheet
    blackwell = hopper.model_copy(update={"flops_per_s": hopper.flops_per_s | {"nvfp4": 9e15}})
    vllm, trtllm, sglang = (catalog.load("engine", name) for name in ("vllm", "trtllm", "sglang"))
    assert [vllm.kv_dtype_for(("fp8", "fp8"), sheet) for sheet in (hopper, blackwell)] == ["bf16", "fp8"]
    assert vllm.kv_dtype_for(("bf16", "mxfp4"), blackwell) == "fp8"
    assert vllm.kv_dtype_for(("bf16", "int4_wo"), blackwell) == "bf16"
    assert trtllm.kv_dtype_for(("fp8", "fp8"), hopper) == "fp8"
    assert trtllm.kv_dtype_for(("bf16", "bf16"), hopper) == "bf16"
    assert sglang.kv_dtype_for(("fp8", "fp8"), blackwell) == "bf16"
    choices = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "trtllm", "weights": "fp8"}
    assert deployment_from(None, choices).kv_cache == "fp8"
    assert deployment_from(None, choices | {"kv_cache": "bf16"}).kv_cache == "bf16"


def test_token_budgets_of_benchmark_recipes() -> None:
    assert token_budget("one_prompt", prompt_tokens=1024, sequences=64) == 1152
    assert token_budget("one_prompt", prompt_tokens=1024, sequences=4) == 1152
    assert token_budget("two_prompts", prompt_tokens=1024, sequences=64) == 2112
    choices = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "trtllm"}
    plain = deployment_from(None, choices)
    assert plain.for_load(1024, 64) is plain
    ruled = deployment_from(None, choices | {"engine_options": {"token_budget_rule": "two_prompts"}})
    assert ruled.scheduler.token_budget == 8192
    assert ruled.for_load(1024, 64).scheduler.token_budget == 2112
    assert ruled.for_load(1024, None).scheduler.token_budget == 2 * 1024 + 2048
    small = deployment_from(
        None,
        {"model": "llama-3.1-8b", "device": "a100-sxm", "engine_options": {"token_budget_rule": "two_prompts"}},
    )
    assert small.for_load(5000, 8).scheduler.token_budget == 10_008


def test_launches_are_paid_by_the_layer_only_without_cuda_graphs() -> None:
    host = HostTerms(exposed_step_s=1e-3, per_layer_s=0.5e-3)
    assert host.serial_s(32) == 1e-3
    assert host.model_copy(update={"cuda_graphs": False}).serial_s(32) == 17e-3
    with pytest.raises(ValidationError, match="per_layer_s"):
        HostTerms(cuda_graphs=False)
    with pytest.raises(BadInput, match="cuda_graphs off needs per_layer_s"):
        deployment_from(None, {"model": "llama-3.1-8b", "device": "h100-sxm", "engine_options": {"cuda_graphs": False}})
