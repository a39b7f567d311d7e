"""Searches as YAML, and what a search leaves behind. The keys are the flags of ``apexsim search``:

model: llama-3.1-70b        # catalog name, or the path of a model YAML
devices: 8xh100-sxm
workload: chat              # catalog name, or the path of a request file
requests: 1024
slo: {ttft_s: 0.5, tpot_s: 0.05}
objective: latency
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from apexsim import __version__
from apexsim.atomic import atomic_path, write_json
from apexsim.errors import BadInput
from apexsim.io.deployments import DeploymentFile, beside, check_computes, resolve_deployment, write_deployment
from apexsim.io.engines import DEFAULT_ENGINE
from apexsim.io.requests import resolve_supply
from apexsim.io.words import CodeName, Dtype, EngineOptions
from apexsim.io.yaml_files import load_spec
from apexsim.search.headline import headline
from apexsim.search.objective import objective_named
from apexsim.search.question import Question
from apexsim.search.space import SearchSpace
from apexsim.search.study import Study
from apexsim.specs.base import Spec
from apexsim.specs.cluster import DEVICES_PER_NODE, parse_devices
from apexsim.specs.deployment import Bill
from apexsim.specs.server import Prompts, TokenChoice
from apexsim.specs.slo import SLO
from apexsim.specs.supply import Supply
from apexsim.specs.workload import Requests


class Traffic(Spec):
    """What is asked of a deployment, by name: the workload flags of the command line."""

    workload: str
    rate_per_s: float | None = Field(None, gt=0)
    concurrency: int | None = Field(None, ge=1)
    requests: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    slo: SLO = SLO()

    def read(self) -> Requests:
        """The requests that these keys describe."""
        return self._asked().requests

    def supply(self) -> Supply:
        """The same, all held, and how to have more of them."""
        asked = self._asked()
        return replace(asked, requests=asked.requests.whole())

    def _asked(self) -> Supply:
        return resolve_supply(
            self.workload,
            rate_per_s=self.rate_per_s,
            concurrency=self.concurrency,
            requests=self.requests,
            seed=self.seed,
        )


class SearchFile(Traffic):
    """A search by names: what a person writes. ``resolve_search`` turns it into a ``Question``."""

    model: str
    devices: str
    allow_idle: bool = False
    objective: str = "latency"
    engine: str = DEFAULT_ENGINE
    engine_options: EngineOptions = Field(default_factory=dict)
    router: CodeName = "round_robin"
    weights: Dtype = None
    moe_weights: Dtype = None
    kv_cache: Dtype = None
    sampling: TokenChoice = "greedy"
    prompts: Prompts = "text"
    bill: Bill = "used"

    @model_validator(mode="before")
    @classmethod
    def _chooses_its_pool(cls, data: Any) -> Any:
        if isinstance(data, dict) and "pools" in data:
            raise ValueError("a search lays out one pool that serves prefill and decode: leave pools out")
        return data


def read_search(path: Path | str) -> SearchFile:
    """Read a search YAML; a model, engine or workload given as a path is looked for beside the file first."""
    file = load_spec(SearchFile, path)
    return file.model_copy(update={key: beside(getattr(file, key), path) for key in ("model", "engine", "workload")})


def resolve_search(file: SearchFile, where: object, *, allow_plugins: bool = False) -> Question:
    """Look every name up; ``BadInput`` at ``where`` on the first that means nothing."""
    objective = objective_named(file.objective, f"{where}: objective")
    base = resolve_deployment(deployment_file(file, where), where, allow_plugins=allow_plugins)
    check_computes(base, where)
    space = SearchSpace(base=base, allow_idle=file.allow_idle)
    return Question(space=space, supply=file.supply(), objective=objective, slo=file.slo, seed=file.seed)


def deployment_file(file: SearchFile, where: object) -> DeploymentFile:
    """The deployment that a search varies: its cluster and all its choices but the plan."""
    count, device = parse_devices(file.devices, f"{where}: devices")
    per_node = min(count, DEVICES_PER_NODE)
    if count % per_node:
        would_do = f"give up to {per_node} devices or whole nodes of {per_node}"
        raise BadInput(would_do, where=where, key="devices", got=file.devices)
    if file.bill == "node" and count < DEVICES_PER_NODE:
        would_do = f"whole nodes have {DEVICES_PER_NODE} devices: give as many, or bill used or fleet"
        raise BadInput(would_do, where=where, key="bill", got=file.bill)
    shared = file.model_dump(include=set(DeploymentFile.model_fields))
    return DeploymentFile(**shared, device=device, nodes=count // per_node, devices_per_node=per_node)


# What ``write_study`` writes.
STUDY_FILES = ("study.json", "plans.parquet", "best.yaml")


def write_study(out: Path, study: Study, file: SearchFile) -> None:
    """Write ``study.json``, ``plans.parquet`` and, when a plan won, ``best.yaml`` into the folder ``out``."""
    with atomic_path(out / "plans.parquet") as scratch:
        study.table.to_parquet(scratch, index=False)
    write_json(out / "study.json", study_data(study))
    best = out / "best.yaml"
    best.unlink(missing_ok=True)  # that of an earlier search answers another question
    if study.winner:
        candidate = study.winner.candidate
        degrees = {**candidate.plan.model_dump(), "replicas": candidate.replicas}
        options = {**file.engine_options, **(study.started.options if study.started else {})}
        write_deployment(best, deployment_file(file, out).model_copy(update={**degrees, "engine_options": options}))


def study_data(study: Study) -> dict[str, Any]:
    """A study as one JSON object; ``timing`` alone may differ between two equal searches."""
    return {
        "version": __version__,
        "question": study.question.describe(),
        "feasible": study.winner is not None,
        "best": study.winner.candidate.name if study.winner else None,
        "decision": study.decision,
        "leaders": [row.candidate.name for row in study.leaders],
        "headline": headline(study),
        "front": [record["plan"] for record in study.records if record["front"]],
        "plans": study.records,
        "timing": study.timing,
    }
