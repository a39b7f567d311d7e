"""The live reference engine: continuous batching with real forward passes, by the clock.

The batching policy, the ledger, the block manager and what a ledger does to a queue are the simulator's own objects;
here a step takes as long as the device takes. Outputs have the lengths that requests ask for: there is no end token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from apexsim.costs.memory import MemoryPlan
from apexsim.errors import BadInput
from apexsim.serving.batch import Batch
from apexsim.serving.decodes import advance
from apexsim.serving.flow import see
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.ledger import Ledger
from apexsim.serving.named import make_policy
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request
from apexsim.serving.scheduler import Scheduler
from apexsim.serving.simulator import no_cycle_collection
from apexsim.serving.traffic import Door
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.model import ModelSpec
from apexsim.specs.workload import Requests
from kernels_profiling.clock import Clock, HostClock
from kernels_profiling.paged_cache import BlockTables
from kernels_profiling.runner import Runner
from kernels_profiling.traffic import Traffic
from kernels_profiling.transformer import CacheShape, Transformer


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is started with. ``scheduler`` is settled: its limits are numbers.

    ``kv_blocks`` of ``scheduler.block_size`` tokens, for requests of up to ``longest`` tokens. ``device`` and ``dtype``
    are torch's; ``graphs`` lets CUDA graphs replay decodes. Times are those of ``clock``.
    """

    model: ModelSpec
    scheduler: SchedulerDefaults
    kv_blocks: int
    longest: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    swiftkv_layers: int | None = None
    graphs: bool = True
    seed: int = 0
    clock: Clock = field(default_factory=HostClock)

    @property
    def cache(self) -> CacheShape:
        """The KV cache."""
        return CacheShape(self.kv_blocks, self.scheduler.block_size, self.longest)


