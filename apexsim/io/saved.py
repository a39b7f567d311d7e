"""``apexsim.load``: whatever was saved, by its path."""

from __future__ import annotations

from pathlib import Path

from apexsim.errors import BadInput
from apexsim.io.deployments import load_deployment
from apexsim.results import SimulationResult
from apexsim.specs.deployment import Deployment


def load(path: Path | str, *, allow_plugins: bool = False) -> Deployment | SimulationResult:
    """A deployment from its YAML file, or a result from the folder that ``SimulationResult.save`` wrote.

    Code that a deployment's file names (``module:Name``) is imported only if ``allow_plugins``; that of a result never
    is. Raises ``BadInput`` naming the path for anything else.
    """
    source = Path(path)
    if source.is_dir():
        return SimulationResult.load(source)
    if source.suffix in (".yaml", ".yml"):
        return load_deployment(source, allow_plugins=allow_plugins)
    raise BadInput("give a deployment YAML or the folder of a saved result", where=source)
