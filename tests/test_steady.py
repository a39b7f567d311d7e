"""The steady part of a run: its window, its figures against known answers, and what may be said of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import apexsim
from apexsim.batch_means import ratio_of, regressed, risen
from apexsim.flows import flows_of
from apexsim.io.deployments import deployment_from
from apexsim.io.requests import resolve_workload
from apexsim.metrics import spread_until
from apexsim.results import SimulationResult
from apexsim.serving.simulator import Run, simulate
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.laws import (
    AllAtOnce,
    ExponentialLength,
    FixedLength,
    GammaLength,
    LengthLaw,
    Lengths,
    LognormalLength,
    PoissonArrivals,
    QuantileLength,
    UniformLength,
)
from apexsim.specs.workload import Requests, Workload
from apexsim.steady import COST, ENERGY, Steady, steady_part
from apexsim.testing import LinearCost, made_up_deployment, made_up_memory

# One seat, a millisecond a token: a request of 10 tokens keeps the server for 10 ms.
ONE_SEAT = SchedulerDefaults(policy="chunked_prefill", max_num_batched_tokens=4096, max_num_seqs=1)
PER_TOKEN = LinearCost(step_ns=1_000_000, token_ns=0, context_ns=0)
TEN = FixedLength(tokens=10)


def queue(load: float, requests: int, *, seed: int, lengths: Lengths = TEN) -> Workload:
    return Workload(
        name="queue",
        requests=requests,
        prompt_tokens=TEN,
        output_tokens=lengths,
        arrivals=PoissonArrivals(rate_per_s=load / (1e-3 * lengths.mean)),
    )


def served(requests: Requests, *, seats: int = 1) -> SimulationResult:
    deployment = made_up_deployment(ONE_SEAT.model_copy(update={"max_num_seqs": seats}))
    memory = made_up_memory(100_000)
    run = Run(deployment, requests, cost=PER_TOKEN, memory=memory)
    run.go()
    recorder = run.recorder
    return SimulationResult.from_run(
        deployment=deployment,
        workload=requests,
        slo=None,
        requests=run.rows.blocks(0),
        itl=recorder.inter_token_gaps(),
        steps=recorder.steps(),
        accounting={},
        worked_s={},
        block_ns=[replica.block_ns for replica in run.replicas],
        memory={"serve": memory},
        timing={},
        notes=(),
    )


def queued(load: float, requests: int, *, seed: int, lengths: Lengths = TEN) -> Steady:
    return served(queue(load, requests, seed=seed, lengths=lengths).sample(seed=seed)).steady


def small(**changed: object) -> Deployment:
    return deployment_from(None, {"model": "llama-3.1-8b", "device": "h100-sxm", **changed})


@cache
def chat(requests: int, seed: int, rate_per_s: float = 8.0) -> SimulationResult:
    return simulate(small(), resolve_workload("chat", rate_per_s=rate_per_s, requests=requests, seed=seed))


# -- figures against known answers -------------------------------------------------------------------------------------


def test_intervals_of_an_m_d_1_queue_hold_what_is_offered() -> None:
    """A server that keeps up gives, in the long run, the 800 tokens a second that are asked of it."""
    found = [queued(0.8, 700, seed=seed) for seed in range(60)]
    rates = np.array([each.output_tokens_per_s for each in found], dtype=float)
    widths = np.array([each.half_width[COST] for each in found], dtype=float)
    inside = np.abs(rates - 800) <= widths * rates
    assert 0.85 <= inside.mean() <= 0.99
    assert rates.mean() == pytest.approx(800, rel=0.01)


@pytest.mark.parametrize("lengths", [TEN, ExponentialLength(mean_tokens=10)])
def test_a_server_that_keeps_up_does_not_grow_and_an_overloaded_one_does(lengths: Lengths) -> None:
    """M/D/1 and, nearly, M/M/1 at 80 and 110 % load."""
    keeps_up = Counter(queued(0.8, 1500, seed=seed, lengths=lengths).kind for seed in range(12))
    overloaded = [queued(1.1, 1500, seed=seed, lengths=lengths) for seed in range(12)]
    assert keeps_up["growing"] == 0
    assert Counter(each.kind for each in overloaded)["growing"] >= 11
    grown = next(each for each in overloaded if each.kind == "growing")
    assert grown.usd_per_million_output_tokens is grown.energy_per_output_token_j is grown.output_tokens_per_s is None
    assert "does not keep up" in grown.reason


def test_evenly_spaced_requests_cost_what_arithmetic_says() -> None:
    """D/D/1: a request of 10 tokens every 20 ms makes 500 tokens a second, of a server of 3 USD an hour."""
    count = 400
    requests = Requests(
        name="even",
        arrival_s=np.arange(count) * 0.02,
        prompt_tokens=np.full(count, 10),
        output_tokens=np.full(count, 10),
    )
    result = served(requests)
    steady = result.steady
    price = result.deployment.cluster.device.price.usd_per_hour
    assert steady.kind == "steady"
    assert steady.output_tokens_per_s == pytest.approx(500, rel=2e-3)
    assert steady.usd_per_million_output_tokens == pytest.approx(price / 3600 / 500 * 1e6, rel=2e-3)
    assert steady.energy_per_output_token_j is None  # a made-up cost has no joules
    assert steady.half_width[COST] == pytest.approx(0, abs=5e-3)


def test_figures_of_short_and_long_runs_agree_within_their_intervals() -> None:
    """The drain of a short run is no part of its figures; those of the whole run fall as the run grows longer."""
    long = chat(8000, 7).steady
    for requests, seed in ((1500, 0), (1500, 1), (1500, 2), (3000, 3)):
        run = chat(requests, seed).steady
        for key in (COST, ENERGY):
            mine, other = getattr(run, key), getattr(long, key)
            assert abs(mine - other) <= math.hypot(run.half_width[key] * mine, long.half_width[key] * other)
    whole = [chat(requests, 0).summary()["cost"][COST] for requests in (100, 1500)]
    assert whole[0] > 1.05 * whole[1] > 1.05 * long.usd_per_million_output_tokens  # type: ignore[operator]


def test_steady_figures_of_drawn_workloads_hardly_depend_on_the_seed() -> None:
    deployment = deployment_from(None, {"model": "llama-3.1-70b", "device": "h100-sxm", "tensor": 4, "replicas": 4})
    found = [
        simulate(deployment, resolve_workload("chat", rate_per_s=20, requests=4096, seed=seed)).steady
        for seed in range(5)
    ]
    assert {each.kind for each in found} == {"steady"}
    for key in (COST, ENERGY):
        figures = [getattr(each, key) for each in found]
        assert max(figures) / min(figures) < 1.03
        assert all(0 < (each.half_width[key] or 1) <= 0.03 for each in found)


def test_the_whole_run_as_window_gives_the_figures_of_the_whole_run() -> None:
    result = chat(300, 0)
    summary, first_s = result.summary(), float(result.request_columns["arrival_s"].min())
    for count in (1, 7):
        flows = flows_of(result, np.linspace(first_s, result.end_s, count + 1))
        assert flows.joules.sum() == pytest.approx(summary["energy"]["total_j"], rel=1e-8)  # whole nanoseconds
        assert flows.tokens.sum() == pytest.approx(result.request_columns["output_tokens"].sum())
        assert flows.prompt_tokens.sum() == pytest.approx(result.request_columns["prompt_tokens"].sum())


def test_steps_told_singly_or_in_runs_give_the_same_steady_figures() -> None:
    requests = resolve_workload("chat", rate_per_s=8, requests=400, seed=1)
    fast, exact = (simulate(small(), requests, exact_steps=exact).steady for exact in (False, True))
    assert fast.usd_per_million_output_tokens == exact.usd_per_million_output_tokens
    assert fast.energy_per_output_token_j == pytest.approx(exact.energy_per_output_token_j, rel=1e-3)


# -- windows and verdicts ----------------------------------------------------------------------------------------------


def test_the_window_leaves_out_ramp_and_drain() -> None:
    result = chat(1500, 0)
    steady, arrival_s = result.steady, result.request_columns["arrival_s"]
    assert steady.kind == "steady"
    assert steady.reason == ""
    assert steady.to_s == arrival_s.max() < result.end_s
    residence_s = result.request_columns["last_token_s"] - result.request_columns["scheduled_s"]
    assert steady.from_s == pytest.approx(arrival_s.min() + np.quantile(residence_s, 0.99))
    assert steady.share == pytest.approx((steady.to_s - (steady.from_s or 0)) / result.duration_s)
    assert steady.requests == ((arrival_s > (steady.from_s or 0)) & (arrival_s < steady.to_s)).sum()


def test_a_short_window_says_how_many_requests_would_do_and_they_do() -> None:
    short = chat(60, 0).steady
    assert short.kind == "short"
    assert short.usd_per_million_output_tokens is not None
    assert short.wanted_requests is not None
    assert f"about {short.wanted_requests:,} requests would do" in short.reason
    wanted = short.wanted_requests
    for _ in range(3):
        longer = chat(wanted, 0).steady
        wanted = longer.wanted_requests or wanted
    assert longer.kind == "steady"


def test_each_figure_says_whether_the_window_is_too_short_for_it() -> None:
    steady = chat(300, 0).steady
    cost, energy = (steady.short_of[figure] or "" for figure in (COST, ENERGY))
    assert "% of cost, above 3%" in cost
    assert "energy" not in cost
    assert "% of energy, above 3%" in energy
    assert "cost" not in energy
    assert "% of cost and " in steady.reason
    wanted = [steady.wanted_of[figure] or 0 for figure in (COST, ENERGY)]
    assert 300 < wanted[0] < wanted[1] == steady.wanted_requests  # the backlog's part falls faster
    enough = chat(600, 0).steady
    assert enough.short_of == enough.wanted_of == {COST: None, ENERGY: None}


def test_money_may_be_known_well_where_joules_are_not() -> None:
    """Requests of one size, evenly: tokens a second are certain. Joules of a step that wander are not."""
    even = Requests(
        name="even", arrival_s=np.arange(400) * 0.5, prompt_tokens=np.full(400, 10), output_tokens=np.full(400, 10)
    )
    result = simulate(small(), even)
    joules = result.step_columns["energy_j"]
    columns = {**result.step_columns, "energy_j": joules * (1 + 0.9 * np.sin(np.linspace(0, 40, len(joules))))}
    steady = steady_part(replace(result, step_columns=columns))
    assert steady.kind == "short"
    assert steady.short_of[COST] is steady.wanted_of[COST] is None
    assert "of energy, above 3%" in (steady.short_of[ENERGY] or "")
    assert steady.wanted_of[ENERGY] == steady.wanted_requests


def test_requests_that_come_at_once_are_a_whole_run() -> None:
    requests = resolve_workload("chat", requests=40).all_at_once()
    result = simulate(small(), requests)
    steady, summary = result.steady, result.summary()
    assert steady.kind == "all_at_once"
    assert "whole run" in steady.reason
    assert steady.usd_per_million_output_tokens == pytest.approx(summary["cost"][COST])
    assert steady.energy_per_output_token_j == pytest.approx(summary["energy"]["per_output_token_j"])
    assert steady.half_width == {COST: None, ENERGY: None}


def test_a_closed_loop_drops_its_first_and_its_last_wave() -> None:
    """4 clients, one seat each: 4 tokens a millisecond; the last client's answers are no part of it."""
    lengths = np.full(402, 10)
    lengths[-1] = 4000
    requests = Requests(name="loop", concurrency=4, prompt_tokens=np.full(402, 10), output_tokens=lengths)
    result = served(requests, seats=4)
    steady, columns = result.steady, result.request_columns
    assert (steady.from_s, steady.to_s) == (columns["last_token_s"][:4].max(), columns["arrival_s"].max())
    assert steady.output_tokens_per_s == pytest.approx(4000, rel=0.02)
    assert steady.kind == "steady"
    assert result.summary()["throughput"]["output_tokens_per_s"] < 2000
    few = served(requests.head(7), seats=4).steady
    assert few.kind == "short"
    assert few.wanted_requests is not None


