"""Prompts in one pool, decoding in another, KV entries over a link that all share: many steps at once change nothing.

Random small cases, full of ties and short of seats and blocks. Half of the replicas for prompts serve some requests
whole, so that both pools decode for long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_pools import cluster, deployed
from test_views import count_inside

from apexsim import catalog
from apexsim.costs.starting import start
from apexsim.costs.steps import build_step_cost
from apexsim.serving.audit import Audited
from apexsim.serving.clock import ARRIVAL
from apexsim.serving.flow import Carrier, Flow
from apexsim.serving.itinerary import WHOLE, Itinerary, PromptsApart, Stop
from apexsim.serving.job import Job
from apexsim.serving.links import Share
from apexsim.serving.messages import View
from apexsim.serving.named import make_policy
from apexsim.serving.pools import PoolSetup, PoolsRun
from apexsim.serving.request import Request
from apexsim.serving.routing import LeastLoaded
from apexsim.serving.settings import ReplicaSettings
from apexsim.serving.traffic import Door
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.placement import place_pools
from apexsim.specs.server import Load
from apexsim.specs.topology import Link, Topology
from apexsim.specs.workload import Requests
from apexsim.testing import LinearCost, made_up_memory
from apexsim.units import NS_PER_S

TICK = 500_000
"""Nanoseconds between the times at which things happen together."""


@dataclass(frozen=True)
class Case:
    """Requests through ``prefills`` replicas for prompts and ``decodes`` for what follows.

    ``mixed``: every third request is served whole where prompts are. ``decode_first``: replicas that decode have the
    lower numbers, and their step ends the lower ranks.
    """

    arrivals_ns: Sequence[int]
    lengths: Sequence[tuple[int, int]]
    prefills: int = 1
    decodes: int = 1
    policies: tuple[str, str] = ("chunked_prefill", "chunked_prefill")
    token_budget: int = 2048
    seats: int = 64
    blocks: int = 4_000
    full_admission: bool = False
    lookahead: int = 0
    stages: tuple[int, int] = (1, 1)
    receive_interval: int = 1
    prefix_caching: bool = False
    window: int | None = None
    frontend_ns: int = 0
    step_ns: int = TICK
    token_ns: int = 0
    context_ns: int = 0
    link_ns: int = 0
    latency_ns: int = 1
    share: Share = "fifo"
    pulls: bool = False
    mixed: bool = False
    decode_first: bool = False

    def settings(self, pool: int, *, exact_steps: bool) -> ReplicaSettings:
        """Of the pool for prompts, 0, and of that for decoding, 1."""
        scheduler = SchedulerDefaults(
            policy=self.policies[pool],
            max_num_batched_tokens=self.token_budget,
            max_num_seqs=self.seats,
            admission="full" if self.full_admission else "prompt",
            lookahead_steps=self.lookahead,
            receive_interval=self.receive_interval,
            prefix_caching=self.prefix_caching,
        )
        cost = LinearCost(self.step_ns, self.token_ns, self.context_ns, self.stages[pool])
        return ReplicaSettings(cost, scheduler, Audited(make_policy(scheduler)), (), exact_steps)

    def requests(self) -> Requests:
        prompts, outputs = np.array(self.lengths, dtype=np.int64).T
        arrival_s = np.array(self.arrivals_ns) / NS_PER_S
        return Requests(name="case", arrival_s=arrival_s, prompt_tokens=prompts, output_tokens=outputs)

    def itinerary(self, request: Request) -> Itinerary:
        prefill = int(self.decode_first)
        if self.mixed and request.index % 3 == 0:
            return (WHOLE[0]._replace(pool=prefill),)
        return PromptsApart(prefill=prefill, decode=1 - prefill)(request)

    def carrier(self) -> Carrier:
        """One link for all; a byte a token."""
        rate = NS_PER_S / self.link_ns if self.link_ns else 1e18
        path = (Link("all", "nic", rate, self.latency_ns / NS_PER_S, "made up"),)
        return Carrier(lambda sender, receiver: path, int, pulls=self.pulls, share=self.share)


def drawn_case(rng: np.random.Generator, *, pulls: bool) -> Case:
    """Half of them with all step ends on one grid of times."""
    count = int(rng.integers(1, 40))
    prompts, outputs = rng.integers(1, 200, count).tolist(), rng.integers(1, 60, count).tolist()
    policies = [str(name) for name in rng.choice(["chunked_prefill", "prefill_first", "shortest_first"], 2)]
    tied = bool(rng.integers(0, 2))
    return Case(
        arrivals_ns=sorted(int(tick) * TICK for tick in rng.integers(0, 60, count)),
        lengths=list(zip(prompts, outputs, strict=True)),
        prefills=int(rng.integers(1, 3)),
        decodes=int(rng.integers(1, 4)),
        policies=(policies[0], policies[1]),
        token_budget=int(rng.choice([256, 2048])),
        seats=int(rng.choice([1, 4, 64])),
        blocks=int(rng.choice([40, 60, 4_000])),
        full_admission=bool(rng.random() < 0.2),
        lookahead=int(rng.integers(0, 2)),
        stages=(1, int(rng.choice([1, 1, 2]))),
        receive_interval=int(rng.choice([1, 1, 1, 5])),
        prefix_caching=bool(rng.integers(0, 2)),
        window=[None, None, 40][int(rng.integers(3))],
        frontend_ns=int(rng.choice([0, 0, 300_000])),
        step_ns=TICK if tied else int(rng.choice([TICK // 2, 700_001])),
        token_ns=0 if tied else 1000,
        context_ns=0 if tied else int(rng.choice([0, 100])),
        link_ns=int(rng.choice([0, TICK // 16, 5000])),
        latency_ns=int(rng.choice([0, 1, TICK, 3 * TICK])),
        share="fair" if rng.random() < 0.3 else "fifo",
        pulls=pulls,
        mixed=bool(rng.integers(0, 2)),
        decode_first=bool(rng.integers(0, 2)),
    )


# -- a run, and what is noted of it ------------------------------------------------------------------------------------


class FewestBlocks:
    """Reads what changes inside stretches; notes what it saw, and how often it looked inside one."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.inside: Counter[str] = Counter()

    def choose(self, job: Job, views: Sequence[View]) -> int:
        for view in views:
            count_inside(view._replica, self.inside)
            self.seen.append((job.index, view.kv_blocks, view.waiting, view.running, view.unfinished))
        return min(range(len(views)), key=lambda at: views[at].kv_blocks)


