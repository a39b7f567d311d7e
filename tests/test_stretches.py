"""How many silent ends have passed, and blocks over time: every kind of stretch against what is counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.serving.fast.one_stage import DecodeStretch, Groups, OneStage
from apexsim.serving.fast.pipeline import InTurn
from apexsim.serving.simulator import How, Run, simulate
from apexsim.specs.workload import Requests
from apexsim.testing import Case, LinearCost, check_case, made_up_deployment, made_up_memory

TICK = 500_000
# Three requests of which the last leaves first, alone, while the others go on.
THREE: dict[str, Any] = {"lengths": [(1, 260), (1, 180), (1, 90), (1, 5)], "context_ns": 50_000}


class Stretch(Protocol):
    """What both kinds of stretches have."""

    silent: int
    next_end_ns: int

    def end_ns(self, count: int) -> int: ...


def passed_by_scan(stretch: Stretch, now_ns: int) -> int:
    """Silent ends strictly before ``now_ns``, looked at one by one."""
    return sum(stretch.end_ns(count) < now_ns for count in range(1, stretch.silent + 1))


def check_passed(decodes: Any, stretch: Stretch) -> None:
    """Just before, at and after every end, and at both ends of time."""
    assert decodes.next_end_ns == stretch.next_end_ns
    ends_ns = [stretch.end_ns(count) for count in range(1, stretch.silent + 2)]
    assert ends_ns == sorted(ends_ns)
    assert ends_ns[-1] == stretch.next_end_ns
    for now_ns in {0, *(end_ns + by for end_ns in ends_ns for by in (-1, 0, 1))}:
        assert decodes.view(now_ns).steps == passed_by_scan(stretch, now_ns), f"at {now_ns} of {ends_ns}"


def stretches_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Check every stretch that a case plans, cuts and goes on with; returns how many of each kind there were."""
    seen: dict[str, int] = {}

    def check(kind: str, decodes: Any) -> None:
        stretch = decodes._stretch
        assert decodes.stretching == (stretch is not None)
        if stretch is not None:
            seen[f"{type(stretch).__name__} {kind} {how_begun(stretch)}".strip()] = 1
            check_passed(decodes, stretch)

    def planning(plan: Callable[..., Any]) -> Callable[..., Any]:
        def planned(decodes: Any, *arguments: Any) -> Any:
            result = plan(decodes, *arguments)
            check("planned", decodes)
            return result

        return planned

    def cutting(cut: Callable[..., bool]) -> Callable[..., bool]:
        def cut_at(decodes: Any, now_ns: int) -> bool:
            stretch = decodes._stretch
            expected = passed_by_scan(stretch, now_ns) if stretch is not None else 0
            dropped = cut(decodes, now_ns)
            assert stretch is None or stretch.silent == expected
            check("cut", decodes)
            return dropped

        return cut_at

    with monkeypatch.context() as patch:
        for kind, plan in ((OneStage, "_lay_out"), (InTurn, "plan")):
            patch.setattr(kind, plan, planning(getattr(kind, plan)))
            patch.setattr(kind, "cut", cutting(kind.cut))
        case.run(exact_steps=False)
    return seen


def how_begun(stretch: Stretch) -> str:
    """Whether it goes on as a step ends: then no batch stands for what is in flight."""
    if not isinstance(stretch, DecodeStretch) or stretch.first:
        return ""
    return "gone on, one ahead" if stretch.ahead else "gone on"


