"""Latent attention end to end: sizes by hand, lowering, costs and their physics, a fit that recovers a known truth."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms import mla as form
from apexsim.costs.forms import prefill
from apexsim.costs.forms.hardware import Hardware
from apexsim.costs.lowering import lower
from apexsim.costs.memory import plan_memory
from apexsim.costs.mla import LatentMixing, projections
from apexsim.costs.operators import Gemm
from apexsim.costs.steps import BatchStats, build_step_cost
from apexsim.errors import Unsupported
from apexsim.fitting import mla as fitting
from apexsim.serving.simulator import simulate
from apexsim.specs.base import parse_spec
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.device import DeviceProfile, FittedOperator
from apexsim.specs.latent import LatentAttention
from apexsim.specs.layers import KVGroup
from apexsim.specs.model import ModelSpec
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.workload import Requests

DEEPSEEK, GLM = catalog.load("model", "deepseek-r1"), catalog.load("model", "glm-5")
H200 = catalog.load("device", "h200-sxm")
DECODE = {c.name: c.start for c in form.COEFFICIENTS} | {"launch_s": 1e-5, "head_tile": 64.0}
PREFILL = {c.name: c.start for c in prefill.COEFFICIENTS} | {
    "hidden_passes": 4.0,
    "causal_skip": 1.0,
    "query_tile": 128.0,
}


def operator(name: str, coefficients: dict[str, float]) -> FittedOperator:
    return FittedOperator(form=name, coefficients=coefficients, evidence="fitted", source="made up")


def with_latent(profile: DeviceProfile = H200) -> DeviceProfile:
    """A profile with latent attention of round coefficients, whatever the shipped one has."""
    latent = {
        "mla_decode": {"bf16": operator("mla_decode", DECODE)},
        "mla_prefill": {"bf16": operator("mla_prefill", PREFILL)},
    }
    return profile.model_copy(update={"operators": {**profile.operators, **latent}})


COSTS = OperatorCosts(with_latent())


def deployed(
    model: ModelSpec = DEEPSEEK, device: DeviceProfile | None = None, engine: str = "vllm-v1-async", **fields: Any
) -> Deployment:
    return Deployment(
        model=model,
        cluster=Cluster(device=device or with_latent(), devices_per_node=16),
        engine=catalog.load("engine", engine),
        pools=(Pool(plan=Plan(tensor=8)),),
        **({"weights": "fp8_block", "kv_cache": "bf16"} | fields),
    )


def mixing(model: ModelSpec = DEEPSEEK, heads: int = 16) -> LatentMixing:
    assert model.mla is not None
    return LatentMixing("attention", model.mla, model.hidden, heads, "bf16")


# Sizes


def test_a_latent_vector_is_cached_whole_on_every_rank() -> None:
    (group,) = DEEPSEEK.kv_groups
    assert group.bytes_per_token("bf16") == 61 * (512 + 64) * 2
    assert group.bytes_per_token("fp8", tensor=8) == 61 * (512 + 64)
    (sparse,) = GLM.kv_groups
    assert sparse.bytes_per_token("bf16", tensor=8) == 78 * (512 + 64 + 128) * 2  # the indexer's key beside it
    assert KVGroup(2, 8, 128, None).bytes_per_token("bf16", tensor=8) == 2 * 2 * 128 * 2


def test_parameters_of_a_layer_by_hand() -> None:
    down = 7168 * 1536 + 7168 * (512 + 64)
    up = 1536 * 128 * (128 + 64) + 512 * 128 * (128 + 128)
    assert DEEPSEEK.mixer_params(DEEPSEEK.layer_kinds[0]) == down + up + 128 * 128 * 7168 == 187_105_280
    assert DEEPSEEK.layer_kinds[0].count == 3
    assert not DEEPSEEK.layer_kinds[0].moe
    scorer = 2048 * 32 * 128 + 6144 * (128 + 32)
    assert GLM.mla is not None
    without = GLM.mla.model_copy(update={"indexer": None})
    assert GLM.mixer_params(GLM.layer_kinds[0]) - without.params(6144, 64, indexed=False) == scorer


def test_flops_of_a_token_stop_growing_where_keys_are_picked() -> None:
    grown = DEEPSEEK.flops_per_token(4096) - DEEPSEEK.flops_per_token(2048)
    assert grown == 61 * 2048 * 2 * 128 * (192 + 128)
    sparse = GLM.flops_per_token(8192) - GLM.flops_per_token(4096)
    assert sparse == 78 * 4096 * 2 * 32 * 128  # the indexer alone


@pytest.mark.parametrize(("weights", "expected"), [("fp8_block", 1.0), ("nvfp4", 2.0), ("int4_wo", 2.0), ("bf16", 2.0)])
def test_projections_stay_bf16_in_four_bit_checkpoints(weights: str, expected: float) -> None:
    assert DEEPSEEK.mla is not None
    before, _ = projections(DEEPSEEK.mla, (7168, 16), weights, indexed=False)
    found = {op.name: op for op in before if isinstance(op, Gemm)}
    assert found["qkv_a"].weight_bytes == expected * 7168 * (1536 + 576)
    assert found["kv_b_keys"].weight_bytes == 2.0 * 512 * 16 * 128


def test_a_spec_that_contradicts_itself_is_refused() -> None:
    shape = DEEPSEEK.model_dump(exclude_defaults=True)
    with pytest.raises(Exception, match="with mla give kv_heads 1 and head_dim 192"):
        parse_spec(ModelSpec, shape | {"kv_heads": 128}, "x")


# Lowering


def test_queries_may_be_projected_at_once() -> None:
    """Moonlight: no rank between hidden state and queries."""
    assert DEEPSEEK.mla is not None
    sizes = DEEPSEEK.mla.model_copy(update={"q_lora_rank": None})
    before, _ = projections(sizes, (2048, 16), "bf16", indexed=False)
    found = {op.name: (op.n, op.k) for op in before if isinstance(op, Gemm)}
    assert (found["q"], found["kv_a"]) == ((16 * 192, 2048), (576, 2048))
    assert "q_norm" not in {op.name for op in before}
    assert sizes.params(2048, 16, indexed=False) == 2048 * (16 * 192 + 576) + 16 * 512 * 256 + 16 * 128 * 2048


def test_layers_that_share_an_indexer_neither_score_nor_cache() -> None:
    assert GLM.mla is not None
    assert GLM.mla.indexer is not None
    owners = tuple(range(0, 78, 4))
    indexer = GLM.mla.indexer.model_copy(update={"layers": owners})
    shared = GLM.model_copy(update={"mla": GLM.mla.model_copy(update={"indexer": indexer})})
    share = len(owners) / 78
    (group,) = shared.kv_groups
    assert group.bytes_per_token("bf16") == 2 * (78 * 576 + len(owners) * 128)
    assert [group.index_keys for group in shared.kv_groups_of(range(1, 4))] == [0]
    deployment = deployed(shared)
    low = lower(deployment.colocated_server())
    scored = {block.kind.indexed: "indexer_q" in {op.name for op in block.rows} for block in low.blocks}
    assert scored == {True: True, False: False}
    (mixed,) = low.attentions
    assert isinstance(mixed, LatentMixing)
    assert mixed.indexed == share
    pairs = np.array([8192.0])
    whole, part = mixing(GLM, 8).indexer_s(COSTS, pairs, pairs), mixed.indexer_s(COSTS, pairs, pairs)
    assert part == pytest.approx(share * whole)


def test_heads_are_split_and_down_projections_repeated() -> None:
    deployment = deployed()
    low = lower(deployment.colocated_server())
    dense, experts = low.blocks
    found = {op.name: op for op in dense.rows if isinstance(op, Gemm)}
    assert (found["qkv_a"].n, found["qkv_a"].k) == (1536 + 576, 7168)
    assert (found["q_b"].n, found["q_b"].k) == (16 * 192, 1536)
    assert (found["o"].n, found["o"].k) == (7168, 16 * 128)
    assert dense.attention == experts.attention == mixing()
    assert [n for _, n in low.stages[0].blocks] == [3, 58]
    assert "attention_all_reduce" in dense.graph
    copies = ["kv_b_keys", "cache_write", "join_queries", "attention"]
    assert all(dense.graph.has_edge(*pair) for pair in pairwise(copies))


def test_tensorrt_llm_copies_while_it_rotates() -> None:
    deployment = deployed(engine="trtllm-1.1")
    dense, _ = lower(deployment.colocated_server()).blocks
    assert dense.graph.has_edge("kv_b_keys", "attention")


def test_memory_holds_as_many_tokens_on_8_ranks_as_one_rank_has_room_for() -> None:
    deployment = deployed()
    plan = plan_memory(deployment.colocated_server())
    per_block = deployment.engine.scheduler.block_size * 61 * 576 * 2
    assert plan.blocks == int(plan.kv_bytes // per_block)


def test_a_device_without_tables_of_it_says_so() -> None:
    a100 = catalog.load("device", "a100-sxm")
    deployment = deployed(device=a100, weights="bf16")
    with pytest.raises(Unsupported, match="a100-sxm has no mla_"):
        build_step_cost(deployment.colocated_server())


# Costs


def test_decodes_never_get_faster_and_never_beat_the_bandwidth() -> None:
    contexts = np.array([1.0, 100.0, 1024.0, 8192.0, 131072.0])
    for batch in (1, 16, 256):
        seconds = mixing().decode_s(COSTS, batch, contexts)
        assert np.all(np.diff(seconds) > 0)
        least = batch * contexts * 576 * 2 / H200.datasheet.memory_bytes_per_s
        assert np.all(seconds >= least)


def test_the_form_by_hand_where_bytes_rule() -> None:
    hw = Hardware(1e15, 1e12, 100, 5e7)
    c = DECODE | {"memory_efficiency": 0.5, "sm_bandwidth": 6.0, "sharpness": 12.0, "block_s": 5e-8, "merge_s": 1e-8}
    batch = form.LatentBatch(64.0, 65536.0, 16.0, 512.0, 64.0, 2.0)
    expected = 64 * (65536 * 576 * 2 + 2 * 16 * 1088) / 0.5e12
    assert float(form.decode_s(batch, c, hw)) == pytest.approx(expected + 1e-5, rel=1e-3)
    assert float(form.flops(batch)) == 2 * 64 * 16 * 65536 * 1088


def test_a_replayed_cache_is_faster_than_a_cold_one_only_while_it_fits() -> None:
    hw = Hardware.of(H200.datasheet, "bf16")
    small, large = (form.LatentBatch(b, 1024.0, 16.0, 512.0, 64.0, 2.0) for b in (8.0, 1024.0))
    assert form.decode_s(small, DECODE, hw, cold=False) < form.decode_s(small, DECODE, hw)
    assert form.decode_s(large, DECODE, hw, cold=False) == pytest.approx(form.decode_s(large, DECODE, hw), rel=0.01)


def test_chunks_pay_for_their_history_twice_over() -> None:
    cost = mixing().chunk_cost(COSTS)
    alone, behind = cost(512, 0), cost(512, 8192)
    unfolding = 8192 * 2 * 512 * 16 * 256 / H200.datasheet.flops_per_s["bf16"]
    assert behind - alone > unfolding
    assert cost(512, 0, launch=False) < alone
    many = cost.many(np.array([0.0, 512.0, 512.0]), np.array([0.0, 0.0, 8192.0]))
    assert many.tolist() == pytest.approx([0.0, alone, behind])


def test_picked_keys_bound_the_attention_and_leave_the_indexer() -> None:
    costs = COSTS
    assert costs.evidence("mla_decode", mixing(GLM).key) == "estimated"
    dense = LatentMixing("attention", LatentAttention(**GLM.mla.model_dump(exclude={"indexer"})), 6144, 8, "bf16")
    sparse, far = mixing(GLM, 8), np.array([2048.0, 131072.0])
    near_s, far_s = sparse.decode_s(costs, 64, far)
    assert far_s < dense.decode_s(costs, 64, far)[1] / 2
    scores = 64 * (131072 - 2048) * 128 * 2 / (0.5 * H200.datasheet.memory_bytes_per_s)
    assert far_s - near_s == pytest.approx(scores, rel=0.05)
    long = sparse.chunk_cost(costs)
    assert long(1024, 100_000) < dense.chunk_cost(costs)(1024, 100_000)
    assert long.many(np.array([1024.0]), np.array([100_000.0]))[0] == pytest.approx(long(1024, 100_000))


def test_work_by_hand() -> None:
    flops, moved = mixing().decode_work(np.array([4.0]), np.array([4000.0]))
    assert flops[0] == 2 * 16 * 1088 * 4000
    assert moved[0] == 2 * 576 * 4000 + 2 * 16 * 1088 * 4
    flops, _ = mixing().chunk_work(np.array([100.0]), np.array([1000.0]))
    assert flops[0] == 2 * 16 * 320 * (100 * 1000 + 5050) + 2 * 16 * 512 * 256 * 1000


def test_a_step_adds_up_its_parts() -> None:
    deployment = deployed()
    cost = build_step_cost(deployment.colocated_server())
    decode, more = (cost.stage_ns(BatchStats(8, 8 * mean, survivors=8))[0] for mean in (1000, 9000))
    grown = np.diff(mixing().decode_s(COSTS, 8, np.array([1000.0, 9000.0])))[0]
    assert more - decode == pytest.approx(61 * grown * 1e9, rel=1e-3)
    mixed = cost.stage_ns(BatchStats(8, 8000, chunks=((512, 4096),), survivors=9))[0]
    assert mixed > decode + 61e9 * mixing().chunk_cost(COSTS)(512, 4096, launch=False)


# Fitting


def write_tables(folder: Path, costs: OperatorCosts, truth: dict[str, dict[str, float]]) -> None:
    """Tables of modules that are exactly what the forms say, 40 us beside."""
    hw, folder = Hardware.of(costs.profile.datasheet, "bf16"), folder / "datacenter" / "h200_sxm"
    folder.mkdir(parents=True)
    for kind, name in (("mla_decode", "mla_generation_module"), ("mla_prefill", "mla_context_module")):
        rows = []
        for heads in (8, 16, 32, 64, 128):
            for batch in (1, 4, 16, 64, 256):
                for tokens in (64, 256, 1024, 4096, 16384):
                    query = 1 if kind == "mla_decode" else tokens
                    rows.append({"heads": heads, "batch": batch, "q_len": query, "kv_len": tokens})
        frame = pd.DataFrame(rows).assign(
            dtype="bf16", kv_dtype="bf16", gemm_dtype="fp8_block", backend="b", table_version="1"
        )
        frame = frame.astype(dict.fromkeys(("heads", "batch", "q_len", "kv_len"), float))
        if kind == "mla_decode":
            shape = form.LatentBatch(frame["batch"], frame["kv_len"], frame["heads"], 512.0, 64.0, 2.0)
            core = form.decode_s(shape, truth[kind], hw, cold=False)
        else:
            heads = prefill.Heads(frame["heads"], frame["heads"], 160.0, None, 2.0)
            core, _ = prefill.prefill_s(
                prefill.Chunks(frame["q_len"], 0.0 * frame["q_len"], frame["batch"]),
                prefill.bind(heads, truth[kind], hw),
            )
            core = core + truth[kind]["hidden_passes"] * 2 * 7168 * frame["batch"] * frame["q_len"] / hw.bytes_per_s
        frame["latency_us"] = 1e6 * (np.asarray(core) + 40e-6 + fitting._projections_s(frame, costs))
        frame.to_parquet(folder / f"{name}.parquet")


def test_a_fit_recovers_modules_made_of_the_forms(tmp_path: Path) -> None:
    costs = OperatorCosts(H200, sustained=False)
    launches = {
        kind: H200.operators[kind]["bf16_d128"].coefficients["launch_s"]
        for kind in ("decode_attention", "prefill_attention")
    }
    truth = {
        "mla_decode": DECODE | {"launch_s": launches["decode_attention"]},
        "mla_prefill": PREFILL | {"launch_s": launches["prefill_attention"]},
    }
    write_tables(tmp_path, costs, truth)
    found = fitting.operators(H200, tmp_path, "h200_sxm")
    for kind in truth:
        fitted = found[kind]["bf16"]
        assert fitted.quality["random"].median < 0.01
        assert fitted.quality["largest"].median < 0.03
        assert fitted.coefficients["module_fp8_block_s"] == pytest.approx(40e-6, rel=0.3)
    assert fitting.operators(H200, tmp_path, "elsewhere") == {}


# End to end


@pytest.mark.parametrize("name", ["deepseek-r1", "glm-5"])
def test_a_run_is_the_same_by_steps_and_says_what_it_rests_on(name: str) -> None:
    deployment = deployed(catalog.load("model", name))
    count = np.arange(24)
    requests = Requests(
        name="some", arrival_s=0.05 * count, prompt_tokens=200 + 90 * count, output_tokens=20 + 7 * count
    )
    fast, exact = (simulate(deployment, requests, exact_steps=steps) for steps in (False, True))
    pd.testing.assert_frame_equal(fast.requests, exact.requests)
    summary = fast.summary()
    assert summary["requests"]["finished"] == 24
    assert summary["energy"]["total_j"] > 0
    evidence = {kind: set(shares) for kind, shares in summary["provenance"].items() if kind.startswith("mla_")}
    assert set(evidence) == {"mla_decode", "mla_prefill"}
    # These coefficients have no measured range, so nothing lies outside one.
    assert all(shares == ({"fitted"} if name == "deepseek-r1" else {"estimated"}) for shares in evidence.values())