class LiveEngine:
    """A replica that really computes; ``serve`` runs a workload through it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        scheduler = self._limits = settings.scheduler
        self._policy = make_policy(scheduler)
        if self._policy.needs_deadline:
            raise BadInput("requests here have no deadlines", key="policy", got=scheduler.policy)
        self._memory = _memory_plan(settings.kv_blocks, scheduler.block_size)
        like = torch.empty(0, dtype=settings.dtype, device=settings.device)
        self.model = Transformer(
            settings.model,
            settings.cache,
            like=like,
            swiftkv_layers=settings.swiftkv_layers,
            seed=settings.seed,
        )
        self._width = min(settings.kv_blocks, -(-settings.longest // scheduler.block_size))
        self._start()
        self.runner = Runner(self.model, self._tables, token_budget=scheduler.token_budget, graphs=settings.graphs)
        self.runner.capture()

    def _start(self) -> None:
        """An empty replica: nothing queued, cached or recorded."""
        blocks = BlockManager(self._memory.blocks, self._memory.block_size, self._memory.blocks_for)
        self._scheduler = Scheduler(self._limits, blocks, self._policy.queue())
        self._tables = BlockTables(blocks, seats=self._limits.max_num_seqs, width=self._width)
        self._recorder = Recorder(())
        self.outputs: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []

    def serve(self, workload: Requests) -> tuple[list[Request], Recorder]:
        """Serve a workload to its end; its requests with their stamps, and what was recorded of steps and gaps.

        Times are nanoseconds since the start. Raises BadInput before any work where a request could never be served.
        """
        check_servable(self.settings, workload)
        traffic = Traffic(workload)
        self._start()
        self.runner.tables = self._tables
        self.runner.known = prompts(traffic.requests, self.settings.model.vocab, self.settings.seed)
        with no_cycle_collection():
            self._began_ns = self.settings.clock.now_ns()
            self._loop(traffic)
        self._scheduler.check_idle()
        self.outputs = [known[r.prompt_tokens :] for known, r in zip(self.runner.known, traffic.requests, strict=True)]
        return traffic.requests, self._recorder

    # -- parts ------------------------------------------------------------------------------------------------

    def _now_ns(self) -> int:
        return self.settings.clock.now_ns() - self._began_ns

    def _loop(self, traffic: Traffic) -> None:
        """Compose and compute until no request is left."""
        waiting, running, now_ns = self._scheduler.waiting, self._scheduler.running, self._now_ns()
        while True:
            waiting.extend([_job_of(request) for request in traffic.arrived(now_ns)])
            if waiting or running:
                answered = self._step()
                now_ns = self._now_ns()
                traffic.answered(answered, now_ns)
            elif traffic.next_ns is None:
                return
            else:
                self.settings.clock.wait_until(self._began_ns + traffic.next_ns)
                now_ns = self._now_ns()

    def _step(self) -> list[Request]:
        """One decision of the policy and the step it makes; returns the requests that have their last token."""
        start_ns, scheduler = self._now_ns(), self._scheduler
        ledger = scheduler.open(self._limits.max_num_seqs)
        self._policy.fill(ledger, scheduler.running, scheduler.waiting)
        scheduler.apply(ledger, start_ns)
        for job in ledger.preempted:
            self._tables.release(job)
        if not (ledger.decodes or ledger.chunks):
            assert ledger.preempted, "requests are there and the policy schedules none"
            return []
        batch = Batch(*advance(ledger, scheduler.blocks, ()))
        batch.start_ns, batch.labels = start_ns, (0, len(scheduler.running), len(scheduler.waiting))
        self._compute(ledger)
        batch.end_ns = self._now_ns()
        return self._end(batch)

    def _compute(self, ledger: Ledger) -> None:
        """Run the step and note the tokens of those that sampled."""
        jobs = [*ledger.decodes, *[job for job, _ in ledger.chunks]]
        for job in jobs:
            self._tables.grow(job)
        known = self.runner.known
        for job, token in zip(jobs, self.runner.run(ledger.decodes, ledger.chunks), strict=True):
            if job.decoding:
                known[job.index][job.known - 1] = token

    def _end(self, batch: Batch) -> list[Request]:
        """Stamp the tokens of a batch; those whose last it was leave."""
        scheduler, held = self._scheduler, self._scheduler.blocks.held
        scheduler.see_off(batch.leaving)
        batch.emit(self._recorder)
        self._recorder.step(batch.stats, batch.labels, (batch.start_ns, batch.end_ns), 1, (held, held))
        for job in batch.leaving:
            scheduler.leave(job)
            self._tables.release(job)
            see(job.request, job)
        self._tables.check()
        return [job.request for job in batch.leaving]


def _job_of(request: Request) -> Job:
    """All of a request as one job."""
    job = request.job = Job(request)
    return job


def check_servable(settings: EngineSettings, workload: Requests) -> None:
    """Raise BadInput where an engine with these settings could never serve a request of a workload."""
    requests = Traffic(workload).requests
    memory = _memory_plan(settings.kv_blocks, settings.scheduler.block_size)
    door = Door(settings.scheduler, min(settings.longest, settings.model.max_context), memory)
    refused = [(request.index + 1, why) for request in requests if (why := door.refuses(request))]
    if refused:
        row, why = refused[0]
        said = f"{len(refused)} of {len(requests)} requests cannot be served; request {row}: {why}"
        raise BadInput(said, where=workload.name)


def prompts(requests: list[Request], vocab: int, seed: int) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Room for all tokens of each request, its prompt drawn at random."""
    random = np.random.default_rng(seed)
    known = [np.zeros(request.total, dtype=np.int64) for request in requests]
    for tokens, request in zip(known, requests, strict=True):
        tokens[: request.prompt_tokens] = random.integers(0, vocab, request.prompt_tokens)
    return known


def _memory_plan(blocks: int, block_size: int) -> MemoryPlan:
    """The cache as the simulator knows it; its bytes play no part in serving."""
    return MemoryPlan(0.0, 0.0, 0.0, 0.0, 0.0, block_size, blocks)
