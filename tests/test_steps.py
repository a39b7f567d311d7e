"""Step costs: runs equal their steps, tables equal the costs behind them, and physics holds."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.steps import BatchStats, StepCost, build_step_cost
from apexsim.costs.tables import BLOCK, OperatorTables, PrefixTable, tables_for
from apexsim.errors import Unsupported
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import HostTerms
from apexsim.specs.plan import Plan, Pool
from apexsim.units import to_ns

ONE = Plan()
FOREVER = 1 << 62
NO_HOST = HostTerms()
SYNC = HostTerms(step_s=1e-3, per_sequence_s=17e-6)
ASYNC = HostTerms(step_s=6.5e-3, per_sequence_s=20e-6, exposed_step_s=0.15e-3, overlapped=True)


spec: Any = cache(catalog.load)


@cache
def step_cost(
    model: str, plan: Plan = ONE, host: HostTerms = NO_HOST, device: str = "h100-sxm", **fields: Any
) -> StepCost:
    engine = spec("engine", "vllm-v1-sync").model_copy(update={"host": host})
    cluster = Cluster(device=spec("device", device))
    pool = Pool(plan=plan)
    deployment = Deployment(model=spec("model", model), cluster=cluster, engine=engine, pools=(pool,), **fields)
    return build_step_cost(deployment.colocated_server())


def decode_stats(contexts: list[int], windows: tuple[int, ...] = ()) -> BatchStats:
    """Statistics of decodes, from the tokens each attends to."""
    stats = BatchStats(len(contexts), sum(contexts), survivors=len(contexts))
    if not windows:
        return stats
    windowed = tuple(sum(min(context, window) for context in contexts) for window in windows)
    left = [[window - context for context in contexts if context < window] for window in windows]
    regular = min([steps + 1 for each in left for steps in each], default=FOREVER)
    return stats._replace(window_contexts=windowed, growing=tuple(map(len, left)), regular=regular)


def grown(contexts: list[int], steps: int) -> list[int]:
    return [context + steps for context in contexts]


plans = st.sampled_from([Plan(), Plan(tensor=2), Plan(pipeline=2), Plan(pipeline=3)])
hosts = st.sampled_from([NO_HOST, SYNC, ASYNC])
batches = st.lists(st.integers(1, 200), min_size=1, max_size=6) | st.lists(
    st.integers(1, 3000), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=150)
@given(
    model=st.sampled_from(["llama-3.1-8b", "gpt-oss-20b", "gemma-3-12b"]),
    plan=plans,
    host=hosts,
    contexts=batches,
    steps=st.integers(1, 300),
)
def test_a_run_is_the_sum_of_its_steps(
    model: str, plan: Plan, host: HostTerms, contexts: list[int], steps: int
) -> None:
    """Every step of a run, from the sequences themselves: the same integers singly, listed and in sum.

    Whatever mixture of contexts below a window and beyond it.
    """
    cost, windows = step_cost(model, plan, host), spec("model", model).windows
    stats = decode_stats(contexts, windows)
    run = cost.decode_run(stats)
    assert run is not None
    assert run.limit >= 1
    steps = min(steps, run.limit)
    singly = []
    for step in range(steps):
        now = decode_stats(grown(contexts, step), windows)
        ahead = stats.grown(step)
        assert of_this_step(ahead) == of_this_step(now)
        assert ahead.growing == now.growing or step == stats.regular - 1
        assert ahead.regular <= now.regular
        assert run.stage_ns(step) == cost.stage_ns(now)
        singly.append(cost.stage_ns(now))
    part = steps // 2
    assert run.stages_ns(part, steps - part) == [list(stages) for stages in singly[part:]]
    if cost.stages == 1:
        assert run.elapsed_ns(steps) == sum(stage for (stage,) in singly)
        assert run.durations_ns(steps).tolist() == [stage for (stage,) in singly]
        assert run.elapsed_ns(part) == sum(stage for (stage,) in singly[:part])


def of_this_step(stats: BatchStats) -> BatchStats:
    """Without what only matters to steps to come."""
    return stats._replace(growing=(), regular=1)


def test_a_run_crosses_from_host_to_device_time() -> None:
    """An overlapped host hides the device at short contexts; the crossing is found wherever a run is cut."""
    host = ASYNC.model_copy(update={"step_s": 10.5e-3, "per_sequence_s": 0.0})
    cost = step_cost("llama-3.1-8b", host=host)
    stats = decode_stats([40] * 64)
    run = cost.decode_run(stats)
    assert run is not None
    durations = run.durations_ns(4000)
    floor = to_ns(10.5e-3 + 0.15e-3)
    assert durations[0] == floor
    assert durations[-1] > floor
    crossing = int(np.argmax(durations > floor))
    for steps in (0, 1, crossing - 1, crossing, crossing + 1, 4000, 17, crossing + 500):
        fresh = cost.decode_run(stats)
        assert fresh is not None
        assert run.elapsed_ns(steps) == fresh.elapsed_ns(steps) == durations[:steps].sum()


def test_windows_bound_a_run() -> None:
    cost = step_cost("gpt-oss-20b")

    def limit(stats: BatchStats) -> int:
        run = cost.decode_run(stats)
        assert run is not None
        return run.limit

    assert limit(decode_stats([100], (128,))) == 29  # contexts 100 ... 128, the last that fills the window
    assert limit(decode_stats([127], (128,))) == 2
    assert limit(decode_stats([60, 100, 200], (128,))) == 29
    assert limit(decode_stats([128, 200], (128,))) > 100_000
    assert limit(of_this_step(decode_stats([60, 100, 200], (128,)))) == 1


def test_only_plain_decode_steps_make_runs() -> None:
    cost = step_cost("llama-3.1-8b")
    assert cost.decode_run(BatchStats(4, 400, (), ((16, 0),), 5)) is None
    assert cost.decode_run(BatchStats(0, 0, (), ((16, 0),), 1)) is None
    assert cost.decode_run(BatchStats(4, 400, (), (), 3)) is None


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 300), contexts=st.lists(st.integers(1, 40_000), min_size=1, max_size=5))
def test_decode_tables_equal_the_cost_behind_them(batch: int, contexts: list[int]) -> None:
    """Whatever the order in which a table grew; to the nanosecond, one rounding."""
    cost = step_cost("llama-3.1-8b")
    (attention,) = cost.attentions
    table = cost.tables.decode(attention, batch)
    for context in contexts:
        direct = float(cost.tables.costs.decode_attention_s(batch, context, attention.shape))
        assert abs(table.at(context) - direct * 1e9) <= 0.51
        assert table.at(context) <= table.at(context + 1)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 9000), survivors=st.integers(1, 600))
def test_dense_tables_equal_the_costs_behind_them(tokens: int, survivors: int) -> None:
    cost = step_cost("llama-3.1-8b", Plan(tensor=2))
    costs, (stage,) = cost.tables.costs, cost.lowered.stages
    rows = np.array([float(tokens)])
    direct = sum(count * float(op.seconds(costs, rows)[0]) for op, count in stage.row_operators())
    direct += sum(float(op.seconds(costs, np.array([float(survivors)]))[0]) for op in stage.head)
    known = cost.tables.chunks(cost.attentions[0])
    chunk = known.launch_ns + known[tokens, 11]
    stats = BatchStats(0, 0, (), ((tokens, 11),), survivors)
    assert cost.stage_ns(stats)[0] - 32 * chunk == pytest.approx(direct * 1e9, abs=1.5)


def test_tables_do_not_depend_on_the_order_of_questions() -> None:
    def answers(order: list[int]) -> dict[int, int]:
        table = PrefixTable(lambda contexts: 1e-6 * np.sqrt(contexts) + 1e-7 * np.sin(contexts))
        return {context: table.at(context) for context in order}

    asked = [5, 70_000, 1023, 1024, 1, 4096, 4095]
    assert answers(asked) == answers(sorted(asked)) == answers(asked[::-1])


def test_equal_profiles_share_tables() -> None:
    profile = spec("device", "h100-sxm")
    assert tables_for(profile) is tables_for(profile.model_copy())
    other = profile.model_copy(update={"name": "other"})
    assert tables_for(profile) is not tables_for(other)


def test_chunks_and_decodes_of_a_mixed_step_add_up() -> None:
    cost = step_cost("llama-3.1-8b")
    decodes = decode_stats([700] * 20)
    chunks = ((300, 0), (200, 512))
    mixed = BatchStats(*decodes[:3], chunks, 22)
    known = cost.tables.chunks(cost.attentions[0])
    attention = cost.tables.decode(cost.attentions[0], 20).at(700) + sum(known[chunk] for chunk in chunks)
    dense = cost.stage_ns(BatchStats(0, 0, (), ((520, 0),), 22))[0] - 32 * (known[520, 0] + known.launch_ns)
    assert cost.stage_ns(mixed) == (dense + 32 * attention,)


def test_attention_of_a_step_is_launched_once() -> None:
    """A chunk alone costs what was fitted; others join its kernel, and all of them that of decodes."""
    cost = step_cost("llama-3.1-8b")
    attention, chunks = cost.attentions[0], ((300, 0), (200, 512), (20, 0))
    fitted = cost.tables.costs.prefill_attention(attention.shape)
    alone = [to_ns(fitted(*chunk)) for chunk in chunks]
    launch = to_ns(fitted.launch_s)
    decode = cost.tables.decode(attention, 20).at(700)

    def attention_ns(decodes: int, *chunks: tuple[int, int]) -> int:
        """Nanoseconds of a layer's attention: what is left of the step without everything that costs by rows."""
        stats = BatchStats(decodes, 700 * decodes, (), chunks, len(chunks))
        rows = np.array([decodes + sum(tokens for tokens, _ in chunks)])
        dense = sum(n * cost.tables.rows_s(op, rows)[0] for op, n in cost.lowered.stages[0].row_operators())
        head = sum(cost.tables.rows_s(op, np.array([len(chunks)]))[0] for op in cost.lowered.stages[0].head)
        return round((cost.stage_ns(stats)[0] - to_ns(dense + head)) / 32)

    for chunk, ns in zip(chunks, alone, strict=True):
        assert attention_ns(0, chunk) == pytest.approx(ns, abs=2)
        assert attention_ns(20, chunk) == pytest.approx(decode + ns - launch, abs=2)
    assert attention_ns(0, *chunks) == pytest.approx(sum(alone) - 2 * launch, abs=4)
    assert attention_ns(20, *chunks) == pytest.approx(decode + sum(alone) - 3 * launch, abs=4)


