"""Deployments: a model on a cluster under an engine, laid out in pools."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import model_validator

from apexsim.errors import InfeasiblePlan, Unsupported
from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.cluster import Cluster
from apexsim.specs.engine import EngineProfile
from apexsim.specs.laws import Floats
from apexsim.specs.model import ModelSpec
from apexsim.specs.placement import Spans, place_pools
from apexsim.specs.plan import Pool
from apexsim.specs.server import Load, Prompts, Server, TokenChoice

Bill = Literal["used", "node", "fleet"]
Seconds = TypeVar("Seconds", float, Floats)


class Deployment(Spec):
    """A model on a cluster under an engine. The specs are whole values, not names, so that a run is its own record.

    ``sampling`` is how its requests ask for tokens: ``greedy`` for the most likely one, or any one at random;
    ``top_p`` for one of the most likely (top-p, top-k), which the engine must find first. ``prompts`` is what they are
    made of: ``text`` as users send, or ``random_tokens`` as benchmarks do, for which routers choose fewer experts.
    ``weights`` not given (or None) is the dtype that the model's checkpoint was published in, bf16 where it names none.
    ``bill`` says which devices are paid for and drawn power for: see ``billed_devices``.
    """

    model: ModelSpec
    cluster: Cluster
    engine: EngineProfile
    pools: tuple[Pool, ...] = (Pool(),)
    router: str = "round_robin"
    weights: str = "bf16"
    moe_weights: str | None = None
    kv_cache: str = "bf16"
    sampling: TokenChoice = "greedy"
    prompts: Prompts = "text"
    bill: Bill = "used"

    @model_validator(mode="before")
    @classmethod
    def _weights_as_published(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("weights") is not None:
            return data
        model = data.get("model")
        known = parse_spec(ModelSpec, model, "model") if isinstance(model, dict) else model
        return {**data, "weights": known.published_dtype if isinstance(known, ModelSpec) else "bf16"}

    def __repr__(self) -> str:
        """What it is in a line: ``model_dump`` gives the whole."""
        pool = self.pools[0]
        where = f"{self.devices_used} x {self.cluster.device.name}, {pool.plan.name}-dp{pool.replicas}"
        return f"<Deployment {self.model.name}, {where}, {self.engine.name}>"

    @property
    def expert_dtype(self) -> str:
        """Dtype of expert weights: the one asked for, else what the model has with these weights."""
        return self.moe_weights or self.model.expert_dtype(self.weights)

    def servers(self, load: Load | None = None) -> tuple[Server, ...]:
        """What one replica of every pool is; with a ``load``, token budgets that follow a rule are set for it.

        Raises InfeasiblePlan with the reasons why a pool cannot be laid out.
        """
        for pool in self.pools:
            if reasons := pool.plan.lawful(self.model, self.cluster.group(pool.device)):
                raise InfeasiblePlan(reasons)
        placed = place_pools(self.cluster, self.pools)
        for pool in self.pools:
            self._check_room(pool, placed[pool.name].spans)
        servers = tuple(self._server(pool, placed[pool.name].spans) for pool in self.pools)
        return servers if load is None else tuple(server.for_load(load) for server in servers)

    def colocated_server(self, load: Load | None = None) -> Server:
        """The server of a deployment whose one pool serves prefill and decode; Unsupported names what else there is."""
        for pool in self.pools:
            if set(pool.phases) != {"prefill", "decode"} or len(self.pools) > 1:
                serves = f"pool {pool.name} serves {' and '.join(pool.phases)} beside {len(self.pools) - 1} others"
                raise Unsupported(f"{serves}: one pool that serves prefill and decode is all that runs so far")
        return self.servers(load)[0]

    def as_run(self, server: Server) -> Deployment:
        """This deployment with the engine that its server runs."""
        return self.model_copy(update={"engine": server.engine})

    def _server(self, pool: Pool, spans: Spans) -> Server:
        return Server(
            pool=pool.name,
            phases=pool.phases,
            model=self.model,
            group=self.cluster.group(pool.device),
            engine=self.engine,
            plan=pool.plan,
            spans=spans,
            weights=self.weights,
            expert_weights=self.expert_dtype,
            kv_cache=self.kv_cache,
            sampling=self.sampling,
            prompts=self.prompts,
        )

    def _check_room(self, pool: Pool, spans: Spans) -> None:
        """InfeasiblePlan where a pool's ranks lie on more nodes than they need."""
        tensor, per_node = pool.plan.tensor, self.cluster.group(pool.device).devices_per_node
        if spans.tensor > math.ceil(tensor / per_node):
            free = f"{pool.replicas} replicas leave no node with room for {tensor} tensor ranks"
            raise InfeasiblePlan([f"{free}; give fewer replicas, or another tensor degree"])

    @model_validator(mode="after")
    def _one_pool_serves_all(self) -> Deployment:
        if len(self.pools) != 1 or set(self.pools[0].phases) != {"prefill", "decode"}:
            raise ValueError("only one pool serving prefill and decode is supported")
        return self

    @property
    def devices_used(self) -> int:
        """Devices that work; the cluster may hold more."""
        return sum(pool.devices for pool in self.pools)

    @property
    def billed_devices(self) -> int:
        """Devices that are paid for; their idle power counts, and utilization is of them.

        ``used``: those that work. ``node``: all of the nodes that hold them. ``fleet``: all of the cluster.
        """
        if self.bill == "fleet":
            return self.cluster.devices
        per_node = self.cluster.devices_per_node
        return self.devices_used if self.bill == "used" else per_node * -(-self.devices_used // per_node)

    @property
    def usd_per_hour(self) -> float:
        """Rent of the billed devices, idle ones too."""
        return self.cluster.device.price.usd_per_hour * self.billed_devices

    @property
    def usd_per_s(self) -> float:
        """The same rent, a second."""
        return self.usd_per_hour / 3600

    def idle_j(self, span_s: Seconds, working_s: Seconds) -> Seconds:
        """Joules that the billed devices draw with nothing to do, over ``span_s`` seconds of the clock.

        ``working_s``: seconds of work of all devices together. More work than the span holds leaves nothing idle.
        """
        idle_s: Seconds = np.maximum(0.0, self.billed_devices * span_s - working_s)
        return self.cluster.device.power.idle_w * idle_s
