"""Deployments: a model on a cluster under an engine, laid out in pools."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import model_validator

from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.cluster import Cluster
from apexsim.specs.engine import EngineProfile, SchedulerDefaults, token_budget
from apexsim.specs.laws import Floats
from apexsim.specs.model import ModelSpec
from apexsim.specs.plan import Pool

TokenChoice = Literal["greedy", "top_p"]
Prompts = Literal["text", "random_tokens"]
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
    def as_published(self) -> bool:
        """Whether the weights are in the dtype of the model's checkpoint."""
        return self.model.checkpoint is not None and self.weights == self.model.checkpoint.dtype

    @property
    def expert_dtype(self) -> str:
        """Dtype of expert weights: the one asked for, else what the model has with these weights."""
        return self.moe_weights or self.model.expert_dtype(self.weights)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What is taken for granted of the weights, for people to read."""
        if not self.as_published or self.model.checkpoint is None:
            return ()
        checkpoint = self.model.checkpoint
        return (f"weights as {self.model.name} was published: {checkpoint.described}", *checkpoint.notes)

    @property
    def context_limit(self) -> int:
        """Most tokens of prompt and output together that a request may have."""
        return min(self.model.max_context, self.engine.scheduler.max_model_len or self.model.max_context)

    @property
    def rank_scheduler(self) -> SchedulerDefaults:
        """The engine's scheduler settings for this context limit, every one resolved, on an attention-data rank."""
        device = self.cluster.device
        return self.engine.scheduler_for(self.context_limit, device.name, device.datasheet)

    @property
    def scheduler(self) -> SchedulerDefaults:
        """The same of a whole replica."""
        return self.rank_scheduler.of_ranks(self.pools[0].plan.attention_data)

    def for_load(self, longest_prompt: int, concurrency: int | None) -> Deployment:
        """This deployment with its token budget set by its rule, if it has one, for prompts up to ``longest_prompt``.

        As many sequences are counted as run together: ``concurrency``, or all seats where the load has no bound.
        """
        scheduler = self.rank_scheduler
        if scheduler.token_budget_rule is None:
            return self
        seats, ranks = scheduler.max_num_seqs, self.pools[0].plan.attention_data
        sequences = seats if concurrency is None else min(seats, -(-concurrency // ranks))
        budget = token_budget(prompt_tokens=longest_prompt, sequences=sequences)
        return self.model_copy(update={"engine": self.engine.with_token_budget(budget)})

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
