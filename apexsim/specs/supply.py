"""Where requests come from, for whoever needs more of them than were asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from apexsim.specs.workload import Requests, Workload


@dataclass(frozen=True, eq=False, kw_only=True)
class Supply:
    """Requests as they were asked for, and more of the same.

    ``law`` drew them, from ``seed``; None where they are recorded. ``fixed``: their number was asked for, so that a
    plan is judged on no more of them than that.
    """

    requests: Requests
    law: Workload | None = None
    seed: int = 0
    fixed: bool = True

    @property
    def grows(self) -> bool:
        """Whether plans may be judged on more requests than there are now."""
        return self.law is not None and not self.fixed

    def at_least(self, count: int) -> Requests:
        """``count`` requests, or all there are if those are more: others drawn, or the recorded ones repeated whole."""
        if count <= len(self.requests):
            return self.requests
        if self.law is None:
            return self.requests.repeated(count)
        return replace(self.law.sample(count, seed=self.seed), notes=self.requests.notes)

    def of(self, count: int) -> Supply:
        """The same supply with at least ``count`` requests to judge plans on."""
        return replace(self, requests=self.at_least(count))