def test_waves_are_counted_whole() -> None:
    loop = Requests(name="waves", concurrency=4, prompt_tokens=np.full(200, 10), output_tokens=np.full(200, 10))
    steady = served(loop.closed_loop(4, 0.01, waves=True), seats=4).steady
    assert steady.output_tokens_per_s == pytest.approx(40 / 0.02, rel=0.03)  # 10 ms of work, 10 ms of pause


def test_where_nothing_finishes_nothing_is_said() -> None:
    requests = Requests(
        name="long", arrival_s=np.arange(3.0), prompt_tokens=np.full(3, 10**6), output_tokens=np.full(3, 5)
    )
    steady = simulate(small(), requests).steady
    assert (steady.kind, steady.usd_per_million_output_tokens, steady.wanted_requests) == ("short", None, None)
    assert "no request finished" in steady.reason


def test_refused_requests_leave_plain_batch_means() -> None:
    chats = resolve_workload("chat", rate_per_s=8, requests=1500, seed=0)
    prompts = chats.prompt_tokens.copy()
    prompts[::100] = 10**6
    changed = Requests(name="some", arrival_s=chats.arrival_s, prompt_tokens=prompts, output_tokens=chats.output_tokens)
    steady = simulate(small(), changed).steady
    assert "batch means" in steady.estimator
    assert steady.output_tokens_per_s == pytest.approx(steady.output_tokens / (steady.window_s or 0), rel=1e-3)


