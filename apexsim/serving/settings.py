"""What every replica of a pool shares."""

from __future__ import annotations

from dataclasses import dataclass

from apexsim.costs.timing import StepTimes
from apexsim.serving.policies import BatchPolicy
from apexsim.specs.engine import SchedulerDefaults


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How replicas decide and how long their steps take. ``windows`` are the model's attention windows, ascending.

    ``exact_steps``: every step is an event of its own, whatever the policy promises.
    """

    cost: StepTimes
    scheduler: SchedulerDefaults
    policy: BatchPolicy
    windows: tuple[int, ...]
    exact_steps: bool

    @property
    def lookahead(self) -> int:
        """Sampled tokens in flight with which a job is scheduled again; a pipeline hides the host by itself."""
        return self.scheduler.lookahead_steps if self.cost.stages == 1 else 0

    @property
    def receive_interval(self) -> int:
        """Steps from one look at who has come to the next."""
        return self.scheduler.receive_interval if self.cost.stages == 1 else 1
