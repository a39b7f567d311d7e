"""Deployments: a model on a cluster under an engine, laid out in pools."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import model_validator

from apexsim.errors import BadInput, InfeasiblePlan, Unsupported
from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.cluster import Cluster, NodeGroup
from apexsim.specs.engine import EngineProfile
from apexsim.specs.laws import Floats
from apexsim.specs.model import ModelSpec
from apexsim.specs.placement import Spans, place_pools
from apexsim.specs.plan import Phase, Pool
from apexsim.specs.server import Load, Prompts, Server, TokenChoice

COLOCATED: tuple[Phase, ...] = ("prefill", "decode")
"""Phases that some pool must serve; one pool that serves both is a co-located deployment."""
Bill = Literal["used", "node", "fleet"]
Seconds = TypeVar("Seconds", float, Floats)


class Deployment(Spec):
    """A model on a cluster under an engine. The specs are whole values, not names, so that a run is its own record.

    ``sampling`` is how its requests ask for tokens: ``greedy`` for the most likely one, or any one at random;
    ``top_p`` for one of the most likely (top-p, top-k), which the engine must find first. ``prompts`` is what they are
    made of: ``text`` as users send, or ``random_tokens`` as benchmarks do, for which routers choose fewer experts.
    ``weights`` not given (or None) is the dtype that the model's checkpoint was published in, bf16 where it names none.
    ``bill`` says which devices are paid for and drawn power for: see ``billed``. What a pool has of its own
    (engine, dtypes) outweighs what is said here.
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

    @model_validator(mode="after")
    def _pools_fit_together(self) -> Deployment:
        names = [pool.name for pool in self.pools]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"pools have names of their own; several are called {', '.join(twice)}")
        served = {phase for pool in self.pools for phase in pool.phases}
        if unserved := [phase for phase in COLOCATED if phase not in served]:
            raise ValueError(f"no pool serves {' or '.join(unserved)}: add it to the phases of a pool")
        for pool in self.pools:
            try:
                self.cluster.group(pool.device)
            except BadInput as error:
                raise ValueError(f"pool {pool.name}: {error}") from None
        return self

    def __repr__(self) -> str:
        """What it is in a line: ``model_dump`` gives the whole."""
        pools = ", ".join(f"{pool.plan.name}-dp{pool.replicas}" for pool in self.pools)
        return f"<Deployment {self.model.name}, {self.devices_named}, {pools}, {self.engine.name}>"

    __str__ = __repr__

    @property
    def devices_named(self) -> str:
        """The devices that work, as ``4 x h100-sxm``."""
        used = {group.name: (self.used(group), group.device.name) for group in self.cluster.groups}
        return " + ".join(f"{count} x {name}" for count, name in used.values() if count)

    @property
    def expert_dtype(self) -> str:
        """Dtype of expert weights: the one asked for, else what the model has with these weights."""
        return self.moe_weights or self.model.expert_dtype(self.weights)

    # -- servers -----------------------------------------------------------------------------------------------------

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

    def check_colocated(self, where: object = None) -> None:
        """Raise Unsupported unless one pool serves prefill and decode, and no other phase, and is all there is.

        ``where``: the file that lists the pools, if any.
        """
        if len(self.pools) > 1 or any(set(pool.phases) != set(COLOCATED) for pool in self.pools):
            serve = ", ".join(f"pool {pool.name} serves {' and '.join(pool.phases)}" for pool in self.pools)
            file = "" if where is None else f"{where}: "
            raise Unsupported(
                f"{file}pools: {serve}; what runs so far is one pool that serves prefill and decode: give that"
            )

    def colocated_server(self, load: Load | None = None) -> Server:
        """The server of a co-located deployment; Unsupported where it is none."""
        self.check_colocated()
        (server,) = self.servers(load)
        return server

    def as_run(self, servers: Sequence[Server]) -> Deployment:
        """This deployment with the engines that the servers of its pools run."""
        engines = [server.engine for server in servers]
        if all(engine == engines[0] for engine in engines):
            own: list[EngineProfile | None] = [None] * len(engines)
            kept = engines[0]
        else:
            own, kept = [*engines], self.engine
        pools = tuple(pool.model_copy(update={"engine": engine}) for pool, engine in zip(self.pools, own, strict=True))
        return self.model_copy(update={"engine": kept, "pools": pools})

    def _server(self, pool: Pool, spans: Spans) -> Server:
        weights, experts = pool.weights or self.weights, pool.moe_weights or self.moe_weights
        return Server(
            pool=pool.name,
            phases=pool.phases,
            model=self.model,
            group=self.cluster.group(pool.device),
            engine=pool.engine or self.engine,
            plan=pool.plan,
            spans=spans,
            weights=weights,
            expert_weights=experts or self.model.expert_dtype(weights),
            kv_cache=pool.kv_cache or self.kv_cache,
            sampling=self.sampling,
            prompts=self.prompts,
        )

    def _check_room(self, pool: Pool, spans: Spans) -> None:
        """InfeasiblePlan where a pool's tensor ranks lie on more nodes than they need."""
        tensor, per_node = pool.plan.tensor, self.cluster.group(pool.device).devices_per_node
        if spans.tensor > math.ceil(tensor / per_node):
            free = f"{pool.replicas} replicas leave no node with room for {tensor} tensor ranks"
            raise InfeasiblePlan([f"{free}; give fewer replicas, or another tensor degree"])

    def replicas_of(self, name: str) -> range:
        """The numbers of the replicas of the pool called ``name``: those of all pools are numbered through."""
        counts = {pool.name: pool.replicas for pool in self.pools}
        first = sum(counts[pool.name] for pool in takewhile(lambda pool: pool.name != name, self.pools))
        return range(first, first + counts[name])

    # -- devices, their price and their idle power -------------------------------------------------------------------

    def used(self, group: NodeGroup) -> int:
        """Devices of a group that work."""
        return sum(pool.devices for pool in self.pools if self.cluster.group(pool.device) is group)

    def billed(self, group: NodeGroup) -> int:
        """Devices of a group that are paid for; their idle power counts, and utilization is of them.

        ``used``: those that work. ``node``: all of the nodes that hold them. ``fleet``: all of the cluster.
        """
        if self.bill == "fleet":
            return group.devices
        used, per_node = self.used(group), group.devices_per_node
        return used if self.bill == "used" else per_node * -(-used // per_node)

    @property
    def devices_used(self) -> int:
        """Devices that work; the cluster may hold more."""
        return sum(pool.devices for pool in self.pools)

    @property
    def billed_devices(self) -> int:
        """Devices of all groups that are paid for."""
        return sum(self.billed(group) for group in self.cluster.groups)

    @property
    def usd_per_hour(self) -> float:
        """Rent of the billed devices, idle ones too."""
        return sum(group.device.price.usd_per_hour * self.billed(group) for group in self.cluster.groups)

    @property
    def usd_per_s(self) -> float:
        """The same rent, a second."""
        return self.usd_per_hour / 3600

    def idle_j(self, span_s: Seconds, working_s: Mapping[str, Seconds]) -> Seconds:
        """Joules that the billed devices draw with nothing to do, over ``span_s`` seconds of the clock.

        ``working_s``: by pool, seconds of work of all its devices together. More work than the span holds leaves
        nothing idle.
        """
        idle_j = 0.0 * span_s
        for group in self.cluster.groups:
            here = [working_s[pool.name] for pool in self.pools if self.cluster.group(pool.device) is group]
            idle_s = np.maximum(0.0, self.billed(group) * span_s - sum(here))
            idle_j = idle_j + group.device.power.idle_w * idle_s
        return idle_j
