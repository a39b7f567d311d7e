"""Plans, pools and deployments: how a model is laid out on devices."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.cluster import MAX_DEVICES, Cluster
from apexsim.specs.engine import EngineProfile, SchedulerDefaults, token_budget
from apexsim.specs.laws import Floats
from apexsim.specs.model import ModelSpec

Stage = Literal["encode", "prefill", "decode"]
TokenChoice = Literal["greedy", "top_p"]
Prompts = Literal["text", "random_tokens"]
Bill = Literal["used", "node", "fleet"]
Seconds = TypeVar("Seconds", float, Floats)


class Plan(Spec):
    """Parallel degrees of one replica.

    Each pipeline stage runs on ``tensor`` x ``attention_data`` ranks. Attention and everything dense are repeated
    ``attention_data`` times, each copy cut over ``tensor`` ranks and at work on sequences of its own; the experts lie
    on all those ranks, spread over ``expert`` of them (which divides their number) and cut over the rest.
    """

    tensor: int = Field(1, ge=1)
    attention_data: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)

    @property
    def devices(self) -> int:
        """Devices of one replica."""
        return self.stage_devices * self.pipeline

    @property
    def stage_devices(self) -> int:
        """Devices of one pipeline stage: the ranks that share its experts."""
        return self.tensor * self.attention_data

    @property
    def moe_tensor(self) -> int:
        """Tensor degree inside each expert."""
        return max(1, self.stage_devices // self.expert)

    @property
    def name(self) -> str:
        """Short name such as ``tp4-pp2``, ``tp8-pp1-ep8`` or ``tp2-adp4-pp1-ep8``."""
        ranks, experts = [f"adp{self.attention_data}"], [f"ep{self.expert}"]
        parts = [f"tp{self.tensor}", *ranks * (self.attention_data > 1), f"pp{self.pipeline}"]
        return "-".join(parts + experts * (self.expert > 1))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What is taken for granted of this plan, for people to read."""
        if self.attention_data == 1:
            return ()
        ranks = f"{self.attention_data} attention-data ranks are taken to be evenly loaded"
        return (f"estimated: {ranks}, as far as whole prompts go; real ones wait longer for the fullest",)

    def lawful(self, model: ModelSpec, cluster: Cluster) -> tuple[str, ...]:
        """Reasons why the plan cannot be laid out for this model on this cluster; empty when it can."""
        t, checks = self.tensor, []
        checks.append((model.heads % t == 0, f"tensor degree {t} does not divide the {model.heads} attention heads"))
        kv = model.kv_heads
        checks.append(
            (kv % t == 0 or t % kv == 0, f"tensor degree {t} neither divides nor is divided by the {kv} KV heads")
        )
        checks.append(
            (model.layers >= self.pipeline, f"pipeline degree {self.pipeline} exceeds the {model.layers} layers")
        )
        checks += self._expert_checks(model)
        widths = model.sharded_widths(self.moe_tensor, t)
        checks += [
            (width % degree == 0, f"tensor degree {degree} does not divide the {what} of {width}")
            for what, width, degree in widths
        ]
        checks.append(
            (self.devices <= cluster.devices, f"needs {self.devices} devices, the cluster has {cluster.devices}")
        )
        node = cluster.devices_per_node
        part = f"tensor degree {t} takes a part of a node: give up to {node}, or a multiple of its {node} devices"
        checks.append((t <= node or t % node == 0, part))
        if self.attention_data > 1:
            cut = f"experts cut over ranks of {self.attention_data} x {t} devices cross nodes of {node} devices"
            checks.append((self.stage_devices <= node or self.moe_tensor == 1, cut))
        return tuple(reason for holds, reason in checks if not holds)

    def _expert_checks(self, model: ModelSpec) -> list[tuple[bool, str]]:
        """What experts ask of the ranks they share, as (whether it holds, the reason if not)."""
        ranks, expert = self.attention_data, self.expert
        over = f"the tensor degree {self.tensor}" + f" x {ranks} attention-data ranks" * (ranks > 1)
        checks = [(self.stage_devices % expert == 0, f"expert degree {expert} does not divide {over}")]
        if model.moe is None:
            same = f"{ranks} attention-data ranks of a model without experts share nothing: give --replicas {ranks}"
            checks.append((ranks == 1, same))
            return [*checks, (expert == 1, f"expert degree {expert} on a model without experts")]
        experts = model.moe.experts
        return [*checks, (experts % expert == 0, f"expert degree {expert} does not divide the {experts} experts")]


class Pool(Spec):
    """Replicas of one plan and the stages of a request's life that they serve."""

    name: str = "serve"
    stages: tuple[Stage, ...] = ("prefill", "decode")
    plan: Plan = Plan()
    replicas: int = Field(1, ge=1, le=MAX_DEVICES)

    @property
    def devices(self) -> int:
        return self.plan.devices * self.replicas


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
        if len(self.pools) != 1 or set(self.pools[0].stages) != {"prefill", "decode"}:
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
