"""Where the ranks of pools lie: on which devices, and which of their groups stay in a node or cross the network.

Devices are numbered node by node, ranks one after another: tensor ranks innermost, then attention-data ranks, pipeline
stages, replicas, pools. Tensor degree 4 and pipeline degree 4 on nodes of 8 put two stages on each node.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from apexsim.errors import InfeasiblePlan
from apexsim.specs.cluster import Cluster
from apexsim.specs.plan import Plan, Pool

Devices: TypeAlias = npt.NDArray[np.int64]


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


class Placement(NamedTuple):
    """Where the replicas of a pool lie.

    ``devices``: numbers of the cluster's devices, by replica, pipeline stage, attention-data rank and tensor rank.
    ``spans``: those of the worst-placed replica, by which all of them are charged.
    """

    devices: Devices
    spans: Spans


def place_pools(cluster: Cluster, pools: Sequence[Pool]) -> dict[str, Placement]:
    """Where the replicas of all ``pools`` lie, by the name of the pool; on a group of nodes in the order of ``pools``.

    Tensor groups, stages and replicas are kept whole where the group has the nodes for it; else ranks follow each other
    without a gap. Example: five replicas of tensor degree 3 do not fit whole on two nodes of 8, so the third lies on
    both. Raises BadInput for a group that is not there, InfeasiblePlan where a group has too few devices.
    """
    found = {}
    for group in cluster.groups:
        here = [pool for pool in pools if cluster.group(pool.device) is group]
        used = sum(pool.devices for pool in here)
        if used > group.devices:
            whose = f"the replicas of {' and '.join(pool.name for pool in here)} use {used} devices"
            raise InfeasiblePlan([f"{whose}, {group.name} has {group.devices}"])
        wanted, first = tuple((pool.plan, pool.replicas) for pool in here), cluster.first_device(group)
        for pool, laid in zip(here, _laid(wanted, group.devices_per_node, group.nodes), strict=True):
            found[pool.name] = laid._replace(devices=laid.devices + first)
    return {pool.name: found[pool.name] for pool in pools}


def place(plan: Plan, devices_per_node: int, *, first: int = 0, whole: bool = True) -> Devices:
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


@lru_cache(maxsize=256)
def _laid(wanted: tuple[tuple[Plan, int], ...], per_node: int, nodes: int) -> tuple[Placement, ...]:
    """Placements of (plan, replicas) one after another on ``nodes`` that have the devices for them."""
    for whole in (True, False):
        at, laid = 0, []
        for plan, replicas in wanted:
            laid.append(_replicas(plan, replicas, per_node, first=at, whole=whole))
            at = int(laid[-1].devices[-1].max()) + 1
        if at <= nodes * per_node:
            break
    return tuple(laid)


def _replicas(plan: Plan, replicas: int, per_node: int, *, first: int, whole: bool) -> Placement:
    """Replicas from the device ``first`` on. Those that begin at the same place of a node lie alike on their nodes."""
    at, numbers = first, []
    seen: dict[int, tuple[Devices, int, Spans]] = {}
    for _ in range(replicas):
        node, offset = divmod(at, per_node)
        if offset not in seen:
            lies = place(plan, per_node, first=offset, whole=whole)
            seen[offset] = lies, int(lies.max()) + 1, spans(plan, per_node, first=offset, whole=whole)
        lies, end, _ = seen[offset]
        numbers.append(lies + node * per_node)
        at = node * per_node + end
    worst = max((found for _, _, found in seen.values()), key=lambda each: each.scatter)
    return Placement(np.array(numbers), worst)


def _begin(at: int, size: int, devices_per_node: int) -> int:
    """The device at which a group of ``size`` begins: ``at``, or the next node's first where it has no room."""
    room = -at % devices_per_node
    return at + room if size > room else at


def _most(groups: Devices) -> int:
    """Most nodes that a row of ``groups`` names."""
    ordered = np.sort(groups, axis=1)
    return int(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1).max(initial=0))
