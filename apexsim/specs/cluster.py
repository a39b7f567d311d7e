"""Clusters: devices of one kind in nodes, and the links between them."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from apexsim.errors import BadInput
from apexsim.specs.base import Spec
from apexsim.specs.device import DeviceProfile


class Cluster(Spec):
    """``nodes`` x ``devices_per_node`` devices of one kind."""

    device: DeviceProfile
    devices_per_node: int = Field(8, ge=1)
    nodes: int = Field(1, ge=1)

    @property
    def devices(self) -> int:
        return self.devices_per_node * self.nodes

    def topology(self) -> Any:
        """networkx graph: devices joined to their node's switch, switches to a fabric; edges carry bytes/s one way."""
        import networkx as nx

        graph = nx.Graph()
        for node in range(self.nodes):
            switch = f"node{node}"
            for slot in range(self.devices_per_node):
                graph.add_edge(switch, f"{switch}/gpu{slot}", bytes_per_s=self.device.datasheet.intra_node_bytes_per_s)
            if node:
                graph.add_edge("fabric", switch, bytes_per_s=self.device.datasheet.inter_node_bytes_per_s)
        if self.nodes > 1:
            graph.add_edge("fabric", "node0", bytes_per_s=self.device.datasheet.inter_node_bytes_per_s)
        return graph


def parse_devices(text: str, where: object = "--devices") -> tuple[int, str]:
    """Read ``8xh100-sxm`` as (8, "h100-sxm")."""
    match = re.fullmatch(r"(\d+)x([\w.-]+)", text.strip())
    if not match or int(match[1]) < 1:
        raise BadInput("give a count of at least 1 and a device, as in 8xh100-sxm", where=where, got=text)
    return int(match[1]), match[2]
