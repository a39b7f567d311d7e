"""Which deployments there are to choose from: every way to lay a model out on the devices given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import model_validator

from apexsim.costs.steps import unknown_collectives
from apexsim.errors import InfeasiblePlan, Unsupported
from apexsim.specs.base import Spec
from apexsim.specs.deployment import Deployment
from apexsim.specs.plan import Plan, Pool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and its number of replicas. ``reasons`` say why it cannot be laid out or priced; empty when it can."""

    plan: Plan
    replicas: int
    reasons: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """Devices that work."""
        return self.plan.devices * self.replicas

    @property
    def name(self) -> str:
        """Short name such as ``tp4-pp1-dp2``; dp is the number of replicas."""
        return f"{self.plan.name}-dp{self.replicas}"


class SearchSpace(Spec):
    """All candidates on the cluster of ``base``, whose pool is replaced and whose every other choice is kept.

    A candidate uses all devices of the cluster; with ``allow_idle`` any number of them from one up.
    """

    base: Deployment
    allow_idle: bool = False

    @model_validator(mode="after")
    def _base_is_colocated(self) -> SearchSpace:
        self.base.check_colocated()
        return self

    def candidates(self) -> tuple[Candidate, ...]:
        """Every tensor x pipeline x replicas that gives the number of devices; of a model with experts every tensor x
        attention_data x pipeline x replicas, times every expert degree that divides the devices of a stage. The
        unlawful ones stay in, with their reasons."""
        devices = self.base.cluster.devices
        counts = range(1, devices + 1) if self.allow_idle else (devices,)
        return tuple(self._candidate(plan, replicas) for count in counts for plan, replicas in self._layouts(count))

    def deployment(self, candidate: Candidate) -> Deployment:
        """The base deployment laid out as the candidate says."""
        pool = Pool(plan=candidate.plan, replicas=candidate.replicas)
        return self.base.model_copy(update={"pools": (pool,)})

    def _layouts(self, devices: int) -> Iterator[tuple[Plan, int]]:
        experts = self.base.model.moe is not None
        for tensor in divisors(devices):
            for ranks in divisors(devices // tensor) if experts else (1,):
                stage = tensor * ranks
                for pipeline in divisors(devices // stage):
                    for expert in divisors(stage) if experts else (1,):
                        plan = Plan(tensor=tensor, attention_data=ranks, pipeline=pipeline, expert=expert)
                        yield plan, devices // plan.devices

    def _candidate(self, plan: Plan, replicas: int) -> Candidate:
        candidate = Candidate(plan, replicas, plan.lawful(self.base.model, self.base.cluster.group()))
        return candidate if candidate.reasons else replace(candidate, reasons=self._unknown(candidate))

    def _unknown(self, candidate: Candidate) -> tuple[str, ...]:
        """What a lawful plan needs and the device has no cost for: groups of devices that nobody timed."""
        try:
            return tuple(
                what for server in self.deployment(candidate).servers() for what in unknown_collectives(server)
            )
        except InfeasiblePlan as error:
            return error.reasons
        except Unsupported as error:
            return (str(error),)


def divisors(number: int) -> tuple[int, ...]:
    """Divisors of a positive number, ascending."""
    return tuple(divisor for divisor in range(1, number + 1) if number % divisor == 0)
