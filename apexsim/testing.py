"""For authors of policies and cost models: a cost that can be checked by hand, random cases, and checks.

``check_policy`` serves random small cases and demands what every batching policy owes: decisions that can be carried
out, no request lost or finished twice, every block given back, Little's law, and the same records whether steps are
simulated singly or not. Where one is broken it says which, and shows the smallest case that it found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apexsim import catalog
from apexsim.columns import joined
from apexsim.costs.memory import MemoryPlan
from apexsim.costs.steps import BatchStats
from apexsim.costs.timing import RunTimes
from apexsim.errors import ApexsimError
from apexsim.serving.audit import Audited
from apexsim.serving.named import make_policy
from apexsim.serving.policies import BatchPolicy
from apexsim.serving.request import Request
from apexsim.serving.simulator import How, Run
from apexsim.specs.cluster import Cluster, NodeGroup
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import CommunicationDefaults, EngineProfile, HostTerms, SchedulerDefaults
from apexsim.specs.memory import MemoryDefaults
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.workload import DEADLINE, Requests
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
class LinearRun(RunTimes):
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
    device = _load("device", "h100-sxm")
    group = NodeGroup(name=device.name, device=device, devices_per_node=max(8, stages * replicas))
    return Deployment(
        model=_load("model", "llama-3.1-8b"),
        cluster=Cluster(groups=(group,)),
        engine=engine,
        pools=(Pool(plan=Plan(pipeline=stages), replicas=replicas),),
        router=router,
    )


RECORDED = (
    "index", "replica", "scheduled_ns", "first_token_ns", "last_token_ns", "shown_ns", "prompt_tokens", "total",
    "known", "computed", "pending", "blocks", "preemptions",
)  # fmt: skip
_load = cache(catalog.load)
Policy = str | Callable[[SchedulerDefaults], BatchPolicy] | BatchPolicy
"""A batching policy: by name, as a class that is built from the scheduler's settings, or an object."""


