"""Plans over several nodes: which groups of ranks leave a node, and that what leaves it costs what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.costs.collectives import MEASURED_ACROSS, CollectiveTable, across_nodes
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.lowering import Lowered, lower
from apexsim.costs.notes import cost_notes
from apexsim.costs.operators import Collective, Elementwise
from apexsim.costs.steps import BatchStats, build_step_cost
from apexsim.errors import InfeasiblePlan, Unsupported
from apexsim.io.deployments import deployment_from
from apexsim.specs.deployment import Deployment
from apexsim.specs.placement import Spans, place, place_pools, spans
from apexsim.specs.plan import Plan, Pool

NAMES = catalog.names("device")
COSTS = {name: OperatorCosts(catalog.load("device", name)) for name in NAMES}
SIZES = 2.0 ** np.arange(10, 30)


def deployed(model: str = "llama-3.1-405b", **choices: Any) -> Deployment:
    given = {"model": model, "device": "h100-sxm", "weights": "fp8", "nodes": 2, "devices_per_node": 8}
    return deployment_from(None, {**given, **choices})


def lowered(model: str = "llama-3.1-405b", **choices: Any) -> Lowered:
    deployment = deployed(model, **choices)
    return lower(deployment.colocated_server())


def sends(low: Lowered) -> list[str]:
    return [op.kind for stage in low.stages for op in stage.once if op.name == "send"]


def decode_s(batch: int, **choices: Any) -> float:
    """Seconds from one token to the next of every sequence, ``batch`` of them with 1,024 tokens of context each."""
    deployment = deployed(**choices)
    cost = build_step_cost(deployment.colocated_server())
    return sum(cost.stage_ns(BatchStats(batch, 1024 * batch, (), (), batch))) / 1e9


# -- which groups leave a node -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (Plan(tensor=8, pipeline=2), (1, 1, 1, (True,))),
        (Plan(tensor=4, pipeline=4), (1, 1, 1, (False, True, False))),
        (Plan(tensor=2, pipeline=3), (1, 1, 1, (False, False))),
        (Plan(tensor=16), (2, 1, 2, ())),
        (Plan(tensor=16, pipeline=2), (2, 1, 2, (True,))),
        (Plan(tensor=2, attention_data=4), (1, 1, 1, ())),
        (Plan(tensor=2, attention_data=16, pipeline=2), (1, 4, 4, (True,))),
        (Plan(tensor=3, pipeline=4), (1, 1, 1, (False, True, False))),
        (Plan(tensor=5, pipeline=3), (1, 1, 1, (True, True))),
    ],
)
def test_spans_on_nodes_of_8_by_hand(plan: Plan, wanted: tuple[object, ...]) -> None:
    assert tuple(spans(plan, 8)) == wanted


@given(
    plan=st.builds(
        Plan,
        tensor=st.integers(1, 17),
        attention_data=st.integers(1, 5),
        pipeline=st.integers(1, 6),
    ),
    per_node=st.integers(1, 12),
    first=st.integers(0, 30),
)
def test_groups_that_fit_a_node_lie_in_one_and_devices_are_used_once(plan: Plan, per_node: int, first: int) -> None:
    gapless = place(plan, per_node, first=first, whole=False)
    assert gapless.ravel().tolist() == list(range(first, first + plan.devices))
    numbers = place(plan, per_node, first=first).ravel()
    assert numbers[0] >= first
    assert (np.diff(numbers) >= 1).all()
    found = spans(plan, per_node, first=first)
    for size, nodes in ((plan.tensor, found.tensor), (plan.stage_devices, found.stage)):
        assert nodes >= -(-size // per_node)
        assert size > per_node or nodes == 1
    assert len(found.hand_overs) == plan.pipeline - 1
    assert plan.devices > per_node or not any(found.hand_overs)


def placed(plan: Plan, *, replicas: int, nodes: int) -> Spans:
    cluster = deployed(tensor=8).cluster.regrouped(nodes=nodes)
    return place_pools(cluster, [Pool(plan=plan, replicas=replicas)])["serve"].spans


def test_all_replicas_are_charged_as_the_worst_placed() -> None:
    # Of 12 devices each on 3 nodes of 8: devices 0-11 hand over between nodes once, 12-23 as well, elsewhere.
    two = placed(Plan(tensor=4, pipeline=3), replicas=2, nodes=3)
    assert two.scatter == (1, 1, 1, 1)
    # Four replicas of 3 fit whole on two nodes of 8; the third of five lies on both.
    assert placed(Plan(tensor=3), replicas=4, nodes=2).tensor == 1
    assert placed(Plan(tensor=3), replicas=5, nodes=2).tensor == 2


def test_a_tensor_group_that_only_fits_on_two_nodes_is_refused() -> None:
    pooled = {"model": "llama-3.1-8b", "weights": "bf16", "devices_per_node": 6, "tensor": 4}
    assert lowered(**pooled, replicas=2)
    with pytest.raises(InfeasiblePlan, match="3 replicas leave no node with room for 4 tensor ranks"):
        lowered(**pooled, replicas=3)


def test_tensor_degrees_beyond_a_node_are_whole_nodes() -> None:
    model, cluster = catalog.load("model", "llama-3.1-405b"), deployed(tensor=8).cluster
    assert Plan(tensor=16).lawful(model, cluster.group()) == ()
    smaller = cluster.regrouped(devices_per_node=6, nodes=4)
    (reason,) = Plan(tensor=8).lawful(model, smaller.group())
    assert reason == "tensor degree 8 takes a part of a node: give up to 6, or a multiple of its 6 devices"


# -- what it costs -------------------------------------------------------------------------------------------------


def test_stages_hand_over_across_nodes_where_a_node_ends() -> None:
    assert sends(lowered(tensor=8, pipeline=2)) == ["send_recv_across_nodes"]
    assert sends(lowered(tensor=8, pipeline=2, nodes=1, devices_per_node=16)) == ["send_recv"]
    assert sends(lowered(tensor=4, pipeline=4)) == ["send_recv", "send_recv_across_nodes", "send_recv"]


def test_a_hand_over_across_nodes_costs_its_own_table() -> None:
    """4,096 tokens of 16,384 values are 134 MB: the step differs by the two tables at that size, and nothing else."""
    stats = BatchStats(0, 0, (), ((4096, 0),), 1)
    near, far = (
        build_step_cost(deployment.colocated_server()).stage_ns(stats)
        for deployment in (deployed(tensor=8, pipeline=2, nodes=n, devices_per_node=16 // n) for n in (1, 2))
    )
    size, costs = 4096 * 16384 * 2, COSTS["h100-sxm"]
    extra = costs.collective_s("send_recv_across_nodes", 2, size) - costs.collective_s("send_recv", 2, size)
    assert far[0] - near[0] == pytest.approx(float(extra) * 1e9, abs=2)
    assert far[1] == near[1]
    assert extra > 3e-3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cheaper_across_nodes_than_inside(name: str) -> None:
    costs = COSTS[name]
    inside, across = (costs.collective_s(kind, 2, SIZES) for kind in ("send_recv", "send_recv_across_nodes"))
    assert (across >= 0.99 * inside).all()  # curves keep points that give each other back within 1 %
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        far = costs.collective_s(kind, 8, SIZES, nodes=2)
        assert (far > costs.collective_s(kind, 4, SIZES)).all()
        assert (np.diff(far) >= 0).all()
        assert costs.evidence(kind, "nccl_8_over_2") == "estimated"


def test_the_estimate_is_its_parts() -> None:
    """1 MiB over 2 x 8: a reduce-scatter and an all-gather of it in a node, two hand-overs of half of it between."""
    costs, size = COSTS["h100-sxm"], 1 << 20
    inside = sum(float(costs.collective_s(kind, 8, size)) for kind in ("reduce_scatter", "all_gather"))
    across = 2 * float(costs.collective_s("send_recv_across_nodes", 2, size / 2))
    assert float(costs.collective_s("all_reduce", 16, size, nodes=2)) == pytest.approx(inside + across, rel=1e-6)
    ring = 6 * float(costs.collective_s("send_recv_across_nodes", 2, size / 4))
    assert float(costs.collective_s("all_reduce", 4, size, nodes=4)) == pytest.approx(ring, rel=1e-6)


def estimated_and_measured() -> tuple[Any, Any]:
    """Points of the all-reduce of 16 A100s on two nodes: as estimated, and as measured."""
    profile = catalog.load("device", "a100-sxm")
    measured = profile.operators["all_reduce"]["nccl_16_over_2"]
    estimate = across_nodes(profile, "all_reduce", "nccl_16_over_2")
    assert measured.points
    assert estimate
    assert estimate.points
    return estimate.points, measured.points


def test_the_estimate_errs_as_stated_where_it_was_measured() -> None:
    estimate, measured = estimated_and_measured()
    errors = np.abs(CollectiveTable(estimate)(measured.bytes) / np.array(measured.seconds) - 1)
    found = (np.median(errors), np.quantile(errors, 0.9), len(errors))
    assert found == pytest.approx(tuple(MEASURED_ACROSS), rel=1e-3)


def test_what_was_measured_over_nodes_is_used_where_it_was() -> None:
    assert COSTS["a100-sxm"].evidence("all_reduce", "nccl_16_over_2") == "fitted"
    assert COSTS["a100-sxm"].evidence("all_reduce", "nccl_16_over_4") == "estimated"
    assert COSTS["h100-sxm"].evidence("all_reduce", "nccl_16_over_2") == "estimated"
    with pytest.raises(Unsupported, match="nccl_16; it has"):  # measured on two nodes, not on one of 16
        COSTS["a100-sxm"].collective_s("all_reduce", 16, 1e6)
    with pytest.raises(Unsupported, match="nccl_12_over_2"):  # nobody measured 6 ranks in a node
        COSTS["h100-sxm"].collective_s("all_reduce", 12, 1e6, nodes=2)


@pytest.mark.parametrize(("weights", "batch"), [("fp8", 1), ("fp8", 64), ("bf16", 16), ("bf16", 64)])
def test_tensor_ranks_on_two_nodes_are_slower_than_two_stages(weights: str, batch: int) -> None:
    assert decode_s(batch, tensor=16, weights=weights) > decode_s(batch, tensor=8, pipeline=2, weights=weights)


def test_but_for_one_request_in_bf16_whose_weights_twice_as_many_devices_read_at_once() -> None:
    """Each of 253 all-reduces of 32 KiB would have to take a fifth longer than estimated for the order to turn."""
    saved_s = decode_s(1, tensor=8, pipeline=2, weights="bf16") - decode_s(1, tensor=16, weights="bf16")
    stages = lowered(tensor=16, weights="bf16").stages
    counts = [n for stage in stages for op, n in stage.row_operators() if getattr(op, "kind", None) == "all_reduce"]
    all_reduce_s = float(COSTS["h100-sxm"].collective_s("all_reduce", 16, 16384 * 2, nodes=2))
    assert sum(counts) == 2 * 126 + 1
    assert 0.15 < saved_s / sum(counts) / all_reduce_s < 0.25


def test_the_estimate_of_a_small_all_reduce_is_not_too_short_where_it_was_measured() -> None:
    estimate, measured = estimated_and_measured()
    sizes = 2.0 ** np.arange(11, 17)
    ratio = CollectiveTable(estimate)(sizes) / CollectiveTable(measured)(sizes)
    assert (ratio > 1.1).all()
    assert (ratio < 1.2).all()


def test_engines_own_kernels_stay_in_a_node() -> None:
    """Beyond it the library sums up, and the norm behind is a kernel of its own."""
    across, inside = (lowered(engine="trtllm-1.1", tensor=tensor) for tensor in (16, 8))
    for low, own in ((across, False), (inside, True)):
        rows = [op for block in low.blocks for op in block.rows]
        reduced = [op for op in rows if isinstance(op, Collective) and op.kind == "all_reduce"]
        norms = [op for op in rows if isinstance(op, Elementwise) and op.name == "ffn_norm"]
        assert {op.custom_max_bytes > 0 for op in reduced} == {own}
        assert {op.hidden_rows > 0 for op in norms} == {own}


def test_experts_exchange_tokens_by_the_tables_of_as_many_nodes() -> None:
    experts = {"model": "deepseek-v3", "weights": "fp8_block", "attention_data": 16, "expert": 16}
    deepep = {"engine_options": {"moe_dispatch": "deepep"}}
    rows = [op for block in lowered(**experts, **deepep).blocks for op in block.rows if isinstance(op, Collective)]
    assert {op.key for op in rows if op.kind == "deepep_dispatch"} == {"ranks_16_over_2"}
    gathered = [op for block in lowered(**experts).blocks for op in block.rows if isinstance(op, Collective)]
    assert {(op.kind, op.key) for op in gathered} == {
        ("all_gather", "nccl_16_over_2"),
        ("reduce_scatter", "nccl_16_over_2"),
    }
    # 16 ranks on four nodes of 4 are not those that were measured on two of 8.
    cut = deployed(**experts, **deepep, nodes=4, devices_per_node=4)
    with pytest.raises(Unsupported, match=r"no deepep_[a-z]+ cost for ranks_16_over_4"):
        build_step_cost(cut.colocated_server())


def test_a_result_says_what_crosses_nodes() -> None:
    def notes(**choices: Any) -> list[str]:
        deployment = deployed(**choices)
        return list(cost_notes(build_step_cost(deployment.colocated_server())))

    assert notes(tensor=16) == ["estimated: all_gather crosses 2 nodes", "estimated: all_reduce crosses 2 nodes"]
    assert notes(tensor=4, pipeline=4) == ["1 of 3 hand-overs between pipeline stages cross nodes"]
    lent = notes(tensor=4, pipeline=4, device="h200-sxm")
    assert lent == ["estimated: 1 of 3 hand-overs between pipeline stages cross nodes"]
    assert notes(tensor=8, nodes=1) == []
