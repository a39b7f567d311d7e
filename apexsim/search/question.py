"""What a search is asked, and the name under which a journal keeps each part of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from apexsim.search.journal import fingerprint, identity
from apexsim.search.objective import Objective
from apexsim.search.space import Candidate, SearchSpace
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests


@dataclass(frozen=True)
class Question:
    """Which candidate of ``space`` serves ``requests`` best, by ``objective`` under ``slo``?

    Raises ``BadInput`` where the objective has no meaning for the requests or the SLO.
    """

    space: SearchSpace
    requests: Requests
    objective: Objective
    slo: SLO = field(default_factory=SLO)
    seed: int = 0

    def __post_init__(self) -> None:
        self.objective.check(self.requests, self.slo)

    def key(self, candidate: Candidate) -> str:
        """Identity of one judgement: a hash of all that its outcome depends on."""
        return identity({"question": self.identity, "plan": candidate.name})

    @cached_property
    def identity(self) -> str:
        """Identity of everything but the candidates: idle devices are part of it, which plans are tried is not."""
        base = self.space.base
        return identity(
            {
                "deployment": base.model_dump(mode="json", exclude_defaults=True, exclude={"pools"}),
                "requests": fingerprint(self.requests),
                "objective": self.objective.name,
                "slo": self.slo.model_dump(mode="json", exclude_defaults=True),
                "seed": self.seed,
            }
        )

    def describe(self) -> dict[str, Any]:
        """The question as plain data, specs by name."""
        base = self.space.base
        return {
            "model": base.model.name,
            "devices": f"{base.cluster.devices}x{base.cluster.device.name}",
            "devices_per_node": base.cluster.devices_per_node,
            "allow_idle": self.space.allow_idle,
            "engine": base.engine.name,
            "router": base.router,
            "weights": base.weights,
            "moe_weights": base.expert_dtype if base.model.moe else None,
            "kv_cache": base.kv_cache,
            "sampling": base.sampling,
            "prompts": base.prompts,
            "workload": self.requests.name,
            "workload_notes": list(self.requests.notes),
            "requests": len(self.requests),
            "rate_per_s": self.requests.rate_per_s,
            "concurrency": self.requests.concurrency,
            "slo": self.slo.model_dump(mode="json"),
            "objective": self.objective.name,
            "seed": self.seed,
            "identity": self.identity,
        }