class Served(NamedTuple):
    """A run that is over: what must not depend on how it was simulated, and how it was, pool by pool."""

    noted: dict[str, Any]
    seen: list[tuple[int, ...]]
    inside: Counter[str]
    rows: list[int]
    steps: list[int]
    preemptions: int


def served(case: Case, *, exact_steps: bool) -> Served:
    """Serve a case, and check that nobody is lost and nothing is left behind."""
    routers, memory = (FewestBlocks(), FewestBlocks()), made_up_memory(case.blocks, window=case.window)
    setups = [
        PoolSetup(replicas, case.settings(pool, exact_steps=exact_steps), memory, routers[pool], case.frontend_ns)
        for pool, replicas in enumerate((case.prefills, case.decodes))
    ]
    door = Door(setups[0].settings.scheduler, 1 << 20, memory)
    order = setups[::-1] if case.decode_first else setups
    run = PoolsRun(order, case.requests(), door, itinerary=case.itinerary, carrier=case.carrier())
    jobs, requests = keep(run.flow)
    run.go()
    check(run, case, requests)
    at = case.decodes if case.decode_first else case.prefills
    first, rows = order.index(setups[0]), run.recorder.steps()
    pools = [rows["replica"] < at, rows["replica"] >= at]
    counted = [pools[first], pools[1 - first]]
    return Served(
        noted(run, jobs, requests),
        routers[0].seen + routers[1].seen,
        routers[0].inside + routers[1].inside,
        [int(pool.sum()) for pool in counted],
        [int(rows["repeats"][pool].sum()) for pool in counted],
        sum(job.preemptions for job in jobs if job.stop),
    )


