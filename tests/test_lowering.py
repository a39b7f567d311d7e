"""Lowering: the operators of a block, and arithmetic that must agree with the model's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms.prefill import causal_pairs
from apexsim.costs.lowering import Lowered, lower, split_layers
from apexsim.costs.operators import Collective, Elementwise, Experts, Gemm
from apexsim.costs.steps import BatchStats, build_step_cost
from apexsim.errors import InfeasiblePlan
from apexsim.io.engines import with_engine_options
from apexsim.specs.base import parse_spec
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import CommunicationDefaults
from apexsim.specs.experts import MoESpec
from apexsim.specs.model import ModelSpec
from apexsim.specs.plan import Plan, Pool

ONE = np.ones(1)
H100 = catalog.load("device", "h100-sxm")


def deployed(model: Any, plan: Plan | None = None, engine: str = "vllm-v1-sync", **fields: Any) -> Deployment:
    return Deployment(
        model=catalog.load("model", model) if isinstance(model, str) else model,
        cluster=Cluster(device=H100, devices_per_node=16),
        engine=catalog.load("engine", engine),
        pools=(Pool(plan=plan or Plan()),),
        **fields,
    )


def lowered(model: Any, plan: Plan | None = None, **fields: Any) -> Lowered:
    deployment = deployed(model, plan, **fields)
    return lower(deployment.colocated_server())


def gemms(low: Lowered) -> dict[str, Gemm]:
    found = [op for block in low.blocks for op in block.rows if isinstance(op, Gemm)]
    return {op.name: op for op in found}


def flops_of_tokens(low: Lowered, tokens: float, pairs: dict[int | None, float], survivors: float) -> float:
    """FLOPs of one rank of every stage for a step, from its operators."""
    total = 0.0
    for stage in low.stages:
        total += sum(count * float(op.flops(tokens * ONE)[0]) for op, count in stage.row_operators())
        total += sum(float(op.flops(survivors * ONE)[0]) for op in stage.head)
        mixed = [(block.attention, n, block.kind.window) for block, n in stage.blocks if block.attention]
        total += sum(n * float(op.decode_work(tokens * ONE, pairs[window] * ONE)[0][0]) for op, n, window in mixed)
    return total


def test_a_dense_block_by_hand() -> None:
    low = lowered("llama-3.1-8b")
    (block,) = low.blocks
    assert list(nx.topological_sort(block.graph)) == [
        "attention_norm", "qkv", "rope", "attention", "o", "ffn_norm", "gate_up", "activation", "down",
    ]  # fmt: skip
    sizes = {name: (op.n, op.k) for name, op in gemms(low).items()}
    assert sizes == {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    per_token = 2 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    assert sum(float(op.flops(ONE)[0]) for op in block.rows) == per_token == 436_207_616
    assert [op.name for op in low.stages[0].once] == ["embedding", "last_norm"]
    assert [op.name for op in low.stages[0].head] == ["lm_head", "sampling"]


def test_tensor_parallelism_splits_and_reduces_twice_a_layer() -> None:
    low = lowered("llama-3.1-70b", Plan(tensor=4))
    (block,) = low.blocks
    sizes = {name: (op.n, op.k) for name, op in gemms(low).items()}
    assert sizes == {"qkv": (2560, 8192), "o": (8192, 2048), "gate_up": (14336, 8192), "down": (8192, 7168)}
    assert (block.attention.shape.heads, block.attention.shape.kv_heads) == (16, 2)
    reduces = [op for op in block.rows if isinstance(op, Collective)]
    assert [(op.kind, op.group, op.bytes_per_row) for op in reduces] == [("all_reduce", 4, 16384.0)] * 2
    assert {op.custom_max_bytes for op in reduces} == {8 << 20}
    (stage,) = low.stages
    assert [op.name for op in stage.once] == ["embedding", "embedding_all_reduce", "last_norm"]
    assert [(op.name, op.rows) for op in stage.head] == [
        ("lm_head", "survivors"), ("logits_all_gather", "survivors"), ("sampling", "survivors"),
    ]  # fmt: skip
    assert stage.head[0].weight_bytes == 2 * 8192 * 128256 / 4


def test_all_reduces_that_are_sent_at_once_grow_with_everybody_s_bytes() -> None:
    """vLLM's kernel, the measured one, sends in two goes above 256 KiB on 8 ranks; TensorRT-LLM's from 129 tokens."""
    costs = OperatorCosts(H100)
    tokens = np.array([0.0, 1.0, 8.0, 64.0, 128.0, 129.0])
    measured = Collective("r", "all_reduce", 8, 16384.0, custom_max_bytes=8 << 20)
    at_once = replace(measured, one_shot_max_bytes=128 * 16384.0)
    table, found = measured.seconds(costs, tokens), at_once.seconds(costs, tokens)
    assert list(found[[0, 1, 2, 5]]) == list(table[[0, 1, 2, 5]])
    kib = 1024.0
    small, large = (float(costs.collective_s("all_reduce", 8, n * kib, custom_allowed=True)) for n in (16, 128))
    assert found[3] == pytest.approx(large + (large - small) / 112 * (1024 - 128))
    assert 1 < found[3] / table[3] < found[4] / table[4]


def test_two_ranks_always_send_at_once() -> None:
    costs = OperatorCosts(H100)
    payload = np.array([1e3, 1e6, 2e7])
    measured = costs.collective_s("all_reduce", 2, payload, custom_allowed=True)
    assert list(costs.one_shot_s(2, payload)) == list(measured)


def test_choosing_experts_is_an_engine_s_own_time_once_a_layer() -> None:
    deployment = deployed("qwen3-30b-a3b", Plan(tensor=2))
    chosen = with_engine_options(deployment.engine, {"expert_choice_s": 20e-6}, "here")
    slower = deployment.model_copy(update={"engine": chosen})
    stats = BatchStats(8, 8 * 1000, (), (), 8)
    times = [build_step_cost(each.colocated_server()).stage_ns(stats)[0] for each in (deployment, slower)]
    assert times[1] - times[0] == pytest.approx(48 * 20_000, abs=48)


def test_no_time_for_choosing_where_the_measured_experts_are_the_engine_s_own() -> None:
    """Kernels of experts in Blackwell's tables are TensorRT-LLM's; vLLM pays for what is around them."""
    trtllm, vllm = catalog.load("engine", "trtllm-1.1"), catalog.load("engine", "vllm-v1-async")
    hopper, blackwell = H100.datasheet, catalog.load("device", "b200-sxm").datasheet
    assert trtllm.expert_choice_s(hopper) == trtllm.host.expert_choice_s > 0
    assert trtllm.expert_choice_s(blackwell) == 0
    assert vllm.expert_choice_s(blackwell) == vllm.host.expert_choice_s > 0


def test_how_far_an_engine_sends_at_once() -> None:
    tokens = CommunicationDefaults(fused_norm_max_bytes=1 << 20, one_shot_max_tokens=128)
    assert tokens.one_shot_bytes(4096.0) == 128 * 4096
    assert tokens.one_shot_bytes(65536.0) == 1 << 20
    large = CommunicationDefaults(fused_norm_max_bytes=64 << 20, one_shot_max_bytes=16 << 20)
    assert large.one_shot_bytes(8192.0) == 8 << 20  # above, the library's all-reduce takes over
    assert CommunicationDefaults(one_shot_max_tokens=128).one_shot_bytes(4096.0) == 0
    assert tokens.model_copy(update={"custom_all_reduce": False}).one_shot_bytes(4096.0) == 0


def test_no_custom_all_reduce_when_the_engine_has_it_off() -> None:
    deployment = deployed("llama-3.1-8b", Plan(tensor=2))
    communication = deployment.engine.communication.model_copy(update={"custom_all_reduce": False})
    engine = deployment.engine.model_copy(update={"communication": communication})
    deployment = deployment.model_copy(update={"engine": engine})
    (block,) = lower(deployment.colocated_server()).blocks
    assert {op.key for op in block.rows if isinstance(op, Collective)} == {"nccl_2"}


def test_kv_heads_repeat_beyond_their_number() -> None:
    (block,) = lowered("llama-3.1-8b", Plan(tensor=16)).blocks
    assert (block.attention.shape.heads, block.attention.shape.kv_heads) == (2, 1)
    assert gemms(lowered("llama-3.1-8b", Plan(tensor=16)))["qkv"].n == (2 + 2) * 128


def test_an_unlawful_plan_says_why() -> None:
    with pytest.raises(InfeasiblePlan, match="does not divide the 32 attention heads"):
        lowered("llama-3.1-8b", Plan(tensor=3))


def test_replicas_need_devices_of_their_own() -> None:
    deployment = deployed("llama-3.1-8b").model_copy(update={"pools": (Pool(plan=Plan(tensor=2), replicas=9),)})
    with pytest.raises(InfeasiblePlan, match="the replicas of serve use 18 devices, h100-sxm has 16"):
        deployment.servers()


@given(layers=st.integers(1, 200), stages=st.integers(1, 16))
def test_layers_split_evenly_and_the_first_take_the_rest(layers: int, stages: int) -> None:
    parts = split_layers(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_pipeline_stages_hold_their_ends_and_hand_over() -> None:
    low = lowered("opt-13b", Plan(pipeline=3))
    assert [len(stage.layers) for stage in low.stages] == [14, 13, 13]
    assert [[op.name for op in stage.once] for stage in low.stages] == [["embedding", "send"], ["send"], ["last_norm"]]
    assert [bool(stage.head) for stage in low.stages] == [False, False, True]
    send = low.stages[0].once[-1]
    assert isinstance(send, Collective)
    assert (send.kind, send.bytes_per_row) == ("send_recv", 2 * 5120)


def test_windowed_and_full_blocks_are_counted_by_stage() -> None:
    low = lowered("gpt-oss-120b", Plan(pipeline=5))
    assert [block.kind.window for block in low.blocks] == [128, None]
    counts = [{block.kind.window: count for block, count in stage.blocks} for stage in low.stages]
    assert counts == [{128: 4, None: 4}, {128: 4, None: 3}, {None: 4, 128: 3}, {128: 4, None: 3}, {None: 4, 128: 3}]


def test_experts_in_tensor_and_expert_parallel() -> None:
    def experts(plan: Plan) -> Experts:
        (block,) = lowered("mixtral-8x7b", plan).blocks
        return next(op for op in block.rows if isinstance(op, Experts))

    assert (experts(Plan(tensor=4)).layer.inter, experts(Plan(tensor=4)).layer.ep) == (14336 // 4, 1)
    spread = experts(Plan(tensor=4, expert=4))
    assert (spread.layer.inter, spread.layer.ep, spread.layer.experts) == (14336, 4, 8)
    assert spread.weight_bytes == experts(Plan(tensor=4)).weight_bytes == 2 * 2 * 3 * 4096 * 14336
    assert spread.flops(ONE) == pytest.approx(2 * 3 * 4096 * 14336 * 2 / 4)


def test_all_to_all_dispatch_replaces_the_closing_all_reduce() -> None:
    deployment = deployed("qwen3-30b-a3b", Plan(tensor=4, expert=4))
    communication = deployment.engine.communication.model_copy(update={"moe_dispatch": "all_to_all"})
    engine = deployment.engine.model_copy(update={"communication": communication})
    deployment = deployment.model_copy(update={"engine": engine})
    (block,) = lower(deployment.colocated_server()).blocks
    order = list(nx.topological_sort(block.graph))
    assert order[-5:] == ["router", "dispatch", "experts", "combine", "ffn_all_gather"]
    dispatch = next(op for op in block.rows if op.name == "dispatch")
    assert isinstance(dispatch, Collective)
    assert dispatch.bytes_per_row == 2 * 2048 * 8 / 4  # a rank sends its quarter of the tokens to 8 experts each


def test_exchanges_that_merge_copies_send_a_token_once_to_a_rank() -> None:
    deployment = deployed("qwen3-30b-a3b", Plan(tensor=4, expert=4))
    sent = {}
    for library in ("all_to_all", "deepep", "deepep_ll", "trtllm"):
        communication = deployment.engine.communication.model_copy(update={"moe_dispatch": library})
        engine = deployment.engine.model_copy(update={"communication": communication})
        changed = deployment.model_copy(update={"engine": engine})
        (block,) = lower(changed.colocated_server()).blocks
        dispatch = next(op for op in block.rows if op.name == "dispatch")
        assert isinstance(dispatch, Collective)
        sent[dispatch.kind, dispatch.key] = dispatch.bytes_per_row / (2 * 2048 / 4)
    merged = 4 * (1 - 0.75**8)
    assert sent == {
        ("all_to_all", "nccl_4"): 8,
        ("deepep_dispatch", "ranks_4"): merged,
        ("deepep_ll_dispatch", "ranks_4"): 8,
        ("trtllm_dispatch", "ranks_4"): merged,
    }


def test_shared_experts_run_beside_the_routed_ones() -> None:
    base = catalog.load("model", "qwen3-30b-a3b")
    assert base.moe is not None
    moe = MoESpec(**base.moe.model_dump() | {"shared_experts": 2, "shared_ffn": 768})
    low = lowered(base.model_copy(update={"moe": moe, "published_params": None}), Plan(tensor=2))
    (block,) = low.blocks
    sizes = gemms(low)
    assert (sizes["shared_gate_up"].n, sizes["shared_down"].k) == (1536, 768)
    assert set(block.graph.predecessors("add_shared")) == {"experts", "shared_down"}
    assert set(block.graph.successors("ffn_norm")) == {"router", "shared_gate_up"}
    assert list(block.graph.successors("add_shared")) == ["ffn_all_reduce"]


def small(**shape: Any) -> ModelSpec:
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "vocab": 100}
    return parse_spec(ModelSpec, {"name": "small", "source": "made up", "max_context": 512, **sizes, **shape}, "small")


def test_norms_after_blocks_alone_leave_sums_before_them() -> None:
    (block,) = lowered(small(pre_norms=False, post_norms=True)).blocks
    bytes_per_row = {op.name: op.bytes_per_row for op in block.rows if isinstance(op, Elementwise)}
    assert {name for name in bytes_per_row if "norm" in name} == {"attention_post_norm", "ffn_post_norm"}
    assert bytes_per_row["attention_residual"] == bytes_per_row["ffn_residual"] == 3 * 2 * 64
    assert list(block.graph.successors("attention_post_norm")) == ["ffn_residual"]


def test_attention_and_ffn_side_by_side_read_one_norm() -> None:
    low = lowered(small(parallel=True), Plan(tensor=2))
    (block,) = low.blocks
    assert set(block.graph.successors("attention_norm")) == {"qkv", "gate_up"}
    assert set(block.graph.predecessors("add_parallel")) == {"attention_all_reduce", "ffn_all_reduce"}
    assert [op.name for op in block.rows if op.name.endswith("norm")] == ["attention_norm"]


def test_layers_without_positions_rotate_nothing() -> None:
    low = lowered(small(layers=8, nope_every=4))
    found = {count: "rope" in {op.name for op in block.rows} for block, count in low.stages[0].blocks}
    assert found == {6: True, 2: False}


# Latent attention multiplies in another order than its model says, one for decodes and one for chunks.
PLAIN = [name for name in catalog.names("model") if catalog.load("model", name).mla is None]


@pytest.mark.parametrize("name", PLAIN)
def test_every_model_lowers_to_its_own_flops_and_weights(name: str) -> None:
    """FLOPs of a decode step = tokens x the model's FLOPs per token; of a chunk, with its causal pairs."""
    model = catalog.load("model", name)
    low = lowered(model)
    for block in low.blocks:
        assert nx.is_directed_acyclic_graph(block.graph)
        named = [data["operator"].name for _, data in block.graph.nodes(data=True)]
        assert sorted(named) == sorted(op.name for op in (block.attention, *block.rows) if op)
    tokens, context = 7, 300
    pairs = {w: tokens * float(min(context, w or context)) for w in (None, *model.windows)}
    assert flops_of_tokens(low, tokens, pairs, tokens) == pytest.approx(tokens * model.flops_per_token(context))
    if model.recurrent:
        return  # a chunk of it works in blocks: see test_recurrent
    chunk = 256
    pairs = {w: float(causal_pairs(chunk, 100, w)) for w in (None, *model.windows)}
    by_token = sum(model.flops_per_token(100 + i) for i in range(1, chunk + 1))
    assert flops_of_tokens(low, chunk, pairs, chunk) == pytest.approx(by_token)