@dataclass(frozen=True, repr=False)
class Case:
    """A small simulation: its load, its engine and its (linear) cost.

    Closed loop if ``concurrency`` is given. With a ``window`` the KV cache also holds layers that keep so many tokens.
    ``patience_ns`` are the times from arrival to deadline, for policies that need them.
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
    turnaround_ns: int = 0
    patience_ns: Sequence[int] = ()
    step_ns: int = 1_000_000
    token_ns: int = 1_000
    context_ns: int = 100

    def __repr__(self) -> str:
        """The call that makes this case, without what is as usual."""
        given = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return f"Case({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in given)})"

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
            turnaround_s=self.turnaround_ns / NS_PER_S,
            waves=self.waves,
            extra={DEADLINE: np.array(self.patience_ns[:count]) / NS_PER_S} if len(self.patience_ns) else {},
            prompt_tokens=prompts,
            output_tokens=outputs,
        )

    def run(self, *, exact_steps: bool, policy: BatchPolicy | None = None) -> KeptRun:
        """Serve the case; ``policy`` decides in place of the one of that name."""
        laid_out = {"stages": self.stages, "replicas": self.replicas, "frontend_ns": self.frontend_ns}
        deployment = made_up_deployment(self.scheduler(), router=self.router, **laid_out)
        cost = LinearCost(self.step_ns, self.token_ns, self.context_ns, self.stages)
        memory = made_up_memory(self.blocks, window=self.window)
        how = How(exact_steps=exact_steps, policy=policy)
        run = KeptRun(deployment, self.requests(), cost=cost, memory=memory, how=how)
        run.go()
        return run


def check_case(case: Case, policy: Policy | None = None) -> None:
    """Serve a case step by step and with macro-steps: both keep every promise and leave the same records.

    Every decision is audited. ``policy``: see ``check_policy``; by default the one that the case names. Raises
    AssertionError, or ``PolicyFault``, with the promise that was broken.
    """
    exact = case.run(exact_steps=True, policy=_made(policy or case.policy, case))
    check_run(exact)
    fast = case.run(exact_steps=False, policy=_made(policy or case.policy, case))
    check_run(fast)
    check_same(fast, exact)


class KeptRun(Run):
    """A run whose requests can be looked at when it is over."""

    def __init__(self, *what: Any, **how: Any) -> None:
        super().__init__(*what, **how)
        self._ended: list[Request] = []
        self.watch = self._keep

    def _keep(self, request: Request) -> bool:
        self._ended.append(request)
        return False

    @property
    def requests(self) -> list[Request]:
        """Those that were asked for, in the order of the workload."""
        return sorted([*self._ended, *self.flow.living.values()], key=lambda request: request.index)

    @property
    def rejected(self) -> dict[int, str]:
        """Why requests were refused, by their place in the workload."""
        columns = joined(self.rows.blocks(0))
        return {int(index): why for index, why in zip(columns["request"], columns["reason"], strict=True) if why}


def check_same(fast: KeptRun, exact: KeptRun) -> None:
    """Demand that two runs noted the same integers about their requests, and the same times between tokens."""
    differs = "single steps and steps at once differ: decodes_first or steady_until promises too much"
    for one, other in zip(fast.requests, exact.requests, strict=True):
        assert one.arrival_ns == other.arrival_ns, f"{differs} (request {one.index}: its arrival)"
        for name in RECORDED:
            got, wanted = getattr(one.job, name, None), getattr(other.job, name, None)
            assert got == wanted, f"{differs} (request {one.index}: {name} is {got}, not {wanted})"
    assert fast.rejected == exact.rejected, f"{differs} (who is refused)"
    for got, wanted in zip(fast.replicas, exact.replicas, strict=True):
        assert got.block_ns == wanted.block_ns, f"{differs} (KV blocks over time of replica {got.index})"
    assert _work_ns(fast) == _work_ns(exact), f"{differs} (time of all steps on all stages)"
    for columns in zip(fast.recorder.inter_token_gaps(), exact.recorder.inter_token_gaps(), strict=True):
        assert np.array_equal(*columns), f"{differs} (times between tokens)"


def _work_ns(run: Run) -> int:
    """Nanoseconds that steps took: in a pipeline those that only decode, on all stages."""
    rows = run.recorder.steps()
    return run.recorder.pipeline_ns or int((rows["end_ns"] - rows["start_ns"]).sum())


def check_run(run: KeptRun) -> None:
    """What every finished run owes: nobody lost, no block kept, tokens counted once, and Little's law."""
    left = run.why_unfinished()
    assert left is None, left
    for replica in run.replicas:
        replica.check_idle()
    rejected = run.rejected
    served = [request for request in run.requests if request.index not in rejected]
    for request in served:
        times = request.arrival_ns, request.scheduled_ns, request.first_token_ns, request.last_token_ns
        arrival_ns, scheduled_ns, first_ns, last_ns = (-1 if time is None else time for time in times)
        assert arrival_ns <= scheduled_ns < first_ns <= last_ns, f"times of request {request.index} run back: {times}"
    _, counts = run.recorder.inter_token_gaps()
    assert counts.sum() == sum(request.output_tokens - 1 for request in served), "tokens were lost or counted twice"
    sojourn_ns = sum((request.last_token_ns or 0) - request.arrival_ns for request in served)
    assert sojourn_ns == run.flow.request_ns, (
        "Little's law: time in system differs from the integral of requests in system"
    )


def check_policy(policy: Policy, *, cases: int = 50, seed: int = 0) -> None:
    """Serve ``cases`` random small cases under a policy and demand what every policy owes.

    ``policy``: an object (copied for each run), a class, the name of a shipped policy, or ``module:Name``. Raises
    AssertionError that says in words which promise broke, with the smallest case found that breaks one; the case can be
    pasted into ``check_case``.
    """
    label = policy if isinstance(policy, str) else "chunked_prefill"
    _made(policy, Case(arrivals_ns=[0], lengths=[(1, 1)]))  # what cannot be made fails as it is: no case shows why
    for stream in np.random.SeedSequence(seed).spawn(cases):
        case = random_case(np.random.default_rng(stream), label)
        if fault := _fault(case, policy):
            case = smallest(case, partial(_fails_alike, policy, fault))
            raise AssertionError(f"{_fault(case, policy)}\nsmallest case found: {case}")


