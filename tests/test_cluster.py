"""Clusters: node groups, what is read and written of them, and the links between their devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.errors import BadInput
from apexsim.io.deployments import load_deployment, read_deployment, resolve_deployment, write_deployment
from apexsim.io.yaml_files import write_yaml
from apexsim.specs.base import parse_spec
from apexsim.specs.cluster import Cluster, NodeGroup, Trunk
from apexsim.specs.deployment import Deployment
from apexsim.specs.topology import Topology

NAMES = catalog.names("device")
DEVICES = {name: catalog.load("device", name) for name in NAMES}
H100, A100 = DEVICES["h100-sxm"], DEVICES["a100-sxm"]


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


# -- links ---------------------------------------------------------------------------------------------------------


def crossed(topology: Topology, start: int, end: int) -> list[str]:
    return [link.name for link in topology.path(start, end)]


def latency_s(topology: Topology, start: int, end: int) -> float:
    return sum(link.latency_s for link in topology.path(start, end))


def test_devices_of_an_nvlink_node_talk_over_nvlink_and_of_two_over_their_cards() -> None:
    topology = Topology(Cluster(device=H100, nodes=2))
    assert crossed(topology, 0, 7) == ["nvlink 0 out", "nvlink 7 in"]
    assert crossed(topology, 0, 8) == ["pcie 0 out", "nic 0 out", "nic 8 in", "pcie 8 in"]
    assert [link.bytes_per_s for link in topology.path(0, 7)] == [450e9, 450e9]
    assert [link.bytes_per_s for link in topology.path(0, 8)] == [64e9, 50e9, 50e9, 64e9]
    # As long as the smallest hand-overs that were measured.
    assert latency_s(topology, 0, 7) == pytest.approx(5e-6)
    assert latency_s(topology, 0, 8) == pytest.approx(17e-6)
    assert topology.path(3, 3) == ()
    assert "(fitted)" in topology.path(0, 8)[1].source


def test_devices_of_a_node_share_its_card_where_it_has_one() -> None:
    topology = Topology(cluster({"device": H100, "nodes": 2, "nics": "node", "nic_bytes_per_s": 12.5e9}))
    assert crossed(topology, 1, 9) == ["pcie 1 out", "nic h100-sxm/0 out", "nic h100-sxm/1 in", "pcie 9 in"]
    assert set(topology.path(1, 9)) & set(topology.path(2, 10))
    assert topology.path(1, 9)[1].bytes_per_s == 12.5e9
    assert not set(topology.path(1, 9)) & set(topology.path(9, 1)), "a link is one way"


def test_boards_on_pcie_talk_through_the_host() -> None:
    topology = Topology(Cluster(device=DEVICES["l40s"], nodes=2))
    assert crossed(topology, 0, 1) == ["pcie 0 out", "pcie 1 in"]
    assert crossed(topology, 0, 8) == ["pcie 0 out", "nic 0 out", "nic 8 in", "pcie 8 in"]
    assert latency_s(topology, 0, 1) == pytest.approx(7.09e-6)
    assert latency_s(topology, 0, 8) == pytest.approx(17e-6)


def test_one_nvlink_joins_trays_and_leaves_the_cards_to_be_given() -> None:
    trays = {"device": DEVICES["gb200"], "nodes": 2, "devices_per_node": 4}
    topology = Topology(cluster(trays, {"device": H100}))
    assert crossed(topology, 0, 7) == ["nvlink 0 out", "nvlink 7 in"]
    assert "one NVLink joins the 2 nodes of gb200" in topology.assumptions
    refused = r"^node group gb200: the datasheet has no rate of its network cards: give nic_bytes_per_s$"
    with pytest.raises(BadInput, match=refused):
        topology.path(0, 8)
    carded = Topology(cluster({**trays, "nic_bytes_per_s": 50e9}, {"device": H100}))
    assert crossed(carded, 0, 7) == ["nvlink 0 out", "nvlink 7 in"]
    assert crossed(carded, 0, 8) == ["pcie 0 out", "nic 0 out", "nic 8 in", "pcie 8 in"]


def test_groups_are_joined_by_a_trunk() -> None:
    free = Topology(two_groups())
    assert crossed(free, 0, 16) == ["pcie 0 out", "nic 0 out", "nic 16 in", "pcie 16 in"]
    assert [link.bytes_per_s for link in free.path(0, 16)] == [64e9, 50e9, 25e9, 32e9]
    assert "networks of node groups are joined without a bottleneck" in free.assumptions
    trunk = {"bytes_per_s": 10e9, "latency_s": 1e-3, "source": "made up"}
    joined = Topology(two_groups(trunk=trunk))
    assert crossed(joined, 0, 16)[2:4] == ["trunk h100-sxm out", "trunk old in"]
    assert crossed(joined, 0, 8) == crossed(free, 0, 8), "inside a group it is not crossed"
    assert latency_s(joined, 0, 16) == pytest.approx(latency_s(free, 0, 16) + 2e-3)


def test_latency_that_nobody_measured_is_said() -> None:
    bare = H100.model_copy(update={"operators": {}})
    topology = Topology(Cluster(device=bare, nodes=2))
    assert latency_s(topology, 0, 8) == 0
    assert "latency of links of h100-sxm is not known: none is charged" in topology.assumptions


@given(
    sizes=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
    nics=st.sampled_from(["device", "node"]),
    trunk=st.sampled_from([None, {"bytes_per_s": 1e10, "latency_s": 1e-6, "source": "made up"}]),
    data=st.data(),
)
def test_the_way_back_is_the_way_there(
    sizes: list[tuple[str, int, int]], nics: str, trunk: dict[str, Any] | None, data: st.DataObject
) -> None:
    groups = [
        {"name": f"{at}", "device": DEVICES[name], "nodes": nodes, "devices_per_node": per_node, "nics": nics}
        | {"nic_bytes_per_s": 25e9}
        for at, (name, nodes, per_node) in enumerate(sizes)
    ]
    topology = Topology(cluster(*groups, trunk=trunk))
    start, end = (data.draw(st.integers(0, topology.cluster.devices - 1)) for _ in range(2))
    there, back = topology.path(start, end), topology.path(end, start)
    assert [(link.kind, link.bytes_per_s, link.latency_s) for link in there] == [
        (link.kind, link.bytes_per_s, link.latency_s) for link in reversed(back)
    ]
    assert len(set(there)) == len(there)
    assert not set(there) & set(back)
    assert bool(there) == (start != end)
    ends = {link.name.split()[1] for link in (*there[:1], *there[-1:])}
    assert ends <= {str(start), str(end)}, "only the links of these two devices"


@pytest.mark.parametrize("device", [-1, 8])
def test_a_device_that_is_not_there_is_refused_in_a_line(device: int) -> None:
    with pytest.raises(BadInput, match=rf"^device: got {device}; the cluster has devices 0 to 7$"):
        Topology(Cluster(device=H100)).path(0, device)


# -- groups in a deployment file -----------------------------------------------------------------------------------


def deployed(tmp_path: Path, **keys: Any) -> Deployment:
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump({"model": "llama-3.1-8b", "device": "h100-sxm", **keys}))
    return load_deployment(path)


def test_groups_of_a_file_are_those_of_its_cluster(tmp_path: Path) -> None:
    trunk = {"bytes_per_s": 1e11, "latency_s": 5e-6, "source": "four 200G links"}
    path = tmp_path / "deployment.yaml"
    names = [{"name": "prefill", "nodes": 2}, {"device": "a100-sxm", "nics": "node"}]
    pools = [{"name": "serve", "device": "a100-sxm"}]
    keys = {"model": "llama-3.1-8b", "device": "h100-sxm", "groups": names, "trunk": trunk, "pools": pools}
    path.write_text(yaml.safe_dump(keys))
    file = read_deployment(path)
    found = resolve_deployment(file, path).cluster
    assert [(group.name, group.device.name, group.nodes, group.nics) for group in found.groups] == [
        ("prefill", "h100-sxm", 2, "device"),
        ("a100-sxm", "a100-sxm", 1, "node"),
    ]
    assert found.trunk == Trunk(**trunk)
    write_deployment(path, file)
    assert read_deployment(path) == file


def test_one_group_of_a_file_serves_as_nodes_do(tmp_path: Path) -> None:
    grouped = deployed(tmp_path, groups=[{"nodes": 2, "devices_per_node": 4}], tensor=8)
    assert grouped == deployed(tmp_path, nodes=2, devices_per_node=4, tensor=8)


def test_a_device_of_a_group_may_be_a_file_beside_the_deployment(tmp_path: Path) -> None:
    write_yaml(tmp_path / "mine.yaml", H100.model_dump(mode="json", exclude_defaults=True))
    (group,) = deployed(tmp_path, groups=[{"device": "mine.yaml"}]).cluster.groups
    assert group.device == H100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"groups": [{}], "nodes": 2}, "nodes: every group has its own: leave it out, or the groups"),
        ({"groups": [{"device": "h1000"}]}, "groups: device: got 'h1000'; unknown device; did you mean "),
        ({"groups": [{}, {}]}, "node groups have names of their own; several are called h100-sxm"),
        ({"groups": [{"nodes": 0}]}, "groups.0.nodes: got 0; Input should be greater than or equal to 1"),
        ({"groups": [{"nic": 1}]}, "groups.0.nic: unknown key; did you mean "),
        (
            {"trunk": {"bytes_per_s": 1e9, "latency_s": 0.0, "source": "x"}},
            "trunk: a trunk joins groups of nodes: give two groups or more",
        ),
        (
            {"groups": [{}], "trunk": {"bytes_per_s": 1e9, "latency_s": 0.0, "source": "x"}},
            "trunk: a trunk joins groups of nodes: give two groups or more",
        ),
        ({"groups": []}, "groups: got []; give at least one, or leave it out"),
        (
            {"groups": [{}], "trunk": {"bytes_per_s": 1e9, "latency_s": 0.0}},
            "trunk.source: is missing and has no default",
        ),
        ({"groups": [{}], "replicas": 9}, "the replicas use 9 devices, the cluster has 8"),
    ],
)
def test_bad_groups_of_a_file_are_refused_in_a_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as refused:
        deployed(tmp_path, **keys)
    assert str(refused.value).startswith(f"{tmp_path / 'deployment.yaml'}: {message}")
    assert "\n" not in str(refused.value)