def keep(flow: Flow) -> tuple[list[Job], list[Request]]:
    """Keep every job that a flow makes, and every request that ends."""
    jobs: list[Job] = []
    requests: list[Request] = []
    make = flow._job_of

    def kept(request: Request, place: int, stop: Stop) -> Job:
        jobs.append(make(request, place, stop))
        return jobs[-1]

    flow._job_of = kept  # type: ignore[method-assign]
    flow.on_end = requests.append
    return jobs, requests


def noted(run: PoolsRun, jobs: Sequence[Job], requests: Sequence[Request]) -> dict[str, Any]:
    """Integers that the fast path and single steps agree on."""
    gaps_ns, counts = run.recorder.inter_token_gaps()
    return {
        "requests": sorted(
            (r.index, r.replica, r.arrival_ns, r.scheduled_ns, r.first_token_ns, r.last_token_ns, r.preemptions)
            for r in requests
        ),
        "jobs": [
            (j.index, j.stop, j.replica, j.scheduled_ns, j.first_token_ns, j.last_token_ns, j.preemptions) for j in jobs
        ],
        "transfers": [
            (t.job, t.sender, t.receiver, t.size, t.asked_ns, t.began_ns, t.ended_ns) for t in run.flow.transfers
        ],
        "gaps": (gaps_ns.tolist(), counts.tolist()),
        "blocks": [replica.block_ns for replica in run.replicas],
    }


def check(run: PoolsRun, case: Case, requests: Sequence[Request]) -> None:
    """Every request was served, every token counted once, and KV entries carried where a second stop needs them."""
    assert not run.flow.living
    assert not run.flow._journeys
    for replica in run.replicas:
        replica.check_idle()
    outputs = [output for _, output in case.lengths]
    assert sorted(request.index for request in requests) == [*range(len(outputs))]
    for request in requests:
        assert request.arrival_ns <= request.scheduled_ns < request.first_token_ns <= request.last_token_ns
    _, counts = run.recorder.inter_token_gaps()
    assert counts.sum() == sum(outputs) - len(outputs)
    carried = [at for at, output in enumerate(outputs) if output > 1 and not (case.mixed and at % 3 == 0)]
    assert sorted(transfer.job for transfer in run.flow.transfers) == carried
    assert sum(transfer.size for transfer in run.flow.transfers) == sum(case.lengths[at][0] for at in carried)
    sojourn_ns = sum(request.last_token_ns - request.arrival_ns for request in requests)
    assert sojourn_ns == run.flow.request_ns


@dataclass
class Compared:
    """What many cases showed."""

    different: list[tuple[int, str]] = field(default_factory=list)
    inside: Counter[str] = field(default_factory=Counter)
    rows: list[int] = field(default_factory=lambda: [0, 0])
    steps: list[int] = field(default_factory=lambda: [0, 0])
    preemptions: int = 0


def compare(count: int, seed: int, *, pulls: bool, **fixed: Any) -> Compared:
    """Serve random cases both ways; some of their fields may be ``fixed``."""
    found = Compared()
    for number, stream in enumerate(np.random.SeedSequence(seed).spawn(count)):
        case = replace(drawn_case(np.random.default_rng(stream), pulls=pulls), **fixed)
        fast, exact = (served(case, exact_steps=exact_steps) for exact_steps in (False, True))
        found.different += [(number, name) for name, value in exact.noted.items() if fast.noted[name] != value]
        found.different += [(number, "views")] if fast.seen != exact.seen else []
        found.inside += fast.inside
        found.rows = [one + other for one, other in zip(found.rows, fast.rows, strict=True)]
        found.steps = [one + other for one, other in zip(found.steps, exact.steps, strict=True)]
        found.preemptions += exact.preemptions
    return found


