"""Batching policies that choose: who is named is served, broken promises are told in words, shipped orders hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from apexsim.errors import BadInput
from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.serving.clock import FOREVER
from apexsim.serving.job import Job
from apexsim.serving.ledger import Ledger
from apexsim.serving.policies import BatchPolicy, ChunkedPrefill
from apexsim.serving.queues import Fifo, Ordered
from apexsim.serving.request import Request
from apexsim.serving.simulator import How, simulate
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests, look_absolute
from apexsim.testing import (
    Case,
    KeptRun,
    LinearCost,
    check_case,
    check_policy,
    check_run,
    made_up_deployment,
    made_up_memory,
)

# -- policies that keep their promises ---------------------------------------------------------------------------------


class ShortestOfAll(BatchPolicy):
    """Sorts the whole queue at every step, and takes off whoever it likes when blocks run out."""

    def __init__(self, scheduler: SchedulerDefaults) -> None:
        self.chunked = scheduler.chunked_prefill

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        self._grow(ledger, sorted(running, key=lambda job: (job.total, job.index)))
        if not ledger.preempted:
            self._admit(ledger, sorted(waiting, key=lambda job: (job.prompt_tokens, -job.index)))

    def _grow(self, ledger: Ledger, order: list[Job]) -> None:
        while order:
            job = order.pop(0)
            tokens = min(ledger.wants(job), ledger.tokens)
            if not tokens or not ledger.sequences:
                continue
            while not ledger.can_give(job, tokens):
                victim = order.pop() if order else job
                ledger.preempt(victim)
                if victim is job:
                    return
            ledger.give(job, tokens)

    def _admit(self, ledger: Ledger, order: list[Job]) -> None:
        for job in order:
            tokens = min(ledger.wants(job), ledger.tokens)
            if tokens and ledger.sequences and ledger.can_admit(job):
                ledger.admit(job, tokens)


class LastFirst(ChunkedPrefill):
    """Gives decodes first, and admits from the tail of the queue."""

    def _admit(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        super()._admit(ledger, reversed(list(waiting)))

    def steady_until(self, ledger: Ledger, waiting: object, now_ns: int) -> int:
        return now_ns if waiting or ledger.preempted else FOREVER


@pytest.mark.parametrize("policy", [ShortestOfAll, LastFirst, "shortest_first", "deadline", "test_policies:LastFirst"])
def test_policies_that_choose_keep_every_promise(policy: type[BatchPolicy] | str) -> None:
    check_policy(policy, cases=40)


def test_an_object_is_checked_as_it_is() -> None:
    check_policy(LastFirst(SchedulerDefaults(policy="chunked_prefill")), cases=10)


# -- policies that do not ----------------------------------------------------------------------------------------------


class Broken(ChunkedPrefill):
    """Chunked prefill but for one fault."""

    def admit(self, ledger: Ledger, job: Job) -> None:
        ledger.admit(job, min(ledger.wants(job), ledger.tokens))

    def _admit(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        for job in list(waiting):
            if min(ledger.wants(job), ledger.tokens) and ledger.sequences and ledger.can_admit(job):
                self.admit(ledger, job)


class SeatsTwice(Broken):
    def admit(self, ledger: Ledger, job: Job) -> None:
        super().admit(ledger, job)
        if ledger.tokens:
            ledger.admit(job, 1)


class Overspends(Broken):
    def admit(self, ledger: Ledger, job: Job) -> None:
        ledger.admit(job, ledger.wants(job))


class SeatsTooMany(ChunkedPrefill):
    def _admit(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        for job in waiting:
            if ledger.tokens and ledger.sequences and ledger.blocks > 9:
                ledger.admit(job, 1)


class Invents(Broken):
    def admit(self, ledger: Ledger, job: Job) -> None:
        ledger.admit(Job(Request(7, 1, 1)), 1)


class TakesOffTheQueue(Broken):
    def admit(self, ledger: Ledger, job: Job) -> None:
        ledger.preempt(job)


class GivesTooMuch(Broken):
    def admit(self, ledger: Ledger, job: Job) -> None:
        ledger.admit(job, min(ledger.tokens, job.prompt_tokens + 1))


class Starves(ChunkedPrefill):
    def _admit(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        pass


class Thrashes(ChunkedPrefill):
    decodes_first = False

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        if running:
            ledger.preempt(running[-1])
        else:
            self._admit(ledger, waiting)


class SaysItIsSteady(Broken):
    """Seats one a step, and yet promises to go on as it is while others wait."""

    def _admit(self, ledger: Ledger, waiting: Iterable[Job]) -> None:
        super()._admit(ledger, list(waiting)[:1])

    def steady_until(self, ledger: Ledger, waiting: object, now_ns: int) -> int:
        return FOREVER


class DecodesSingly(ChunkedPrefill):
    def _grow(self, ledger: Ledger, running: Sequence[Job]) -> None:
        for job in running:
            tokens = min(ledger.wants(job), ledger.tokens)
            if tokens and ledger.can_give(job, tokens):
                ledger.give(job, tokens)


class BreaksTwo(SaysItIsSteady):
    """Two faults: the one of many requests is clear, the other shows in smaller cases, too."""

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        super().fill(ledger, running, waiting)
        if len(running) > 2:
            ledger.preempted += running[:1] * 2


class Fails(ChunkedPrefill):
    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        raise KeyError("no such thing")


BROKEN = [
    (SeatsTwice, "seated a request twice"),
    (Overspends, "more than the budget of"),
    (SeatsTooMany, "seats were free"),
    (Invents, "admitted a request that does not wait"),
    (TakesOffTheQueue, "preempted a request that does not run"),
    (GivesTooMuch, "where it lacks"),
    (Starves, "waited in replica 0, the first"),
    (Thrashes, "goes on deciding and requests do not finish"),
    (SaysItIsSteady, "single steps and steps at once differ: decodes_first or steady_until promises too much"),
    (BreaksTwo, "the policy preempted a request twice"),
    (DecodesSingly, "promises decodes first, and gave some before, or without, give_decodes"),
    (Fails, "the policy raised KeyError"),
]


@pytest.mark.parametrize(("policy", "said"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_told_in_words_with_a_small_case(policy: type[BatchPolicy], said: str) -> None:
    with pytest.raises(AssertionError, match=said) as caught:
        check_policy(policy, cases=60)
    shown = str(caught.value).partition("smallest case found: ")[2]
    case = eval(shown, {"Case": Case})
    assert len(case.lengths) <= 8, "a few requests are enough to show each of these"
    with pytest.raises(Exception, match=r".") as again:
        check_case(case, policy)
    assert said in str(again.value) or "KeyError" in said


def test_a_run_of_ones_own_policy_stops_at_a_broken_promise() -> None:
    """Not only under ``check_policy``: no result comes of decisions that cannot be carried out."""
    case = Case(arrivals_ns=[0, 0], lengths=[(5, 3), (9, 3)], policy="test_policies:SeatsTwice")
    with pytest.raises(BadInput, match="policy: the policy seated a request twice"):
        case.run(exact_steps=False)


def test_a_policy_is_a_batch_policy() -> None:
    with pytest.raises(BadInput, match="subclass"):
        Case(arrivals_ns=[0], lengths=[(5, 3)], policy="collections:OrderedDict").run(exact_steps=False)


# -- queues ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["come", "take", "back"])), max_size=40))
def test_ordered_queues_are_sorted_lists(moves: list[tuple[int, str]]) -> None:
    queue, model, out = Ordered(lambda job: job.prompt_tokens), list[Job](), list[Job]()
    for index, (number, move) in enumerate(moves):
        if move == "come":
            job = Job(Request(index, number, 1))
            queue.append(job)
            model.append(job)
        elif move == "take" and model:
            job = model.pop(number % len(model))
            queue.take(job)
            out.append(job)
        elif move == "back" and out:
            queue.appendleft(out[-1])
            model.append(out.pop())
        model.sort(key=lambda job: (job.prompt_tokens, job.index))
        assert list(queue) == model
        assert len(queue) == len(model)
    for queue_of_one in (queue, Fifo()):
        with pytest.raises(ValueError, match=r"."):
            queue_of_one.take(Job(Request(99, 3, 1)))


# -- the shipped ones --------------------------------------------------------------------------------------------------

MEAN_TOKENS = 10_000
SERVICE_S = MEAN_TOKENS * 1e-6


def jobs(rng: np.random.Generator, count: int, utilisation: float) -> Requests:
    """Poisson arrivals of one output token; the prompt's tokens are the service in microseconds."""
    prompts = np.clip(np.rint(rng.exponential(MEAN_TOKENS, count)), 2, 131_000).astype(np.int64)
    arrival_s = np.cumsum(rng.exponential(SERVICE_S / utilisation, count))
    return Requests(name="jobs", arrival_s=arrival_s, prompt_tokens=prompts, output_tokens=np.ones_like(prompts))


