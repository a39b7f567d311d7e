"""Macro-stepping against the oracle that simulates every step: byte-identical records, whatever the case."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apexsim.serving.batching import POLICIES
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
    step_ns=st.sampled_from([TICK, TICK // 2, 700_001]),
    context_ns=st.sampled_from([0, 100]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
def test_stretches_equal_steps(case: Case) -> None:
    check_case(case)


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
