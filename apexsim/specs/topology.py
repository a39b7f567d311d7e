"""The links between the devices of a cluster, and which of them a transfer from one device to another crosses.

Every device has a PCIe link to a slot; slots of a node meet at its host. Boards with NVLink meet at a switch of their
node as well. A network card sits at the slot of every device, or at the host for all of a node. Cards of a group meet
in its network, networks of groups in a core. Whatever is not a link here (slot to host, the network itself) carries
all that its links bring. Example: from device 0 to device 8 of 2 x 8 H100 go PCIe, card, card and PCIe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from apexsim.errors import BadInput
from apexsim.specs.cluster import Cluster, NodeGroup
from apexsim.specs.device import DeviceProfile

LinkKind = Literal["nvlink", "pcie", "nic", "trunk"]

# Transfers leave a node only where they must: a card counts as many times what a link inside a node does.
_CARD_WEIGHT = 10


class Link(NamedTuple):
    """A way for bytes in one direction, shared by all transfers that cross it at once.

    ``name`` is its own in a cluster, such as ``nic 3 out``. ``source`` says where its figures are from.
    """

    name: str
    kind: LinkKind
    bytes_per_s: float
    latency_s: float
    source: str


class Topology:
    """The links of a cluster as a graph, ``graph``: a networkx DiGraph whose edges may carry a ``link``.

    Devices are its vertices 0 to ``devices`` - 1, numbered as ``place_pools`` does; all others are named by text.
    """

    def __init__(self, cluster: Cluster) -> None:
        import networkx as nx

        self.cluster = cluster
        self.graph = nx.DiGraph()
        self._paths: dict[tuple[int, int], tuple[Link, ...]] = {}
        for group in cluster.groups:
            self._add_nodes(group)
            self._add_trunk(group)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What is taken for granted of the links, for people to read."""
        return ("links run at the rates of datasheets", *self._assumed())

    def path(self, start: int, end: int) -> tuple[Link, ...]:
        """The shared links that bytes from device ``start`` to device ``end`` cross, in their order; none to itself.

        Raises BadInput for a device that is not there, and for groups whose network cards are not known.
        """
        if (start, end) not in self._paths:
            self._paths[start, end] = self._found(start, end)
        return self._paths[start, end]

    def _found(self, start: int, end: int) -> tuple[Link, ...]:
        import networkx as nx

        for device in (start, end):
            if device not in self.graph:
                raise BadInput(f"the cluster has devices 0 to {self.cluster.devices - 1}", where="device", got=device)
        try:
            vertices = nx.shortest_path(self.graph, start, end, weight="weight")
        except nx.NetworkXNoPath:
            blind = ", ".join(group.name for group in self.cluster.groups if not _has_cards(group))
            would_do = "the datasheet has no rate of its network cards: give nic_bytes_per_s"
            raise BadInput(would_do, where=f"node group {blind}") from None
        links = (self.graph.edges[edge]["link"] for edge in nx.utils.pairwise(vertices))
        return tuple(link for link in links if link is not None)

    def _add_nodes(self, group: NodeGroup) -> None:
        first, cards = self.cluster.first_device(group), _has_cards(group)
        for device in range(first, first + group.devices):
            node = f"{group.name}/{(device - first) // group.devices_per_node}"
            self._join(device, f"slot {device}", _pcie(group, f"{device}"))
            self._join(f"slot {device}", f"host {node}")
            if _has_nvlink(group.device):
                self._join(device, f"switch {group.name if _one_nvlink(group) else node}", _nvlink(group, f"{device}"))
            if cards and group.nics == "device":
                self._join(f"slot {device}", f"network {group.name}", _card(group, f"{device}"))
        for node in (f"{group.name}/{number}" for number in range(group.nodes)):
            if cards and group.nics == "node":
                self._join(f"host {node}", f"network {group.name}", _card(group, node))

    def _add_trunk(self, group: NodeGroup) -> None:
        """Join the network of a group to those of the others."""
        trunk, network = self.cluster.trunk, f"network {group.name}"
        if len(self.cluster.groups) > 1 and network in self.graph:
            link = Link(group.name, "trunk", trunk.bytes_per_s, trunk.latency_s, trunk.source) if trunk else None
            self._join(network, "core", link)

    def _join(self, inner: object, outer: object, link: Link | None = None) -> None:
        """Join two vertices in both directions, each with a link of its own where there is one."""
        weight = _CARD_WEIGHT if link and link.kind == "nic" else 1
        for start, end, way in ((inner, outer, "out"), (outer, inner, "in")):
            named = link._replace(name=f"{link.kind} {link.name} {way}") if link else None
            self.graph.add_edge(start, end, link=named, weight=weight)

    def _assumed(self) -> Iterator[str]:
        for group in self.cluster.groups:
            if None in _hand_overs_s(group.device):
                yield f"latency of links of {group.name} is not known: none is charged"
            if group.nodes > 1 and _one_nvlink(group):
                yield f"one NVLink joins the {group.nodes} nodes of {group.name}"
            elif self.cluster.devices > group.devices_per_node and _has_cards(group):
                yield f"every {group.nics} of {group.name} has a network card, and the network carries what all send"
        if len(self.cluster.groups) > 1 and self.cluster.trunk is None:
            yield "networks of node groups are joined without a bottleneck"


