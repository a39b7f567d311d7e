"""Data-parallel attention: what ranks repeat, what they share, and that their steps are those of the fullest rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from apexsim import catalog
from apexsim.cli.main import app
from apexsim.costs.accounting import account
from apexsim.costs.lowering import Lowered, lower
from apexsim.costs.memory import MemoryPlan, plan_memory, weights_bytes
from apexsim.costs.operators import Collective, Experts
from apexsim.costs.ranks import deal, fullest
from apexsim.costs.steps import BatchStats, StepCost, build_step_cost
from apexsim.errors import BadInput
from apexsim.io.deployments import deployment_from, load_deployment, read_deployment, write_deployment
from apexsim.serving.simulator import simulate
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.plan import Plan
from apexsim.specs.workload import Requests
from apexsim.validation.cases import case_of
from apexsim.validation.replay import replay
from apexsim.validation.runs import read_runs

MIXTRAL = catalog.load("model", "mixtral-8x7b")
NO_HOST = {"step_s": 0.0, "per_sequence_s": 0.0, "exposed_step_s": 0.0, "launch_s": 0.0}


def deployed(tensor: int = 1, ranks: int = 1, **choices: Any) -> Deployment:
    given = {"model": "mixtral-8x7b", "device": "h200-sxm", "engine": "vllm-v1-sync", "tensor": tensor}
    return deployment_from(None, {**given, "attention_data": ranks, **choices})


def lowered(tensor: int = 1, ranks: int = 1, **choices: Any) -> Lowered:
    deployment = deployed(tensor, ranks, **choices)
    return lower(deployment.colocated_server())


def cost_of(tensor: int = 1, ranks: int = 1, **choices: Any) -> StepCost:
    deployment = deployed(tensor, ranks, engine_options=NO_HOST, **choices)
    return build_step_cost(deployment.colocated_server())


def planned(tensor: int = 1, ranks: int = 1, **choices: Any) -> MemoryPlan:
    deployment = deployed(tensor, ranks, **choices)
    return plan_memory(deployment.colocated_server())


def decodes(count: int, context: int) -> BatchStats:
    return BatchStats(count, count * context, (), (), count)


def row_names(low: Lowered) -> list[str]:
    return [op.name for op in low.blocks[0].rows]


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_stage_has_tensor_x_attention_data_devices() -> None:
    plan = Plan(tensor=2, attention_data=4, pipeline=2, expert=4)
    assert (plan.stage_devices, plan.devices, plan.moe_tensor) == (8, 16, 2)
    assert plan.name == "tp2-adp4-pp2-ep4"
    assert Plan(tensor=2).name == "tp2-pp1"


@pytest.mark.parametrize(
    ("model", "plan", "reason"),
    [
        ("llama-3.1-8b", Plan(attention_data=4), "4 attention-data ranks of a model without experts share nothing"),
        ("llama-3.1-8b", Plan(attention_data=4), "give --replicas 4"),
        ("mixtral-8x7b", Plan(tensor=2, attention_data=2, expert=8), "does not divide the tensor degree 2 x 2"),
        ("mixtral-8x7b", Plan(tensor=4, attention_data=4, expert=8), "experts cut over ranks of 4 x 4 devices cross"),
    ],
)
def test_plans_that_make_no_sense_say_why(model: str, plan: Plan, reason: str) -> None:
    cluster = Cluster(device=catalog.load("device", "h200-sxm"), nodes=4)
    assert any(reason in said for said in plan.lawful(catalog.load("model", model), cluster.group()))


def test_whole_experts_may_lie_across_nodes() -> None:
    cluster = Cluster(device=catalog.load("device", "h200-sxm"), nodes=4)
    assert Plan(attention_data=32, expert=32).lawful(catalog.load("model", "deepseek-v3"), cluster.group()) == ()


def test_the_plan_is_said_by_flag_and_by_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give --replicas 2"):
        deployed(ranks=2, model="llama-3.1-8b")
    flags = ["--model", "llama-3.1-8b", "--device", "h200-sxm", "--attention-data", "2", "--workload", "chat"]
    refused = CliRunner().invoke(app, ["simulate", *flags])
    assert isinstance(refused.exception, BadInput)
    assert "--replicas 2" in str(refused.exception)
    path = tmp_path / "deployment.yaml"
    path.write_text("model: mixtral-8x7b\ndevice: h200-sxm\ntensor: 2\nattention_data: 4\nexpert: 8\n")
    pool = load_deployment(path).pools[0]
    assert (pool.plan.name, pool.devices) == ("tp2-adp4-pp1-ep8", 8)
    write_deployment(tmp_path / "again.yaml", read_deployment(path))
    assert load_deployment(tmp_path / "again.yaml") == load_deployment(path)


# -- what ranks repeat and what they share -----------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """Attention, norms and router whole on each of 4 ranks, a quarter of the experts, embeddings and head whole."""
    low = lowered(ranks=4, expert=4)
    server = deployed(ranks=4, expert=4).colocated_server()
    hidden, head = 4096, 128
    attention = hidden * (32 + 2 * 8) * head + 32 * head * hidden
    experts = 8 // 4 * 3 * hidden * 14336
    layer = attention + experts + hidden * 8 + 2 * hidden
    wanted = 2 * (32 * layer + 2 * 32000 * hidden + hidden)
    assert weights_bytes(server, low, 0) == pytest.approx(wanted)


def test_kv_blocks_are_those_of_all_ranks_and_a_sequence_lies_on_one() -> None:
    plan = planned(ranks=4, expert=4)
    token_bytes = 2 * 32 * 8 * 128 * 2  # all KV heads: nothing of a sequence lies elsewhere
    assert plan.blocks == 4 * int(plan.kv_bytes // (16 * token_bytes))
    assert plan.max_tokens == 16 * plan.blocks // 4
    assert plan.blocks > planned(tensor=4).blocks / 4
    # The latent cache, whole on every tensor rank, is not repeated on data ranks: 8 hold 8 times the sequences.
    latent = {"model": "deepseek-v3", "weights": "fp8_block", "engine_options": {"max_num_batched_tokens": 1024}}
    tensor, data = planned(tensor=8, **latent), planned(ranks=8, expert=8, **latent)
    assert data.blocks / data.kv_bytes == pytest.approx(8 * tensor.blocks / tensor.kv_bytes, rel=1e-3)


def test_activations_are_a_ranks_tokens_and_the_experts_tokens_of_all() -> None:
    tokens, width = 8192, 8192
    deployment = deployed(ranks=2, expert=2, engine_options={"max_num_batched_tokens": tokens, "max_num_seqs": 64})
    expert = 4096 + 2 * (2 * 14336 + 14336)
    found = plan_memory(deployment.colocated_server()).activation_bytes
    assert found == 2 * tokens * (width + 2 * expert)


def test_settings_of_a_rank_count_for_every_rank() -> None:
    of_replica = deployed(ranks=4, engine_options={"max_num_seqs": 32}).colocated_server().scheduler
    assert (of_replica.max_num_seqs, of_replica.max_num_batched_tokens) == (128, 4 * 8192)
    assert of_replica.max_chunk_tokens == 8192
    together = deployed(ranks=4, engine="sglang-0.5").colocated_server().scheduler
    assert (together.max_num_seqs, together.max_num_batched_tokens, together.max_chunk_tokens) == (1024, 8192, 2048)
    one = deployed().colocated_server()
    assert one.scheduler == one.rank_scheduler


def test_tokens_are_gathered_or_dispatched_over_the_ranks() -> None:
    gathering = row_names(lowered(tensor=2, ranks=2, expert=4))
    assert gathering[-5:] == ["router", "gather", "experts", "scatter", "ffn_all_reduce"]
    dispatch = {"engine_options": {"moe_dispatch": "all_to_all"}}
    assert row_names(lowered(ranks=4, expert=4, **dispatch))[-4:] == ["router", "dispatch", "experts", "combine"]
    both = lowered(tensor=2, ranks=2, expert=4, **dispatch)
    assert row_names(both)[-1] == "ffn_all_gather"
    (sent,) = (op for op in both.blocks[0].rows if op.name == "dispatch")
    assert isinstance(sent, Collective)
    assert (sent.group, sent.rows, sent.bytes_per_row) == (4, "all_tokens", 2 * 4096 * 2 / 4)
    cut = next(op for op in lowered(tensor=2, ranks=2).blocks[0].rows if isinstance(op, Experts))
    assert (cut.layer.ep, cut.layer.inter, cut.rows) == (1, 14336 // 4, "all_tokens")


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", [decodes(64, 900), BatchStats(9, 9 * 500, (), ((700, 0), (300, 512)), 11)])
def test_one_rank_costs_what_tensor_parallelism_alone_does(stats: BatchStats) -> None:
    plain = deployment_from(
        None, {"model": "mixtral-8x7b", "device": "h200-sxm", "engine": "vllm-v1-sync", "tensor": 4}
    )
    assert deployed(tensor=4) == plain
    assert [op.rows for op in lowered(tensor=4).blocks[0].rows] == ["tokens"] * len(lowered(tensor=4).blocks[0].rows)
    plain_cost = build_step_cost(plain.colocated_server())
    low = plain_cost.lowered
    own = low.stages[0].row_operators()
    tokens = np.array([stats.decodes + sum(tokens for tokens, _ in stats.chunks)])
    rows_s = sum(count * plain_cost.tables.rows_s(op, tokens)[0] for op, count in own)
    head_s = sum(plain_cost.tables.rows_s(op, np.array([stats.survivors]))[0] for op in low.stages[0].head)
    free = cost_of(tensor=4)
    mixing = 32 * free._mixing_ns(stats)[0]
    assert free.stage_ns(stats)[0] == pytest.approx(1e9 * (rows_s + head_s) + mixing, abs=4)


def test_two_ranks_halve_the_tokens_of_what_is_dense_and_share_the_experts() -> None:
    cost = cost_of(ranks=2, expert=2)
    tables = cost.tables
    half, whole = np.array([32]), np.array([64])
    rows = cost.lowered.stages[0].row_operators()
    dense = sum(count * tables.rows_s(op, half)[0] for op, count in rows if op.rows == "tokens")
    shared = sum(count * tables.rows_s(op, whole)[0] for op, count in rows if op.rows == "all_tokens")
    head = sum(tables.rows_s(op, half)[0] for op in cost.lowered.stages[0].head)
    attention = 32 * tables.decode(cost.attentions[0], 32).at(1000)
    wanted = 1e9 * (dense + shared + head) + attention
    assert cost.stage_ns(decodes(64, 1000))[0] == pytest.approx(wanted, abs=4)
    odd = cost.stage_ns(decodes(63, 1000))[0]
    assert odd == pytest.approx(wanted - 1e9 * shared + 1e9 * sum(
        count * tables.rows_s(op, whole - 1)[0] for op, count in rows if op.rows == "all_tokens"
    ), abs=4)  # fmt: skip


def test_a_prompt_is_not_cut_over_ranks() -> None:
    cost = cost_of(ranks=4, expert=4)
    one, two, five = (cost.stage_ns(BatchStats(0, 0, (), ((1024, 0),) * n, n))[0] for n in (1, 2, 5))
    gathered = [cost._gathered[1024 * n][0] for n in (1, 2, 5)]
    assert one - gathered[0] == two - gathered[1]  # the second prompt runs beside the first
    assert five - gathered[2] > 1.5 * (one - gathered[0])


def test_chunks_are_dealt_longest_first_to_the_emptiest_rank() -> None:
    assert deal([10, 70, 30, 40], 2) == [0, 0, 1, 1]
    assert fullest(((10, 0), (50, 8), (30, 0), (40, 0)), 2) == ((30, 0), (40, 0))
    assert fullest(((10, 0), (50, 8)), 1) == ((10, 0), (50, 8))
    assert fullest((), 4) == ()


@pytest.mark.parametrize("plan", [{"ranks": 4, "expert": 4}, {"tensor": 2, "ranks": 2, "pipeline": 2}])
def test_runs_of_decodes_equal_their_steps(plan: dict[str, int]) -> None:
    cost = cost_of(**plan)
    stats = decodes(37, 700)
    run = cost.decode_run(stats)
    assert run is not None
    steps = [cost.stage_ns(stats.grown(step)) for step in range(200)]
    assert [tuple(row) for row in run.stages_ns(0, 200)] == steps


def busy(count: int = 80, prompt: int = 3000) -> Requests:
    rng = np.random.default_rng(5)
    return Requests(
        name="busy",
        arrival_s=np.cumsum(rng.exponential(0.02, count)),
        prompt_tokens=rng.integers(1, prompt, count),
        output_tokens=rng.integers(1, 120, count),
    )


@pytest.mark.parametrize("engine", ["vllm-v1-async", "sglang-0.5", "trtllm-1.0"])
def test_macro_steps_change_nothing(engine: str) -> None:
    deployment = deployed(ranks=4, expert=4, engine=engine)
    fast, exact = (simulate(deployment, busy(), exact_steps=exact) for exact in (False, True))
    pd.testing.assert_frame_equal(fast.requests, exact.requests, check_exact=True)
    assert any("attention-data ranks" in note for note in fast.summary()["notes"])


def test_no_prompt_gets_more_of_a_step_than_a_rank_takes() -> None:
    options = {"max_num_batched_tokens": 512}
    deployment = deployed(ranks=4, expert=4, engine_options=options)
    alone = Requests(name="alone", arrival_s=np.zeros(1), prompt_tokens=np.array([3000]), output_tokens=np.array([2]))
    assert simulate(deployment, alone).steps["chunk_tokens"].max() == 512
    assert 512 < simulate(deployment, busy()).steps["chunk_tokens"].max() <= 4 * 512


# -- what a run used ---------------------------------------------------------------------------------------------------


def accounted(cost: StepCost, stats: BatchStats) -> Any:
    names = ("decodes", "context", "chunk_tokens", "survivors", "repeats")
    counts = (stats.decodes, stats.context, sum(tokens for tokens, _ in stats.chunks), stats.survivors, 1)
    steps = {name: np.array([value]) for name, value in zip(names, counts, strict=True)}
    chunks = np.array([(0, *chunk) for chunk in stats.chunks], dtype=np.int64).reshape(-1, 3).T
    return account(cost, steps, dict(zip(("step", "tokens", "history"), chunks, strict=True)))


MIXED = BatchStats(63, 63 * 900, (), ((500, 0), (200, 100), (900, 0)), 66)


def test_flops_are_those_of_the_model_however_it_is_laid_out() -> None:
    one, ranks, cut = (
        accounted(cost_of(**plan), MIXED).flops for plan in ({}, {"ranks": 4, "expert": 4}, {"tensor": 2, "ranks": 2})
    )
    assert ranks == pytest.approx(one, rel=1e-9)
    assert one < cut < 1.001 * one  # the router is repeated on tensor ranks


def test_device_seconds_are_those_of_every_rank() -> None:
    """All ranks take the step's time, but for prompts, which keep one rank busy: the others wait, at idle power."""
    cost = cost_of(ranks=4, expert=4)
    for stats, whole in ((decodes(63, 900), True), (MIXED, False)):
        seconds = sum(accounted(cost, stats).seconds.values())
        step_s = cost.stage_ns(stats)[0] / 1e9
        assert seconds == pytest.approx(4 * step_s, rel=1e-6) if whole else seconds < 4 * step_s
        assert seconds > 3 * step_s