def served(requests: Requests, policy: str, **how: object) -> KeptRun:
    """One seat, one microsecond a token, nothing else."""
    scheduler = SchedulerDefaults(policy=policy, max_num_batched_tokens=131_072, max_num_seqs=1)
    cost = LinearCost(step_ns=0, token_ns=1_000, context_ns=0)
    run = KeptRun(made_up_deployment(scheduler), requests, cost=cost, memory=made_up_memory(9_000), how=How(**how))  # type: ignore[arg-type]
    run.go()
    check_run(run)
    return run


def mean_wait_s(run: KeptRun) -> float:
    return float(np.mean([(request.scheduled_ns or 0) - request.arrival_ns for request in run.requests])) / 1e9


def theory_sjf_s(utilisation: float) -> float:
    """Mean wait of M/G/1 under non-preemptive shortest job first, for exponential service times.

    A job of size x waits R / (1 - rho(x))**2 on average: R = rate E[S^2] / 2 is what is left of the job in service,
    rho(x) the load of all shorter jobs.
    """
    sizes = np.linspace(0, 40, 400_001)  # in mean service times
    density = np.exp(-sizes)
    shorter = utilisation * (1 - (1 + sizes) * np.exp(-sizes))
    left_s = utilisation * SERVICE_S  # E[S^2] / 2 is the square of the mean
    return float(np.trapezoid(density * left_s / (1 - shorter) ** 2, sizes))


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_shortest_first_waits_as_theory_says(utilisation: float) -> None:
    streams = [np.random.default_rng(stream) for stream in np.random.SeedSequence(1954).spawn(8)]
    waits = [mean_wait_s(served(jobs(rng, 30_000, utilisation), "shortest_first")) for rng in streams]
    assert np.mean(waits) == pytest.approx(theory_sjf_s(utilisation), rel=0.03)


