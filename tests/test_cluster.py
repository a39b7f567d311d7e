"""Clusters: node groups, what is read and written of them, and the links between their devices."""

from __future__ import annotations

from typing import Any

import pytest

from apexsim import catalog
from apexsim.errors import BadInput
from apexsim.specs.base import parse_spec
from apexsim.specs.cluster import Cluster, NodeGroup

H100, A100 = (catalog.load("device", name) for name in ("h100-sxm", "a100-sxm"))


def cluster(*groups: dict[str, Any], **more: Any) -> Cluster:
    return parse_spec(Cluster, {"groups": groups, **more}, "cluster")


def two_groups(**more: Any) -> Cluster:
    return cluster({"device": H100, "nodes": 2}, {"name": "old", "device": A100, "devices_per_node": 4}, **more)


# -- what is read and written --------------------------------------------------------------------------------------


def test_a_cluster_of_one_group_reads_and_writes_as_one_list_of_fields() -> None:
    flat = Cluster(device=H100, devices_per_node=4, nodes=3)
    assert flat == Cluster(groups=(NodeGroup(name="h100-sxm", device=H100, devices_per_node=4, nodes=3),))
    assert (flat.device, flat.devices_per_node, flat.nodes, flat.devices) == (H100, 4, 3, 12)
    written = flat.model_dump(mode="json", exclude_defaults=True)
    assert {key: written[key] for key in written if key != "device"} == {"devices_per_node": 4, "nodes": 3}
    assert parse_spec(Cluster, flat.model_dump(mode="json"), "saved") == flat


def test_a_group_keeps_a_name_of_its_own() -> None:
    named = cluster({"name": "prefill", "device": H100})
    assert named.model_dump()["name"] == "prefill"
    assert parse_spec(Cluster, named.model_dump(mode="json"), "saved") == named
    assert named.regrouped(device=A100).group().name == "prefill"
    assert Cluster(device=H100).regrouped(device=A100) == Cluster(device=A100)


def test_several_groups_are_numbered_through_and_found_by_name() -> None:
    both = two_groups()
    assert both.devices == 20
    assert [both.first_device(group) for group in both.groups] == [0, 16]
    assert both.group("old").device is A100
    assert parse_spec(Cluster, both.model_dump(mode="json"), "saved") == both


@pytest.mark.parametrize("ask", ["device", "devices_per_node", "nodes"])
def test_several_groups_have_no_single_device(ask: str) -> None:
    with pytest.raises(BadInput, match=r"^the cluster has several node groups: name one of h100-sxm, old$"):
        getattr(two_groups(), ask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": ()}, "groups: got (); Tuple should have at least 1 item after validation, not 0"),
        ({"device": H100, "groups": ({"device": A100},)}, "give either groups, or device of the only one"),
        (
            {"groups": ({"device": H100}, {"device": H100})},
            "node groups have names of their own; several are called h100-sxm",
        ),
        (
            {"groups": ({"device": H100, "nodes": 900}, {"device": A100, "nodes": 900})},
            "the node groups have 14400 devices; give at most 10000",
        ),
        (
            {"groups": ({"device": H100, "nics": "rail"},)},
            "groups.0.nics: got 'rail'; Input should be 'device' or 'node'",
        ),
        ({"groups": ({"device": H100, "node": 2},)}, "groups.0.node: unknown key; did you mean nodes"),
        ({"device": H100, "nic": 1}, "nic: unknown key; "),
    ],
)
def test_bad_clusters_are_refused_in_a_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_spec(Cluster, given, "cluster")
    assert str(refused.value).startswith(f"cluster: {message}")
    assert "\n" not in str(refused.value)


def test_a_group_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadInput, match=r"^got 'olt'; no such node group; did you mean old\?$"):
        two_groups().group("olt")
