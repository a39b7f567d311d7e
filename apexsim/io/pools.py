"""Pools as YAML: ``pools`` of a deployment, each with a plan of its own.

pools:
  - {name: prefill, phases: [prefill], tensor: 2}
  - {name: decode, phases: [decode], replicas: 3, device: a100-sxm, engine_options: {max_num_seqs: 128}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from apexsim.io.engines import engine_named
from apexsim.io.names import check_known
from apexsim.io.words import Dtype, EngineOption, EngineOptions, outweighing
from apexsim.specs.base import Name, Spec
from apexsim.specs.cluster import MAX_DEVICES
from apexsim.specs.plan import Phase, Plan, Pool
from apexsim.units import DTYPE_BYTES


class PoolFile(Spec):
    """A pool by names, as ``Pool`` has it; what is not given is the deployment's.

    ``device`` names a group of nodes, or, where the deployment lists no groups, a device. ``engine_options`` outweigh
    those of the deployment.
    """

    name: Name
    phases: tuple[Phase, ...] = ("prefill", "decode")
    device: str | None = None
    tensor: int = Field(1, ge=1)
    attention_data: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    replicas: int = Field(1, ge=1, le=MAX_DEVICES)
    engine: str | None = None
    engine_options: EngineOptions = Field(default_factory=dict)
    weights: Dtype = None
    moe_weights: Dtype = None
    kv_cache: Dtype = None

    @field_validator("phases")
    @classmethod
    def _serves_something(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        if not phases:
            raise ValueError("give at least one of prefill, decode")
        return phases

    @property
    def plan(self) -> Plan:
        return Plan(tensor=self.tensor, attention_data=self.attention_data, pipeline=self.pipeline, expert=self.expert)

    @property
    def own_engine(self) -> bool:
        """Whether its engine is another than the deployment's, or has other options."""
        return self.engine is not None or bool(self.engine_options)


def resolve_pool(
    file: PoolFile, engine: str, options: Mapping[str, EngineOption], where: object, *, allow_plugins: bool
) -> Pool:
    """The pool of a deployment with this ``engine`` and ``options``; ``BadInput`` at ``where`` for unknown names."""
    where = f"{where}: pool {file.name}"
    for key in ("weights", "moe_weights", "kv_cache"):
        check_known(getattr(file, key), DTYPE_BYTES, where, key)
    own: dict[str, Any] = {"engine": None}
    if file.own_engine:
        given = outweighing(options, file.engine_options, where)
        own["engine"] = engine_named(file.engine or engine, given, where, allow_plugins=allow_plugins)
    kept = file.model_dump(include={"name", "phases", "device", "replicas", "weights", "moe_weights", "kv_cache"})
    return Pool(**kept, plan=file.plan, **own)
