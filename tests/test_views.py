"""The law of what a replica hears and shows: others look inside stretches and see what single steps would show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np
import pytest

from apexsim.serving.clock import ARRIVAL
from apexsim.serving.job import Job
from apexsim.serving.messages import Arrive, View
from apexsim.serving.policies import POLICIES
from apexsim.serving.replica import Replica
from apexsim.serving.simulator import How
from apexsim.testing import (
    Case,
    KeptRun,
    LinearCost,
    check_case,
    check_run,
    check_same,
    made_up_deployment,
    made_up_memory,
    random_case,
)


class Seen(NamedTuple):
    """What a view shows of a replica at some time."""

    now_ns: int
    replica: int
    unfinished: int
    waiting: int
    running: int
    kv_blocks: int
    kv_blocks_total: int


def made(case: Case, *, exact_steps: bool) -> KeptRun:
    """The run of a case, not yet begun."""
    deployment = made_up_deployment(
        case.scheduler(),
        stages=case.stages,
        replicas=case.replicas,
        router=case.router,
        frontend_ns=case.frontend_ns,
    )
    cost = LinearCost(case.step_ns, case.token_ns, case.context_ns, case.stages)
    memory = made_up_memory(case.blocks, window=case.window)
    return KeptRun(deployment, case.requests(), cost=cost, memory=memory, how=How(exact_steps=exact_steps))


def look(run: KeptRun, times_ns: Sequence[int], inside: Counter[str]) -> list[Seen]:
    """Begin a run and look at all of its replicas at each of these times; counts looks ``inside`` stretches."""
    seen: list[Seen] = []

    def looks(_: object) -> None:
        for view, replica in zip(run.flow._views, run.replicas, strict=True):
            count_inside(replica, inside)
            seen.append(Seen(run.clock.now_ns, *(getattr(view, name) for name in Seen._fields[1:])))

    for time_ns in times_ns:
        run.clock.at(time_ns, ARRIVAL, looks)
    run.go()
    return seen


def count_inside(replica: Replica, inside: Counter[str]) -> None:
    """Count what has passed unseen of the stretch that a replica is in, if any."""
    decodes, now_ns = replica._decodes, replica._clock.now_ns
    passed = decodes.view(now_ns)
    assert decodes.stretching or not any(passed)
    if passed.steps:
        kind = type(decodes).__name__
        inside[kind] += 1
        inside[f"{kind}, blocks taken"] += passed.blocks > 0
        inside[f"{kind}, windows"] += not replica._blocks.steady
        inside[f"{kind}, lookahead"] += replica._flight.most > replica._flight.cost.stages
        inside[f"{kind}, somebody waits"] += replica.in_queue > 0


def drawn_case(rng: np.random.Generator) -> Case:
    """Of all shipped policies; half of them with windows, half with all that happens on one grid of times."""
    case = random_case(rng, sorted(POLICIES)[rng.integers(len(POLICIES))])
    case = replace(case, balanced=bool(rng.integers(2)), window=[None, 40][rng.integers(2)])
    case = replace(case, full_admission=rng.random() < 0.2, most_of_prompt=[None, 8][rng.integers(2)])
    return replace(case, token_ns=0, context_ns=0, step_ns=500_000) if rng.integers(2) else case


def drawn_times_ns(rng: np.random.Generator, run: KeptRun) -> list[int]:
    """Some at random, some on the grid, some as a step ends or just before or after, up to a little after the end."""
    ends_ns = run.recorder.steps()["end_ns"]
    last_ns = int(ends_ns.max())
    ticks = 500_000 * rng.integers(0, last_ns // 500_000 + 2, 15)
    ties = rng.choice(ends_ns, 15) + rng.integers(-1, 2, 15)
    return sorted(int(time_ns) for time_ns in (*rng.integers(0, last_ns + 2, 30), *ticks, *ties))


def test_views_look_the_same_inside_stretches() -> None:
    """And looking changes nothing."""
    inside: Counter[str] = Counter()
    for stream in np.random.SeedSequence(14).spawn(100):
        rng = np.random.default_rng(stream)
        case = drawn_case(rng)
        plain = case.run(exact_steps=True)
        times_ns = drawn_times_ns(rng, plain)
        exact, fast = (made(case, exact_steps=exact_steps) for exact_steps in (True, False))
        wanted = look(exact, times_ns, Counter())
        assert look(fast, times_ns, inside) == wanted, case
        check_run(fast)
        check_same(fast, plain)
    kinds = {f"{kind}{how}" for kind in ("OneStage", "InTurn") for how in ("", ", blocks taken", ", windows")}
    kinds |= {"OneStage, lookahead", "OneStage, somebody waits"}
    assert {kind for kind in kinds if inside[kind] < 50} == set(), f"hardly looked at: {inside}"


# -- routers -----------------------------------------------------------------------------------------------------------


class FewestBlocks:
    """Reads what changes inside stretches, and counts how often it did."""

    inside: ClassVar[Counter[str]] = Counter()

    def choose(self, job: Job, views: Sequence[View]) -> int:
        for view in views:
            count_inside(view._replica, self.inside)
        return min(range(len(views)), key=lambda at: (views[at].kv_blocks, views[at].waiting + views[at].running))


def test_a_router_that_reads_blocks_chooses_the_same_either_way() -> None:
    FewestBlocks.inside.clear()
    for stream in np.random.SeedSequence(7).spawn(60):
        rng = np.random.default_rng(stream)
        check_case(replace(drawn_case(rng), replicas=3, router="test_views:FewestBlocks"))
    assert min(FewestBlocks.inside[kind] for kind in ("OneStage", "InTurn")) >= 50, FewestBlocks.inside


# -- the law -----------------------------------------------------------------------------------------------------------


def handing_on(case: Case, *, after_ns: int) -> KeptRun:
    """A run in which the second replica computes anew what the first has done, told so much after each end."""
    run = made(case, exact_steps=False)
    first, second = run.replicas

    def done(job: Job) -> None:
        job.request.job = again = Job(job.request)

        def tell(_: object) -> None:
            second.deliver(Arrive(again))

        if after_ns:
            run.clock.at(run.clock.now_ns + after_ns, ARRIVAL, tell)
        else:
            tell(None)

    first._on_done = done
    return run


def test_replicas_hear_of_others_only_in_events_of_rank_0() -> None:
    case = Case(arrivals_ns=[0, 0], lengths=[(5, 40), (9, 90)], replicas=2)
    run = handing_on(case, after_ns=1)
    run.go()
    jobs = [request.job for request in run.requests]
    assert [job.replica for job in jobs if job is not None and job.finished] == [1, 1]
    with pytest.raises(AssertionError, match="events of rank 0"):
        handing_on(case, after_ns=0).go()
