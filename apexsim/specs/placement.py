"""Where the ranks of a pool lie: which of their groups stay inside a node and which cross the network.

Devices are numbered node by node, ranks one after another: tensor ranks innermost, then attention-data ranks, pipeline
stages, replicas. Tensor degree 4 and pipeline degree 4 on nodes of 8 put two stages on each node.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from apexsim.specs.plan import Plan, Pool


class Spans(NamedTuple):
    """The nodes that groups of one replica's ranks lie on, those of the most scattered group.

    ``tensor``: ranks that share the weights of attention. ``attention_data``: ranks of one tensor position that gather
    tokens. ``stage``: all ranks of a stage, which exchange tokens of experts. ``hand_overs``: for every boundary
    between pipeline stages, whether a rank and its successor lie on different nodes.
    """

    tensor: int
    attention_data: int
    stage: int
    hand_overs: tuple[bool, ...]

    @property
    def scatter(self) -> tuple[int, int, int, int]:
        """The larger, the more of a replica's traffic crosses nodes."""
        return self.tensor, self.attention_data, self.stage, sum(self.hand_overs)


def spans(plan: Plan, devices_per_node: int, *, first: int = 0, whole: bool = True) -> Spans:
    """Spans of a replica whose first free device has the number ``first``; see ``place`` for ``whole``."""
    nodes = place(plan, devices_per_node, first=first, whole=whole) // devices_per_node
    return Spans(
        tensor=_most(nodes.reshape(-1, plan.tensor)),
        attention_data=_most(nodes.transpose(0, 2, 1).reshape(-1, plan.attention_data)),
        stage=_most(nodes.reshape(plan.pipeline, -1)),
        hand_overs=tuple(bool(crosses) for crosses in (nodes[1:] != nodes[:-1]).any(axis=(1, 2))),
    )


@lru_cache(maxsize=4096)
def pool_spans(pool: Pool, devices_per_node: int, nodes: int) -> Spans:
    """Spans of the worst-placed replica of a pool, by which all of them are charged; there are devices for the pool.

    Groups are kept whole where the cluster has the nodes for it; else ranks follow each other without a gap. Example:
    five replicas of tensor degree 3 do not fit whole on two nodes of 8, so the third lies on both.
    """
    devices = nodes * devices_per_node
    found = _replicas(pool, devices_per_node, devices, whole=True)
    found = found or _replicas(pool, devices_per_node, devices, whole=False)
    return max(found, key=lambda each: each.scatter)


def place(plan: Plan, devices_per_node: int, *, first: int = 0, whole: bool = True) -> npt.NDArray[np.int64]:
    """Device numbers by pipeline stage, attention-data rank and tensor rank, from the device ``first`` on.

    ``whole``: a tensor group, stage or replica that the rest of a node has no room for begins at the next node.
    """
    at, numbers = first, []
    for stage in range(plan.pipeline):
        for group in range(plan.attention_data):
            begins = [plan.devices] * (stage == group == 0) + [plan.stage_devices] * (group == 0) + [plan.tensor]
            for size in begins if whole else ():
                at = _begin(at, size, devices_per_node)
            numbers.append(np.arange(at, at + plan.tensor))
            at += plan.tensor
    return np.array(numbers).reshape(plan.pipeline, plan.attention_data, plan.tensor)


def _replicas(pool: Pool, per_node: int, devices: int, *, whole: bool) -> list[Spans]:
    """Spans of every way in which the pool's replicas lie; none where there are too few ``devices`` for it."""
    at = 0
    ends: dict[int, int] = {}
    found = []
    for _ in range(pool.replicas):
        node, offset = divmod(at, per_node)
        if offset not in ends:
            ends[offset] = int(place(pool.plan, per_node, first=offset, whole=whole).max()) + 1
            found.append(spans(pool.plan, per_node, first=offset, whole=whole))
        at = node * per_node + ends[offset]
        if at > devices:
            return []
    return found


def _begin(at: int, size: int, devices_per_node: int) -> int:
    """The device at which a group of ``size`` begins: ``at``, or the next node's first where it has no room."""
    room = -at % devices_per_node
    return at + room if size > room else at


def _most(groups: npt.NDArray[np.int64]) -> int:
    """Most nodes that a row of ``groups`` names."""
    ordered = np.sort(groups, axis=1)
    return int(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1).max(initial=0))
