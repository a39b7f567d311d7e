"""What plans are ranked by: goodput that lasts, steady figures, ties, fewest devices; and plans that cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_search import LIMITS, REQUESTS, layout, question, space, summary

from apexsim import catalog, simulate
from apexsim.errors import BadInput
from apexsim.io.requests import resolve_supply
from apexsim.io.search_files import study_data
from apexsim.reasons import counted
from apexsim.search.goodput import LEAST_SPAN_S, PER_REPLICA, goodput, highest_passing, probe_requests, scout
from apexsim.search.headline import headline
from apexsim.search.judging import Row
from apexsim.search.objective import OBJECTIVES
from apexsim.search.outcomes import Outcome
from apexsim.search.probing import probe, waits_grow
from apexsim.search.space import Candidate, SearchSpace
from apexsim.search.study import MOST_DRAWN, search
from apexsim.search.ties import decide, half_width, leaders, rank, ties
from apexsim.search.trial import Scouted, Trial
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.plan import Plan
from apexsim.specs.slo import SLO
from apexsim.specs.supply import Supply
from apexsim.specs.workload import Requests
from apexsim.steady import COST, ENERGY

CHAT = catalog.load("workload", "chat")


def drawn(count: int, *, fixed: bool = False) -> Supply:
    return Supply(requests=CHAT.sample(count), law=CHAT, fixed=fixed)


# -- more of the same requests -----------------------------------------------------------------------------------------


def test_drawn_requests_go_on_as_they_began() -> None:
    supply = resolve_supply("chat", rate_per_s=3.0, requests=50, seed=7)
    more = supply.at_least(200)
    assert len(more) == 200
    assert np.array_equal(more.arrival_s[:50], supply.requests.arrival_s)
    assert np.array_equal(more.output_tokens[:50], supply.requests.output_tokens)
    assert supply.fixed
    assert not resolve_supply("chat").fixed
    assert supply.at_least(20) is supply.requests


def test_recorded_requests_are_repeated_whole_one_mean_gap_apart() -> None:
    supply = Supply(requests=REQUESTS)  # four, half a second apart
    more = supply.at_least(6)
    assert len(more) == 8
    assert list(more.arrival_s) == [0.5 * number for number in range(8)]
    assert more.rate_per_s == REQUESTS.rate_per_s
    assert "four repeated 2 times" in more.notes
    assert not supply.grows


# -- goodput -----------------------------------------------------------------------------------------------------------


def trial(run: Any, supply: Supply, *, replicas: int = 1, devices: int = 2, **scouted: float) -> Trial:
    looked = {"e2e_s": 1.0, "best_per_s": None, **scouted}
    return Trial(run, supply, SLO(ttft_s=1.0), devices, replicas, Scouted(**looked))


def test_a_probe_lasts_a_minute_or_4000_requests_a_replica_or_ten_end_to_end_times() -> None:
    one = trial(None, drawn(10))
    assert probe_requests(one, 1.0) == PER_REPLICA
    assert probe_requests(one, 1000.0) == 1 + 1000 * LEAST_SPAN_S
    assert probe_requests(trial(None, drawn(10), replicas=8), 1.0) == 8 * PER_REPLICA
    assert probe_requests(trial(None, drawn(10), e2e_s=20.0), 1000.0) == 1 + 1000 * 200


def test_goodput_does_not_reward_what_a_burst_alone_withstands() -> None:
    """A server of 10 requests/s with a queue that it hides for 1,000 requests: 512 at any rate pass, 4,000 do not."""
    seen: list[tuple[int, float]] = []

    def run(requests: Requests, *, until_lost: bool = False) -> Mapping[str, Any]:
        seen.append((len(requests), requests.rate_per_s))
        excess = len(requests) * max(0.0, 1 - 10 / requests.rate_per_s)
        return summary(attainment=float(excess <= 1000 / 3))

    looked = scout(trial(run, drawn(512)))
    brief = looked["brief_per_device_per_s"]
    assert brief is not None
    assert brief > 10
    figures = goodput(trial(run, drawn(512), own_per_s=brief, best_per_s=brief))
    rate = figures["goodput_requests_per_s"]
    assert rate is not None
    assert 10 < rate < 11  # 4,000 requests: at most a twelfth of them may be in excess
    assert figures["goodput_per_device_per_s"] == rate / 2
    assert figures["goodput_span_s"] == pytest.approx(3999 / rate)
    assert len(set(seen)) == len(seen)  # no rate twice on the same requests


def test_a_plan_that_short_probes_find_far_behind_is_not_probed_at_length() -> None:
    figures = goodput(trial(None, drawn(512), own_per_s=1.0, best_per_s=2.5))
    assert figures == {"goodput_requests_per_s": 2.0, "goodput_span_s": None, "goodput_per_device_per_s": 1.0}
    said = OBJECTIVES["goodput"].explain({**figures, "attainment": 1.0}, {"kind": "steady", "reason": ""}, LIMITS)
    assert "far behind the best" in said


def test_a_rate_at_which_waits_lengthen_does_not_last() -> None:
    """Time to first token is not limited, so attainment is 1 however long the queue grows."""

    def run(requests: Requests, *, until_lost: bool = False) -> Mapping[str, Any]:
        return summary(attainment=1.0) | {"waits_grow": requests.rate_per_s > 4}

    rate = goodput(trial(run, drawn(64), own_per_s=8.0, best_per_s=8.0))["goodput_requests_per_s"]
    assert rate is not None
    assert 4 / 1.02 <= rate <= 4


@pytest.mark.parametrize(("service_s", "grows"), [(0.9, False), (1.1, True)])
def test_waits_of_a_queue_that_is_too_slow_grow(service_s: float, grows: bool) -> None:
    arrival_s = np.arange(1000.0)
    assert waits_grow(arrival_s, np.maximum(0.0, (service_s - 1) * arrival_s)) is grows


@pytest.mark.parametrize("rate_per_s", [4.0, 200.0])
def test_a_probe_agrees_with_a_whole_run(rate_per_s: float) -> None:
    """It ends a run as soon as it is lost, and only then."""
    deployment = space("llama-3.1-8b", devices=1).deployment(Candidate(Plan(), 1))
    requests, slo = CHAT.sample(600).at_rate(rate_per_s), SLO(ttft_s=0.3, tpot_s=0.05)
    whole = simulate(deployment, requests, slo=slo).summary()["slo"]["attainment"]
    found = probe(deployment, requests, slo)["slo"]["attainment"]
    if whole >= slo.target:
        assert found == whole
    else:
        assert found < slo.target


@given(st.floats(1e-2, 1e2), st.floats(1e-2, 1e2))
def test_no_rate_is_tried_twice(threshold: float, start: float) -> None:
    tried: list[float] = []

    def passes(value: float) -> bool:
        tried.append(value)
        return value <= threshold

    highest_passing(passes, start, step=1.1)
    assert len(set(tried)) == len(tried)


# -- ties --------------------------------------------------------------------------------------------------------------


def row(name: int, value: float, *, window: str = "steady", parts: list[float] | None = None, **more: float) -> Row:
    column = OBJECTIVES["energy"].column
    figures: dict[str, float | None] = {column: value, "attainment": 1.0, "e2e_p90_s": 1.0, "devices": 1.0, **more}
    batches: dict[str, list[float | None]] = {column: [*(parts or [])]}
    return Row(Candidate(Plan(tensor=name), 1), Outcome("ok", "", figures, window, batches))


def test_plans_tie_within_half_a_percent() -> None:
    energy = OBJECTIVES["energy"]
    assert ties(row(1, 1.0), row(2, 1.0049), energy)
    assert not ties(row(1, 1.0), row(2, 1.006), energy)


def test_plans_tie_within_the_sampling_error_of_their_paired_difference() -> None:
    energy, noise = OBJECTIVES["energy"], np.random.default_rng(1).normal(size=20)
    common, own = 0.2 * noise, np.random.default_rng(2).normal(size=20) * 0.1
    first, steady = [*(1 + common)], [*(1.03 + common)]
    noisy = [*(1.03 + common + own)]
    assert not ties(row(1, 1.0, parts=first), row(2, 1.03, parts=steady), energy)  # what they share cancels
    assert ties(row(1, 1.0, parts=first), row(2, 1.03, parts=noisy), energy)
    assert half_width(own) == pytest.approx(2.093 * own.std(ddof=1) / 20**0.5, rel=1e-3)  # Student's t, 19 degrees


def test_ties_are_broken_by_attainment_then_latency_then_devices_and_never_by_name_alone() -> None:
    energy = OBJECTIVES["energy"]
    rows = [row(1, 1.0, attainment=0.95), row(2, 1.001), row(4, 1.002, e2e_p90_s=0.5), row(8, 1.5)]
    ranked = rank(rows, energy)
    assert [each.candidate.plan.tensor for each in ranked] == [4, 2, 1, 8]
    assert len(leaders(ranked, energy)) == 3
    assert decide(ranked, energy) == "tie"
    assert decide(rank([row(2, 1.0), row(1, 1.0)], energy), energy) == "equal"
    assert decide(rank([row(2, 1.0), row(1, 1.1)], energy), energy) == "win"
    assert rank(rows, energy) == rank(rows[::-1], energy)


def test_a_short_window_wins_nothing() -> None:
    energy = OBJECTIVES["energy"]
    assert energy.half_width is not None

    def of(name: int, value: float, window: str, share: float) -> Row:
        return row(name, value, window=window, **{energy.half_width or "": share})

    best = of(1, 1.0, "steady", 0.02)
    assert decide(rank([of(1, 1.0, "short", 0.1), of(2, 2.0, "steady", 0.02)], energy), energy) == "short"
    assert decide(rank([best, of(2, 2.0, "short", 0.6)], energy), energy) == "short"  # it may cost as little as 0.8
    assert decide(rank([best, row(2, 2.0, window="short")], energy), energy) == "short"  # and who knows
    assert decide(rank([best, of(2, 2.0, "short", 0.3)], energy), energy) == "win"  # 1.4 at the least


def test_the_headline_says_tie_and_what_broke_it() -> None:
    def alike(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
        tensor, pipeline, replicas = layout(deployment)
        kept = 1 - replicas / 100 - pipeline / 1000
        return summary(steady_usd_per_million_output_tokens=3 + tensor / 1e4, attainment=kept)

    study = search(question("cost", space=space(devices=4)), evaluate=alike)
    assert study.decision == "tie"
    line = headline(study)
    assert line.startswith("a tie by cost: ")
    assert "tp4-pp1-dp1 is first by SLO attainment (98.90%, the next 98.80%)" in line
    assert "(95 %: +-0.0% from sampling; how wrong the model may be for this figure is not known)" in line
    assert study_data(study)["decision"] == "tie"


# -- steady windows ----------------------------------------------------------------------------------------------------


def test_plans_that_do_not_keep_up_cannot_win() -> None:
    def grows(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
        return summary(window="growing" if layout(deployment)[0] > 1 else "steady", reason="the backlog grows by 9 %")

    study = search(question("cost", space=space(devices=2)), evaluate=grows)
    verdicts = {each.candidate.name: each.outcome.verdict for each in study.rows}
    assert verdicts == {"tp1-pp1-dp2": "ok", "tp1-pp2-dp1": "ok", "tp2-pp1-dp1": "misses_slo"}
    assert study.rows[-1].outcome.reason == "the backlog grows by 9 %"
    assert search(question("latency", space=space(devices=2)), evaluate=grows).rows[-1].outcome.verdict == "ok"


def needs(count: int) -> Any:
    def run(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
        short = len(requests) < count
        far = layout(deployment)[1] > 1
        return summary(
            window="short" if short else "steady",
            reason="too short" if short else "",
            steady_usd_wanted_requests=float(count),
            steady_energy_wanted_requests=float(count),
            attainment=0.1 if far else 1.0,
            requests=float(len(requests)),
        )

    return run


def test_a_search_draws_more_requests_where_windows_are_too_short() -> None:
    study = search(question("energy", space=space(devices=2), supply=drawn(100)), evaluate=needs(500))
    assert len(study.question.requests) == 500
    assert study.decision != "short"
    assert "500 requests drawn in place of 100" in headline(study)
    judged = {each.candidate.name: each.outcome.figures["requests"] for each in study.rows}
    assert judged == {"tp1-pp1-dp2": 500, "tp2-pp1-dp1": 500, "tp1-pp2-dp1": 100}  # the last misses the SLO by far


def noisy_joules(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
    """Money is known well, joules are not before 700 requests."""
    wide = None if len(requests) >= 700 else "the half-width is 5.0% of energy; about 700 requests would do"
    run = summary(
        window="short" if wide else "steady",
        reason=wide or "",
        steady_usd_per_million_output_tokens=float(layout(deployment)[0]),
        steady_usd_half_width=0.001,
        steady_energy_half_width=0.05,
        steady_energy_wanted_requests=700.0,
    )
    run["steady"]["short_of"] = {COST: None, ENERGY: wide}
    run["steady"]["wanted_of"][COST] = None
    return run


def test_a_window_is_too_short_for_the_figure_that_counts_or_not_at_all() -> None:
    """A search by cost does not draw more requests because joules are not yet known well."""
    asked = {"space": space(devices=2), "supply": drawn(100)}
    cost, energy = (search(question(by, **asked), evaluate=noisy_joules) for by in ("cost", "energy"))
    assert len(cost.question.requests) == 100
    assert {each.outcome.window for each in cost.rows} == {"steady"}
    assert {each.outcome.reason for each in cost.rows} == {""}
    assert cost.decision == "equal"  # tp1-pp1-dp2 and tp1-pp2-dp1: of the same cost, and as fast
    assert len(energy.question.requests) == 700
    fixed = question("energy", space=space(devices=2), supply=drawn(100, fixed=True))
    assert {each.outcome.window for each in search(fixed, evaluate=noisy_joules).rows} == {"short"}
    assert "5.0% of energy" in search(fixed, evaluate=noisy_joules).rows[0].outcome.reason


def test_a_number_that_was_asked_for_stays_and_says_that_it_is_too_short() -> None:
    asked = question("energy", space=space(devices=2), supply=drawn(100, fixed=True))
    study = search(asked, evaluate=needs(500))
    assert len(study.question.requests) == 100
    assert headline(study).startswith(
        "too short to say which plan is best by energy (about 500 requests would do): first is tp1-pp1-dp2"
    )
    assert "; too short" not in headline(study)  # said once


def test_a_search_draws_so_many_by_itself_and_no_more() -> None:
    asked = question("cost", space=space(devices=2), supply=drawn(1000))
    study = search(asked, evaluate=needs(10**6), jobs=1)
    assert len(study.question.requests) == MOST_DRAWN
    assert (
        f"(about 1,000,000 requests would do, more than the {MOST_DRAWN:,} that a search draws by itself: "
        in headline(study)
    )


# -- fewest devices ----------------------------------------------------------------------------------------------------


def test_fewest_devices_that_keep_the_slo() -> None:
    def by_devices(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
        tensor, pipeline, replicas = layout(deployment)
        used = tensor * pipeline * replicas
        return summary(attainment=min(1.0, 0.31 * used), steady_energy_per_output_token_j=float(pipeline))

    study = search(question("devices", space=space(devices=4)), evaluate=by_devices)
    assert study.question.space.allow_idle
    assert study.winner is not None
    assert study.winner.candidate.devices == 3
    assert study.winner.candidate.name == "tp1-pp1-dp3"  # as many, at the least energy
    line = headline(study)
    assert "3 devices" in line
    assert (
        "with one device fewer the nearest plan, tp1-pp1-dp2, misses it: 62.0% of requests keep the SLO, 90% wanted"
        in line
    )
    assert "1 device is not needed" in line
    assert "paid for" not in line
    assert "--allow-idle" not in line  # all were looked at


def test_fewest_devices_needs_an_slo() -> None:
    with pytest.raises(BadInput, match="devices needs a limit to keep: give --slo"):
        question("devices", slo=SLO())


# -- what can run ------------------------------------------------------------------------------------------------------


def test_groups_that_no_collective_was_timed_for_cannot_be_laid_out() -> None:
    odd = catalog.load("model", "llama-3.1-8b").model_copy(update={"heads": 24, "kv_heads": 24, "ffn": 14_400})
    cluster = Cluster(device=catalog.load("device", "h100-sxm"), devices_per_node=6)
    base = Deployment(model=odd, cluster=cluster, engine=catalog.load("engine", "vllm-v1-async"))
    by_name = {each.name: each.reasons for each in SearchSpace(base=base).candidates()}
    assert "h100-sxm has no all_reduce over 3 devices" in by_name["tp3-pp1-dp2"]
    assert by_name["tp2-pp1-dp3"] == ()


def test_reasons_are_counted_and_told_with_ranges() -> None:
    reasons = [f"tensor degree {degree} does not divide the 8 KV heads" for degree in (7, 3, 5)]
    more = ["needs 10.5 GiB", "needs 1,024 GiB"]
    assert counted([*more, *reasons, "other"]) == [
        (3, "tensor degree 3 to 7 does not divide the 8 KV heads"),
        (2, "needs 10.5 to 1,024 GiB"),
        (1, "other"),
    ]


# -- the same bytes ----------------------------------------------------------------------------------------------------

SEARCH = """
import json
from apexsim.io.search_files import study_data
from apexsim.planning import search
found = []
for model, devices in (("gpt-oss-20b", "1xh100-sxm"), ("qwen3-next-80b-a3b", "4xh100-sxm")):
    study = search(model=model, devices=devices, workload="chat", requests=20, objective="energy", jobs=1)
    found.append({key: value for key, value in study_data(study).items() if key != "timing"})
print(json.dumps(found))
"""


def test_a_search_is_the_same_whatever_strings_hash_to() -> None:
    printed = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", SEARCH], env=environment, capture_output=True, text=True, check=True
        )
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert all(any(plan["verdict"] == "ok" for plan in study["plans"]) for study in json.loads(printed[0]))


def test_devices_are_exact_and_wait_for_windows_that_are_long_enough() -> None:
    """Two devices may be too few in the long run: their short window decides nothing. A larger plan's may be short."""
    fewest = OBJECTIVES["devices"]
    two, three = row(1, 1.0, window="short", devices=2.0), row(2, 1.0, devices=3.0)
    assert fewest.error(two.outcome.figures) == 0.0
    assert decide(rank([two, three], fewest), fewest) == "short"
    settled = row(1, 1.0, devices=2.0)
    assert decide(rank([settled, row(2, 1.0, window="short", devices=3.0)], fewest), fewest) == "win"
