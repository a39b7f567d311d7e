"""For authors of policies, routers and cost models: a cost that can be checked by hand, random cases, and checks.

``check_policy`` serves random small cases and demands what every batching policy owes: no request lost or finished
twice, every block given back, Little's law, and the same records whether steps are simulated singly or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apexsim import catalog
from apexsim.costs.memory import MemoryPlan
from apexsim.costs.steps import BatchStats
from apexsim.serving.simulator import Run
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment, Plan, Pool
from apexsim.specs.engine import CommunicationDefaults, EngineProfile, HostTerms, SchedulerDefaults
from apexsim.specs.memory import MemoryDefaults
from apexsim.specs.workload import Requests
from apexsim.units import NS_PER_S


@dataclass(frozen=True)
class LinearCost:
    """A step of ``step_ns`` + ``token_ns`` a token + ``context_ns`` a token of mean decode context, in every stage."""

    step_ns: int = 1_000_000
    token_ns: int = 1_000
    context_ns: int = 100
    stages: int = 1

    def stage_ns(self, stats: BatchStats) -> tuple[int, ...]:
        chunk_tokens = sum(tokens for tokens, _ in stats.chunks)
        mean = stats.context // stats.decodes if stats.decodes else 0
        step = self.step_ns + self.token_ns * (stats.decodes + chunk_tokens) + self.context_ns * mean
        return tuple(step + stage for stage in range(self.stages))

    def decode_run(self, stats: BatchStats) -> LinearRun | None:
        return LinearRun(self, stats)


@dataclass(frozen=True)
class LinearRun:
    """Consecutive decode steps under a ``LinearCost``."""

    cost: LinearCost
    stats: BatchStats
    limit: int = 1 << 40

    def elapsed_ns(self, steps: int) -> int:
        first = self.cost.stage_ns(self.stats)[0]
        return steps * first + self.cost.context_ns * (steps * (steps - 1) // 2)

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        return self.cost.stage_ns(self.stats)[0] + self.cost.context_ns * np.arange(steps, dtype=np.int64)

    def stage_ns(self, step: int) -> tuple[int, ...]:
        return self.cost.stage_ns(self.stats.grown(step))

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        return [list(self.stage_ns(step)) for step in range(first, first + count)]


def made_up_deployment(
    scheduler: SchedulerDefaults,
    *,
    stages: int = 1,
    replicas: int = 1,
    router: str = "round_robin",
    frontend_ns: int = 0,
) -> Deployment:
    """Llama-3.1-8B on H100s under an engine that is nothing but ``scheduler`` and a frontend."""
    engine = EngineProfile(
        name="made-up",
        engine="made-up",
        versions=(),
        host=HostTerms(frontend_per_request_s=frontend_ns / NS_PER_S),
        scheduler=scheduler,
        memory=MemoryDefaults(),
        communication=CommunicationDefaults(),
        evidence="prior",
        source="made up for tests",
    )
    return Deployment(
        model=_load("model", "llama-3.1-8b"),
        cluster=Cluster(device=_load("device", "h100-sxm"), devices_per_node=max(8, stages * replicas)),
        engine=engine,
        pools=(Pool(plan=Plan(pipeline=stages), replicas=replicas),),
        router=router,
    )


RECORDED = (
    "index", "replica", "arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "shown_ns", "prompt_tokens",
    "total", "known", "computed", "pending", "blocks", "preemptions",
)  # fmt: skip
_load = cache(catalog.load)


@dataclass(frozen=True)
class Case:
    """A small simulation: its load, its engine and its (linear) cost.

    Closed loop if ``concurrency`` is given. With a ``window`` the KV cache also holds layers that keep so many tokens.
    """

    arrivals_ns: Sequence[int]
    lengths: Sequence[tuple[int, int]]
    policy: str = "chunked_prefill"
    chunked: bool = True
    token_budget: int = 512
    seats: int = 64
    blocks: int = 4_000
    full_admission: bool = False
    lookahead: int = 0
    stages: int = 1
    balanced: bool = False
    prefix_caching: bool = False
    stream_interval: int = 1
    receive_interval: int = 1
    most_of_prompt: int | None = None
    replicas: int = 1
    router: str = "round_robin"
    frontend_ns: int = 0
    concurrency: int | None = None
    waves: bool = False
    window: int | None = None
    step_ns: int = 1_000_000
    token_ns: int = 1_000
    context_ns: int = 100

    def scheduler(self) -> SchedulerDefaults:
        return SchedulerDefaults.model_validate({
            "policy": self.policy,
            "max_num_batched_tokens": self.token_budget,
            "max_num_seqs": self.seats,
            "chunked_prefill": self.chunked,
            "admission": "full" if self.full_admission else "prompt",
            "lookahead_steps": self.lookahead,
            "pipeline_split": "balanced" if self.balanced else "greedy",
            "prefix_caching": self.prefix_caching,
            "stream_interval": self.stream_interval,
            "receive_interval": self.receive_interval,
            "max_chunk_tokens": self.most_of_prompt if self.chunked else None,
        })  # fmt: skip

    def requests(self) -> Requests:
        count = min(len(self.arrivals_ns), len(self.lengths))
        prompts, outputs = np.array(self.lengths[:count], dtype=np.int64).T
        open_loop = self.concurrency is None
        return Requests(
            name="case",
            arrival_s=np.array(self.arrivals_ns[:count]) / NS_PER_S if open_loop else None,
            concurrency=self.concurrency,
            waves=self.waves,
            prompt_tokens=prompts,
            output_tokens=outputs,
        )

    def run(self, *, exact_steps: bool) -> Run:
        """Serve the case."""
        deployment = made_up_deployment(
            self.scheduler(),
            stages=self.stages,
            replicas=self.replicas,
            router=self.router,
            frontend_ns=self.frontend_ns,
        )
        cost = LinearCost(self.step_ns, self.token_ns, self.context_ns, self.stages)
        memory = made_up_memory(self.blocks, window=self.window)
        run = Run(deployment, self.requests(), cost=cost, memory=memory, exact_steps=exact_steps)
        run.go()
        return run


def check_case(case: Case) -> None:
    """Serve a case with and without macro-steps: both runs keep every promise and leave the same records."""
    fast, exact = case.run(exact_steps=False), case.run(exact_steps=True)
    for run in (fast, exact):
        check_run(run)
    assert records(fast) == records(exact), f"{case}: macro-steps changed a record"
    for column, name in zip(fast.recorder.inter_token_gaps(), ("gaps", "counts"), strict=True):
        other = dict(zip(("gaps", "counts"), exact.recorder.inter_token_gaps(), strict=True))[name]
        assert np.array_equal(column, other), f"{case}: macro-steps changed the inter-token {name}"


def records(run: Run) -> list[tuple[Any, ...]]:
    """Every integer that a run noted about its requests."""
    return [tuple(getattr(request, name) for name in RECORDED) for request in run.requests]


def check_run(run: Run) -> None:
    """What every finished run owes: nobody lost, no block kept, tokens counted once, and Little's law."""
    for replica in run.replicas:
        replica.check_idle()
    served = [request for request in run.requests if request.index not in run.recorder.rejected]
    for request in served:
        assert request.known == request.total, f"{request} did not finish"
        assert request.pending == 0, f"{request} has tokens in flight"
        assert request.arrival_ns <= (request.scheduled_ns or 0) < (request.first_token_ns or 0)
        assert (request.first_token_ns or 0) <= (request.last_token_ns or 0)
    _, counts = run.recorder.inter_token_gaps()
    assert counts.sum() == sum(request.output_tokens - 1 for request in served)
    sojourn_ns = sum((request.last_token_ns or 0) - request.arrival_ns for request in served)
    assert sojourn_ns == run.request_ns, "Little's law: time in system differs from the integral of requests in system"