def _nvlink(group: NodeGroup, name: str) -> Link:
    near, _ = _hand_overs_s(group.device)
    return Link(name, "nvlink", group.device.datasheet.intra_node_bytes_per_s, (near or 0.0) / 2, _source(group))


def _pcie(group: NodeGroup, name: str) -> Link:
    """PCIe to a device's slot. Beside NVLink its latency is part of the network card's, which was measured with it."""
    near = None if _has_nvlink(group.device) else _hand_overs_s(group.device)[0]
    return Link(name, "pcie", group.device.datasheet.pcie_bytes_per_s, (near or 0.0) / 2, _source(group))


def _card(group: NodeGroup, name: str) -> Link:
    """A network card: half of what the smallest hand-over between nodes takes, less the PCIe before it."""
    rate, (_, far) = group.device.datasheet.inter_node_bytes_per_s, _hand_overs_s(group.device)
    latency_s = 0.0 if _one_nvlink(group) else max(0.0, (far or 0.0) / 2 - _pcie(group, name).latency_s)
    given = group.nic_bytes_per_s is not None
    source = f"nic_bytes_per_s of the node group; {_source(group)}" if given else _source(group)
    return Link(name, "nic", group.nic_bytes_per_s or rate, latency_s, source)


def _source(group: NodeGroup) -> str:
    """Where the figures of a group's links are from."""
    device = group.device
    tables = [
        f"{kind} {found.source} ({found.evidence})"
        for kind in ("send_recv", "send_recv_across_nodes")
        if (found := device.operators.get(kind, {}).get("p2p"))
    ]
    latency = f"; latency from the smallest of {' and '.join(tables)}" if tables else ""
    return f"{device.name} datasheet ({device.datasheet.source}){latency}"


def _hand_overs_s(device: DeviceProfile) -> tuple[float | None, float | None]:
    """Seconds of the smallest hand-over measured between devices of a node, and of two nodes; None where none was."""
    tables = [device.operators.get(kind, {}).get("p2p") for kind in ("send_recv", "send_recv_across_nodes")]
    near, far = (table.points.seconds[0] if table and table.points else None for table in tables)
    return near, far


def _has_nvlink(device: DeviceProfile) -> bool:
    """Whether devices of a node reach each other faster than over PCIe."""
    return device.datasheet.intra_node_bytes_per_s > device.datasheet.pcie_bytes_per_s


def _one_nvlink(group: NodeGroup) -> bool:
    """Whether NVLink joins the nodes too: trays of GB200 are as fast between each other as inside."""
    sheet = group.device.datasheet
    return _has_nvlink(group.device) and sheet.inter_node_bytes_per_s >= sheet.intra_node_bytes_per_s


def _has_cards(group: NodeGroup) -> bool:
    """Whether the rate of a group's network cards is known: of one NVLink, datasheets give that between trays."""
    return group.nic_bytes_per_s is not None or not _one_nvlink(group)