cases = st.builds(
    Case,
    arrivals_ns=st.lists(st.integers(0, 200).map(lambda tick: tick * TICK // 2), min_size=1, max_size=12).map(sorted),
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=12, max_size=12),
    policy=st.sampled_from(["chunked_prefill", "prefill_first"]),
    token_budget=st.sampled_from([1, 16, 512]),
    seats=st.sampled_from([2, 64]),
    blocks=st.sampled_from([20, 4000]),
    lookahead=st.sampled_from([0, 1]),
    stages=st.sampled_from([1, 1, 2, 3]),
    concurrency=st.sampled_from([None, 3]),
    turnaround_ns=st.sampled_from([0, 3 * TICK]),
    window=st.sampled_from([None, 40]),
    step_ns=st.sampled_from([0, TICK, 700_001]),
    context_ns=st.sampled_from([0, 100, 50_000]),
)


def test_passed_equals_a_scan_of_all_ends() -> None:
    seen: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:

        @settings(max_examples=120)
        @given(cases)
        def look(case: Case) -> None:
            for kind, count in stretches_of(case, monkeypatch).items():
                seen[kind] = seen.get(kind, 0) + count

        look()
        for arrival_ns in after_leaving():  # which draws may miss
            for lookahead in (0, 1):
                case = Case(arrivals_ns=[0, 0, 0, arrival_ns], lookahead=lookahead, **THREE)
                seen |= stretches_of(case, monkeypatch)
    kinds = {f"DecodeStretch {what}" for what in ("planned", "cut")}
    kinds |= {f"{kind} {gone_on}" for kind in kinds for gone_on in ("gone on", "gone on, one ahead")}
    kinds |= {"PipelineStretch planned", "PipelineStretch cut"}
    assert kinds <= seen.keys(), f"{seen}: a kind of stretch was never looked at"


def test_an_arrival_after_somebody_left_waits_for_the_step_in_flight() -> None:
    """The stretch of those who stay begins with no batch in flight, and its first step is shorter than the average one.

    An arrival just after that step must not find that nothing has passed.
    """
    for arrival_ns in after_leaving():
        for lookahead in (0, 1):
            check_case(Case(arrivals_ns=[0, 0, 0, arrival_ns], lookahead=lookahead, **THREE))


def after_leaving() -> list[int]:
    """Times in the first steps after the first of ``THREE`` has left."""
    left_ns = Case(arrivals_ns=[0] * 3, **THREE).run(exact_steps=True).requests[2].last_token_ns
    assert left_ns is not None
    return [left_ns + after_ns for after_ns in range(0, 20_000_000, 500_000)]


@pytest.mark.parametrize(("count", "budget"), [(2, 1), (70, 64), (40, 7)])
@pytest.mark.parametrize("policy", ["prefill_first", "chunked_prefill"])
def test_no_more_decodes_than_the_token_budget(count: int, budget: int, policy: str) -> None:
    case = Case(
        arrivals_ns=[0] * count, lengths=[(2, 30)] * count, policy=policy, token_budget=budget, seats=1_024,
        most_of_prompt=None,
    )  # fmt: skip
    check_case(case)
    steps = case.run(exact_steps=False).recorder.steps()
    assert (steps["decodes"] + steps["chunk_tokens"]).max() == budget


# -- blocks over time --------------------------------------------------------------------------------------------------


def test_blocks_over_time_by_hand() -> None:
    """One request of 20 + 30 tokens in blocks of 16: two blocks for 13 steps, three for 16, four for the last."""
    run = Case(arrivals_ns=[0], lengths=[(20, 30)], token_ns=0, context_ns=0).run(exact_steps=False)
    assert run.replicas[0].block_ns == (2 * 13 + 3 * 16 + 4 * 1) * 1_000_000


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("window", [None, 40])
def test_blocks_over_time_equal_those_counted_at_every_step(stages: int, lookahead: int, window: int | None) -> None:
    """By an onlooker of the single steps, who counts before every change."""
    rng = np.random.default_rng(stages + 2 * lookahead)
    case = Case(
        arrivals_ns=sorted(int(tick) * TICK for tick in rng.integers(0, 200, 30)),
        lengths=[(int(p), int(o)) for p, o in rng.integers(1, 90, (30, 2))],
        stages=stages,
        lookahead=lookahead,
        window=window,
        blocks=60,
        seats=12,
    )
    run = Run(
        made_up_deployment(case.scheduler(), stages=stages),
        case.requests(),
        cost=LinearCost(stages=stages),
        memory=made_up_memory(60, window=window),
        how=How(exact_steps=True),
    )
    blocks, counted, before_ns = run.replicas[0]._blocks, 0, 0

    def looked_at(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: object) -> None:
            nonlocal counted, before_ns
            counted += blocks.held * (run.clock.now_ns - before_ns)
            before_ns = run.clock.now_ns
            change(*arguments)

        return changed

    blocks.grow, blocks.release = looked_at(blocks.grow), looked_at(blocks.release)  # type: ignore[method-assign]
    run.go()
    assert counted == run.replicas[0].block_ns > 0
    assert case.run(exact_steps=False).replicas[0].block_ns == counted


def test_results_have_the_same_occupancy_and_idle_joules_either_way() -> None:
    rng = np.random.default_rng(5)
    requests = Requests(
        name="busy",
        arrival_s=np.cumsum(rng.exponential(0.05, 40)),
        prompt_tokens=rng.integers(1, 2000, 40),
        output_tokens=rng.integers(1, 120, 40),
    )
    for file in (
        {"model": "llama-3.1-8b", "replicas": 3},
        {"model": "llama-3.1-70b", "tensor": 2, "pipeline": 2},
        {"model": "gpt-oss-20b", "tensor": 2, "attention_data": 2, "pipeline": 2, "engine": "sglang-0.5"},
    ):
        deployment = resolve_deployment(DeploymentFile(device="h100-sxm", **file), where="test")
        fast, exact = (simulate(deployment, requests, exact_steps=exact) for exact in (False, True))
        assert fast.block_ns == exact.block_ns
        one, other = fast.summary(), exact.summary()
        assert one["utilization"]["kv_cache_mean"] == other["utilization"]["kv_cache_mean"]
        assert one["energy"]["idle_j"] == other["energy"]["idle_j"]
        operators_s = sum(sum(by.values()) for by in fast.usage.seconds.values())
        assert fast.usage.working_s == pytest.approx(operators_s, rel=1e-6)


def test_kinds_of_stretches_are_two() -> None:
    """Whoever adds a third puts it under the property above."""
    assert set(Groups.__subclasses__()) == {OneStage, InTurn}
