"""Groups of nodes as YAML: ``groups`` of a deployment, each with devices of one kind.

device: h100-sxm            # of groups that name none
groups:
  - {name: prefill, nodes: 2}
  - {name: decode, device: h200-sxm, nodes: 4, nics: node, nic_bytes_per_s: 50e9}
trunk: {bytes_per_s: 100e9, latency_s: 5e-6, source: four 200G links}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from apexsim.specs.base import Name, Spec, parse_spec
from apexsim.specs.cluster import DEVICES_PER_NODE, MAX_DEVICES, Cluster, Nics
from apexsim.specs.device import DeviceProfile


class GroupFile(Spec):
    """A group of nodes by names, as ``NodeGroup`` has it; ``device`` is the deployment's where none is given."""

    name: Name | None = None
    device: str | None = None
    devices_per_node: int = Field(DEVICES_PER_NODE, ge=1, le=MAX_DEVICES)
    nodes: int = Field(1, ge=1, le=MAX_DEVICES)
    nics: Nics = "device"
    nic_bytes_per_s: float | None = Field(None, ge=1e6, le=1e16)


def grouped_cluster(
    groups: Sequence[GroupFile], load: Callable[[str | None], DeviceProfile], where: object, **more: Any
) -> Cluster:
    """The cluster of ``groups``, whose devices are looked up by ``load``; ``more`` are other fields of a Cluster."""
    known = [{**group.model_dump(exclude_none=True), "device": load(group.device)} for group in groups]
    return parse_spec(Cluster, {"groups": known, **more}, where)
