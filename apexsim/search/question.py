"""What a search is asked, and the name under which a journal keeps each part of the answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from apexsim.search.journal import fingerprint, identity
from apexsim.search.objective import Objective
from apexsim.search.space import Candidate, SearchSpace
from apexsim.serving.named import check_all_due
from apexsim.specs.slo import SLO
from apexsim.specs.supply import Supply
from apexsim.specs.workload import Requests


@dataclass(frozen=True)
class Question:
    """Which candidate of ``space`` serves the requests of ``supply`` best, by ``objective`` under ``slo``?

    An objective that looks for the fewest devices has a space that allows idle ones. Raises ``BadInput`` where the
    objective has no meaning for the requests or the SLO.
    """

    space: SearchSpace
    supply: Supply
    objective: Objective
    slo: SLO = field(default_factory=SLO)
    seed: int = 0

    def __post_init__(self) -> None:
        self.objective.check(self.requests, self.slo)
        check_all_due(self.space.base, self.requests, self.slo)
        if self.objective.any_devices and not self.space.allow_idle:
            object.__setattr__(self, "space", self.space.model_copy(update={"allow_idle": True}))

    @property
    def requests(self) -> Requests:
        """The requests that plans are judged on."""
        return self.supply.requests

    def on(self, count: int) -> Question:
        """The same question on at least ``count`` requests."""
        return replace(self, supply=self.supply.of(count))

    def key(self, candidate: Candidate, **more: Any) -> str:
        """Identity of one judgement: a hash of all that its outcome depends on, ``more`` too."""
        return identity({"question": self.identity, "plan": candidate.name, **more})

    @cached_property
    def identity(self) -> str:
        """Identity of everything but the candidates: idle devices are part of it, which plans are tried is not."""
        base = self.space.base
        return identity(
            {
                "deployment": base.model_dump(mode="json", exclude_defaults=True, exclude={"pools"}),
                "requests": fingerprint(self.requests),
                "law": self._law,
                "objective": self.objective.name,
                "slo": self.slo.model_dump(mode="json", exclude_defaults=True),
                "seed": self.seed,
            }
        )

    @property
    def _law(self) -> dict[str, Any] | None:
        """What further requests are drawn from, by an objective that needs them; None where they are repeated."""
        law = self.supply.law
        if law is None or self.objective.own_rate:
            return None
        numbers = ("prompt_tokens", "output_tokens", "rank_correlation", "arrivals")
        return {**{key: law.model_dump(mode="json")[key] for key in numbers}, "seed": self.supply.seed}

    def describe(self) -> dict[str, Any]:
        """The question as plain data, specs by name.

        ``rate_per_s`` is what was asked for, or what the workload's law says; ``realised_rate_per_s`` that of the rows,
        which differs by chance where they are drawn.
        """
        base = self.space.base
        return {
            "model": base.model.name,
            "devices": f"{base.cluster.devices}x{base.cluster.device.name}",
            "devices_per_node": base.cluster.devices_per_node,
            "allow_idle": self.space.allow_idle,
            "bill": base.bill,
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
            "rate_per_s": self.requests.offered.rate_per_s,
            "realised_rate_per_s": self.requests.rate_per_s,
            "concurrency": self.requests.concurrency,
            "slo": self.slo.model_dump(mode="json"),
            "objective": self.objective.name,
            "seed": self.seed,
            "identity": self.identity,
        }
