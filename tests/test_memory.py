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
from apexsim.specs.deployment import Deployment
from apexsim.specs.device import DeviceProfile
from apexsim.specs.engine import EngineProfile
from apexsim.specs.memory import MemoryDefaults
from apexsim.specs.plan import Plan, Pool

GIB = 2**30
H100 = catalog.load("device", "h100-sxm")
ENGINE = catalog.load("engine", "vllm-v1-sync")


SCHEDULER = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")


def deployed(
    model: Any, plan: Plan | None = None, *, device: DeviceProfile = H100, share: float = 0.9, **fields: Any
) -> Deployment:
    engine: EngineProfile = fields.pop("engine", ENGINE)
    memory = engine.memory.model_copy(update={"gpu_memory_utilization": share})
    scheduler = engine.scheduler.model_copy(update={key: fields.pop(key) for key in SCHEDULER if key in fields})
    return Deployment(
        model=catalog.load("model", model) if isinstance(model, str) else model,
        cluster=Cluster(device=device, devices_per_node=16),
        engine=engine.model_copy(update={"memory": memory, "scheduler": scheduler}),
        pools=(Pool(plan=plan or Plan()),),
        **fields,
    )


def planned(model: Any, plan: Plan | None = None, **options: Any) -> MemoryPlan:
    deployment = deployed(model, plan, **options)
    return plan_memory(deployment.colocated_server())


def weights_of(model: Any, plan: Plan | None = None, **fields: Any) -> list[float]:
    """Bytes on one device of every stage."""
    server = deployed(model, plan, **fields).colocated_server()
    low = lower(server)
    return [weights_bytes(server, low, stage) for stage in range(len(low.stages))]


def test_llama_8b_by_hand() -> None:
    plan = planned("llama-3.1-8b")
    assert plan.weights_bytes == 8_030_261_248 * 2
    # Sampling for 1024 seats: the hidden states of 8192 tokens, and 9.5 copies of fp32 logits.
    assert plan.activation_bytes == 8192 * 4096 * 2 + 9.5 * 1024 * 128256 * 4
    assert (plan.communication_bytes, plan.reserve_bytes) == (0, 200 * 2**20)
    parts = plan.weights_bytes + plan.activation_bytes + plan.reserve_bytes
    assert plan.kv_bytes == pytest.approx(0.9 * round(79.1 * GIB) - parts)
    token_bytes = 2 * 32 * 8 * 128 * 2
    assert plan.blocks == plan.kv_bytes // (16 * token_bytes)
    assert plan.max_tokens == plan.kv_tokens == 16 * plan.blocks
    assert plan.concurrency_at(160) == plan.blocks / 10


def test_a_full_step_in_the_layers_can_be_the_peak() -> None:
    """With few seats: 8192 tokens x bf16 x (hidden + residual + gate/up + activation)."""
    plan = planned("llama-3.1-8b", max_num_seqs=8)
    assert plan.activation_bytes == 8192 * 2 * (2 * 4096 + 3 * 14336)


def test_llama_70b_does_not_fit_one_h100_and_says_by_how_much() -> None:
    with pytest.raises(InfeasiblePlan) as caught:
        planned("llama-3.1-70b")
    assert str(caught.value) == "weights of 131 GiB exceed the 71.2 GiB a device offers (79.1 GiB x 0.9)"


def test_llama_70b_in_fp8_fits_two() -> None:
    plan = planned("llama-3.1-70b", Plan(tensor=2), weights="fp8")
    assert 33 * GIB < plan.weights_bytes < 35 * GIB
    assert plan.communication_bytes == 5 * 358_612_992
    assert plan.blocks > 1000


def test_everything_but_the_weights_can_be_too_much() -> None:
    with pytest.raises(InfeasiblePlan, match=r"activations of .* engine reserve of .* leave nothing for the KV cache"):
        planned("llama-3.1-70b", Plan(tensor=2), share=0.84)


def test_too_little_left_for_a_block_is_refused() -> None:
    before = planned("llama-3.1-8b")
    spare = before.kv_bytes - 1000.0
    share = 0.9 - spare / H100.datasheet.memory_bytes
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
    unpadded = ENGINE.model_copy(update={"expert_padding": ()})
    assert weights_of(name, engine=unpadded) == [
        model.weight_bytes("bf16", (model.moe.dtype if model.moe else None) or "bf16")
    ]
    assert weights_of(name, weights="fp8", engine=unpadded) == [model.weight_bytes("fp8", expert)]


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


