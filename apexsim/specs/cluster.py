"""Clusters: devices of one kind in nodes."""

from __future__ import annotations

import re

from pydantic import Field

from apexsim.errors import BadInput
from apexsim.specs.base import Spec
from apexsim.specs.device import DeviceProfile

# Far more than serve one model; a larger number is a slip of the finger, and costs hours.
MAX_DEVICES = 10_000


class Cluster(Spec):
    """``nodes`` x ``devices_per_node`` devices of one kind."""

    device: DeviceProfile
    devices_per_node: int = Field(8, ge=1, le=MAX_DEVICES)
    nodes: int = Field(1, ge=1, le=MAX_DEVICES)

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
