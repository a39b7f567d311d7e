"""Macro-stepping against the oracle that simulates every step: byte-identical records, whatever the case."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.serving.policies import POLICIES
from apexsim.serving.simulator import simulate
from apexsim.specs.workload import Requests
from apexsim.testing import Case, check_case, check_policy

TICK = 500_000  # arrivals on a coarse grid of nanoseconds, so that ties with step ends are common

cases = st.builds(
    Case,
    arrivals_ns=st.lists(st.integers(0, 40).map(lambda tick: tick * TICK), min_size=1, max_size=24).map(sorted),
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=24, max_size=24),
    policy=st.sampled_from(sorted(POLICIES)),
    chunked=st.booleans(),
    token_budget=st.sampled_from([16, 64, 512]),
    seats=st.sampled_from([1, 3, 8, 64]),
    blocks=st.sampled_from([20, 40, 4000]),
    full_admission=st.booleans(),
    lookahead=st.sampled_from([0, 1]),
    stages=st.sampled_from([1, 1, 2, 3]),
    balanced=st.booleans(),
    replicas=st.sampled_from([1, 3]),
    router=st.sampled_from(["least_loaded", "round_robin"]),
    frontend_ns=st.sampled_from([0, TICK]),
    concurrency=st.sampled_from([None, None, 1, 5]),
    waves=st.booleans(),
    turnaround_ns=st.sampled_from([0, TICK]),
    patience_ns=st.lists(st.integers(0, 8).map(lambda tick: tick * TICK), min_size=24, max_size=24),
    prefix_caching=st.booleans(),
    stream_interval=st.sampled_from([1, 1, 4, 50]),
    receive_interval=st.sampled_from([1, 1, 3, 20]),
    most_of_prompt=st.sampled_from([None, None, 10, 100]),
    window=st.sampled_from([None, None, 40]),
    step_ns=st.sampled_from([TICK, TICK // 2, 700_001]),
    context_ns=st.sampled_from([0, 100]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
def test_stretches_equal_steps(case: Case) -> None:
    check_case(case)


def test_a_cohort_that_dissolves_at_once_leaves_the_stamps_of_its_members() -> None:
    """A prompt that ends beside an older one still being computed: the cohort it would found cannot stand."""
    check_case(
        Case(
            arrivals_ns=[0, 3 * TICK, 3 * TICK, 3 * TICK],
            lengths=[(101, 2), (1, 1), (52, 1), (1, 2)],
            token_budget=16,
            most_of_prompt=10,
            seats=3,
            blocks=20,
            step_ns=TICK,
            token_ns=1000,
            context_ns=0,
        )
    )


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_keep_their_promises(policy: str) -> None:
    check_policy(POLICIES[policy], cases=20)


def test_forced_ties_on_three_least_loaded_replicas() -> None:
    """Every arrival, step end and finish falls on the same grid; three replicas finish together again and again."""
    rng = np.random.default_rng(7)
    for concurrency in (None, 4):
        check_case(
            Case(
                arrivals_ns=sorted(int(tick) * TICK for tick in rng.integers(0, 60, 120)),
                lengths=[
                    (int(p), int(o)) for p, o in zip(rng.integers(1, 64, 120), rng.integers(1, 40, 120), strict=True)
                ],
                replicas=3,
                router="least_loaded",
                seats=4,
                token_ns=0,
                step_ns=TICK,
                context_ns=0,
                concurrency=concurrency,
            )
        )


@pytest.mark.parametrize(
    "file",
    [
        {"model": "llama-3.1-8b"},
        {"model": "llama-3.1-8b", "engine": "vllm-v1-sync", "replicas": 2, "router": "least_loaded"},
        {"model": "llama-3.1-70b", "tensor": 2, "pipeline": 2},
        {"model": "gpt-oss-120b", "tensor": 2},
        {"model": "gpt-oss-20b", "pipeline": 2, "engine": "sglang-0.5"},
        {"model": "mixtral-8x7b", "tensor": 2, "engine": "trtllm-1.0"},
        {"model": "llama-3.1-70b", "tensor": 8, "engine": "vllm-0.6"},
        {"model": "nvidia-nemotron-nano-9b-v2"},
        {"model": "qwen3-next-80b-a3b", "tensor": 4, "engine": "sglang-0.5"},
        {"model": "gemma-3-12b"},
        {"model": "mixtral-8x7b", "attention_data": 4, "expert": 4},
        {"model": "gpt-oss-20b", "tensor": 2, "attention_data": 2, "pipeline": 2, "engine": "sglang-0.5"},
    ],
    ids=lambda file: "-".join(str(value) for value in file.values()),
)
def test_fitted_costs_give_the_same_records_either_way(file: dict[str, object]) -> None:
    deployment = resolve_deployment(DeploymentFile(device="h100-sxm", **file), where="test")
    rng = np.random.default_rng(11)
    requests = Requests(
        name="busy",
        arrival_s=np.cumsum(rng.exponential(0.08, 60)),
        prompt_tokens=rng.integers(1, 3000, 60),
        output_tokens=rng.integers(1, 150, 60),
    )
    fast, exact = (simulate(deployment, requests, exact_steps=exact) for exact in (False, True))
    pd.testing.assert_frame_equal(fast.requests, exact.requests, check_exact=True)
    assert fast.summary()["itl_s"] == exact.summary()["itl_s"]
    assert fast.steps["repeats"].sum() == exact.steps["repeats"].sum()
    summaries = [{key: value for key, value in run.summary().items() if key != "timing"} for run in (fast, exact)]
    assert summaries[0]["energy"]["total_j"] == pytest.approx(summaries[1]["energy"]["total_j"], rel=1e-9)
    assert fast.block_ns == exact.block_ns
    assert summaries[0]["utilization"]["kv_cache_mean"] == summaries[1]["utilization"]["kv_cache_mean"]
    assert summaries[0]["energy"]["idle_j"] == summaries[1]["energy"]["idle_j"]
    assert summaries[0]["utilization"]["kv_cache_peak"] == summaries[1]["utilization"]["kv_cache_peak"]