def test_energy_and_cost_count_all_devices() -> None:
    result = simulate(deployed(tensor=2, ranks=4, expert=8), busy(40))
    summary = result.summary()
    price = summary["cost"]["usd_per_hour"]
    assert price == simulate(deployed(tensor=8), busy(40)).summary()["cost"]["usd_per_hour"]
    assert summary["energy"]["mean_power_w"] > 8 * result.deployment.cluster.device.power.idle_w
    assert 0 < summary["utilization"]["busy"] <= 1


# -- measured runs -----------------------------------------------------------------------------------------------------


def test_measured_runs_with_data_parallel_attention_are_predicted(data: Path) -> None:
    folder = data / "ground_truth"
    sets = [folder / "silicon" / "runs.csv", folder / "energy_h100_b200" / "runs.csv"]
    runs = [run for path in sets for run in read_runs(path) if (run.row.attention_data or 1) > 1]
    runs = [run for run in runs if not run.row.exclude]
    assert len(runs) == 32
    spread = []
    for run in runs:
        case = case_of(run.row)
        plan, laid_out = case.deployment.pools[0].plan, any(" instead of " in note for note in case.notes)
        assert laid_out or plan.devices == run.row.gpus  # as its launch script says, or as the row is labelled
        if plan.attention_data > 1:
            spread.append(run)
    sparse_run = next(run for run in spread if run.row.workload == "closed_loop")
    for run in (sparse_run, next(run for run in spread if run.row.workload == "saturated")):
        replayed = replay(run)
        assert replayed.status == "ok"
        assert any("attention-data ranks" in note for note in replayed.notes)
    sparse = replay(sparse_run)
    assert sparse.figures["tpot_mean_s"] == pytest.approx(sparse_run.row.tpot_mean_s, rel=0.3)
