"""What serving owes physics and its users: queueing is felt, gaps count, nobody is lost, no budget is overspent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apexsim.errors import BadInput
from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.results import SimulationResult
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.ledger import Ledger
from apexsim.serving.messages import View
from apexsim.serving.policies import POLICIES, BatchPolicy, ChunkedPrefill
from apexsim.serving.request import Request
from apexsim.serving.routing import LeastLoaded, RoundRobin
from apexsim.serving.simulator import Run, simulate
from apexsim.serving.unfinished import why_rejected
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.workload import Requests
from apexsim.testing import Case, LinearCost, check_case, check_run, made_up_deployment, made_up_memory


def serve(requests: Requests, **file: object) -> SimulationResult:
    written = DeploymentFile.model_validate({"model": "llama-3.1-8b", "device": "h100-sxm", **file})
    return simulate(resolve_deployment(written, where="test"), requests)


def requests_of(arrival_s: Sequence[float], prompt: int = 500, output: int = 20) -> Requests:
    count = len(arrival_s)
    return Requests(
        name="made up",
        arrival_s=np.array(arrival_s),
        prompt_tokens=np.full(count, prompt),
        output_tokens=np.full(count, output),
    )


def test_ttft_contains_queueing() -> None:
    """64 requests at once for one seat: the 64th waits for 63 whole services."""
    result = serve(requests_of([0.0] * 64), engine="vllm-v1-sync", engine_options={"max_num_seqs": 1})
    rows = result.requests.sort_values("scheduled_s")
    services = np.diff(rows["scheduled_s"])
    assert services.min() > 0.9 * services.max()
    assert rows["ttft_s"].iloc[-1] == pytest.approx(rows["ttft_s"].iloc[0] + services.sum(), rel=0.02)


def test_duration_contains_arrival_gaps() -> None:
    result = serve(requests_of([0.0, 100.0]))
    assert result.summary()["duration_s"] > 100
    assert result.summary()["throughput"]["requests_per_s"] < 2 / 100
    assert result.summary()["utilization"]["busy"] < 0.05


def test_decode_slows_with_context() -> None:
    """The same tokens take longer behind a longer prompt, and the gap between tokens grows within one answer."""
    short, long = (serve(requests_of([0.0] * 32, prompt=p, output=200)).summary()["itl_s"]["p50"] for p in (100, 6000))
    assert long > 1.2 * short


@pytest.mark.parametrize("plan", [{}, {"tensor": 2}, {"pipeline": 2}, {"replicas": 3}, {"replicas": 2, "tensor": 2}])
def test_every_request_is_in_the_statistics_of_every_plan(plan: dict[str, int]) -> None:
    result = serve(requests_of(np.linspace(0, 2, 50).tolist()), **plan)
    assert result.summary()["requests"] == {"total": 50, "finished": 50, "rejected": 0, "unfinished": 0}
    assert result.requests[["ttft_s", "e2e_s"]].notna().all().all()
    assert set(result.requests["replica"]) == set(range(plan.get("replicas", 1)))


def test_a_request_beyond_the_context_is_a_row_with_its_reason() -> None:
    requests = Requests(
        name="long",
        arrival_s=np.array([0.0, 1.0]),
        prompt_tokens=np.array([9000, 10]),
        output_tokens=np.array([10, 10]),
    )
    result = serve(requests, engine_options={"max_model_len": 8192})
    assert result.summary()["requests"] == {"total": 2, "finished": 1, "rejected": 1, "unfinished": 0}
    assert "9010 tokens" in result.requests["reason"][0]
    assert "8192" in result.requests["reason"][0]


def test_a_lookahead_delays_what_a_composition_sees() -> None:
    """An arrival during step j joins step j + 1 of a synchronous engine, step j + 2 of an asynchronous one."""
    waits = []
    for lookahead in (0, 1):
        case = Case(
            arrivals_ns=[0, 10_500_000],
            lengths=[(4, 40), (4, 2)],
            lookahead=lookahead,
            step_ns=1_000_000,
            token_ns=0,
            context_ns=0,
        )
        request = case.run(exact_steps=False).requests[1]
        assert request.first_token_ns is not None
        waits.append(request.first_token_ns - request.arrival_ns)
    assert waits == [1_500_000, 2_500_000]


def test_a_pipeline_overlaps_batches_of_different_requests() -> None:
    """Two stages of 1 ms: one request gets a token every 2 ms; two that are not in the same batch each do as well."""
    alone = Case(arrivals_ns=[0], lengths=[(4, 100)], stages=2, token_ns=0, context_ns=0).run(exact_steps=False)
    apart = Case(arrivals_ns=[0, 50_000], lengths=[(4, 100), (4, 100)], stages=2, token_ns=0, context_ns=0)
    both = apart.run(exact_steps=False)
    assert both.requests[1].last_token_ns < 1.2 * alone.requests[0].last_token_ns  # type: ignore[operator]


def test_preempted_requests_are_recomputed_and_finish() -> None:
    case = Case(arrivals_ns=[0] * 6, lengths=[(60, 100)] * 6, blocks=30)
    run = case.run(exact_steps=False)
    check_run(run)
    assert sum(request.preemptions for request in run.requests) > 0


def test_full_admission_never_preempts() -> None:
    run = Case(arrivals_ns=[0] * 6, lengths=[(60, 100)] * 6, blocks=30, full_admission=True).run(exact_steps=False)
    assert sum(request.preemptions for request in run.requests) == 0
    assert run.requests[-1].scheduled_ns >= run.requests[0].last_token_ns  # type: ignore[operator]


def test_whole_prompts_wait_for_a_step_of_their_own() -> None:
    """Without chunks a prompt that does not fit beside the others waits; one beyond the budget is refused."""
    case = Case(arrivals_ns=[0, 0, 0], lengths=[(100, 2), (100, 2), (200, 2)], token_budget=150, chunked=False)
    run = case.run(exact_steps=True)
    assert run.requests[1].scheduled_ns > run.requests[0].scheduled_ns  # type: ignore[operator]
    assert "exceeds the budget of 150 tokens" in run.rejected[2]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 40)), min_size=1, max_size=6),
    policy=st.sampled_from(sorted(POLICIES)),
    chunked=st.booleans(),
    token_budget=st.sampled_from([1, 16, 500]),
    most_of_prompt=st.sampled_from([None, 7, 4096]),
    seats=st.sampled_from([1, 3]),
    blocks=st.sampled_from([1, 4, 30, 200]),
    full_admission=st.booleans(),
    stages=st.sampled_from([1, 2]),
    balanced=st.booleans(),
    window=st.sampled_from([None, 40]),
)
def test_who_is_let_in_is_served(lengths: list[tuple[int, int]], **limits: Any) -> None:
    """Whatever limits stand together, a request is refused with its reason or gets all its tokens."""
    patience_ns = [1] * len(lengths)
    case = Case(arrivals_ns=[0] * len(lengths), lengths=lengths, patience_ns=patience_ns, **limits)
    for exact_steps in (True, False):
        run = case.run(exact_steps=exact_steps)
        check_run(run)
        assert not any("unfinished" in note for note in run.notes())


def test_a_prompt_that_no_step_can_hold_is_refused() -> None:
    """Whole prompts: the least of the token budget and the most of one prompt decides."""
    requests = Requests(
        name="stall",
        arrival_s=np.array([0.0, 1.0]),
        prompt_tokens=np.array([520, 10]),
        output_tokens=np.array([1, 5]),
    )
    limits = {"max_num_batched_tokens": 512, "max_chunk_tokens": 4096}
    result = serve(requests, engine="trtllm-1.0", engine_options=limits)
    assert result.requests["status"].tolist() == ["rejected", "finished"]
    assert "520 tokens exceeds the budget of 512 tokens a step" in result.requests["reason"][0]


class Idler(ChunkedPrefill):
    """Serves nobody whose prompt is longer than 100 tokens."""

    def _admit(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        super()._admit(ledger, [job for job in waiting if job.prompt_tokens <= 100])


def test_a_run_that_leaves_requests_says_why() -> None:
    """How many, where, and what they waited for; clients that no answer came to, and the requests they never sent."""
    options = {"policy": "test_serving:Idler"}
    result = serve(requests_of([0.0, 0.1, 0.2], prompt=101), engine_options=options)
    (said,) = [note for note in result.notes if "unfinished" in note]
    assert "3 of 3 requests are unfinished: 3 waited in replica 0" in said
    assert "the policy, which left it waiting" in said
    assert result.summary()["requests"]["unfinished"] == 3
    looped = serve(requests_of([0.0] * 5, prompt=101).closed_loop(2), engine_options=options)
    assert any("3 were never sent: no client was free" in note for note in looped.notes)
    assert not any("unfinished" in note for note in serve(requests_of([0.0])).notes)


def test_closed_loops_keep_their_concurrency() -> None:
    case = Case(arrivals_ns=list(range(30)), lengths=[(50, 20)] * 30, concurrency=4)
    run = case.run(exact_steps=False)
    starts = sorted(request.arrival_ns for request in run.requests)
    ends = sorted(request.last_token_ns or 0 for request in run.requests)
    assert starts[:4] == [0, 0, 0, 0]
    for number in range(4, 30):
        assert starts[number] == ends[number - 4] + 1
    check_case(case)


def test_routers() -> None:
    run = Case(arrivals_ns=[0], lengths=[(1, 1)], replicas=3).run(exact_steps=True)
    views, job, turns = [View(replica) for replica in run.replicas], Job(Request(0, 1, 1)), RoundRobin()
    for view, unfinished in zip(views, (3, 1, 1), strict=True):
        view.unfinished = unfinished
    assert [turns.choose(job, views) for _ in range(4)] == [0, 1, 2, 0]
    assert LeastLoaded().choose(job, views) == 1


class CautiousPolicy(BatchPolicy):
    """A policy of one's own that promises nothing about its steps."""

    def __init__(self, scheduler: SchedulerDefaults) -> None:
        self.inner = ChunkedPrefill(scheduler)

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        self.inner.fill(ledger, running, waiting)
        assert ledger.tokens >= 0
        assert ledger.blocks >= 0
        assert ledger.seats >= 0