@pytest.mark.parametrize("device", ["h100-sxm", "h200-sxm", "a100-sxm"])
def test_a_chunk_without_its_launch_still_meets_the_roofline(device: str) -> None:
    profile = spec("device", device)
    costs = OperatorCosts(profile)
    tokens, history = (x.ravel() for x in np.meshgrid(np.arange(1, 3000, 37), [0, 1, 500, 30_000]))
    fitted = costs.prefill_attention(step_cost("llama-3.1-8b", device=device).attentions[0].shape)
    joined = fitted.many(tokens, history, launch=False)
    read = (4 * 32 * 128 * tokens + 4 * 8 * 128 * (tokens + history)) / profile.datasheet.memory_bytes_per_s
    flops = 4 * 32 * 128 * tokens * (history + (tokens + 1) / 2) / profile.datasheet.flops_per_s["bf16"]
    assert (joined >= 0.999999 * np.maximum(read, flops)).all()
    np.testing.assert_allclose(joined + fitted.launch_s, fitted.many(tokens, history), rtol=1e-9)
    assert fitted(777.0, 42.0, launch=False) == pytest.approx(float(fitted.many(777, 42, launch=False)), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    host=hosts,
    decodes=st.lists(st.integers(1, 4000), max_size=20),
    chunks=st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 3000)), min_size=1, max_size=5),
    survivors=st.integers(0, 25),
)
def test_the_quick_way_of_mixed_steps_is_the_general_one(
    host: HostTerms, decodes: list[int], chunks: list[tuple[int, int]], survivors: int
) -> None:
    cost = step_cost("llama-3.1-8b", host=host)
    stats = decode_stats(decodes)._replace(chunks=tuple(chunks), survivors=survivors)
    assert cost._plain_mixed_ns(stats) == cost._mixed_ns(stats)