def test_shortest_first_finishes_everybody_and_waits_less() -> None:
    requests = jobs(np.random.default_rng(2), 800, 0.9)
    shortest, first_come = (served(requests, policy) for policy in ("shortest_first", "chunked_prefill"))
    assert sum(request.finished for request in shortest.requests) == 800
    assert mean_wait_s(shortest) < 0.7 * mean_wait_s(first_come)


def order(run: KeptRun) -> list[int]:
    return [request.index for request in sorted(run.requests, key=lambda request: request.scheduled_ns or 0)]


def test_output_counts_only_for_who_knows_it() -> None:
    case = Case(arrivals_ns=[0] * 4, lengths=[(9, 1), (5, 90), (4, 90), (6, 2)], policy="shortest_first", seats=1)
    assert order(case.run(exact_steps=False)) == [2, 1, 3, 0]
    scheduler = SchedulerDefaults(policy="shortest_first", max_num_seqs=1, knows_output=True)
    run = KeptRun(made_up_deployment(scheduler), case.requests(), cost=LinearCost(), memory=made_up_memory(100))
    run.go()
    assert order(run) == [3, 0, 2, 1]


def file(**engine_options: object) -> DeploymentFile:
    return DeploymentFile(model="llama-3.1-8b", device="h100-sxm", engine_options=engine_options)  # type: ignore[arg-type]


def test_only_shortest_first_may_know_the_output() -> None:
    resolve_deployment(file(policy="shortest_first", knows_output=True), where="mine.yaml")
    with pytest.raises(BadInput, match="knows_output goes with policy shortest_first") as caught:
        resolve_deployment(file(policy="deadline", knows_output=True), where="mine.yaml")
    assert "mine.yaml" in str(caught.value)


