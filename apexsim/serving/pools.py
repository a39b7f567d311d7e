"""A run of requests through several pools. No deployment asks for one yet: whoever calls it wires the pools by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from apexsim.costs.memory import MemoryPlan
from apexsim.serving.clock import Clock
from apexsim.serving.flow import Carrier, Flow
from apexsim.serving.itinerary import Itineraries
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.replica import Replica
from apexsim.serving.request_rows import RequestRows
from apexsim.serving.routing import Router
from apexsim.serving.settings import ReplicaSettings
from apexsim.serving.traffic import Door, OpenLoop, Source
from apexsim.specs.workload import Requests


class PoolSetup(NamedTuple):
    """What a pool of so many ``replicas`` is made of."""

    replicas: int
    settings: ReplicaSettings
    memory: MemoryPlan
    router: Router
    frontend_ns: int = 0

    def build(self, flow: Flow, clock: Clock, recorder: Recorder, *, first: int = 0) -> list[Replica]:
        """Its replicas, numbered from ``first``, that serve the flow from now on."""
        memory, remembers = self.memory, self.settings.scheduler.prefix_caching
        replicas = [
            Replica(
                first + number,
                clock=clock,
                settings=self.settings,
                blocks=BlockManager(
                    memory.blocks,
                    memory.block_size,
                    memory.blocks_for,
                    steady=memory.steady,
                    remembers=remembers,
                    clock=clock,
                ),
                recorder=recorder,
                on_done=flow.done,
            )
            for number in range(self.replicas)
        ]
        flow.serve_with(replicas, self.router, frontend_ns=self.frontend_ns)
        return replicas


class PoolsRun:
    """Requests of an open loop through pools, as ``itinerary`` leads them: see ``Flow``. All pools serve one model.

    ``door`` refuses what some pool could not serve.
    """

    def __init__(
        self, pools: Sequence[PoolSetup], requests: Requests, door: Door, *, itinerary: Itineraries, carrier: Carrier
    ) -> None:
        self.clock = Clock()
        self.recorder = Recorder(pools[0].settings.windows)
        self.rows = RequestRows()
        self.flow = Flow(self.clock, self.rows, itinerary=itinerary, carrier=carrier)
        self.replicas: list[Replica] = []
        for pool in pools:
            self.replicas += pool.build(self.flow, self.clock, self.recorder, first=len(self.replicas))
        self.source = Source(requests, door, self.rows.reject, patience_ns=None)

    def go(self) -> None:
        """Run until every request is done."""
        OpenLoop(self.source, self.clock, self.flow).begin()
        self.clock.run()
        self.flow.close_rows()
        for request in self.flow.living.values():
            self.flow.leave(request)
