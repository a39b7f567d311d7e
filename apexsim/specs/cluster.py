"""Clusters: groups of nodes with devices of one kind, and how many devices a text asks for."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from apexsim.errors import BadInput, nearest
from apexsim.specs.base import Name, Spec
from apexsim.specs.device import DeviceProfile

# Far more than serve one model; a larger number is a slip of the finger, and costs hours.
MAX_DEVICES = 10_000
# Devices of a node where nothing says otherwise: those of an HGX or DGX board.
DEVICES_PER_NODE = 8

Nics = Literal["device", "node"]


class Overhead(Spec):
    """What a server and its building draw beyond the devices: ``per_device`` x their watts (power supplies, fans)
    + ``slot_w`` a device slot (processors, memory, network), and ``pue`` times all of that for the building.
    """

    per_device: float = Field(1.10, ge=1)
    slot_w: float = Field(200.0, ge=0)
    pue: float = Field(1.2, ge=1)
    source: str = (
        "8 devices at 700 W make 7.76 kW; an 8 x H100 node draws 7.75 kW in training (arXiv 2506.14551), 8.4 kW at "
        "most (arXiv 2412.08602); PUE between 1.09 (Google) and an average of 1.4 to 1.6"
    )

    def server_j(self, devices_j: float, device_s: float) -> float:
        """Joules of the servers: those of their devices, and ``device_s`` seconds of all device slots."""
        return self.per_device * devices_j + self.slot_w * device_s


class NodeGroup(Spec):
    """``nodes`` x ``devices_per_node`` devices of one kind, on one network.

    ``name`` is the device's where none is given. ``nics`` says who has a network card: every device, or every node one
    for all its devices. ``nic_bytes_per_s`` is a card's rate one way, ``inter_node_bytes_per_s`` of the datasheet
    where it is None.
    """

    name: Name
    device: DeviceProfile
    devices_per_node: int = Field(DEVICES_PER_NODE, ge=1, le=MAX_DEVICES)
    nodes: int = Field(1, ge=1, le=MAX_DEVICES)
    nics: Nics = "device"
    nic_bytes_per_s: float | None = Field(None, ge=1e6, le=1e16)

    @model_validator(mode="before")
    @classmethod
    def _called_by_its_device(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "name" in data:
            return data
        device = data.get("device")
        name = device.get("name") if isinstance(device, dict) else getattr(device, "name", None)
        return data if name is None else {"name": name, **data}

    @property
    def devices(self) -> int:
        return self.devices_per_node * self.nodes


class Trunk(Spec):
    """What joins the network of every node group to those of the others: a link each, one way out and one in."""

    bytes_per_s: float = Field(ge=1e6, le=1e16)
    latency_s: float = Field(ge=0, le=1)
    source: str


class Cluster(Spec):
    """One or more node groups. Devices are numbered through: group by group, in a group node by node.

    A cluster of one group is written, and read, with the fields of that group as its own. ``trunk`` None takes the
    networks of the groups to be joined without a bottleneck.
    """

    groups: tuple[NodeGroup, ...] = Field(min_length=1)
    overhead: Overhead = Overhead()
    trunk: Trunk | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_group_flat(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        flat = {key: value for key, value in data.items() if key in NodeGroup.model_fields}
        if flat and "groups" in data:
            raise ValueError(f"give either groups, or {', '.join(flat)} of the only one")
        rest = {key: value for key, value in data.items() if key not in flat}
        return {"groups": (flat,), **rest} if flat else data

    @model_validator(mode="after")
    def _names_differ(self) -> Cluster:
        names = [group.name for group in self.groups]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"node groups have names of their own; several are called {', '.join(twice)}")
        if self.devices > MAX_DEVICES and len(names) > 1:
            raise ValueError(f"the node groups have {self.devices} devices; give at most {MAX_DEVICES}")
        return self

    @model_serializer(mode="wrap")
    def _as_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if len(self.groups) > 1 or "groups" not in data:
            return data
        (group,) = data.pop("groups")
        if self.groups[0].name == self.groups[0].device.name:
            group.pop("name", None)
        return {**group, **data}

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)

    @property
    def device(self) -> DeviceProfile:
        """The device of a cluster of one group; ``BadInput`` where there are several."""
        return self.group().device

    @property
    def devices_per_node(self) -> int:
        """Devices a node of a cluster of one group; ``BadInput`` where there are several."""
        return self.group().devices_per_node

    @property
    def nodes(self) -> int:
        """Nodes of a cluster of one group; ``BadInput`` where there are several."""
        return self.group().nodes

    def group(self, name: str | None = None) -> NodeGroup:
        """The node group called ``name``, or the only one for None; ``BadInput`` says which there are."""
        names = [group.name for group in self.groups]
        if name is None and len(names) > 1:
            raise BadInput(f"the cluster has several node groups: name one of {', '.join(names)}")
        if name is not None and name not in names:
            raise BadInput(f"no such node group; {nearest(name, names)}", got=name)
        return self.groups[0 if name is None else names.index(name)]

    def first_device(self, group: NodeGroup) -> int:
        """The number of the first device of ``group``."""
        return sum(each.devices for each in self.groups[: self.groups.index(group)])

    def regrouped(self, **fields: Any) -> Cluster:
        """The cluster with ``fields`` of its only group replaced; ``BadInput`` where there are several groups."""
        group = self.group()
        if "device" in fields and group.name == group.device.name:
            fields = {"name": fields["device"].name, **fields}
        return self.model_copy(update={"groups": (group.model_copy(update=fields),)})


def parse_devices(text: str, where: object = "--devices") -> tuple[int, str]:
    """Read ``8xh100-sxm`` as (8, "h100-sxm")."""
    match = re.fullmatch(r"0*([0-9]+)x(\S+)", text.strip())
    if not match or match[1] == "0":
        raise BadInput("give a count of at least 1 and a device, as in 8xh100-sxm", where=where, got=text)
    if len(match[1]) > 9 or int(match[1]) > MAX_DEVICES:
        raise BadInput(f"give at most {MAX_DEVICES} devices", where=where, got=text)
    return int(match[1]), match[2]