def test_a_policy_by_module_and_name_never_overspends() -> None:
    rng = np.random.default_rng(3)
    lengths = [(int(p), int(o)) for p, o in zip(rng.integers(1, 200, 40), rng.integers(1, 60, 40), strict=True)]
    check_case(
        Case(arrivals_ns=[0] * 40, lengths=lengths, policy="test_serving:CautiousPolicy", blocks=60, token_budget=64)
    )


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("chunked_prefil", "chunked_prefill"),
        ("nowhere:Policy", "looked for in the current folder"),
        (":P", "module:Name"),
    ],
)
def test_unknown_policies_are_refused(policy: str, said: str) -> None:
    deployment = made_up_deployment(SchedulerDefaults(policy=policy))
    with pytest.raises(BadInput, match=said):
        Run(deployment, requests_of([0.0]), cost=LinearCost(), memory=made_up_memory(10))


class BlockBooks(RuleBasedStateMachine):
    """Any order of growing and releasing keeps free + held == total, and nobody holds less than it needs."""

    @initialize(total=st.integers(1, 60), size=st.sampled_from([1, 4, 16]))
    def open(self, total: int, size: int) -> None:
        self.manager = BlockManager(total, size, lambda tokens: -(-tokens // size))
        self.jobs = [Job(Request(index, 10, 10)) for index in range(4)]
        self.tokens = dict.fromkeys(range(4), 0)

    @rule(who=st.integers(0, 3), more=st.integers(1, 40))
    def grow(self, who: int, more: int) -> None:
        job, tokens = self.jobs[who], self.tokens[who] + more
        if self.manager.missing(job, tokens) <= self.manager.free:
            self.manager.grow(job, tokens)
            self.tokens[who] = tokens
        else:
            with pytest.raises(RuntimeError, match="blocks"):
                self.manager.grow(job, tokens)

    @precondition(lambda self: any(self.tokens.values()))
    @rule(who=st.integers(0, 3))
    def release(self, who: int) -> None:
        self.manager.release(self.jobs[who])
        self.tokens[who] = 0

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "manager"):
            held = [job.blocks for job in self.jobs]
            assert self.manager.free + sum(held) == self.manager.total
            assert held == [self.manager.blocks_for(tokens) for tokens in self.tokens.values()]


TestBlockBooks = BlockBooks.TestCase
TestBlockBooks.settings = settings(max_examples=60, deadline=None)


def test_why_requests_were_rejected_is_told_by_kind() -> None:
    reasons = {"520 tokens exceed 512": 2, "600 tokens exceed 512": 1, "no blocks": 1}
    assert list(why_rejected(reasons)) == [
        "3 rejected: 520 to 600 tokens exceed 512",
        "1 rejected: no blocks",
    ]
