"""One plan on trial: what an objective may do to learn the figure that it ranks by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from apexsim.specs.slo import SLO
from apexsim.specs.supply import Supply
from apexsim.specs.workload import Requests


class Run(Protocol):
    """Simulates the plan: requests in, summary out.

    ``until_lost``: only whether the SLO is kept counts. The run may end where it cannot be any more, and the summary
    need hold no more than ``slo.attainment`` and ``waits_grow``.
    """

    def __call__(self, requests: Requests, *, until_lost: bool = False) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Scouted:
    """What a first look at all plans found; a figure that does not exist is None.

    ``e2e_s``: every plan has a median end-to-end time at low load; the largest of them.
    ``best_per_s``: the highest rate per device, in requests a second, that short probes let pass on any plan.
    ``own_per_s``: the same rate of the plan on trial.
    """

    e2e_s: float | None
    best_per_s: float | None
    own_per_s: float | None = None


@dataclass(frozen=True)
class Trial:
    """A plan of ``devices`` devices in ``replicas`` replicas, and the requests to try it on.

    ``scouted``: what a first look at all plans of the search found; None where the objective asked for none.
    """

    run: Run
    supply: Supply
    slo: SLO
    devices: int
    replicas: int
    scouted: Scouted | None = None