# -- what a workload offers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law",
    [
        FixedLength(tokens=7),
        UniformLength(low=3, high=10),
        LognormalLength(log_mean=5.0, log_sd=1.2),
        LognormalLength(log_mean=5.0, log_sd=1.2, max_tokens=1000),
        ExponentialLength(mean_tokens=3.5),
        GammaLength(mean_tokens=200, cv=1.5),
        QuantileLength(probabilities=(0, 0.5, 0.9, 1), tokens=(1, 100, 500, 4000)),
    ],
    ids=lambda law: law.kind,
)
def test_the_mean_of_a_law_is_that_of_its_draws(law: LengthLaw) -> None:
    draws = law.draw(np.random.default_rng(0).standard_normal(400_000))
    assert law.mean == pytest.approx(draws.mean(), abs=4 * draws.std() / math.sqrt(len(draws)) + 1e-6)


def test_what_is_offered_follows_what_is_done_to_the_rows() -> None:
    drawn = queue(0.5, 50, seed=0, lengths=ExponentialLength(mean_tokens=40)).sample()
    mean = ExponentialLength(mean_tokens=40).mean
    assert drawn.offered.output_tokens == mean != drawn.output_tokens.mean()
    assert drawn.offered.rate_per_s == 0.5 / (1e-3 * mean)
    assert drawn.head(20).offered == drawn.offered
    assert drawn.at_rate(3.0).offered.rate_per_s == 3.0
    assert drawn.all_at_once().offered.rate_per_s == math.inf
    assert drawn.closed_loop(4).offered.rate_per_s is None
    trace = Requests(name="t", arrival_s=np.array([0, 1, 4.0]), prompt_tokens=[5, 5, 8], output_tokens=[1, 2, 3])  # type: ignore[arg-type]
    assert (trace.offered.rate_per_s, trace.offered.prompt_tokens, trace.offered.output_tokens) == (0.5, 6, 2)
    assert trace.arriving(PoissonArrivals(rate_per_s=9.0)).offered.rate_per_s == 9.0
    once = Workload(name="o", prompt_tokens=TEN, output_tokens=TEN, arrivals=AllAtOnce()).sample(5)
    assert once.arriving(PoissonArrivals(rate_per_s=2.0)).offered.rate_per_s == 2.0


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_amounts_are_spread_evenly_and_points_come_at_once() -> None:
    start, end = np.array([0.0, 2.0, 3.0]), np.array([4.0, 2.0, 5.0])
    amounts = np.array([8.0, 1.0, 10.0])
    assert spread_until((start, end), amounts, np.array([-1, 0, 1, 2, 4, 9])).tolist() == [0, 0, 2, 5, 14, 19]


