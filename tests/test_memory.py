"""Memory: bytes that add up, blocks that cover windows, and refusals that name what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.costs.lowering import lower
from apexsim.costs.memory import MemoryPlan, plan_memory, weights_bytes
from apexsim.errors import InfeasiblePlan
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment, Plan, Pool
from apexsim.specs.device import DeviceProfile

GIB = 2**30
H100 = catalog.load("device", "h100-sxm")


def deployed(
    model: Any, plan: Plan | None = None, *, device: DeviceProfile = H100, share: float = 0.9, **fields: Any
) -> Deployment:
    engine = catalog.load("engine", "vllm-v1-sync")
    memory = engine.memory.model_copy(update={"gpu_memory_utilization": share})
    return Deployment(
        model=catalog.load("model", model) if isinstance(model, str) else model,
        cluster=Cluster(device=device, devices_per_node=16),
        engine=engine.model_copy(update={"memory": memory}),
        pools=(Pool(plan=plan or Plan()),),
        **fields,
    )


def planned(model: Any, plan: Plan | None = None, **options: Any) -> MemoryPlan:
    deployment = deployed(model, plan, **options)
    return plan_memory(deployment, deployment.pools[0])


def weights_of(model: Any, plan: Plan | None = None, **fields: Any) -> list[float]:
    """Bytes on one device of every stage."""
    deployment = deployed(model, plan, **fields)
    pool = deployment.pools[0]
    low = lower(deployment, pool)
    return [weights_bytes(deployment, pool, low, stage) for stage in range(len(low.stages))]


def test_llama_8b_by_hand() -> None:
    plan = planned("llama-3.1-8b")
    assert plan.weights_bytes == 8_030_261_248 * 2
    # 8192 tokens x bf16 x (hidden + residual + gate/up + activation), and fp32 logits of 1024 sequences.
    scheduler = catalog.load("engine", "vllm-v1-sync").scheduler
    assert scheduler.max_num_batched_tokens is not None
    tokens = scheduler.max_num_batched_tokens
    logits = min(scheduler.max_num_seqs, tokens) * 128256 * 4
    assert plan.activation_bytes == tokens * 2 * (2 * 4096 + 3 * 14336) + logits
    assert plan.communication_bytes == 0
    parts = plan.weights_bytes + plan.activation_bytes + plan.reserve_bytes + plan.communication_bytes
    assert plan.kv_bytes == pytest.approx(0.9 * 80 * GIB - parts)
    token_bytes = 2 * 32 * 8 * 128 * 2
    assert plan.blocks == plan.kv_bytes // (16 * token_bytes)
    assert plan.max_tokens == 16 * plan.blocks


def test_llama_70b_does_not_fit_one_h100_and_says_by_how_much() -> None:
    with pytest.raises(InfeasiblePlan) as caught:
        planned("llama-3.1-70b")
    assert str(caught.value) == "weights of 131 GiB exceed the 72 GiB a device offers (80 GiB x 0.9)"


def test_llama_70b_in_fp8_fits_two() -> None:
    plan = planned("llama-3.1-70b", Plan(tensor=2), weights="fp8")
    assert 33 * GIB < plan.weights_bytes < 35 * GIB
    assert plan.communication_bytes == 358_612_992
    assert plan.blocks > 1000


def test_everything_but_the_weights_can_be_too_much() -> None:
    with pytest.raises(InfeasiblePlan, match=r"activations of .* engine reserve of .* leave nothing for the KV cache"):
        planned("llama-3.1-70b", Plan(tensor=2), share=0.84)


def test_too_little_left_for_a_block_is_refused() -> None:
    before = planned("llama-3.1-8b")
    spare = before.kv_bytes - 1000.0
    share = 0.9 - spare / (80 * GIB)
    with pytest.raises(InfeasiblePlan, match="hold 0 KV blocks"):
        planned("llama-3.1-8b", share=share)


def test_the_fullest_stage_decides_and_is_named() -> None:
    stages = weights_of("llama-3.1-70b", Plan(pipeline=2))
    assert sum(stages) == catalog.load("model", "llama-3.1-70b").weight_bytes("bf16", "bf16")
    with pytest.raises(InfeasiblePlan, match=r"pipeline stage 1 of 2"):
        planned("llama-3.1-405b", Plan(pipeline=2))
    plan = planned("llama-3.1-70b", Plan(tensor=2, pipeline=2))
    assert plan.weights_bytes == pytest.approx(max(stages) / 2, rel=1e-3)


@pytest.mark.parametrize("name", catalog.names("model"))
def test_one_rank_holds_the_whole_model(name: str) -> None:
    model = catalog.load("model", name)
    expert = (model.moe.dtype if model.moe else None) or "fp8"
    assert weights_of(name) == [model.weight_bytes("bf16", (model.moe.dtype if model.moe else None) or "bf16")]
    assert weights_of(name, weights="fp8") == [model.weight_bytes("fp8", expert)]


@pytest.mark.parametrize("plan", [Plan(tensor=4), Plan(tensor=4, expert=4), Plan(tensor=2, pipeline=2)])
def test_ranks_share_the_weights(plan: Plan) -> None:
    (whole,) = weights_of("mixtral-8x7b")
    shares = weights_of("mixtral-8x7b", plan)
    assert plan.tensor * sum(shares) == pytest.approx(whole, rel=1e-3)


def test_tied_embeddings_are_one_matrix_until_a_pipeline_parts_them() -> None:
    model = catalog.load("model", "qwen3-8b").model_copy(update={"tied_embeddings": True})
    table = 2 * model.vocab * model.hidden
    assert weights_of(model) == [model.weight_bytes("bf16", "bf16")]
    assert sum(weights_of(model, Plan(pipeline=2))) == weights_of(model)[0] + table


def test_kv_heads_repeat_beyond_their_number() -> None:
    wide, wider = (planned("llama-3.1-70b", Plan(tensor=t)) for t in (8, 16))
    assert wide.kv_bytes / wide.blocks == pytest.approx(wider.kv_bytes / wider.blocks, rel=1e-3)


def test_an_fp8_cache_holds_twice_the_tokens() -> None:
    bf16, fp8 = planned("llama-3.1-8b"), planned("llama-3.1-8b", kv_cache="fp8")
    assert fp8.blocks == pytest.approx(2 * bf16.blocks, abs=1)


def test_windowed_layers_hold_no_more_than_their_window() -> None:
    plan = planned("gpt-oss-20b")
    assert plan.groups == ((1, None), (1, 128))
    assert plan.blocks_for(16) == 2
    assert plan.blocks_for(128) == 16
    assert plan.blocks_for(4096) == 256 + 9
    token_bytes = 2 * 12 * 8 * 64 * 2  # of one unit: 12 of 24 layers
    assert plan.blocks == plan.kv_bytes // (16 * token_bytes)
    assert plan.max_tokens == (plan.blocks - 9) * 16


def test_unequal_groups_are_weighted() -> None:
    base = catalog.load("model", "gpt-oss-20b")
    model = base.model_copy(update={"layer_pattern": ("window", "window", "full"), "published_params": None})
    plan = planned(model)
    assert plan.groups == ((1, None), (2, 128))
    assert plan.blocks_for(4096) == 256 + 2 * 9


def test_a_stage_with_an_uneven_share_of_groups_counts_its_fullest() -> None:
    """24 layers, window and full by turns, on 5 stages: the first stage has 5 layers, 3 of them windowed."""
    plan = planned("gpt-oss-20b", Plan(pipeline=5))
    per_layer = 2 * 8 * 64 * 2
    assert plan.groups == ((1, None), (1, 128))
    assert plan.kv_bytes / plan.blocks == pytest.approx(3 * per_layer * 16, rel=1e-3)


groups = st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(1, 500)), min_size=1, max_size=3)


@given(groups=groups, blocks=st.integers(1, 3000), size=st.sampled_from([1, 16, 64]))
def test_blocks_rise_at_block_borders_only_and_max_tokens_is_the_most(
    groups: list[tuple[int, int | None]], blocks: int, size: int
) -> None:
    plan = MemoryPlan(0, 0, 0, 0, 0, size, blocks, tuple(groups))
    assert plan.blocks_for(0) == 0
    for count in (1, 2, 7):
        assert plan.blocks_for(count * size) == plan.blocks_for(count * size - size + 1)
        assert plan.blocks_for(count * size) <= plan.blocks_for(count * size + 1)
    most = plan.max_tokens
    if most is None:
        assert plan.blocks_for(10**9) <= blocks
    else:
        assert plan.blocks_for(most) <= blocks < plan.blocks_for(most + 1)
