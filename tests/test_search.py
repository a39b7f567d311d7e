"""Search: spaces counted by hand, rankings under an injected simulator, and the real line end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.cli.main import main
from apexsim.errors import BadInput, InfeasiblePlan
from apexsim.io.deployments import load_deployment
from apexsim.io.search_files import read_search, resolve_search, study_data
from apexsim.planning import search as plan
from apexsim.search import journal, judging
from apexsim.search.executors import choose_jobs, executor_named, run_local
from apexsim.search.goodput import MAX_DOUBLINGS, RATE_TOLERANCE, highest_passing
from apexsim.search.headline import headline, usual_choice
from apexsim.search.journal import fingerprint, identity
from apexsim.search.objective import FIGURES, OBJECTIVES
from apexsim.search.outcomes import Outcome
from apexsim.search.pareto import pareto_front
from apexsim.search.question import Question
from apexsim.search.space import SearchSpace, divisors
from apexsim.search.study import search
from apexsim.search.ties import sampling_error
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.slo import SLO
from apexsim.specs.supply import Supply
from apexsim.specs.workload import Requests
from apexsim.steady import COST, ENERGY

REQUESTS = Requests(
    name="four", arrival_s=np.arange(4) * 0.5, prompt_tokens=np.full(4, 100), output_tokens=np.full(4, 10)
)
LIMITS = SLO(ttft_s=1.0)


def space(model: str = "llama-3.1-70b", devices: int = 8, nodes: int = 1, allow_idle: bool = False) -> SearchSpace:
    cluster = Cluster(device=catalog.load("device", "h100-sxm"), devices_per_node=devices, nodes=nodes)
    base = Deployment(
        model=catalog.load("model", model), cluster=cluster, engine=catalog.load("engine", "vllm-v1-async")
    )
    return SearchSpace(base=base, allow_idle=allow_idle)


def question(objective: str = "latency", **changed: Any) -> Question:
    supply = Supply(requests=changed.pop("requests", REQUESTS))
    asked: dict[str, Any] = {"space": space(), "supply": supply, "slo": LIMITS}
    return Question(**{**asked, **changed}, objective=OBJECTIVES[objective])


def summary(window: str = "steady", reason: str = "", **figures: float) -> dict[str, Any]:
    """A summary in which every figure is 1, and known exactly, except those named."""
    nested: dict[str, Any] = {"waits_grow": False, "batches": {}}
    for figure, path in FIGURES.items():
        inner = nested
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = figures.get(figure, 0.0 if "half_width" in figure else 1.0)
    short_of = dict.fromkeys((COST, ENERGY), reason if window == "short" else None)
    nested["steady"] |= {"kind": window, "reason": reason, "short_of": short_of}
    return nested


def layout(deployment: Deployment) -> tuple[int, int, int]:
    pool = deployment.pools[0]
    return pool.plan.tensor, pool.plan.pipeline, pool.replicas


def toy(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
    """Wider tensor parallelism answers faster and costs more energy; one device does not hold the model; pipelines of
    8 crash; more than 0.5 requests/s a replica and tensor rank miss the SLO."""
    tensor, pipeline, replicas = layout(deployment)
    if tensor * pipeline == 1:
        raise InfeasiblePlan(["weights of 10 bytes exceed 5 bytes"])
    if pipeline == 8:
        raise RuntimeError("no\nluck")
    keeps = requests.rate_per_s <= 0.5 * tensor * replicas
    return summary(
        attainment=1.0 if keeps else 1 / (1 + pipeline),
        e2e_p90_s=10 / tensor + pipeline,
        steady_energy_per_output_token_j=tensor / pipeline,
        output_tokens_per_s=100.0 * replicas / pipeline,
    )


def dies_on_pipelines(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
    """Ends its process where the plan has a pipeline."""
    if layout(deployment)[1] > 1:
        os._exit(1)
    return summary()


# -- space -------------------------------------------------------------------------------------------------------------


def test_every_factorisation_of_the_devices_is_a_candidate() -> None:
    layouts = {(c.plan.tensor, c.plan.pipeline, c.replicas) for c in space().candidates()}
    assert len(layouts) == len(space().candidates()) == 10  # triples of divisors whose product is 8
    assert all(t * p * r == 8 for t, p, r in layouts)


@pytest.mark.parametrize("devices", [1, 2, 6, 8])
def test_idle_devices_add_the_smaller_spaces(devices: int) -> None:
    small = space(devices=devices, allow_idle=True).candidates()
    alone = [c.name for count in range(1, devices + 1) for c in space(devices=count).candidates()]
    assert [c.name for c in small] == alone
    assert len({c.name for c in small}) == len(small)


def test_experts_are_spread_over_every_divisor_of_the_tensor_degree() -> None:
    candidates = space("mixtral-8x7b").candidates()
    assert [c.plan.expert for c in candidates if c.plan.tensor == 8] == [1, 2, 4, 8]
    # Of 8 = 2^3: (tensor, attention_data) k + 1 ways for 2^k devices a stage, k + 1 expert degrees, 4 - k pipelines.
    assert len({c.name for c in candidates}) == len(candidates) == sum((k + 1) ** 2 * (4 - k) for k in range(4))
    assert all(not c.reasons for c in candidates if c.plan.attention_data == 8)


def test_unlawful_plans_stay_with_their_reasons() -> None:
    by_name = {c.name: c for c in space(devices=6).candidates()}
    assert by_name["tp2-pp3-dp1"].reasons == ()
    assert any("64 attention heads" in reason for reason in by_name["tp3-pp1-dp2"].reasons)


def test_tensor_degrees_go_to_a_node_and_by_whole_nodes_beyond() -> None:
    by_name = {c.name: c for c in space(nodes=2).candidates()}
    assert by_name["tp8-pp2-dp1"].reasons == by_name["tp16-pp1-dp1"].reasons == ()
    cut = {c.name: c for c in space(devices=4, nodes=6, allow_idle=True).candidates()}
    assert not cut["tp4-pp6-dp1"].reasons
    assert not cut["tp8-pp3-dp1"].reasons
    uneven = {c.name: c for c in space(devices=6, nodes=4).candidates()}
    assert uneven["tp8-pp3-dp1"].reasons == (
        "tensor degree 8 takes a part of a node: give up to 6, or a multiple of its 6 devices",
    )


def test_divisors() -> None:
    assert divisors(12) == (1, 2, 3, 4, 6, 12)


# -- ranking -----------------------------------------------------------------------------------------------------------


def test_every_plan_is_a_row_whatever_becomes_of_it() -> None:
    study = search(question(), evaluate=toy)
    rows = {row.candidate.name: row.outcome for row in study.rows}
    assert len(rows) == 10
    assert rows["tp1-pp1-dp8"] == Outcome("infeasible", "weights of 10 bytes exceed 5 bytes")
    assert rows["tp1-pp8-dp1"] == Outcome("failed", "RuntimeError: no luck")
    assert rows["tp2-pp4-dp1"].verdict == "misses_slo"
    assert rows["tp2-pp4-dp1"].reason == "20.0% of requests keep the SLO, 90% wanted"
    assert rows["tp8-pp1-dp1"].verdict == "ok"


def test_order_is_by_objective_then_attainment_then_what_did_not_run() -> None:
    verdicts = [row.outcome.verdict for row in search(question(), evaluate=toy).rows]
    assert verdicts == sorted(verdicts, key=["ok", "misses_slo", "failed", "infeasible", "unlawful"].index)
    table = search(question(), evaluate=toy).table
    assert table.loc[table.verdict == "ok", "objective_value"].is_monotonic_increasing
    assert table.loc[table.verdict == "misses_slo", "attainment"].is_monotonic_decreasing
    assert list(table["rank"]) == list(range(1, 11))


def test_ties_go_to_fewer_devices_then_to_the_name() -> None:
    def equal(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
        return summary()

    rows = search(question(space=space(devices=4, allow_idle=True)), evaluate=equal).rows
    ran = [(row.candidate.devices, row.candidate.name) for row in rows if row.outcome.verdict == "ok"]
    assert ran == sorted(ran)


@pytest.mark.parametrize(
    ("objective", "best"),
    [("latency", "tp8-pp1-dp1"), ("throughput", "tp2-pp1-dp4"), ("energy", "tp1-pp2-dp4"), ("goodput", "tp8-pp1-dp1")],
)
def test_each_objective_has_its_winner(objective: str, best: str) -> None:
    study = search(question(objective, slo=SLO(ttft_s=1.0, target=0.5)), evaluate=toy)
    assert study.winner is not None
    assert study.winner.candidate.name == best


def test_throughput_is_of_all_requests_at_once_and_attainment_of_the_workload_as_given() -> None:
    seen = []

    def watched(deployment: Deployment, requests: Requests, slo: SLO, seed: int, **_: bool) -> Mapping[str, Any]:
        seen.append(requests.span_s)
        return summary(attainment=float(requests.span_s > 0), output_tokens_per_s=7.0 if requests.span_s else 9.0)

    study = search(question("throughput"), evaluate=watched)
    assert study.winner is not None
    assert study.winner.outcome.figures["saturated_output_tokens_per_s"] == 9.0
    assert study.winner.outcome.figures["output_tokens_per_s"] == 7.0
    assert sorted(set(seen)) == [0.0, 1.5]


def test_goodput_is_the_highest_rate_within_the_slo_per_device_used() -> None:
    table = search(question("goodput"), evaluate=toy).table.set_index("plan")
    rate = table.loc["tp8-pp1-dp1", "goodput_requests_per_s"]
    assert 4.0 / (1 + RATE_TOLERANCE) <= rate <= 4.0  # toy: 0.5 requests/s a rank
    assert table.loc["tp8-pp1-dp1", "goodput_per_device_per_s"] == rate / 8
    idle = search(question("goodput", space=space(devices=4, allow_idle=True)), evaluate=toy).table.set_index("plan")
    assert idle.loc["tp2-pp1-dp1", "goodput_per_device_per_s"] == pytest.approx(0.5, rel=RATE_TOLERANCE)


def test_goodput_needs_limits_and_arrival_times() -> None:
    with pytest.raises(BadInput, match="--slo"):
        question("goodput", slo=SLO())
    with pytest.raises(BadInput, match="arrival times"):
        question("goodput", requests=REQUESTS.all_at_once())
    with pytest.raises(BadInput, match="arrival times"):
        question("goodput", requests=REQUESTS.closed_loop(2))


def test_without_a_feasible_plan_there_is_no_best_but_all_rows() -> None:
    study = search(question(slo=SLO(ttft_s=1.0, target=1.0), requests=REQUESTS.at_rate(100.0)), evaluate=toy)
    assert study.best is None
    assert len(study.front) == 0
    assert study.rows[0].outcome.verdict == "misses_slo"
    assert headline(study).startswith("no plan keeps the SLO; the nearest is ")


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_bisection_finds_a_threshold_from_any_start(threshold: float, start: float) -> None:
    found = highest_passing(lambda value: value <= threshold, start)
    far = start * 2.0**MAX_DOUBLINGS
    if threshold < start / 2.0**MAX_DOUBLINGS:
        assert found is None
    elif threshold >= far:
        assert found == far
    else:
        assert found is not None
        assert found <= threshold <= found * (1 + RATE_TOLERANCE) * (1 + 1e-12)


def test_bisection_ends_when_nothing_or_everything_passes() -> None:
    assert highest_passing(lambda value: False, 1.0) is None
    assert highest_passing(lambda value: True, 1.0) == 2.0**MAX_DOUBLINGS


# -- front, words ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_front_is_what_no_other_point_beats(points: list[tuple[int, int, int]]) -> None:
    front = pareto_front(points)
    for point, best in zip(points, front, strict=True):
        beaten = any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
        assert best is not beaten
    assert not points or any(front)


def test_front_of_a_study_keeps_fast_and_frugal_plans() -> None:
    front = search(question(slo=SLO(ttft_s=1.0, target=0.1)), evaluate=toy).front
    # (10 / tensor + pipeline, tensor / pipeline) of toy: tp2-pp1-dp4 loses to tp4-pp2-dp1, tp1-pp2-dp4 to tp2-pp4-dp1.
    best = ["tp8-pp1-dp1", "tp4-pp1-dp2", "tp4-pp2-dp1", "tp2-pp2-dp2", "tp2-pp4-dp1", "tp1-pp4-dp2"]
    assert list(front["plan"]) == best
    assert set(front["verdict"]) == {"ok"}


def test_usual_choice_is_the_widest_lawful_tensor_degree_in_a_node() -> None:
    for where, name in ((space(), "tp8-pp1-dp1"), (space(nodes=2), "tp8-pp2-dp1"), (space(devices=6), "tp2-pp3-dp1")):
        row = usual_choice(search(question(space=where), evaluate=toy))
        assert row is not None
        assert row.candidate.name == name


def test_headline_says_what_is_taken_for_granted_of_the_best_plan() -> None:
    def likes_ranks(deployment: Deployment, *_: Any, **__: Any) -> Mapping[str, Any]:
        plan = deployment.pools[0].plan
        return summary(e2e_p90_s=plan.expert / plan.attention_data)

    line = headline(search(question(space=space("mixtral-8x7b", devices=4)), evaluate=likes_ranks, jobs=1))
    assert line.startswith("best by latency: tp1-adp4-pp1")
    assert "estimated: 4 attention-data ranks are taken to be evenly loaded" in line
    assert "estimated" not in headline(search(question(), evaluate=toy))
    wide = headline(search(question(space=space(nodes=2)), evaluate=toy))
    assert wide.startswith("best by latency: tp16-pp1-dp1")
    assert wide.endswith("estimated: collectives of tensor ranks on several nodes")


def test_the_usual_choice_as_the_second_is_said_once() -> None:
    def second(deployment: Deployment, *_: Any, **__: Any) -> Mapping[str, Any]:
        return summary(e2e_p90_s={1: 1.0, 2: 2.0}[layout(deployment)[0]] * layout(deployment)[1] ** 3)

    line = headline(search(question(space=space(devices=2)), evaluate=second))
    assert line.count("tp2-pp1-dp1") == 1
    assert "50.0% below the second, tp2-pp1-dp1, which is the usual choice (largest tensor degree in a node)" in line
    assert line.count("usual choice") == 1


def test_headline_gives_the_margin_over_the_second_and_the_usual_choice() -> None:
    line = headline(search(question("throughput", slo=SLO(ttft_s=1.0, target=0.1)), evaluate=toy))
    assert line.startswith("best by throughput: tp2-pp1-dp4")
    assert "100.0% above the second" in line
    assert "300.0% above the usual choice (largest tensor degree in a node), tp8-pp1-dp1" in line
    assert "it is the usual choice" in headline(search(question(), evaluate=toy))


def test_a_sampling_error_that_nobody_knows_is_not_nought() -> None:
    study = search(question("throughput", slo=SLO(ttft_s=1.0, target=0.1)), evaluate=toy)
    one, other = study.rows[:2]
    assert sampling_error(one, other, OBJECTIVES["throughput"]) is None
    said = "plans tie within 0.5% only, as no sampling error of theirs is known"
    assert said in headline(study)
    assert "its sampling error is not known" in headline(study)
    known = search(question("cost", space=space(devices=2)), evaluate=toy)
    assert said not in headline(known)
    assert sampling_error(*known.rows[:2], OBJECTIVES["cost"]) == 0.0  # both are known exactly


def test_headline_says_that_fewer_devices_were_not_looked_at() -> None:
    said = "plans on fewer devices were not looked at (--allow-idle)"
    asked = {"slo": SLO(ttft_s=1.0, target=0.1)}
    for objective, so in (("cost", True), ("energy", True), ("latency", False)):
        assert (said in headline(search(question(objective, **asked), evaluate=toy))) is so
    idle = space(devices=4, allow_idle=True)
    assert said not in headline(search(question("cost", space=idle, **asked), evaluate=toy))
    assert said not in headline(
        search(question("cost", space=space("llama-3.1-8b", 1)), evaluate=lambda *_, **__: summary())
    )


@pytest.mark.parametrize(("bill", "paid"), [("used", 0), ("fleet", 2)])
def test_devices_that_are_not_needed_are_said_to_be_paid_for_where_they_are(bill: str, paid: int) -> None:
    base = space(devices=4).base.model_copy(update={"bill": bill})
    asked = question("cost", space=SearchSpace(base=base, allow_idle=True), slo=SLO(ttft_s=1.0, target=0.1))
    few = search(asked, evaluate=cheap_on_two)
    assert few.winner is not None
    assert few.winner.candidate.devices == 2
    assert few.records[0]["devices_billed"] == 2 + paid
    line = headline(few)
    assert "2 devices are not needed" in line
    assert ("2 devices are not needed, but paid for (bill: fleet)" in line) is bool(paid)


def cheap_on_two(deployment: Deployment, *_: Any, **__: Any) -> Mapping[str, Any]:
    return summary(steady_usd_per_million_output_tokens=1.0 + abs(deployment.devices_used - 2))


def test_a_part_of_the_idle_devices_may_be_paid_for() -> None:
    base = space(devices=4, nodes=2).base.model_copy(update={"bill": "node"})
    asked = question("cost", space=SearchSpace(base=base, allow_idle=True), slo=SLO(ttft_s=1.0, target=0.1))
    line = headline(search(asked, evaluate=cheap_on_two))
    assert "6 devices are not needed, but 2 of them are paid for (bill: node)" in line


def test_without_an_slo_no_plan_is_said_to_miss_it() -> None:
    study = search(question(slo=SLO(), space=space(devices=2)), evaluate=lambda *_, **__: summary(attainment=0.5))
    assert headline(study) == (
        "no plan serves 90% of requests; the nearest is tp1-pp1-dp2: 50.0% of requests are served, 90% wanted"
    )


def test_the_usual_choice_that_will_not_do_says_why() -> None:
    def narrow_is_good(deployment: Deployment, *_: Any, **__: Any) -> Mapping[str, Any]:
        return summary(attainment=0.5 if layout(deployment)[0] == 2 else 1.0)

    line = headline(search(question(space=space(devices=2)), evaluate=narrow_is_good))
    usual = "the usual choice (largest tensor degree in a node), tp2-pp1-dp1"
    assert f"{usual}, is not good enough: 50.0% of requests keep the SLO, 90% wanted" in line


def test_names_that_tie_are_one_list() -> None:
    def alike(deployment: Deployment, *_: Any, **__: Any) -> Mapping[str, Any]:
        _tensor, pipeline, replicas = layout(deployment)
        return summary(attainment=1 - replicas / 100 - pipeline / 1000)

    three = headline(search(question("cost", space=space(devices=2)), evaluate=alike))
    assert three.startswith("a tie by cost: tp2-pp1-dp1, tp1-pp2-dp1 and tp1-pp1-dp2; tp2-pp1-dp1 is first by SLO")
    six = headline(search(question("cost", space=space(devices=4)), evaluate=lambda *_, **__: summary()))
    assert six.startswith(
        "equal by cost and by all that breaks ties: tp1-pp1-dp4, tp1-pp2-dp2, tp1-pp4-dp1 and 3 more: "
    )


# -- determinism, resuming, failing ------------------------------------------------------------------------------------


def comparable(study: Any) -> dict[str, Any]:
    return {key: value for key, value in study_data(study).items() if key != "timing"}


def test_jobs_change_nothing_but_the_timing() -> None:
    alone, together = (search(question(), evaluate=toy, jobs=jobs) for jobs in (1, 2))
    assert comparable(together) == comparable(alone)
    assert together.table.equals(alone.table)


def test_a_process_that_dies_costs_its_own_row_only() -> None:
    study = search(question(space=space(devices=2)), evaluate=dies_on_pipelines, jobs=2)
    verdicts = {row.candidate.name: row.outcome.verdict for row in study.rows}
    assert verdicts == {"tp1-pp1-dp2": "ok", "tp2-pp1-dp1": "ok", "tp1-pp2-dp1": "failed"}
    assert "process that ran it died" in study.rows[-1].outcome.reason


SLEEPERS = """
import os, sys, time
from functools import partial
from apexsim.search.executors import run_local