def test_regressed_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, inside = np.random.default_rng(3), 0
    for _ in range(400):
        controls = rng.normal(10, 2, (12, 2))
        values = 3 + controls @ [2.0, 0.5] + rng.normal(0, 1, 12)
        found, _ = regressed(controls, values, np.array([11.0, 9.0]))
        inside += abs(found.value - (3 + 22 + 4.5)) <= found.half_width
    assert 0.92 <= inside / 400 <= 0.98


def test_controls_that_never_change_leave_the_plain_mean() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 3.0])
    found, slopes = regressed(np.full((6, 2), 7.0), values, np.array([7.0, 7.0]))
    assert (found.value, slopes.tolist()) == (3.0, [0.0, 0.0])
    assert found.half_width == pytest.approx(2.5706 * values.std(ddof=1) / math.sqrt(6), rel=1e-4)


def test_a_ratio_of_batches_and_a_rise() -> None:
    rng = np.random.default_rng(0)
    found = ratio_of(rng.normal(30, 3, 20), rng.normal(10, 0.1, 20))
    assert found.value == pytest.approx(3, abs=found.half_width)
    assert 0.02 < found.relative < 0.15
    noise = rng.normal(0, 1, 41)
    assert risen(noise) == 0.0
    assert risen(noise + np.arange(41)) == pytest.approx(40, rel=0.1)
    assert risen(noise - np.arange(41)) == 0.0


def test_a_queue_that_grows_tells_an_overload_whose_requests_stay_long() -> None:
    """Two A100 get three times what they serve: requests stay for minutes, and the window is short against that."""
    deployment = apexsim.deployment(model="llama-3.1-8b", device="a100-sxm", replicas=2)
    requests = apexsim.workload("chat", rate_per_s=30, requests=2000)
    steady = apexsim.simulate(deployment, requests).steady
    assert steady.kind == "growing"
    assert steady.usd_per_million_output_tokens is None
    assert "does not keep up" in steady.reason