@pytest.mark.parametrize("pulls", [False, True], ids=["pushed", "pulled"])
@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.long)])
def test_two_pools_are_the_same_either_way(count: int, pulls: bool) -> None:
    found = compare(count, 5 + pulls, pulls=pulls)
    assert found.different == []
    assert all(rows < steps for rows, steps in zip(found.rows, found.steps, strict=True)), "a pool did not march"
    assert min(found.inside[kind] for kind in ("OneStage", "InTurn")) >= count, f"hardly looked at: {found.inside}"
    assert found.preemptions, "nobody was preempted while he decoded"


# -- shipped models, devices and engines -------------------------------------------------------------------------------


def wired(requests: Requests, *, exact_steps: bool, pulls: bool, share: Share) -> PoolsRun:
    """Prompts on 2 x H100, decoding on three A100, KV entries over the cards of both groups, from each first rank."""
    deployment = deployed()
    placed, topology, first, setups = place_pools(deployment.cluster, deployment.pools), Topology(cluster()), [], []
    for pool, server in zip(deployment.pools, deployment.servers(Load.of(requests)), strict=True):
        engine = start(server)
        cost = build_step_cost(engine.server, prompts=requests.distinct_prompts)
        scheduler = engine.server.scheduler
        settings = ReplicaSettings(cost, scheduler, make_policy(scheduler), server.model.windows, exact_steps)
        setups.append(PoolSetup(pool.replicas, settings, engine.memory, LeastLoaded()))
        first += [int(devices.flat[0]) for devices in placed[pool.name].devices]
    each = int(sum(group.bytes_per_token("bf16") for group in deployment.model.kv_groups))
    carrier = Carrier(
        lambda sender, receiver: topology.path(first[sender], first[receiver]),
        lambda tokens: each * tokens,
        pulls=pulls,
        share=share,
    )
    door = Door(setups[0].settings.scheduler, 1 << 20, setups[1].memory)
    return PoolsRun(setups, requests, door, itinerary=PromptsApart(), carrier=carrier)


@pytest.mark.parametrize(("pulls", "share"), [(False, "fair"), (True, "fifo")])
def test_servers_of_a_deployment_over_the_links_of_its_cluster(pulls: bool, share: Share) -> None:
    traffic = catalog.load("workload", "chat").model_copy(update={"requests": 150, "rate_per_s": 6.0})
    requests = traffic.sample(seed=1)
    runs = [wired(requests, exact_steps=exact_steps, pulls=pulls, share=share) for exact_steps in (False, True)]
    notes = []
    for run in runs:
        jobs, ended = keep(run.flow)
        run.go()
        assert len(ended) == 150
        notes.append(noted(run, jobs, ended))
    assert notes[0] == notes[1]
    rows, steps = (len(run.recorder.steps()["repeats"]) for run in runs)
    assert rows < steps / 2
    for transfer in runs[0].flow.transfers:
        took_s = (transfer.ended_ns - transfer.asked_ns) / NS_PER_S
        assert transfer.size / 50e9 < took_s < 1.0  # a card carries 50 GB/s


# -- the law, broken ---------------------------------------------------------------------------------------------------


def goes_on_at_once(flow: Flow, job: Job) -> bool:
    """As ``Flow._goes_on``, but in the very event in which the step ends, past the assertion that forbids it."""
    journey = flow._journeys.get(job.request.index)
    if journey is None:
        return False
    places = journey.end(job)
    if journey.over:
        del flow._journeys[job.request.index]
        return False
    rank, flow._clock.rank = flow._clock.rank, ARRIVAL
    for place in places:
        flow._begin(job.request, journey, place)
    flow._clock.rank = rank
    return True


def test_replicas_may_not_hear_of_a_step_end_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they do, what they find depends on which steps were simulated singly. Why ``messages`` has its law."""
    together = {"step_ns": TICK, "token_ns": 0, "context_ns": 0, "decode_first": True}
    assert compare(30, 8, pulls=True, **together).different == []
    monkeypatch.setattr(Flow, "_goes_on", goes_on_at_once)
    found = compare(30, 8, pulls=True, **together)
    assert {"requests", "views"} <= {name for _, name in found.different}
