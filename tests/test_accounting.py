"""Accounting: seconds, FLOPs, bytes and joules agree with the costs of the steps and with arithmetic."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from apexsim import catalog
from apexsim.costs.accounting import Accounting, account
from apexsim.costs.steps import BatchStats, StepCost, build_step_cost
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import HostTerms
from apexsim.specs.plan import Plan, Pool

spec: Any = cache(catalog.load)
ONE = Plan()
SYNC = HostTerms(step_s=1e-3, per_sequence_s=17e-6, exposed_step_s=1e-4)
HIDING = HostTerms(step_s=2e-3, exposed_step_s=1e-4, overlapped=True)


def cost_of(model: str, plan: Plan = ONE, host: HostTerms = SYNC, device: str = "h100-sxm", **fields: Any) -> StepCost:
    engine = spec("engine", "vllm-v1-sync").model_copy(update={"host": host})
    pool = Pool(plan=plan)
    cluster = Cluster(device=spec("device", device))
    deployment = Deployment(model=spec("model", model), cluster=cluster, engine=engine, pools=(pool,), **fields)
    return build_step_cost(deployment.colocated_server())


def columns(
    steps: list[tuple[BatchStats, int]], windows: tuple[int, ...] = ()
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
    """Recorded columns of steps with their repeats."""
    rows = [
        (stats.decodes, stats.context, sum(tokens for tokens, _ in stats.chunks), stats.survivors, repeats)
        for stats, repeats in steps
    ]
    names = ("decodes", "context", "chunk_tokens", "survivors", "repeats")
    table = dict(zip(names, np.array(rows, dtype=np.int64).reshape(-1, 5).T, strict=True))
    for position, window in enumerate(windows):
        table[f"window_context_{window}"] = np.array([stats.window_contexts[position] for stats, _ in steps])
        growing = [stats.growing[position] if stats.growing else 0 for stats, _ in steps]
        table[f"window_growing_{window}"] = np.array(growing)
    chunks = [(row, *chunk) for row, (stats, _) in enumerate(steps) for chunk in stats.chunks]
    named = zip(("step", "tokens", "history"), np.array(chunks, dtype=np.int64).reshape(-1, 3).T, strict=True)
    return table, dict(named)


def accounted(cost: StepCost, steps: list[tuple[BatchStats, int]], windows: tuple[int, ...] = ()) -> Accounting:
    return account(cost, *columns(steps, windows))


def decode(batch: int, context: int) -> BatchStats:
    return BatchStats(batch, batch * context, (), (), batch)


MIXED = BatchStats(30, 30 * 800, (), ((500, 0), (200, 1000)), 32)
MANY = BatchStats(0, 0, (), tuple((20 + 7 * i, 50 * (i % 3)) for i in range(40)), 40)
CROWDED = MANY._replace(decodes=5, context=5 * 300, survivors=45)
ALONE = BatchStats(0, 0, (), ((700, 300),), 1)
STEPS = [
    (decode(8, 600), 1),
    (MIXED, 1),
    (MANY, 1),
    (CROWDED, 1),
    (ALONE, 1),
    (decode(32, 801), 50),
    (decode(256, 100), 3),
]


def singly(steps: list[tuple[BatchStats, int]]) -> list[BatchStats]:
    return [stats.grown(step) for stats, repeats in steps for step in range(repeats)]


@pytest.mark.parametrize("plan", [Plan(), Plan(tensor=2), Plan(tensor=2, pipeline=2)])
@pytest.mark.parametrize("host", [SYNC, HostTerms(step_s=8e-3, exposed_step_s=1e-4, overlapped=True)])
def test_device_seconds_are_the_steps_own_times(plan: Plan, host: HostTerms) -> None:
    """Every nanosecond of every stage, on each of its devices, has an operator or the host to answer for it."""
    cost = cost_of("llama-3.1-8b", plan, host)
    spent = sum(sum(cost.stage_ns(stats)) for stats in singly(STEPS)) * plan.tensor * 1e-9
    assert sum(accounted(cost, STEPS).seconds.values()) == pytest.approx(spent, rel=1e-4)


@pytest.mark.parametrize("plan", [Plan(), Plan(pipeline=2)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_run_that_crosses_the_host_floor_waits_as_long_as_its_steps(plan: Plan, share: float) -> None:
    def waited_s(cost: StepCost, steps: list[tuple[BatchStats, int]]) -> float:
        return sum(seconds for (kind, _), seconds in accounted(cost, steps).seconds.items() if kind == "host")

    run, no_host = decode(64, 500), cost_of("llama-3.1-8b", plan, HostTerms())
    first_s, last_s = (no_host.stage_ns(run.grown(step))[0] * 1e-9 for step in (0, 1999))
    cost = cost_of("llama-3.1-8b", plan, HostTerms(step_s=first_s + share * (last_s - first_s), overlapped=True))
    singly = waited_s(cost, [(run.grown(step), 1) for step in range(2000)])
    assert singly > 0
    assert waited_s(cost, [(run, 2000)]) == pytest.approx(singly, rel=1e-3)


@pytest.mark.parametrize("step", [MIXED, MANY, CROWDED, ALONE])
def test_seconds_of_one_step_with_chunks(step: BatchStats) -> None:
    cost = cost_of("llama-3.1-8b")
    assert sum(accounted(cost, [(step, 1)]).seconds.values()) == pytest.approx(cost.stage_ns(step)[0] * 1e-9, rel=1e-5)


@pytest.mark.parametrize("device", ["a100-sxm", "l40s"])
@pytest.mark.parametrize("plan", [ONE, Plan(tensor=2)])
def test_chunks_and_decodes_of_one_launch_take_what_it_takes(device: str, plan: Plan) -> None:
    cost = cost_of("llama-3.1-8b", plan, device=device)
    for step in (MIXED, CROWDED):
        worked_s = sum(accounted(cost, [(step, 1)]).seconds.values())
        assert worked_s == pytest.approx(plan.devices * sum(cost.stage_ns(step)) / 1e9, rel=1e-6)


def test_windowed_models_too() -> None:
    cost = cost_of("gpt-oss-20b")
    mixed = BatchStats(2, 700 + 60, (128 + 60,), ((300, 200),), 3)
    none = {"window_contexts": (0,), "growing": (0,)}
    steps = [*windowed((128,)), (mixed._replace(growing=(0,)), 1), (MANY._replace(**none), 1)]
    spent = sum(sum(cost.stage_ns(stats)) for stats in singly(steps)) * 1e-9
    assert sum(accounted(cost, steps, (128,)).seconds.values()) == pytest.approx(spent, rel=1e-4)


def windowed(windows: tuple[int, ...]) -> list[tuple[BatchStats, int]]:
    """Rows of decodes that are all beyond every window, all below, and both; some rows are of one step."""
    contexts = [[900] * 4, [50] * 2, [50, 900, 901], [3, 60, 60, 70, 500, 700, 899], [127, 900], [20, 50, 900]]
    return [
        (decodes_of(each, windows), repeats) for each, repeats in zip(contexts, (40, 20, 79, 59, 2, 1), strict=True)
    ]


def decodes_of(contexts: list[int], windows: tuple[int, ...]) -> BatchStats:
    attended = tuple(sum(min(context, window) for context in contexts) for window in windows)
    growing = tuple(sum(context < window for context in contexts) for window in windows)
    return BatchStats(len(contexts), sum(contexts), attended, (), len(contexts), growing, 100)


@pytest.mark.parametrize(("model", "host"), [("gpt-oss-20b", SYNC), ("gemma-3-12b", SYNC), ("gpt-oss-20b", HIDING)])
@pytest.mark.parametrize("plan", [Plan(), Plan(pipeline=2)])
def test_a_run_under_windows_accounts_like_its_steps(model: str, host: HostTerms, plan: Plan) -> None:
    cost, windows = cost_of(model, plan, host), spec("model", model).windows
    rows = windowed(windows)
    whole, parts = (accounted(cost, steps, windows) for steps in (rows, [(stats, 1) for stats in singly(rows)]))
    assert whole.flops == pytest.approx(parts.flops, rel=1e-9)
    assert whole.bytes_moved == pytest.approx(parts.bytes_moved, rel=1e-9)
    assert whole.seconds == pytest.approx(parts.seconds, rel=1e-6)
    assert whole.energy_j == pytest.approx(parts.energy_j, rel=1e-3)


def test_a_run_accounts_like_its_steps() -> None:
    cost = cost_of("llama-3.1-8b")
    whole, parts = accounted(cost, STEPS), accounted(cost, [(stats, 1) for stats in singly(STEPS)])
    assert whole.flops == pytest.approx(parts.flops, rel=1e-9)
    assert whole.bytes_moved == pytest.approx(parts.bytes_moved, rel=1e-9)
    assert whole.seconds == pytest.approx(parts.seconds, rel=1e-6)
    assert whole.energy_j == pytest.approx(parts.energy_j, rel=1e-3)


@pytest.mark.parametrize("plan", [Plan(), Plan(tensor=4), Plan(pipeline=2)])
def test_joules_and_seconds_of_rows_add_up_to_those_of_operators(plan: Plan) -> None:
    found = accounted(cost_of("llama-3.1-8b", plan), STEPS)
    assert len(found.step_j) == len(found.step_s) == len(STEPS)
    assert found.step_j.sum() == pytest.approx(sum(found.energy_j.values()), rel=1e-12)
    assert found.step_s.sum() == pytest.approx(sum(found.seconds.values()), rel=1e-12)
    alone = [accounted(cost_of("llama-3.1-8b", plan), [step]) for step in STEPS]
    assert found.step_j == pytest.approx([sum(each.energy_j.values()) for each in alone], rel=1e-9)


@pytest.mark.parametrize("plan", [Plan(), Plan(tensor=2, pipeline=2)])
def test_flops_are_those_of_the_model(plan: Plan) -> None:
    model = spec("model", "llama-3.1-8b")
    done = accounted(cost_of("llama-3.1-8b", plan), [(decode(16, 500), 10)])
    by_hand = sum(16 * model.flops_per_token(500 + step) for step in range(10))
    assert done.flops == pytest.approx(by_hand, rel=1e-9)
    chunk = accounted(cost_of("llama-3.1-8b", plan), [(BatchStats(0, 0, (), ((100, 50),), 1), 1)])
    head = 2.0 * model.vocab * model.hidden
    by_hand = sum(model.flops_per_token(50 + i) - head for i in range(1, 101)) + head
    assert chunk.flops == pytest.approx(by_hand, rel=1e-9)


def test_a_decode_step_reads_the_weights_and_the_cache() -> None:
    model = spec("model", "llama-3.1-8b")
    done = accounted(cost_of("llama-3.1-8b"), [(decode(16, 2000), 1)])
    cache_bytes = 16 * 2000 * 2 * 32 * 8 * 128 * 2
    weights = model.weight_bytes("bf16", "bf16") - 2 * model.embedding_params
    assert weights + cache_bytes < done.bytes_moved < 1.05 * (weights + cache_bytes)


def test_power_lies_between_the_least_and_the_limit() -> None:
    power = spec("device", "h100-sxm").power
    least = min(power.active_w, power.comm_w, power.gap_w)
    drawn = []
    for step in (decode(1, 100), decode(64, 500), BatchStats(0, 0, (), ((8000, 0),), 1)):
        done = accounted(cost_of("llama-3.1-8b"), [(step, 5 if not step.chunks else 1)])
        drawn.append(sum(done.energy_j.values()) / sum(done.seconds.values()))
        assert least <= drawn[-1] <= power.limit_w
    assert drawn == sorted(drawn)


def test_collectives_and_waits_draw_their_own_power() -> None:
    power = spec("device", "h100-sxm").power
    done = accounted(cost_of("llama-3.1-70b", Plan(tensor=4)), STEPS)
    for kind, watts in (("all_reduce", power.comm_w), ("host", power.gap_w)):
        seconds = sum(spent for (operator, _), spent in done.seconds.items() if operator == kind)
        assert done.energy_j[kind] == pytest.approx(watts * seconds)


def test_sizes_beyond_the_measured_ones_count_as_extrapolated() -> None:
    inside = accounted(cost_of("llama-3.1-8b"), [(decode(8, 600), 1)])
    assert ("decode_attention", "extrapolated") not in inside.seconds
    assert inside.seconds["gemm", "fitted"] > 0
    long = accounted(cost_of("llama-3.1-8b"), [(BatchStats(0, 0, (), ((120_000, 0),), 1), 1)])
    assert long.seconds["prefill_attention", "extrapolated"] > 0
    assert long.seconds["gemm", "extrapolated"] > 0


def test_no_steps_account_to_nothing() -> None:
    done = accounted(cost_of("llama-3.1-8b", Plan(tensor=2)), [])
    assert done.flops == done.bytes_moved == 0
    assert not done.seconds
    assert sum(done.energy_j.values()) == 0


def test_sliding_windows_that_a_device_never_saw_are_estimated() -> None:
    """The A100's tables hold none: its inner loop is taken to be as fast under a window."""
    operators = catalog.load("device", "a100-sxm").operators["prefill_attention"]
    assert all("window_efficiency" not in op.coefficients for op in operators.values())
    found = accounted(cost_of("gemma-2-9b", device="a100-sxm"), [(BatchStats(0, 0, (0,), ((512, 0),), 1), 1)], (4096,))
    assert found.seconds["prefill_attention", "estimated"] > 0
