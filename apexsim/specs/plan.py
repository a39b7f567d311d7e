"""Plans and pools: how one replica is cut over devices, and how many replicas serve which part of a request's life."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apexsim.specs.base import Name, Spec
from apexsim.specs.cluster import MAX_DEVICES, NodeGroup
from apexsim.specs.engine import EngineProfile
from apexsim.specs.model import ModelSpec

Phase = Literal["encode", "prefill", "decode"]


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

    def lawful(self, model: ModelSpec, group: NodeGroup) -> tuple[str, ...]:
        """Reasons why the plan cannot be laid out for this model on these nodes; empty when it can."""
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
        checks.append((self.devices <= group.devices, f"needs {self.devices} devices, the cluster has {group.devices}"))
        node = group.devices_per_node
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
    """Replicas of one plan and the phases of a request's life that they serve.

    ``device`` names the group of the cluster's nodes that they lie on; None is the only one. ``engine``, ``weights``,
    ``moe_weights`` and ``kv_cache`` are the pool's own; what is None is the deployment's.
    """

    name: Name = "serve"
    phases: tuple[Phase, ...] = Field(("prefill", "decode"), min_length=1)
    plan: Plan = Plan()
    replicas: int = Field(1, ge=1, le=MAX_DEVICES)
    device: str | None = None
    engine: EngineProfile | None = None
    weights: str | None = None
    moe_weights: str | None = None
    kv_cache: str | None = None

    @property
    def devices(self) -> int:
        return self.plan.devices * self.replicas

    @property
    def described(self) -> str:
        """Plan and replicas, such as ``tp4-pp1 x 2``."""
        return f"{self.plan.name} x {self.replicas}"
