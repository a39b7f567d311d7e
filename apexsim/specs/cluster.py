"""Clusters: devices of one kind in nodes."""

from __future__ import annotations

import re

from pydantic import Field

from apexsim.errors import BadInput
from apexsim.specs.base import Spec
from apexsim.specs.device import DeviceProfile

# Far more than serve one model; a larger number is a slip of the finger, and costs hours.
MAX_DEVICES = 10_000
# Devices of a node where nothing says otherwise: those of an HGX or DGX board.
DEVICES_PER_NODE = 8


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


class Cluster(Spec):
    """``nodes`` x ``devices_per_node`` devices of one kind."""

    device: DeviceProfile
    devices_per_node: int = Field(DEVICES_PER_NODE, ge=1, le=MAX_DEVICES)
    nodes: int = Field(1, ge=1, le=MAX_DEVICES)
    overhead: Overhead = Overhead()

    @property
    def devices(self) -> int:
        return self.devices_per_node * self.nodes


def parse_devices(text: str, where: object = "--devices") -> tuple[int, str]:
    """Read ``8xh100-sxm`` as (8, "h100-sxm")."""
    match = re.fullmatch(r"0*([0-9]+)x(\S+)", text.strip())
    if not match or match[1] == "0":
        raise BadInput("give a count of at least 1 and a device, as in 8xh100-sxm", where=where, got=text)
    if len(match[1]) > 9 or int(match[1]) > MAX_DEVICES:
        raise BadInput(f"give at most {MAX_DEVICES} devices", where=where, got=text)
    return int(match[1]), match[2]