def _fails_alike(policy: Policy, fault: str, case: Case) -> bool:
    """Whether a case shows a fault of the same kind: one of the policy's decisions, or of what comes of them."""
    found, decided = _fault(case, policy), ("policy: the policy", "the policy")
    return found is not None and found.startswith(decided) == fault.startswith(decided)


def _made(policy: Policy, case: Case) -> BatchPolicy:
    """A policy fresh for one run, audited."""
    scheduler = case.scheduler()
    if isinstance(policy, str):
        made = make_policy(scheduler.model_copy(update={"policy": policy}))
    else:
        made = deepcopy(policy) if isinstance(policy, BatchPolicy) else policy(scheduler)
    tokens = sum(prompt + output for prompt, output in case.lengths)
    return Audited(made, most=1_000 + 100 * tokens)


def _fault(case: Case, policy: Policy) -> str | None:
    """What a policy breaks in a case, in words; None when it keeps every promise."""
    try:
        check_case(case, policy)
    except (AssertionError, ApexsimError) as error:
        return str(error)
    except Exception as error:  # a policy of the user's may fail in any way
        return f"the policy raised {type(error).__name__}: {error}"
    return None


def smallest(case: Case, fails: Callable[[Case], bool], *, tries: int = 600) -> Case:
    """A case that still ``fails`` and that no single simplification leaves failing; ``tries`` bounds the search."""
    found = True
    while found:
        found = False
        for simpler in _simpler(case):
            tries -= 1
            if tries < 0:
                return case
            if fails(simpler):
                case, found = simpler, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Cases with fewer requests, then with plainer settings, then with fewer tokens and earlier arrivals."""
    count = min(len(case.arrivals_ns), len(case.lengths))
    size = count // 2
    while size:
        yield from (_without(case, first, first + size) for first in range(0, count, size))
        size //= 2
    for setting in fields(case):
        written = setting.name in ("policy", "arrivals_ns", "lengths", "patience_ns")
        usual: Any = setting.default
        if not written and getattr(case, setting.name) != usual:
            yield replace(case, **{setting.name: usual})
    for position, (prompt, output) in enumerate(case.lengths):
        for fewer in ((1, output), (prompt // 2, output), (prompt, 1), (prompt, output // 2)):
            if min(fewer) and fewer != (prompt, output):
                yield replace(case, lengths=[*case.lengths[:position], fewer, *case.lengths[position + 1 :]])
    if any(case.arrivals_ns):
        yield replace(case, arrivals_ns=[0] * len(case.arrivals_ns))


def _without(case: Case, first: int, last: int) -> Case:
    """The case without some of its requests."""
    arrivals_ns, lengths, patience_ns = (
        [*rows[:first], *rows[last:]] for rows in (case.arrivals_ns, case.lengths, case.patience_ns)
    )
    return replace(case, arrivals_ns=arrivals_ns, lengths=lengths, patience_ns=patience_ns)


def random_case(rng: np.random.Generator, policy: str) -> Case:
    """A case that is small, busy and full of ties."""
    count = int(rng.integers(1, 40))
    closed = bool(rng.integers(0, 3) == 0)
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
        receive_interval=int(rng.choice([1, 1, 5])),
        concurrency=int(rng.integers(1, 9)) if closed else None,
        turnaround_ns=int(rng.choice([0, 700_000])) if closed else 0,
        patience_ns=[int(tick) * 500_000 for tick in rng.integers(0, 20, count)],
    )


def made_up_memory(blocks: int, *, block_size: int = 16, window: int | None = None) -> MemoryPlan:
    """A KV cache of that many blocks, whatever the model; half of its layers windowed if ``window`` is given."""
    groups = ((1, None),) if window is None else ((1, None), (1, window))
    return MemoryPlan(0.0, 0.0, 0.0, 0.0, 0.0, block_size=block_size, blocks=blocks, groups=groups)
