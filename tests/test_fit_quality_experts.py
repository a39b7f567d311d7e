"""Experts, collectives, small kernels and shared launches of the shipped profiles: quality, physics, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog
from apexsim.costs.collectives import CollectiveTable, clean_points, copies_sent
from apexsim.costs.fitted import AttentionShape, MoeLayer, OperatorCosts
from apexsim.costs.forms import mixed, moe, routing
from apexsim.costs.forms.hardware import Hardware
from apexsim.costs.forms.residual import LogGrid
from apexsim.costs.forms.scalar import SCALAR
from apexsim.errors import Unsupported
from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.serving.simulator import simulate
from apexsim.specs.workload import Requests
from apexsim.units import dtype_bytes

HOPPER, BLACKWELL = ("h100-sxm", "h200-sxm"), ("b200-sxm", "b300-sxm", "gb200", "gb300")
SINGLE_LAUNCH = ("a100-sxm", "l40s", "rtx-pro-6000", "rtx-4090")
NAMES = (*HOPPER, *BLACKWELL, *SINGLE_LAUNCH)
PROFILES = {name: catalog.load("device", name) for name in NAMES}
COSTS = {name: OperatorCosts(profile, sustained=False) for name, profile in PROFILES.items()}
DTYPES = {
    **{name: {"bf16", "fp8", "fp8_block", "int4_wo", "mxfp4"} for name in (*HOPPER, "l40s", "rtx-4090")},
    **{name: {"bf16", "fp8", "fp8_block", "nvfp4", "int4_wo", "mxfp4"} for name in BLACKWELL},
    "rtx-pro-6000": {"bf16", "fp8", "nvfp4", "int4_wo", "mxfp4"},
    "a100-sxm": {"bf16", "int4_wo"},
}
EXPERTS = [(name, dtype) for name in NAMES for dtype in sorted(DTYPES[name])]
LINKED = [name for name in NAMES if name != "rtx-4090"]
# (median, p90) of absolute errors, per device: random rows of served models, models held out, more tokens than trained.
EXPERT_QUALITY = {
    **dict.fromkeys(HOPPER, ((0.067, 0.22), (0.075, 0.22), (0.10, 0.26))),
    **dict.fromkeys(BLACKWELL, ((0.06, 0.18), (0.16, 0.37), (0.26, 0.63))),
    **dict.fromkeys(("l40s", "rtx-4090"), ((0.06, 0.25), (0.10, 0.46), (0.115, 0.28))),
    "rtx-pro-6000": ((0.061, 0.22), (0.085, 0.26), (0.08, 0.26)),
    "a100-sxm": ((0.09, 0.34), (0.29, 0.96), (0.25, 0.57)),
}
DEEPSEEK = MoeLayer(7168, 2048, 8, 256, 1, "fp8_block")


def quality(name, kind, key, score):
    return PROFILES[name].operators[kind][key].quality[score]


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_of_the_tables_has_experts(name):
    assert set(PROFILES[name].operators["moe"]) == DTYPES[name]


@pytest.mark.parametrize(("name", "dtype"), EXPERTS)
def test_experts_are_as_good_as_promised(name, dtype):
    found = PROFILES[name].operators["moe"][dtype].quality
    for score, (median, p90) in zip(("random_served", "served_shapes", "largest"), EXPERT_QUALITY[name], strict=True):
        if score in found:
            assert found[score].median <= median, score
            assert found[score].p90 <= p90, score


@pytest.mark.parametrize(("name", "dtype"), EXPERTS)
def test_experts_obey_the_roofline_and_grow_with_tokens(name, dtype):
    layer = MoeLayer(4096, 1536, 8, 128, dtype=dtype)
    tokens = np.array([1, 8, 64, 512, 4096, 16384])
    seconds = COSTS[name].moe_s(tokens, layer)
    touched = routing.touched_experts(tokens, 128, 8, layer.routing_exponent)
    assert (
        seconds >= touched * 3 * 4096 * 1536 * dtype_bytes(dtype) / PROFILES[name].datasheet.memory_bytes_per_s
    ).all()
    assert (np.diff(seconds) > 0).all()


@pytest.mark.parametrize("name", [*HOPPER, *BLACKWELL])
def test_all_experts_of_group_limited_routing_are_read_in_serving(name):
    """The rows that measured it reach half of them: a cost fitted naively would beat the memory."""
    weights = 256 * 3 * 7168 * 2048
    assert COSTS[name].moe_s(4096, DEEPSEEK) >= weights / PROFILES[name].datasheet.memory_bytes_per_s


@pytest.mark.parametrize("name", [*HOPPER, *BLACKWELL])
def test_skewed_routing_and_more_ranks_cost_what_they_should(name):
    balanced, skewed = (
        COSTS[name].moe_s(8192, MoeLayer(4096, 1536, 8, 128, 8, "fp8_block", exponent)) for exponent in (0.0, 1.2)
    )
    assert balanced < skewed < 4 * balanced
    alone, spread = (COSTS[name].moe_s(8192, MoeLayer(4096, 1536, 8, 128, ep, "fp8_block")) for ep in (1, 8))
    assert alone / 8 < spread < alone


def test_activated_experts_set_the_time_of_a_layer(data):
    """Layers timed elsewhere by the number of experts that a batch activates: judged, not fitted."""
    table = data / "kernels" / "vllm_layers" / "RTXPRO6000" / "Qwen3-30B-A3B-Instruct-2507" / "moe.parquet"
    rows = pd.read_parquet(table)
    rows = rows[rows["activated_experts"] >= np.minimum(64, rows["tokens"] * 4)]
    op = PROFILES["rtx-pro-6000"].operators["moe"]["bf16"]
    shape = moe.MoeShape(
        *(rows["tokens"].to_numpy(float), 2048.0, 768.0, 8.0, 128.0, 1.0, 3.0),
        active=rows["activated_experts"].to_numpy(float),
        local=8 * rows["tokens"].to_numpy(float),
    )
    hw = Hardware.of(PROFILES["rtx-pro-6000"].datasheet, "bf16")
    seconds = moe.moe_s(shape, 2.0, op.coefficients, hw, cold=False)
    seconds = seconds * np.exp(LogGrid.of(op.residual).log_factor(*moe.residual_coordinates(shape)))
    errors = np.abs(seconds / (rows["time_us_per_layer"].to_numpy() * 1e-6) - 1)
    assert np.median(errors) <= 0.08
    assert np.quantile(errors, 0.9) <= 0.30


@pytest.mark.parametrize("name", LINKED)
def test_collectives_predict_their_own_points_left_out(name):
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    scores = [op.quality["leave_one_out"] for kind in kinds for op in PROFILES[name].operators[kind].values()]
    bound = (0.035, 0.13) if name not in ("l40s", "rtx-pro-6000") else (0.035, 0.18)
    assert np.median([score.median for score in scores]) <= bound[0]
    assert np.median([score.p90 for score in scores]) <= bound[1]
    ranks = {key.split("_")[1] for key in PROFILES[name].operators["all_reduce"]}
    assert {"2", "4", "8"} <= ranks


@pytest.mark.parametrize("name", LINKED)
def test_collectives_give_back_every_cleaned_point(name, data):
    from apexsim.fitting import facts

    folder = data / "kernels" / "datacenter" / facts.devices()[name].folder
    rows = pd.read_parquet(folder / "nccl.parquet")
    rows = rows[rows["collective"].astype(str) == "all_reduce"]
    for group, of_group in rows.groupby("num_gpus"):
        kept, _ = clean_points(list(zip(of_group["bytes"], of_group["latency_us"] * 1e-6, strict=True)))
        size, seconds = np.array(kept).T
        table = CollectiveTable(PROFILES[name].operators["all_reduce"][f"nccl_{group}"].points)
        assert np.abs(table(size) / seconds - 1).max() <= 0.0105


def test_exchanges_of_experts_are_known_where_they_were_measured():
    for name in HOPPER:
        for kind in ("deepep_dispatch", "deepep_combine", "deepep_ll_dispatch", "deepep_ll_combine"):
            measured = {"ranks_8", "ranks_16_over_2", "ranks_32_over_4", "ranks_64_over_8"}
            assert set(PROFILES[name].operators[kind]) == measured
    assert "ranks_64" in PROFILES["gb200"].operators["trtllm_combine"]
    sent = 64 * 7168 * 2 * copies_sent(8, 8)
    out, back = (COSTS["h100-sxm"].collective_s(f"deepep_{phase}", 8, sent) for phase in ("dispatch", "combine"))
    assert 20e-6 < out < back < 200e-6
    slower = COSTS["h100-sxm"].collective_s("deepep_dispatch", 64, sent, nodes=8)
    assert slower > out
    with pytest.raises(Unsupported, match="no deepep_dispatch cost for ranks_8"):
        COSTS["l40s"].collective_s("deepep_dispatch", 8, sent)


def test_what_nobody_measured_between_devices_is_refused_or_marked():
    with pytest.raises(Unsupported, match="rtx-4090 has no all_reduce cost for custom_2"):
        COSTS["rtx-4090"].collective_s("all_reduce", 2, 1e6, custom_allowed=True)
    links = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "send_recv_across_nodes")
    for kind in links:
        assert {op.evidence for op in PROFILES["rtx-4090"].operators[kind].values()} == {"estimated"}
    assert COSTS["gb200"].evidence("all_reduce", "nccl_4") == "fitted"
    assert COSTS["gb200"].evidence("all_reduce", "nccl_8") == "estimated"
    assert COSTS["rtx-4090"].evidence("moe", "bf16") == "estimated"
    assert COSTS["l40s"].evidence("mixed_attention", "any") == "estimated"


@pytest.mark.parametrize("name", ["rtx-pro-6000", "rtx-4090"])
def test_small_kernels_are_as_good_as_promised_where_they_were_timed(name):
    found = PROFILES[name].operators
    for key in ("norm", "rope", "activation", "embedding"):
        assert found["elementwise"][key].quality["in_sample"].median <= 0.12
        assert found["elementwise"][key].quality["in_sample"].p90 <= 0.47
    (sampler,) = found["sampling"]["any"].quality.values()
    assert sampler.median <= 0.04
    assert sampler.p90 <= 0.115
    norm, any_kernel = COSTS[name].elementwise_s(1e6, "ffn_norm"), COSTS[name].elementwise_s(1e6)
    assert norm != any_kernel


@pytest.mark.parametrize("name", ["rtx-pro-6000", "rtx-4090"])
def test_a_shared_launch_is_as_good_as_promised(name):
    found = PROFILES[name].operators["mixed_attention"]["any"].quality
    assert found["in_sample"].median <= 0.08
    assert found["in_sample"].p90 <= 0.24
    held_out = [score for key, score in found.items() if key.startswith("held_out")]
    assert len(held_out) == (3 if name == "rtx-pro-6000" else 0)
    assert all(score.median <= 0.10 and score.p90 <= 0.38 for score in held_out)


def test_only_devices_of_flash_attention_2_launch_chunks_and_decodes_together():
    shape = AttentionShape(32, 8, 128)
    for name in NAMES:
        assert (COSTS[name].shared_launch(shape) is not None) == (name in SINGLE_LAUNCH)


def test_a_shared_launch_costs_more_than_the_sum_where_decodes_lose_their_packing():
    """128 decodes at 16,384 keys beside a chunk of 16: nearly four times the sum on the device it was timed on."""
    costs, shape = COSTS["rtx-pro-6000"], AttentionShape(32, 8, 128)
    together = costs.shared_launch(shape)(128, 16384, [(16, 0)])
    apart = costs.decode_attention_s(128, 16384, shape) + costs.prefill_attention(shape)(16, 0)
    assert 2 < together / apart < 5


@pytest.mark.parametrize("name", SINGLE_LAUNCH)
def test_a_long_chunk_starts_blocks_for_every_decode_beside_it(name):
    """A grid has room for the longest chunk in every sequence: one of 2,048 tokens costs more than 16 of 128."""
    launch = COSTS[name].shared_launch(AttentionShape(32, 8, 128))
    assert launch(128, 256, [(2048, 0)]) > launch(128, 256, [(128, 0)] * 16)


@pytest.mark.parametrize("window", [None, 1024])
def test_a_shared_launch_is_one_form_on_floats_and_arrays_and_knows_no_order(window):
    costs, shape = COSTS["rtx-pro-6000"], AttentionShape(32, 8, 128, window)
    launch = costs.shared_launch(shape)
    op = PROFILES["rtx-pro-6000"].operators["mixed_attention"]["any"]
    bound = mixed.bind(shape.sizes, op.coefficients, Hardware.of(PROFILES["rtx-pro-6000"].datasheet, "bf16"))
    tokens, history = np.array([16.0, 500.0, 2048.0]), np.array([0.0, 3000.0, 100.0])
    arrays = mixed.launch_s(mixed.chunk_blocks(tokens, history, bound), mixed.decode_blocks(8.0, 700.0, bound), bound)
    floats = [launch(8, 700, [(int(t), int(h))]) for t, h in zip(tokens, history, strict=True)]
    np.testing.assert_allclose(arrays, floats, rtol=1e-12)
    chunks = [(16, 0), (500, 3000), (2048, 100)]
    assert launch(8, 700, chunks) == pytest.approx(launch(8, 700, chunks[::-1]), rel=1e-12)
    assert launch(8, 700, chunks) > max(floats)
    assert mixed.decode_blocks(8, 700, bound, SCALAR).kv_bytes >= 8 * 700 * 2 * 128 * 8 * 2


@pytest.mark.parametrize("device", ["rtx-pro-6000", "a100-sxm"])
def test_stretches_equal_steps_where_launches_are_shared(device):
    deployment = resolve_deployment(DeploymentFile(device=device, model="qwen3-8b"), where="test")
    rng = np.random.default_rng(5)
    requests = Requests(
        name="busy",
        arrival_s=np.cumsum(rng.exponential(0.08, 40)),
        prompt_tokens=rng.integers(1, 3000, 40),
        output_tokens=rng.integers(1, 120, 40),
    )
    fast, exact = (simulate(deployment, requests, exact_steps=exact) for exact in (False, True))
    pd.testing.assert_frame_equal(fast.requests, exact.requests, check_exact=True)
