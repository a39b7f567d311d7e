"""apexsim: which deployment of a model serves a workload within its SLO at the least cost, energy or hardware.

The names below are all there is to import from here; each is loaded when it is first asked for, so that
``import apexsim`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Imported here, before anyone else can import the room ``apexsim.search``, the function keeps the name.
from apexsim.planning import search

if TYPE_CHECKING:
    from apexsim.errors import ApexsimError, BadInput, InfeasiblePlan
    from apexsim.io.saved import load
    from apexsim.planning import deployment, workload
    from apexsim.results import SimulationResult
    from apexsim.search.study import Study
    from apexsim.serving.simulator import simulate
    from apexsim.specs.cluster import Cluster
    from apexsim.specs.deployment import Deployment
    from apexsim.specs.device import DeviceProfile
    from apexsim.specs.engine import EngineProfile
    from apexsim.specs.model import ModelSpec
    from apexsim.specs.plan import Plan, Pool
    from apexsim.specs.slo import SLO
    from apexsim.specs.workload import Requests, Workload

__version__ = "0.1.0"

__all__ = [
    "SLO", "ApexsimError", "BadInput", "Cluster", "Deployment", "DeviceProfile", "EngineProfile", "InfeasiblePlan",
    "ModelSpec", "Plan", "Pool", "Requests", "SimulationResult", "Study", "Workload",
    "deployment", "load", "search", "simulate", "workload",
]  # fmt: skip

_MODULES = {
    "apexsim.errors": ("ApexsimError", "BadInput", "InfeasiblePlan"),
    "apexsim.io.saved": ("load",),
    "apexsim.planning": ("deployment", "workload"),
    "apexsim.results": ("SimulationResult",),
    "apexsim.search.study": ("Study",),
    "apexsim.serving.simulator": ("simulate",),
    "apexsim.specs.cluster": ("Cluster",),
    "apexsim.specs.deployment": ("Deployment",),
    "apexsim.specs.plan": ("Plan", "Pool"),
    "apexsim.specs.device": ("DeviceProfile",),
    "apexsim.specs.engine": ("EngineProfile",),
    "apexsim.specs.model": ("ModelSpec",),
    "apexsim.specs.slo": ("SLO",),
    "apexsim.specs.workload": ("Requests", "Workload"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'apexsim' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
