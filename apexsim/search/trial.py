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
class Trial:
    """A plan of ``devices`` devices in ``replicas`` replicas, and the requests to try it on.

    ``low_load_e2e_s``: of the medians of the end-to-end time that the plans of a search have at low load, the largest;
    None where the objective did not ask for them.
    """

    run: Run
    supply: Supply
    slo: SLO
    devices: int
    replicas: int
    low_load_e2e_s: float | None = None