def test_experts_are_loaded_as_their_kernels_ask() -> None:
    """Marlin's MXFP4: hidden 2880 in steps of 256, width 2880 on a rank in steps of 128; on Blackwell 256 both."""
    model = catalog.load("model", "gpt-oss-120b")
    published = model.weight_bytes("bf16", "mxfp4")
    experts = 36 * 128 * 3 * 2880 * 2880 * (0.5 + 1 / 32)
    (marlin,) = weights_of("gpt-oss-120b")
    (blackwell,) = weights_of("gpt-oss-120b", device=catalog.load("device", "b200-sxm"))
    assert marlin - published == pytest.approx(experts * (3072 / 2880 * 2944 / 2880 - 1))
    assert blackwell - published == pytest.approx(experts * ((3072 / 2880) ** 2 - 1))
    (quarter,) = weights_of("gpt-oss-120b", Plan(tensor=4))  # 720 wide on a rank: 768
    (whole,) = weights_of("gpt-oss-120b", Plan(tensor=4), engine=ENGINE.model_copy(update={"expert_padding": ()}))
    assert quarter - whole == pytest.approx(experts / 4 * (3072 / 2880 * 768 / 720 - 1))


def shared(share_of: str, **terms: Any) -> EngineProfile:
    memory = {"share_of": share_of, "reserve_bytes": GIB, "sampler_logit_copies": 1.0, **terms}
    return ENGINE.model_copy(update={"memory": ENGINE.memory.model_copy(update=memory)})


def test_what_the_share_is_of_decides_what_comes_out_of_it() -> None:
    """8B on 79.1 GiB, a share of 0.8, a reserve of 1 GiB: the KV bytes by hand, and their standard errors."""
    seen, share, error = round(79.1 * GIB), 0.8, ENGINE.memory_evidence.kept_error if ENGINE.memory_evidence else 0.0
    plans = {of: planned("llama-3.1-8b", share=share, engine=shared(of)) for of in ("total", "started", "loaded")}
    weights, step = plans["total"].weights_bytes, plans["total"].activation_bytes
    kept = {"total": step + GIB, "started": share * GIB, "loaded": share * (step + GIB)}
    assert plans["total"].kv_bytes == pytest.approx(share * seen - weights - step - GIB)
    assert plans["started"].kv_bytes == pytest.approx(share * (seen - GIB) - weights)
    assert plans["loaded"].kv_bytes == pytest.approx(share * (seen - weights - step - GIB))
    for of, plan in plans.items():
        assert plan.kv_error_bytes == pytest.approx(error * kept[of])


def test_an_engine_may_choose_its_share_by_what_it_leaves() -> None:
    """16 GiB of a device, a fifth of a small one; a share that is given outweighs that."""
    memory = MemoryDefaults(gpu_memory_utilization=None, left_bytes=16 * GIB)
    assert memory.share_on(160 * GIB) == 0.9
    assert memory.share_on(24 * GIB) == 0.8
    assert memory.model_copy(update={"gpu_memory_utilization": 0.85}).share_on(160 * GIB) == 0.85


def test_a_shortage_names_what_the_share_is_of() -> None:
    with pytest.raises(InfeasiblePlan, match=r"exceed the 70.3 GiB a device offers \(78.1 GiB free before weights"):
        planned("llama-3.1-70b", engine=shared("started"))
    with pytest.raises(InfeasiblePlan, match=r"exceed the 79.1 GiB a device offers \(79.1 GiB\)"):
        planned("llama-3.1-70b", engine=shared("loaded"))


def test_graphs_count_where_the_engine_counts_them() -> None:
    engine = shared("total", graph_bytes=GIB // 2)
    eager = engine.model_copy(update={"host": engine.host.model_copy(update={"cuda_graphs": False})})
    assert planned("llama-3.1-8b", engine=engine).reserve_bytes == 1.5 * GIB
    assert planned("llama-3.1-8b", engine=eager).reserve_bytes == GIB


def test_a_summary_says_what_a_replica_holds() -> None:
    plan = planned("llama-3.1-70b", Plan(tensor=4, pipeline=2))
    figures = plan.figures(131072)
    assert figures["weights_bytes"] == pytest.approx(2 * catalog.load("model", "llama-3.1-70b").params, rel=1e-4)
    token_bytes = 2 * 80 * 8 * 128 * 2
    assert figures["kv_bytes"] == figures["kv_tokens"] * token_bytes
    assert figures["max_concurrency_at_context"] == figures["kv_tokens"] / 131072
    low, high = figures["kv_tokens_range"]
    assert low < figures["kv_tokens"] < high
    assert plan.kv_error_bytes is not None
    assert high - low == pytest.approx(2 * 1.96 * plan.kv_error_bytes / plan.kv_bytes * plan.kv_tokens, abs=2)


def test_blocks_that_a_server_told_are_no_estimate() -> None:
    engine = shared("total", kv_blocks=1000)
    figures = planned("llama-3.1-70b", engine=engine).figures(16000)  # too large for the device as we count
    assert (figures["kv_tokens"], figures["kv_tokens_range"]) == (16000, [16000, 16000])


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