def sleep(name, folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(60)

if __name__ == "__main__":
    list(run_local(partial(sleep, folder=sys.argv[1]), "ab", 2))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see whether a process is there")
def test_workers_end_with_a_killed_search(tmp_path: Path) -> None:
    script, folder = tmp_path / "sleepers.py", tmp_path / "pids"
    folder.mkdir()
    script.write_text(SLEEPERS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)
    assert until(lambda: len(os.listdir(folder)) == 2)
    parent.kill()
    parent.wait()
    assert until(lambda: not any(alive(int(pid)) for pid in os.listdir(folder)))


def until(holds: Callable[[], bool], patience_s: float = 300.0) -> bool:
    """Whether something comes to hold before patience ends."""
    end_s = time.monotonic() + patience_s
    while not holds() and time.monotonic() < end_s:
        time.sleep(0.05)
    return holds()


def alive(pid: int) -> bool:
    """Whether a process is there; one that has ended and waits for its parent to look is not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_identity_forgets_defaults_and_file_names_but_no_figure() -> None:
    key = question().identity
    assert question(seed=1).identity != key
    assert question(slo=SLO(ttft_s=2.0)).identity != key
    assert question(slo=SLO(ttft_s=1.0, target=0.9)).identity == key
    assert fingerprint(REQUESTS) == fingerprint(REQUESTS.head(4))
    assert fingerprint(REQUESTS) != fingerprint(REQUESTS.at_rate(3.0))
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})


def test_outcomes_of_another_generation_answer_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    now = identity({"a": 1})
    monkeypatch.setattr(journal, "GENERATION", journal.GENERATION - 1)
    assert identity({"a": 1}) != now


def test_progress_counts_every_plan() -> None:
    seen: list[tuple[int, int]] = []
    search(question(), evaluate=toy, progress=lambda done, plans: seen.append((done, plans)))
    assert seen == [(done, 10) for done in range(1, 11)]


def test_small_searches_start_no_processes() -> None:
    assert choose_jobs(None, 100) == 1
    assert choose_jobs(3, 100) == 3
    assert choose_jobs(None, 10**9) >= 1
    with pytest.raises(BadInput, match="at least 1"):
        choose_jobs(0, 100)


def test_local_executor_yields_every_task_once() -> None:
    for jobs in (1, 2):
        assert Counter(run_local(partial(pow, 2), range(5), jobs)) == Counter((n, 2**n) for n in range(5))


def test_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(BadInput, match=r"apexsim\[ray\]"):
        list(executor_named("ray")(partial(pow, 2), range(2), 1))
    with pytest.raises(BadInput, match="did you mean local"):
        executor_named("locl")


# -- the real line ----------------------------------------------------------------------------------------------------

SMALL = ["--model", "llama-3.1-8b", "--devices", "2xh100-sxm", "--workload", "chat", "--requests", "30"]


def test_the_command_ranks_plans_and_its_best_can_be_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["search", *SMALL, "--slo", "ttft_s=1,tpot_s=0.05", "--out", str(out), "--json", "-"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert {plan["plan"] for plan in data["plans"]} == {"tp1-pp1-dp2", "tp1-pp2-dp1", "tp2-pp1-dp1"}
    assert data["plans"][0]["plan"] == data["best"]
    assert data["headline"][1:] in " ".join(printed.err.split())
    assert json.loads((out / "study.json").read_text()) == data
    assert list(pd.read_parquet(out / "plans.parquet")["plan"]) == [plan["plan"] for plan in data["plans"]]

    assert main(["simulate", str(out / "best.yaml"), *SMALL[4:], "--json", "-"]) == 0
    e2e_s = json.loads(capsys.readouterr().out)["e2e_s"]["p90"]
    assert e2e_s == data["plans"][0]["e2e_p90_s"] == data["plans"][0]["objective_value"]


def test_resuming_a_finished_search_gives_the_same_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": "llama-3.1-8b", "devices": "2xh100-sxm", "workload": "chat", "requests": 30}
    first = plan(**asked, out=tmp_path)
    monkeypatch.setattr(judging, "simulate", None)
    assert comparable(plan(**asked, out=tmp_path, resume=True)) == comparable(first)


def test_real_searches_are_the_same_with_one_job_and_with_two() -> None:
    asked = {"model": "llama-3.1-8b", "devices": "4xh100-sxm", "workload": "chat", "requests": 30}
    alone, together = (plan(**asked, slo=SLO(ttft_s=0.5), objective="cost", jobs=jobs) for jobs in (1, 2))
    assert json.dumps(comparable(alone)) == json.dumps(comparable(together))


def test_a_plan_that_does_not_fit_says_which_bytes() -> None:
    study = plan(model="llama-3.1-70b", devices="2xh100-sxm", workload="chat", requests=10)
    row = next(row for row in study.rows if row.candidate.name == "tp1-pp1-dp2")
    assert row.outcome.verdict == "infeasible"
    assert "GiB" in row.outcome.reason
    assert "starts with tensor degree 2" in row.outcome.reason
    assert study.best is not None


def test_devices_that_a_plan_leaves_idle_are_not_billed() -> None:
    table = plan(model="llama-3.1-8b", devices="2xh100-sxm", workload="chat", requests=30, allow_idle=True).table
    one = table.set_index("plan").loc["tp1-pp1-dp1"]
    alone = plan(model="llama-3.1-8b", devices="1xh100-sxm", workload="chat", requests=30).table.iloc[0]
    assert (one["devices_used"], one["devices_idle"]) == (1, 1)
    assert one["usd_per_hour"] == alone["usd_per_hour"]
    assert one["energy_per_output_token_j"] == alone["energy_per_output_token_j"]
    assert one["e2e_p90_s"] == alone["e2e_p90_s"]


def test_the_table_marks_what_misses_the_slo_and_shows_what_is_paid_for(capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", *SMALL, "--slo", "ttft_s=0.0001,target=0.8", "--allow-idle", "--bill", "fleet"])
    said = capsys.readouterr().out
    marked = [line.split() for line in said.splitlines() if line.lstrip().startswith("tp")]
    assert [each[1] for each in marked] == ["x"] * 4
    assert "x misses the SLO (80%)" in said
    assert "0.0% of requests keep the SLO, 80% wanted" in said
    one = next(each for each in marked if each[0] == "tp1-pp1-dp1")
    assert one[3:5] == ["1", "2"]  # all that are given


def test_without_an_slo_no_share_is_said_to_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *SMALL]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.lstrip().startswith("tp")]
    assert len(rows) == 3
    assert all("-" in each and "100.0%" not in each for each in rows)
    assert "paid" not in said  # as many as are used


def test_the_question_keeps_the_rate_that_was_asked_for() -> None:
    told = plan(
        model="llama-3.1-8b", devices="1xh100-sxm", workload="chat", requests=30, rate_per_s=10.0
    ).question.describe()
    assert told["rate_per_s"] == 10.0
    assert told["realised_rate_per_s"] != 10.0
    assert told["realised_rate_per_s"] == pytest.approx(10.0, rel=0.5)
    trace = question().describe()
    assert trace["rate_per_s"] == trace["realised_rate_per_s"] == 2.0


def test_help_shows_the_extra_that_ray_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--help"]) == 0
    assert "ray (extra [ray])" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_nothing_feasible_is_exit_status_1_and_no_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.yaml").write_text("of another search")
    asked = [*SMALL, "--slo", "ttft_s=0.0001", "--out", str(tmp_path), "--resume", "--json", "-"]
    assert main(["search", *asked]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["feasible"], data["best"], len(data["plans"])) == (False, None, 3)
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--devices", "0xh100-sxm"], "devices: got '0xh100-sxm'; give a count of at least 1"),
        (["--devices", "12xh100-sxm"], "whole nodes of 8"),
        (["--devices", "2xh100-sx"], "did you mean h100-sxm"),
        (["--model", "llama-3.1-80b"], "did you mean llama-3.1-8b"),
        (["--devices", "8000000000xh100-sxm"], "give at most 10000 devices"),
        (["--devices", "\N{FULLWIDTH DIGIT EIGHT}xh100-sxm"], "give a count of at least 1"),
        (["--router", "no_such_module:Name"], "No module named"),
        (["--workload", "chatt"], "did you mean chat"),
        (["--objective", "latancy"], "did you mean latency"),
        (["--objective", "goodput"], "goodput needs a limit to keep: give --slo"),
        (["--rate-per-s", "-1"], "rate_per_s: got -1.0"),
        (["--requests", "0"], "requests: got 0"),
        (["--engine-option", "max_num_sequ=8"], "did you mean max_num_seqs"),
        (["--executor", "locl"], "did you mean local"),
        (["--jobs", "0"], "--jobs"),
        (["--slo", "ttft=1"], "did you mean ttft_s"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *SMALL, "--out", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_search_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "search.yaml"
    (tmp_path / "mine.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,10,5\n")
    file.write_text("model: llama-3.1-8b\ndevices: 1xh100-sxm\nworkload: mine.csv\nengine_options: {block_size: 32}\n")
    study = plan(file, seed=3, engine_options={"max_num_seqs": 7})
    assert len(study.question.requests) == 2  # found beside the file
    assert study.question.seed == 3
    scheduler = study.question.space.base.engine.scheduler
    assert (scheduler.block_size, scheduler.max_num_seqs) == (32, 7)
    file.write_text("model: llama-3.1-8b\ndevice: 1xh100-sxm\nworkload: mine.csv\n")
    assert main(["search", str(file)]) == 2
    assert f"{file}: device: unknown key; did you mean devices" in capsys.readouterr().err
    assert main(["search", "--devices", "1xh100-sxm"]) == 2
    assert main(["search", *SMALL, "--resume"]) == 2
    assert "--resume: give --out" in capsys.readouterr().err


@pytest.mark.parametrize("example", sorted((Path(__file__).parents[1] / "examples").glob("*-on-*.yaml")), ids=str)
def test_examples_are_valid_searches(example: Path) -> None:
    assert resolve_search(read_search(example), example).space.candidates()


def test_the_deployment_example_is_lawful() -> None:
    deployment = load_deployment(Path(__file__).parents[1] / "examples" / "llama-3.1-70b-tp4-x2.yaml")
    assert deployment.devices_used == deployment.cluster.devices == 8


def test_a_search_by_whole_nodes_is_given_whole_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """Else two commands would bill the same plan differently."""
    assert main(["search", *SMALL, "--bill", "node"]) == 2
    assert (
        "bill: got 'node'; whole nodes have 8 devices: give as many, or bill used or fleet" in capsys.readouterr().err
    )