@pytest.mark.parametrize("plan", [Plan(tensor=2), Plan(tensor=8), Plan(tensor=2, pipeline=3)])
def test_ranks_together_do_the_work_of_one(plan: Plan) -> None:
    one = flops_of_tokens(lowered("qwen3-8b"), 5, {None: 1000.0}, 5)
    split = flops_of_tokens(lowered("qwen3-8b", plan), 5, {None: 1000.0}, 5)
    assert plan.tensor * split == pytest.approx(one)


def test_products_of_an_engine_read_weights_no_slower_than_those_they_are_said_to_be_like() -> None:
    """TensorRT-LLM in fp8: memory-bound products at the share of bf16's, compute-bound ones as measured."""
    found = {}
    for weights in ("fp8", "bf16"):
        deployment = deployed("llama-3.1-70b", Plan(tensor=2), "trtllm-1.1", weights=weights)
        rows = lower(deployment.colocated_server()).stages[0].row_operators()
        (found[weights],) = [op for op, _ in rows if op.name == "gate_up"]
    assert (found["fp8"].reads_like, found["bf16"].reads_like) == ("bf16", None)
    costs = OperatorCosts(H100)
    slow, quick = (costs.operator("gemm", dtype).coefficients["memory_efficiency"] for dtype in ("fp8", "bf16"))
    assert slow < quick
    product, measured = found["fp8"], replace(found["fp8"], reads_like=None)
    few, many = (float((product.seconds(costs, n * ONE) / measured.seconds(costs, n * ONE))[0]) for n in (1, 16384))
    assert slow / quick - 0.01 < few < 0.99
    assert many == pytest.approx(1, abs=0.01)
    assert replace(found["bf16"], reads_like="fp8").seconds(costs, ONE) == found["bf16"].seconds(costs, ONE)