def check_policy(policy: Callable[..., Any], *, cases: int = 50, seed: int = 0) -> None:
    """Run ``cases`` random cases under ``policy``: one of ``POLICIES``, or one's own as ``module:Name`` finds it."""
    name = f"{policy.__module__}:{policy.__qualname__}"
    for stream in np.random.SeedSequence(seed).spawn(cases):
        check_case(random_case(np.random.default_rng(stream), name))


def random_case(rng: np.random.Generator, policy: str) -> Case:
    """A case that is small, busy and full of ties."""
    count = int(rng.integers(1, 40))
    return Case(
        arrivals_ns=sorted(int(tick) * 500_000 for tick in rng.integers(0, 60, count)),
        lengths=[
            (int(p), int(o)) for p, o in zip(rng.integers(1, 200, count), rng.integers(1, 60, count), strict=True)
        ],
        policy=policy,
        token_budget=int(rng.choice([32, 256, 2048])),
        seats=int(rng.choice([1, 4, 64])),
        blocks=int(rng.choice([24, 60, 4_000])),
        lookahead=int(rng.integers(0, 2)),
        stages=int(rng.integers(1, 4)),
        replicas=int(rng.choice([1, 3])),
        router=str(rng.choice(["round_robin", "least_loaded"])),
        step_ns=int(rng.choice([500_000, 700_001])),
        prefix_caching=bool(rng.integers(0, 2)),
        stream_interval=int(rng.choice([1, 7])),
    )


def made_up_memory(blocks: int, *, block_size: int = 16, window: int | None = None) -> MemoryPlan:
    """A KV cache of that many blocks, whatever the model; half of its layers windowed if ``window`` is given."""
    groups = ((1, None),) if window is None else ((1, None), (1, window))
    return MemoryPlan(0.0, 0.0, 0.0, 0.0, 0.0, block_size=block_size, blocks=blocks, groups=groups)
