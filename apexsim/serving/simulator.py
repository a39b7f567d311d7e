"""One run: requests through a deployment, from arrivals to columns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from apexsim.costs.accounting import RunningAccount, worked_s
from apexsim.costs.memory import MemoryPlan
from apexsim.costs.notes import cost_notes
from apexsim.costs.starting import Started, start
from apexsim.costs.steps import StepCost, build_step_cost
from apexsim.costs.timing import StepTimes
from apexsim.results import SimulationResult
from apexsim.serving.clock import Clock
from apexsim.serving.flow import Flow
from apexsim.serving.named import check_due, make_policy, make_router
from apexsim.serving.policies import BatchPolicy
from apexsim.serving.pools import PoolSetup
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.request_rows import RequestRows
from apexsim.serving.settings import ReplicaSettings
from apexsim.serving.traffic import ClosedLoop, Door, OpenLoop, Source, Traffic
from apexsim.serving.unfinished import why_rejected, why_unfinished
from apexsim.specs.deployment import Deployment
from apexsim.specs.server import Load
from apexsim.specs.slo import SLO
from apexsim.specs.workload import DEADLINE, Requests, Workload, look_absolute
from apexsim.tables import kept
from apexsim.units import to_ns

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
    deployment, built_s = deployment.as_run([engine.server]), time.perf_counter()
    with no_cycle_collection():
        run = Run(deployment, requests, cost=cost, memory=engine.memory, how=How(slo, None, exact_steps, progress))
        run.go()
    simulated_s = time.perf_counter()
    account = RunningAccount(cost)
    steps = kept(account.add(*rows) for rows in run.recorder.blocks())
    return SimulationResult.from_run(
        deployment=deployment,
        workload=requests,
        slo=slo,
        requests=run.rows.blocks(to_ns(engine.server.engine.host.response_s)),
        itl=run.recorder.inter_token_gaps(),
        steps=steps,
        accounting={engine.server.pool: account.total},
        worked_s={engine.server.pool: worked_s(cost, steps, run.recorder.pipeline_ns)},
        block_ns=[replica.block_ns for replica in run.replicas],
        memory={engine.server.pool: engine.memory},
        notes=(*requests.notes, *engine.notes, *run.notes(), *engine.server.assumptions, *cost_notes(cost)),
        timing=_timing(started_s, built_s, simulated_s),
    )


def set_up(deployment: Deployment, requests: Requests) -> tuple[Started, StepCost]:
    """The engine as it starts for these requests, and what its steps cost."""
    engine = start(deployment.colocated_server(Load.of(requests)))
    return engine, build_step_cost(engine.server, prompts=requests.distinct_prompts)


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

    ``watch``, where given, sees every request that leaves or is refused, and ends the run by returning True.
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
        server = deployment.colocated_server()
        self.clock = Clock()
        self.recorder = Recorder(server.model.windows)
        self.rows = RequestRows()
        self.policy = how.policy or make_policy(server.scheduler)
        count = sum(pool.replicas for pool in deployment.pools)
        self.flow = Flow(self.clock, self.rows, stream_interval=server.scheduler.stream_interval)
        host = server.engine.host
        settings = ReplicaSettings(cost, server.scheduler, self.policy, server.model.windows, how.exact_steps)
        frontend_ns = to_ns(host.frontend_per_request_s)
        pool = PoolSetup(count, settings, memory, make_router(deployment.router), frontend_ns)
        self.replicas = pool.build(self.flow, self.clock, self.recorder)
        self._workload = requests
        self.source = Source(
            requests,
            Door(server.scheduler, server.context_limit, memory),
            self._refused,
            patience_ns=self._patience_ns(requests, how.slo),
        )
        self._traffic = self._traffic_of(requests, to_ns(host.response_s))
        self._left = [0, 0]  # requests that have not ended when the run is over: never sent, and sent
        self._done = 0
        self.watch: Callable[[Request], bool] | None = None
        self._progress = how.progress
        self.asked = len(requests)
        self._stride = max(1, self.asked // 100)

    def _patience_ns(self, requests: Requests, slo: SLO | None) -> int | None:
        """Time from arrival to deadline of requests that bring none; None where nobody says one.

        Raises BadInput where a policy needs deadlines and there are none.
        """
        if DEADLINE not in requests.columns and slo is not None and slo.ttft_s is not None:
            return to_ns(slo.ttft_s)
        check_due(self.policy, requests, slo)
        return None

    def _traffic_of(self, requests: Requests, response_ns: int) -> Traffic:
        """The way in which the requests come."""
        if requests.concurrency is None:
            return OpenLoop(self.source, self.clock, self.flow)
        return ClosedLoop(
            self.source,
            self.clock,
            self.flow,
            clients=requests.concurrency,
            pause_ns=response_ns + max(1, to_ns(requests.turnaround_s)),
            waves=requests.waves,
        )

    def go(self) -> None:
        """Run until every request is done."""
        if self._traffic.waits or self.watch or self._progress:
            self.flow.on_end = self._finished
        self._traffic.begin()
        self.clock.run()
        self.flow.close_rows()
        for request in (*self.flow.living.values(), *self.source.rest()):
            self.flow.leave(request)
            self._left[request.replica is not None] += 1
        if self._progress:
            self._progress(1.0)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know: columns that nobody looked at, and why requests were not served."""
        asked = self._workload
        used = {DEADLINE} if self.policy.needs_deadline else set()
        unused = sorted(asked.columns - used)
        told = [f"columns without effect here: {', '.join(unused)}"] if unused else []
        due_s = asked.extra[DEADLINE] if used & asked.columns else None
        if due_s is not None and asked.arrival_s is not None and look_absolute(due_s, asked.arrival_s):
            told.append(f"{DEADLINE} counts from arrival; these look like absolute times: they grow with arrival_s")
        why = self.why_unfinished()
        return (*told, *why_rejected(self.rows.rejected), *([why] if why else []))

    def why_unfinished(self) -> str | None:
        """What the requests that neither finished nor were refused waited for; None where there are none."""
        return why_unfinished(self.replicas, asked=self.asked, unsent=self._left[0], stuck=self._left[1])

    def _refused(self, request: Request, reason: str) -> None:
        """The request is turned away at the door."""
        self.rows.reject(request, reason)
        self._count(request)

    def _finished(self, request: Request) -> None:
        self._count(request)
        self._traffic.ended()

    def _count(self, request: Request) -> None:
        self._done += 1
        if self.watch and self.watch(request):
            self.clock.stop()
        if self._progress and self._done % self._stride == 0:
            self._progress(self._done / self.asked)


@contextmanager
def no_cycle_collection() -> Iterator[None]:
    """A run makes many small objects. Those that keep each other let go when their row is written (``flow``).

    Looking for cycles among them would cost time and find nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