def test_host_time_adds_or_hides() -> None:
    stats = decode_stats([500] * 10)
    (device,) = step_cost("llama-3.1-8b").stage_ns(stats)
    assert step_cost("llama-3.1-8b", host=SYNC).stage_ns(stats) == (device + to_ns(1e-3 + 10 * 17e-6),)
    hidden = HostTerms(step_s=1e-3, exposed_step_s=0.2e-3, overlapped=True)
    assert step_cost("llama-3.1-8b", host=hidden).stage_ns(stats) == (device + to_ns(0.2e-3),)
    slow = hidden.model_copy(update={"step_s": 0.1})
    assert step_cost("llama-3.1-8b", host=slow).stage_ns(stats) == (to_ns(0.1 + 0.2e-3),)
    chunked = BatchStats(0, 0, (), ((64, 0),), 1)
    assert step_cost("llama-3.1-8b", host=slow).stage_ns(chunked) == (to_ns(0.1 + 0.2e-3),)


def test_pipeline_stages_share_the_layers_and_host_sits_in_the_first() -> None:
    stats = decode_stats([900] * 32)
    (whole,) = step_cost("llama-3.1-8b").stage_ns(stats)
    piped = step_cost("llama-3.1-8b", Plan(pipeline=2))
    first, last = piped.stage_ns(stats)
    tables, send = piped.tables, piped.lowered.stages[0].once[-1]
    assert send.name == "send"
    sent = tables.rows_s(send, np.array([32]))[0] * 1e9
    assert first + last == pytest.approx(whole + sent, abs=3)
    hosted = step_cost("llama-3.1-8b", Plan(pipeline=2), SYNC).stage_ns(stats)
    assert hosted == (first + to_ns(1e-3 + 32 * 17e-6), last)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-2-7b", "qwen3-32b", "mixtral-8x7b"])
