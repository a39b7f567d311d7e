"""Recurrent layers: what an estimate must hold, blocks of a fixed state, and head sizes nobody measured."""

from __future__ import annotations

import numpy as np
import pytest

from apexsim import catalog
from apexsim.costs.fitted import AttentionShape, OperatorCosts
from apexsim.costs.memory import plan_memory
from apexsim.costs.recurrent import StateUpdate
from apexsim.costs.steps import BatchStats, build_step_cost
from apexsim.errors import Unsupported
from apexsim.serving.simulator import simulate
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.workload import Requests

H100 = catalog.load("device", "h100-sxm")
COSTS = OperatorCosts(H100)
HYBRIDS = ["qwen3-next-80b-a3b", "nvidia-nemotron-nano-9b-v2"]
TENSOR = {"qwen3-next-80b-a3b": 4, "nvidia-nemotron-nano-9b-v2": 1}


def deployed(name: str, *, tensor: int | None = None, pipeline: int = 1) -> Deployment:
    """On H100, with as many seats as have room for their states."""
    engine = catalog.load("engine", "vllm-v1-async")
    return Deployment(
        model=catalog.load("model", name),
        cluster=Cluster(device=H100, devices_per_node=8),
        engine=engine.model_copy(update={"scheduler": engine.scheduler.model_copy(update={"max_num_seqs": 128})}),
        pools=(Pool(plan=Plan(tensor=tensor or TENSOR[name], pipeline=pipeline)),),
    )


def state_of(name: str, tensor: int = 1) -> StateUpdate:
    layer = catalog.load("model", name).recurrent
    assert layer is not None
    return StateUpdate("state", layer, tensor)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_decode_reads_and_writes_every_state(name: str) -> None:
    state = state_of(name)
    for batch in (1, 16, 256):
        seconds = float(state.decode_s(COSTS, batch, np.ones(1))[0])
        least = batch * 2 * state.layer.state_bytes() / H100.datasheet.memory_bytes_per_s
        assert least < seconds < 2 * least + 10e-6
    contexts = state.decode_s(COSTS, 8, np.array([1.0, 1e3, 1e5]))
    assert len(set(contexts.tolist())) == 1


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_chunk_costs_by_its_tokens_and_never_beats_the_roofline(name: str) -> None:
    state, sheet = state_of(name), H100.datasheet
    cost = state.chunk_cost(COSTS)
    flops, moved = (float(figure) for figure in state.chunk_work(np.array(4096.0), np.array(0.0)))
    seconds = cost(4096, 0)
    assert seconds > max(flops / sheet.flops_per_s["bf16"], moved / sheet.memory_bytes_per_s)
    assert cost(4096, 100_000) == seconds
    assert cost(4096, 0, launch=False) == pytest.approx(seconds - cost.launch_s)
    assert cost.many(np.array([0, 4096]), 0).tolist() == [0.0, pytest.approx(seconds)]


def test_ranks_share_the_heads_and_repeat_the_groups_they_cannot_share() -> None:
    one, four, many = (state_of("qwen3-next-80b-a3b", tensor) for tensor in (1, 4, 32))
    assert four.layer.state_bytes(4) == one.layer.state_bytes() / 4
    assert many.layer.groups_here(32) == 1
    assert many.layer.convolved(32) == 128 + 2 * 128


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_take_blocks_that_do_not_grow(name: str) -> None:
    deployment = deployed(name)
    plan = plan_memory(deployment.colocated_server())
    size, model = plan.block_size, deployment.model
    block_bytes = plan.kv_bytes / plan.blocks
    state_bytes = model.state_bytes_of(range(model.layers), TENSOR[name])
    assert plan.fixed_blocks == pytest.approx(state_bytes / block_bytes, abs=1.01)
    assert plan.blocks_for(0) == 0
    assert plan.blocks_for(100 * size) - plan.blocks_for(size) == 99
    assert plan.blocks_for(size) == plan.fixed_blocks + 1
    assert not plan.steady
    assert plan.max_tokens == (plan.blocks - plan.fixed_blocks) * size


def test_a_stage_of_states_alone_holds_its_share() -> None:
    """Attention stands at layers 14, 21, 30 and 39 of 56: the last of four stages has none."""
    deployment = deployed("nvidia-nemotron-nano-9b-v2", pipeline=4)
    model = deployment.model
    assert model.kv_groups_of(range(42, 56)) == ()
    plan = plan_memory(deployment.colocated_server())
    assert plan.blocks > plan.blocks_for(100_000)


@pytest.mark.parametrize("name", HYBRIDS)
def test_decode_time_grows_with_context_by_its_few_layers_of_attention_only(name: str) -> None:
    deployment = deployed(name)
    cost = build_step_cost(deployment.colocated_server())

    def step_ns(context: int) -> int:
        return sum(cost.stage_ns(BatchStats(8, 8 * context, (8,), (), 8)))

    attention = next(kind for kind in cost.attentions if kind.window is None)
    layers = sum(cost.lowered.layers_of(attention))
    few, many = (float(attention.decode_s(COSTS, 8, np.array([context]))[0]) for context in (1000.0, 30_000.0))
    assert step_ns(30_000) - step_ns(1000) == pytest.approx(1e9 * layers * (many - few), rel=0.01)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_marked_as_estimates(name: str) -> None:
    requests = Requests(name="few", arrival_s=np.zeros(8), prompt_tokens=np.full(8, 500), output_tokens=np.full(8, 20))
    provenance = simulate(deployed(name), requests).summary()["provenance"]
    assert set(provenance["recurrent"]) == {"estimated"}


def test_a_head_size_nobody_measured_follows_the_nearest_as_an_estimate() -> None:
    measured = {key for key in H100.operators["decode_attention"] if key.startswith("bf16_d")}
    assert "bf16_d96" not in measured
    assert COSTS.evidence("decode_attention", "bf16_d96") == "estimated"
    assert COSTS.evidence("decode_attention", "bf16_d128") == "fitted"
    narrow, wide = (float(COSTS.decode_attention_s(64, 4096, AttentionShape(32, 8, d))) for d in (128, 512))
    assert wide == pytest.approx(4 * narrow, rel=0.25)  # four times the bytes
    with pytest.raises(Unsupported, match="no decode_attention cost for nvfp4_d128"):
        COSTS.operator("decode_attention", "nvfp4_d128")
