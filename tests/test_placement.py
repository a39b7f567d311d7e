"""Where replicas of pools lie: no device twice, groups whole where they fit, spans as counted device by device."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.errors import BadInput, InfeasiblePlan
from apexsim.specs.cluster import Cluster, NodeGroup
from apexsim.specs.placement import Placement, place_pools
from apexsim.specs.plan import Plan, Pool

PLANS = st.builds(
    Plan, tensor=st.sampled_from([1, 2, 3, 4, 8, 16]), attention_data=st.integers(1, 4), pipeline=st.integers(1, 4)
)


@cache
def groups(*sizes: tuple[int, int]) -> Cluster:
    """A cluster of groups a, b, ... of (nodes, devices a node)."""
    device = catalog.load("device", "h100-sxm")
    return Cluster(
        groups=tuple(
            NodeGroup(name="abcdef"[at], device=device, nodes=nodes, devices_per_node=per_node)
            for at, (nodes, per_node) in enumerate(sizes)
        )
    )


# -- the reference: one device after another, in plain lists -------------------------------------------------------


def replicas_by_hand(plan: Plan, replicas: int, per_node: int, *, whole: bool) -> list[list[list[list[int]]]]:
    """Device numbers of replicas, stages, attention-data ranks and tensor ranks."""
    at, found = 0, []

    def begin(size: int) -> None:
        nonlocal at
        left = (per_node - at % per_node) % per_node
        if whole and size > left:
            at += left

    for _ in range(replicas):
        begin(plan.devices)
        replica = []
        for _ in range(plan.pipeline):
            begin(plan.stage_devices)
            stage = []
            for _ in range(plan.attention_data):
                begin(plan.tensor)
                stage.append(list(range(at, at + plan.tensor)))
                at += plan.tensor
            replica.append(stage)
        found.append(replica)
    return found


def spans_by_hand(plan: Plan, replicas: int, per_node: int, nodes: int) -> tuple[Any, ...]:
    """Nodes of the worst replica's tensor groups, attention-data groups and stages; hand-overs that cross nodes."""
    found = replicas_by_hand(plan, replicas, per_node, whole=True)
    if found[-1][-1][-1][-1] >= nodes * per_node:
        found = replicas_by_hand(plan, replicas, per_node, whole=False)

    def flat(stage: list[list[int]]) -> list[int]:
        return [device for ranks in stage for device in ranks]

    def over(devices: list[int]) -> int:
        return len({device // per_node for device in devices})

    each = []
    for replica in found:
        tensor = max(over(ranks) for stage in replica for ranks in stage)
        data = max(over([ranks[t] for ranks in stage]) for stage in replica for t in range(plan.tensor))
        stages = max(over(flat(stage)) for stage in replica)
        crosses = tuple(
            any(a // per_node != b // per_node for a, b in zip(flat(one), flat(next_one), strict=True))
            for one, next_one in pairwise(replica)
        )
        each.append((tensor, data, stages, crosses))
    return max(each, key=lambda spans: (*spans[:3], sum(spans[3])))


@given(plan=PLANS, replicas=st.integers(1, 9), per_node=st.integers(1, 12), spare=st.integers(0, 5))
def test_spans_are_those_counted_device_by_device(plan: Plan, replicas: int, per_node: int, spare: int) -> None:
    pool = Pool(plan=plan, replicas=replicas)
    nodes = -(-pool.devices // per_node) + spare
    found = place_pools(groups((nodes, per_node)), [pool])["serve"].spans
    assert tuple(found) == spans_by_hand(plan, replicas, per_node, nodes)


# -- n pools -------------------------------------------------------------------------------------------------------


@st.composite
def laid(draw: st.DrawFn) -> tuple[Cluster, list[Pool], dict[str, Placement]]:
    """One to four pools on one or two groups that have the devices for them."""
    pools = [
        Pool(name=f"pool-{at}", plan=draw(PLANS), replicas=draw(st.integers(1, 4)), device=draw(st.sampled_from("ab")))
        for at in range(draw(st.integers(1, 4)))
    ]
    per_node = draw(st.integers(1, 10))
    used = [sum(pool.devices for pool in pools if pool.device == name) for name in "ab"]
    cluster = groups(*((max(1, -(-each // per_node)) + draw(st.integers(0, 4)), per_node) for each in used))
    return cluster, pools, place_pools(cluster, pools)


@given(laid())
def test_every_device_is_one_rank_of_one_replica_in_its_group(
    case: tuple[Cluster, list[Pool], dict[str, Placement]],
) -> None:
    cluster, pools, found = case
    assert list(found) == [pool.name for pool in pools]
    numbers = np.concatenate([found[pool.name].devices.ravel() for pool in pools])
    assert len(set(numbers.tolist())) == len(numbers)
    for pool in pools:
        plan, group = pool.plan, cluster.group(pool.device)
        devices = found[pool.name].devices
        assert devices.shape == (pool.replicas, plan.pipeline, plan.attention_data, plan.tensor)
        first = cluster.first_device(group)
        assert first <= devices.min() <= devices.max() < first + group.devices


@given(laid())
def test_groups_lie_whole_where_the_nodes_allow(case: tuple[Cluster, list[Pool], dict[str, Placement]]) -> None:
    """What fits a node lies in one, unless the pools of its group leave no gap at all; spans are of the worst."""
    cluster, pools, found = case
    for pool in pools:
        group, placement = cluster.group(pool.device), found[pool.name]
        nodes = (placement.devices - cluster.first_device(group)) // group.devices_per_node
        tensor = max(len(set(ranks)) for ranks in nodes.reshape(-1, pool.plan.tensor).tolist())
        assert placement.spans.tensor == tensor
        beside = [found[other.name].devices for other in pools if other.device == pool.device]
        taken = np.sort(np.concatenate([each.ravel() for each in beside]))
        gapless = taken[-1] - taken[0] == len(taken) - 1
        assert gapless or tensor == -(-pool.plan.tensor // group.devices_per_node)


def test_pools_follow_each_other_on_a_group_by_hand() -> None:
    prefill = Pool(name="prefill", plan=Plan(tensor=4), replicas=3, phases=("prefill",))
    decode = Pool(name="decode", plan=Plan(tensor=8), phases=("decode",))
    found = place_pools(groups((3, 8)), [prefill, decode])
    assert found["prefill"].devices[:, 0, 0, 0].tolist() == [0, 4, 8]
    # Eight ranks do not fit beside the third prefill replica: they take a node of their own.
    assert found["decode"].devices.ravel().tolist() == list(range(16, 24))
    assert found["decode"].spans.tensor == 1
    # Two nodes of 10 have no room for gaps: ranks follow each other, and the third prefill replica lies on both.
    tight = place_pools(groups((2, 10)), [prefill, decode])
    assert tight["decode"].devices.ravel().tolist() == list(range(12, 20))
    assert (tight["prefill"].spans.tensor, tight["decode"].spans.tensor) == (2, 1)


def test_groups_number_their_devices_one_after_another() -> None:
    pools = [
        Pool(name="decode", plan=Plan(tensor=4), device="b"),
        Pool(name="prefill", plan=Plan(tensor=2), device="a"),
    ]
    found = place_pools(groups((1, 4), (1, 8)), pools)
    assert found["decode"].devices.ravel().tolist() == [4, 5, 6, 7]
    assert found["prefill"].devices.ravel().tolist() == [0, 1]


def test_a_group_with_too_few_devices_is_refused_in_a_line() -> None:
    pools = [Pool(name=name, plan=Plan(tensor=4), replicas=2, device="b") for name in ("prefill", "decode")]
    with pytest.raises(InfeasiblePlan, match=r"^the replicas of prefill and decode use 16 devices, b has 8$"):
        place_pools(groups((4, 8), (1, 8)), pools)


def test_a_pool_on_a_group_that_is_not_there_is_refused_in_a_line() -> None:
    with pytest.raises(BadInput, match=r"^got 'c'; no such node group; known: a, b$"):
        place_pools(groups((1, 8), (1, 8)), [Pool(device="c")])
    with pytest.raises(BadInput, match=r"^the cluster has several node groups: name one of a, b$"):
        place_pools(groups((1, 8), (1, 8)), [Pool()])