def test_decode_cost_grows_with_context_and_batch(model: str) -> None:
    cost = step_cost(model, Plan(tensor=2))
    times = [
        [cost.stage_ns(decode_stats([context] * batch))[0] for context in (64, 512, 4096, 16384)]
        for batch in (1, 16, 128)
    ]
    for row in times:
        assert row == sorted(row)
    for column in zip(*times, strict=True):
        assert list(column) == sorted(column)
    assert times[2][3] > 2 * times[2][0]


@pytest.mark.parametrize("model", ["llama-3.1-8b", "mixtral-8x7b"])
def test_two_ranks_are_faster_than_one_and_no_more_than_twice(model: str) -> None:
    for stats in (decode_stats([1000] * 8), decode_stats([1000] * 128), BatchStats(0, 0, (), ((4096, 0),), 1)):
        one, two = (step_cost(model, Plan(tensor=t)).stage_ns(stats)[0] for t in (1, 2))
        assert 1.0 < one / two < 2.05


@settings(deadline=None, max_examples=60)
@given(
    model=st.sampled_from(["llama-3.1-8b", "qwen3-8b", "llama-2-7b"]),
    tensor=st.sampled_from([1, 2, 4]),
    weights=st.sampled_from(["bf16", "fp8"]),
    decodes=st.lists(st.integers(1, 4000), min_size=0, max_size=128),
    chunks=st.lists(st.tuples(st.integers(2, 4000), st.integers(0, 4000)), max_size=8),
)
def test_no_step_is_faster_than_the_roofline(
    model: str, tensor: int, weights: str, decodes: list[int], chunks: list[tuple[int, int]]
) -> None:
    """All weights and all cached keys read once at peak bandwidth; all FLOPs at the peak of the weights' dtype."""
    if not decodes and not chunks:
        decodes = [1]
    shape, sheet = spec("model", model), spec("device", "h100-sxm").datasheet
    base = decode_stats(decodes)
    stats = base._replace(chunks=tuple(chunks), survivors=len(decodes) + len(chunks))
    (ns,) = step_cost(model, Plan(tensor=tensor), weights=weights).stage_ns(stats)
    cached = base.context + sum(tokens + history for tokens, history in chunks)
    kv = sum(group.bytes_per_token("bf16") for group in shape.kv_groups)
    read = shape.weight_bytes(weights, weights) - shape.embedding_params * 2 + kv * cached
    head = 2.0 * shape.vocab * shape.hidden
    flops = sum(shape.flops_per_token(context) for context in decodes) + len(chunks) * head
    for tokens, history in chunks:
        flops += tokens * (shape.flops_per_token(history + (tokens + 1) / 2) - head)
    floor = max(read / sheet.memory_bytes_per_s, flops / sheet.flops_per_s[weights]) / tensor
    assert ns * 1e-9 >= 0.999 * floor


def test_unknown_costs_are_refused_before_a_run() -> None:
    with pytest.raises(Unsupported, match=r"a100-sxm has no gemm cost for fp8"):
        step_cost("llama-3.1-8b", device="a100-sxm", weights="fp8")


def test_blocks_are_filled_lazily() -> None:
    engine = spec("engine", "vllm-v1-sync")
    cluster = Cluster(device=spec("device", "h100-sxm").model_copy(update={"name": "lazily"}))
    deployment = Deployment(model=spec("model", "qwen3-14b"), cluster=cluster, engine=engine)
    cost = build_step_cost(deployment.colocated_server())
    calls: list[int] = []
    gemm_s = cost.tables.costs.gemm_s

    def counted(m: Any, *sizes: Any, **how: Any) -> Any:
        calls.append(len(m))
        return gemm_s(m, *sizes, **how)

    cost.tables.costs.gemm_s = counted  # type: ignore[method-assign]
    cost.stage_ns(decode_stats([100] * 8))
    cost.stage_ns(decode_stats([100] * 60))
    assert calls == [BLOCK] * 5  # four products of a layer and the LM head, rows 1 ... 64
    assert isinstance(cost.tables.costs, OperatorCosts)


def test_memory_of_tables_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = OperatorCosts(spec("device", "h100-sxm"))
    tables = OperatorTables(costs)
    (attention,) = step_cost("llama-3.1-8b").attentions
    held = tables.decode(attention, 4)
    held.grow(5000)
    tables.trim()
    assert tables.decode(attention, 4) is held
    monkeypatch.setattr("apexsim.costs.tables.MAX_DECODE_ENTRIES", 5000)
    tables.trim()
    assert tables.decode(attention, 4) is not held
    assert tables.decode(attention, 4).at(4000) == held.at(4000)
    monkeypatch.setattr("apexsim.costs.tables.MAX_CHUNKS", 3)
    chunks = tables.chunks(attention)
    for tokens in range(2, 10):
        assert chunks[tokens, 0] == chunks[tokens, 0] > 0
        assert len(chunks) <= 3
