"""One run: requests through a deployment, from arrivals to columns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from apexsim.costs.accounting import account, worked_s
from apexsim.costs.memory import MemoryPlan
from apexsim.costs.notes import cost_notes
from apexsim.costs.starting import Started, start
from apexsim.costs.steps import StepCost, build_step_cost
from apexsim.costs.timing import StepTimes
from apexsim.results import SimulationResult
from apexsim.serving.batching import BatchPolicy
from apexsim.serving.clock import ARRIVAL, Clock
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.named import check_due, make_policy, make_router
from apexsim.serving.recording import Recorder
from apexsim.serving.replica import Replica, ReplicaSettings
from apexsim.serving.request import Request
from apexsim.serving.unfinished import why_rejected, why_unfinished
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.slo import SLO
from apexsim.specs.workload import DEADLINE, Requests, Workload, look_absolute
from apexsim.units import NS_PER_S, to_ns

Progress = Callable[[float], None]


def simulate(
    deployment: Deployment,
    workload: Requests | Workload,
    *,
    slo: SLO | None = None,
    seed: int = 0,
    exact_steps: bool = False,
    progress: Progress | None = None,
) -> SimulationResult:
    """Serve every request of ``workload`` and return what happened.

    ``seed`` draws the requests of a ``Workload``; a run itself has no randomness. ``exact_steps`` simulates each step
    singly (the slow oracle: the same request records). ``progress`` is called with the share of requests done.
    Raises ``InfeasiblePlan`` when the plan is not lawful or does not start, ``Unsupported`` where no cost is known.
    """
    started_s = time.perf_counter()
    requests = workload.sample(seed=seed) if isinstance(workload, Workload) else workload
    engine, cost = set_up(deployment, requests)
    deployment, built_s = engine.deployment, time.perf_counter()
    with no_cycle_collection():
        run = Run(deployment, requests, cost=cost, memory=engine.memory, how=How(slo, None, exact_steps, progress))
        run.go()
    simulated_s = time.perf_counter()
    steps, chunks = run.recorder.steps(), run.recorder.chunks()
    accounting = account(cost, steps, chunks)
    return SimulationResult.from_run(
        deployment=deployment,
        workload=requests,
        slo=slo,
        requests=run.recorder.requests(run.requests, to_ns(deployment.engine.host.response_s)),
        itl=run.recorder.inter_token_gaps(),
        steps=steps,
        chunks=chunks,
        accounting=accounting,
        worked_s=worked_s(cost, accounting, steps, run.recorder.pipeline_ns),
        block_ns=[replica.block_ns for replica in run.replicas],
        memory=engine.memory,
        notes=(*requests.notes, *engine.notes, *run.notes(), *_assumptions(deployment), *cost_notes(cost)),
        timing=_timing(started_s, built_s, simulated_s),
    )


def _assumptions(deployment: Deployment) -> tuple[str, ...]:
    return (*deployment.assumptions, *deployment.pools[0].plan.assumptions)


def set_up(deployment: Deployment, requests: Requests) -> tuple[Started, StepCost]:
    """The engine as it starts for these requests, and what its steps cost."""
    engine = start(deployment.for_load(int(requests.prompt_tokens.max()), requests.concurrency))
    pool = engine.deployment.pools[0]
    return engine, build_step_cost(engine.deployment, pool, prompts=requests.prompt_tokens)


def _timing(started_s: float, built_s: float, simulated_s: float) -> dict[str, float]:
    """Wall-clock seconds of a run and of its parts, up to now: see ``summarise``."""
    now_s = time.perf_counter()
    return {
        "wall_s": now_s - started_s,
        "build_s": built_s - started_s,
        "simulate_s": simulated_s - built_s,
        "account_s": now_s - simulated_s,
    }


@dataclass(frozen=True)
class How:
    """What a run depends on beside its deployment and its requests.

    ``slo`` gives requests without a ``deadline_s`` of their own their deadline. ``policy`` decides in place of the one
    that the scheduler names. The rest as in ``simulate``.
    """

    slo: SLO | None = None
    policy: BatchPolicy | None = None
    exact_steps: bool = False
    progress: Progress | None = None


_PLAINLY = How()


class Run:
    """The clock, the replicas and the requests of one simulation.

    ``request_ns`` is the number of requests in the system integrated over time (L x T of Little's law), kept as each
    leaves by the clock. ``watch``, where given, sees every request that leaves or is refused, and ends the run by
    returning True.
    """

    def __init__(
        self,
        deployment: Deployment,
        requests: Requests,
        *,
        cost: StepTimes,
        memory: MemoryPlan,
        how: How = _PLAINLY,
    ) -> None:
        self.clock = Clock()
        self.recorder = Recorder(deployment.model.windows)
        stream_interval = deployment.scheduler.stream_interval
        self.requests = [
            Request(index, prompt, output, stream_interval=stream_interval)
            for index, (prompt, output) in enumerate(
                zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True)
            )
        ]
        self.policy = how.policy or make_policy(deployment.scheduler)
        self._columns = requests.extra
        self._patience_ns = self._patience(requests, how.slo)
        due_s, arrival_s = requests.extra.get(DEADLINE), requests.arrival_s
        self._absolute = due_s is not None and arrival_s is not None and look_absolute(due_s, arrival_s)
        self.replicas = self._replicas(deployment, cost, memory, how.exact_steps)
        self._router = make_router(deployment.router)
        self._door = Door(deployment.scheduler, deployment.context_limit, memory)
        self._response_ns = to_ns(deployment.engine.host.response_s)
        self._turnaround_ns = None if requests.concurrency is None else max(1, to_ns(requests.turnaround_s))
        self._clients = requests.concurrency
        self._waves = requests.waves
        self._out = 0
        self.request_ns = 0
        self._next = 0
        self._done = 0
        self.watch: Callable[[Request], bool] | None = None
        self._progress = how.progress
        self._stride = max(1, len(self.requests) // 100)
        self._coming = [] if requests.arrival_s is None else self._open_loop(requests.arrival_s)

    def _patience(self, requests: Requests, slo: SLO | None) -> list[int] | None:
        """Nanoseconds from each arrival to the deadline: those of the column, else of the SLO; None where none says.

        Raises BadInput where a policy needs deadlines and there are none.
        """
        if DEADLINE in requests.extra:
            return [to_ns(seconds) for seconds in requests.extra[DEADLINE].tolist()]
        if slo is not None and slo.ttft_s is not None:
            return [to_ns(slo.ttft_s)] * len(requests)
        check_due(self.policy, requests, slo)
        return None

    def _replicas(
        self, deployment: Deployment, cost: StepTimes, memory: MemoryPlan, exact_steps: bool
    ) -> list[Replica]:
        scheduler = deployment.scheduler
        settings = ReplicaSettings(
            cost=cost,
            scheduler=scheduler,
            policy=self.policy,
            windows=deployment.model.windows,
            frontend_ns=to_ns(deployment.engine.host.frontend_per_request_s),
            exact_steps=exact_steps,
        )
        return [
            Replica(
                index,
                clock=self.clock,
                settings=settings,
                blocks=BlockManager(
                    memory.blocks,
                    memory.block_size,
                    memory.blocks_for,
                    steady=memory.steady,
                    remembers=scheduler.prefix_caching,
                ),
                recorder=self.recorder,
                on_finish=self._finished,
            )
            for index in range(deployment.pools[0].replicas)
        ]

    def go(self) -> None:
        """Run until every request is done."""
        if self._clients is not None:
            self.clock.at(0, ARRIVAL, self._start_clients)
        elif self._coming:
            self.clock.at(self._coming[0][0], ARRIVAL, self._arrive)
        self.clock.run()
        if self._progress:
            self._progress(1.0)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know: columns that nobody looked at, and why requests were not served."""
        used = {DEADLINE} if self.policy.needs_deadline else set()
        unused = sorted(self._columns.keys() - used)
        told = [f"columns without effect here: {', '.join(unused)}"] if unused else []
        if self._absolute and used:
            told.append(f"{DEADLINE} counts from arrival; these look like absolute times: they grow with arrival_s")
        why = why_unfinished(self.requests, self.replicas, frozenset(self.recorder.rejected))
        return (*told, *why_rejected(self.recorder.rejected), *([why] if why else []))

    # -- arrivals -----------------------------------------------------------------------------------------------

    def _open_loop(self, arrival_s: NDArray[np.float64]) -> list[tuple[int, Request]]:
        """When each request is to be routed; with one replica and so nothing to route, when it reaches the queue."""
        frontend_ns = self.replicas[0].frontend_ns if len(self.replicas) == 1 else 0
        free_ns, coming = 0, []
        for request, arrival_ns in zip(
            self.requests, np.rint(arrival_s * NS_PER_S).astype(np.int64).tolist(), strict=True
        ):
            self._arrives(request, arrival_ns)
            if not self._refused(request):
                free_ns = max(free_ns, arrival_ns) + frontend_ns
                coming.append((free_ns, request))
        return coming

    def _arrive(self, _: Event) -> None:
        """All requests of this instant arrive, then the next arrival is awaited."""
        now, coming, replicas = self.clock.now_ns, self._coming, self.replicas
        while self._next < len(coming) and coming[self._next][0] == now:
            request = coming[self._next][1]
            self._next += 1
            if len(replicas) == 1:
                replicas[0].next_arrival_ns = coming[self._next][0] if self._next < len(coming) else None
                replicas[0].take(request)
            else:
                self._route(request)
        if self._next < len(coming):
            self.clock.at(coming[self._next][0], ARRIVAL, self._arrive)

    def _start_clients(self, _: Event) -> None:
        """All clients of a closed loop send a request; those of one in waves do so again and again."""
        assert self._clients is not None
        for _client in range(min(self._clients, len(self.requests))):
            self._send()

    def _send(self) -> None:
        """A client of a closed loop sends the next request; one refused at the door is followed at once by another."""
        while self._next < len(self.requests):
            request = self.requests[self._next]
            self._next += 1
            self._arrives(request, self.clock.now_ns)
            if not self._refused(request):
                self._out += 1
                self._route(request)
                return

    def _arrives(self, request: Request, now_ns: int) -> None:
        request.arrival_ns = now_ns
        if self._patience_ns is not None:
            request.deadline_ns = now_ns + self._patience_ns[request.index]

    def _refused(self, request: Request) -> bool:
        """Whether the request is turned away at the door."""
        reason = self._door.refuses(request)
        if reason:
            self.recorder.reject(request, reason)
            self._count(request)
        return bool(reason)

    def _route(self, request: Request) -> None:
        chosen = self._router.choose([replica.unfinished for replica in self.replicas])
        self.replicas[chosen].submit(request)

    def _finished(self, request: Request) -> None:
        self.request_ns += self.clock.now_ns - request.arrival_ns
        self._count(request)
        self._out -= 1
        if self._turnaround_ns is None or self._next == len(self.requests) or (self._waves and self._out):
            return
        send = self._start_clients if self._waves else lambda _: self._send()
        self.clock.at(self.clock.now_ns + self._response_ns + self._turnaround_ns, ARRIVAL, send)

    def _count(self, request: Request) -> None:
        self._done += 1
        if self.watch and self.watch(request):
            self.clock.stop()
        if self._progress and self._done % self._stride == 0:
            self._progress(self._done / len(self.requests))


@contextmanager
def no_cycle_collection() -> Iterator[None]:
    """A run makes many small objects and no cycles: looking for cycles among them costs time and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Door:
    """Refuses requests that no scheduler could ever serve, each with its reason."""

    def __init__(self, scheduler: SchedulerDefaults, context_limit: int, memory: MemoryPlan) -> None:
        self._context_limit = context_limit
        budget = scheduler.token_budget
        whole = budget if scheduler.max_chunk_tokens is None else min(budget, scheduler.max_chunk_tokens)
        self._prompt_limit = None if scheduler.chunked_prefill else whole
        self._memory_limit = memory.max_tokens
        holder = "a replica" if memory.ranks == 1 else "an attention-data rank"
        self._blocks = f"{memory.rank_blocks} KV blocks that {holder} has"

    def refuses(self, request: Request) -> str:
        """Why the request cannot be served; empty when it can."""
        total, prompt = request.total, request.prompt_tokens
        if total > self._context_limit:
            return f"{total} tokens of prompt and output exceed the context limit of {self._context_limit}"
        if self._prompt_limit is not None and prompt > self._prompt_limit:
            limit = f"the budget of {self._prompt_limit} tokens a step"
            return f"a prompt of {prompt} tokens exceeds {limit}, and prompts are not chunked"
        if self._memory_limit is not None and total > self._memory_limit:
            return f"{total} tokens need more than the {self._blocks}"
        return ""