def test_the_earliest_deadline_is_first() -> None:
    """By the column; where there is none, by arrival, which one limit for all leaves in order."""
    lengths = [(50, 2)] * 4
    case = Case(arrivals_ns=[0] * 4, lengths=lengths, policy="deadline", seats=1, patience_ns=[900, 300, 600, 300])
    assert order(case.run(exact_steps=False)) == [1, 3, 2, 0]
    requests = Requests(
        name="r", arrival_s=np.arange(4) / 1e4, prompt_tokens=np.full(4, 50), output_tokens=np.full(4, 2)
    )
    run = served(requests, "deadline", slo=SLO(ttft_s=0.5))
    assert [request.deadline_ns for request in run.requests] == [500_000_000 + 100_000 * i for i in range(4)]
    assert order(run) == [0, 1, 2, 3]


def test_deadlines_come_from_the_arrivals_of_a_closed_loop() -> None:
    case = Case(arrivals_ns=[0] * 3, lengths=[(5, 2)] * 3, policy="deadline", concurrency=1, patience_ns=[10, 20, 30])
    run = case.run(exact_steps=False)
    assert [(r.deadline_ns or 0) - r.arrival_ns for r in run.requests] == [10, 20, 30]


def test_a_deadline_policy_without_deadlines_is_refused() -> None:
    requests = jobs(np.random.default_rng(0), 3, 0.5)
    deployment = resolve_deployment(file(policy="deadline"), where="test")
    with pytest.raises(BadInput, match=r"--slo ttft_s=\.\.\. or a column deadline_s"):
        simulate(deployment, requests, slo=SLO(tpot_s=0.1))


def test_a_column_of_deadlines_is_said_to_count_only_where_it_does() -> None:
    requests = Requests(
        name="r",
        arrival_s=np.zeros(2),
        prompt_tokens=np.array([5, 6]),
        output_tokens=np.array([2, 2]),
        extra={"deadline_s": np.array([2.0, 1.0])},
    )
    said = {}
    for policy in ("deadline", "chunked_prefill"):
        deployment = resolve_deployment(file(policy=policy), where="test")
        said[policy] = any(
            "columns without effect here: deadline_s" in note for note in simulate(deployment, requests).notes
        )
    assert said == {"deadline": False, "chunked_prefill": True}


def test_deadlines_are_seconds() -> None:
    with pytest.raises(BadInput, match=r"deadline_s, row 2 .*seconds after the arrival"):
        Requests(
            name="r",
            arrival_s=np.zeros(2),
            prompt_tokens=np.array([5, 6]),
            output_tokens=np.array([2, 2]),
            extra={"deadline_s": np.array([2.0, -1.0])},
        )


def with_deadlines(deadline_s: NDArray[np.float64], arrival_s: NDArray[np.float64]) -> Requests:
    count = len(arrival_s)
    return Requests(
        name="r",
        arrival_s=arrival_s,
        prompt_tokens=np.full(count, 50),
        output_tokens=np.full(count, 2),
        extra={"deadline_s": deadline_s},
    )


@pytest.mark.parametrize(("absolute", "origin_s"), [(True, 0.0), (True, 86_400.0), (False, 0.0)])
def test_deadlines_that_are_times_on_a_clock_are_told(absolute: bool, origin_s: float) -> None:
    """Patience alone never grows with the arrivals; arrival + patience does, wherever its clock began."""
    rng = np.random.default_rng(3)
    arrival_s = np.cumsum(rng.exponential(0.1, 60))
    patience_s = rng.uniform(0.2, 1.0, 60)
    requests = with_deadlines(origin_s + patience_s + (arrival_s if absolute else 0), arrival_s)
    said = {
        policy: [
            note for note in simulate(resolve_deployment(file(policy=policy), "t"), requests).notes if "count" in note
        ]
        for policy in ("deadline", "chunked_prefill")
    }
    told = "deadline_s counts from arrival; these look like absolute times: they grow with arrival_s"
    assert said == {"deadline": [told] if absolute else [], "chunked_prefill": []}


def test_one_deadline_for_all_or_a_burst_is_no_clock() -> None:
    ones, times = np.full(20, 0.5), np.arange(20) / 10
    assert not look_absolute(ones, times)
    assert not look_absolute(times, ones)
    assert look_absolute(times + 1, times)
    assert not look_absolute(times[:4] + 1, times[:4])


def test_an_empty_deadline_is_nothing() -> None:
    with pytest.raises(BadInput, match=r"deadline_s, row 2 \(.*\): got nothing; give seconds after the arrival"):
        with_deadlines(np.array([1.0, np.nan]), np.zeros(2))