@pytest.mark.parametrize("model", ["deepseek-v3", "nvidia-nemotron-nano-9b-v2"])
def test_products_of_latent_and_recurrent_layers_are_the_engine_s_too(model: str) -> None:
    deployment = deployed(model, Plan(tensor=8), "trtllm-1.1", weights="fp8")
    rows = [op for op, _ in lower(deployment.colocated_server()).stages[0].row_operators()]
    products = [op for op in rows if isinstance(op, Gemm) and op.dtype == "fp8"]
    assert len(products) > 3
    assert all(op.reads_like == "bf16" and op.quantised for op in products)


def test_mxfp4_experts_on_marlin_cost_what_its_kernel_of_int4_experts_does() -> None:
    """Slower than the own kernel for large steps, about as fast for small ones; weights take their own bytes."""
    found, costs = [], OperatorCosts(H100)
    for marlin in (False, True):
        engine = with_engine_options(catalog.load("engine", "vllm-v1-async"), {"marlin_experts": marlin}, "here")
        deployment = deployed("gpt-oss-120b", Plan(tensor=2)).model_copy(update={"engine": engine})
        rows = lower(deployment.colocated_server()).stages[0].row_operators()
        found += [op for op, _ in rows if isinstance(op, Experts)]
    (own, marlin) = dict.fromkeys(found)
    assert (own.key, marlin.key) == ("mxfp4", "int4_wo")
    assert own.weight_bytes == marlin.weight_bytes
    few, many = (float((marlin.seconds(costs, n * ONE) / own.seconds(costs, n * ONE))[0]) for n in (8, 8192))
    assert few < 1.1
    assert many > 1.3
