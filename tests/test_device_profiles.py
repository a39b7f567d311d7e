"""The shipped profiles: size, quality, physics. None of it needs the reference data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.costs.fitted import AttentionShape, MoeLayer, OperatorCosts
from apexsim.costs.forms import decode, gemm, mixed, mla, moe, prefill, routing, small
from apexsim.costs.forms.hardware import Hardware
from apexsim.errors import Unsupported
from apexsim.io.yaml_files import format_yaml
from apexsim.specs.device import DeviceProfile
from apexsim.units import dtype_bytes

HOPPER = ("h100-sxm", "h200-sxm")
BLACKWELL = ("b200-sxm", "b300-sxm", "gb200", "gb300")
NAMES = ("a100-sxm", *HOPPER, *BLACKWELL, "l40s", "rtx-pro-6000", "rtx-4090")
PROFILES: dict[str, DeviceProfile] = {name: catalog.load("device", name) for name in NAMES}
COSTS = {name: OperatorCosts(PROFILES[name]) for name in NAMES}
BURST = {name: OperatorCosts(PROFILES[name], sustained=False) for name in NAMES}
BOUNDS = {
    "gemm": [*gemm.COEFFICIENTS, gemm.SPLIT, gemm.QUANTISE],
    "prefill": [*prefill.COEFFICIENTS, prefill.WINDOW_EFFICIENCY],
    "decode": decode.COEFFICIENTS,
    "moe": moe.COEFFICIENTS,
    "elementwise": small.ELEMENTWISE,
    "sampling": small.SAMPLING,
    "table": [],
    "mla_decode": mla.COEFFICIENTS,
    "mla_prefill": prefill.COEFFICIENTS,
    "mixed": mixed.COEFFICIENTS,
}
names, hopper = st.sampled_from(NAMES), st.sampled_from(HOPPER)


def operators(profile):
    return [(kind, key, op) for kind, found in profile.operators.items() for key, op in found.items()]


def peak(name, dtype):
    return Hardware.of(PROFILES[name].datasheet, dtype).flops_per_s


def bandwidth(name):
    return PROFILES[name].datasheet.memory_bytes_per_s


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_small_and_complete(name):
    profile = PROFILES[name]
    assert len(format_yaml(profile.model_dump(mode="json", exclude_defaults=True))) <= 60_000
    kinds = {"gemm", "prefill_attention", "decode_attention", "moe", "elementwise", "sampling"}
    kinds |= {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "send_recv_across_nodes"}
    assert kinds <= set(profile.operators)
    assert profile.provenance.tables
    assert all(op.source for _, _, op in operators(profile))


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_stay_inside_their_physical_bounds(name):
    for _, key, op in operators(PROFILES[name]):
        bounds = {c.name: c for c in BOUNDS[op.form]}
        for coefficient, value in op.coefficients.items():
            if coefficient in bounds:
                c = bounds[coefficient]
                assert c.low * 0.999 <= value <= c.high * 1.001, (key, coefficient)


@pytest.mark.parametrize("name", NAMES)
def test_measured_operators_report_three_hold_outs(name):
    for kind, key, op in operators(PROFILES[name]):
        if kind in ("gemm", "prefill_attention", "decode_attention", "moe") and op.evidence == "fitted":
            assert {"random", "largest"} <= set(op.quality), (kind, key)
            # Timed layers hold one head shape: a hundred rows for a form of ten coefficients.
            assert op.rows_used > (90 if op.source.startswith("vllm_layers") else 500)


@given(name=names, m=st.integers(1, 32768), n=st.integers(16, 130000), k=st.integers(16, 60000), data=st.data())
def test_no_product_beats_the_roofline(name, m, n, k, data):
    dtype = data.draw(st.sampled_from(sorted(PROFILES[name].operators["gemm"])))
    seconds = BURST[name].gemm_s(m, n, k, dtype)
    inputs = 2.0 if dtype.endswith("_wo") else dtype_bytes(dtype)
    moved = dtype_bytes(dtype) * n * k + inputs * m * k + 2 * m * n
    assert seconds >= 2 * m * n * k / peak(name, dtype) * (1 - 1e-9)
    assert seconds >= moved / bandwidth(name) * (1 - 1e-9)


@given(
    name=names,
    heads=st.sampled_from([(32, 8), (8, 1), (64, 8), (40, 40), (4, 4)]),
    chunk=st.integers(1, 30000),
    history=st.integers(0, 200000),
    window=st.sampled_from([None, 128, 4096]),
)
def test_no_chunk_beats_the_roofline_and_both_paths_agree(name, heads, chunk, history, window):
    shape = AttentionShape(*heads, 128, None if name == "a100-sxm" else window)
    seconds = COSTS[name].prefill_attention(shape)(chunk, history)
    pairs = prefill.causal_pairs(float(chunk), float(history), shape.window)
    assert seconds >= 4 * pairs * heads[0] * 128 / peak(name, "bf16") * (1 - 1e-9)
    seen = chunk + min(history, shape.window or history)
    assert seconds >= 2 * 2 * seen * heads[1] * 128 / bandwidth(name) * (1 - 1e-9)
    assert float(COSTS[name].prefill_attention(shape).many(chunk, history)) == pytest.approx(seconds, rel=1e-9)


@given(
    name=names,
    batch=st.integers(1, 2048),
    heads=st.sampled_from([(32, 8), (8, 1), (64, 8), (40, 40), (4, 4), (96, 8)]),
    context=st.floats(1, 200000),
    data=st.data(),
)
def test_no_decode_beats_the_roofline_and_none_falls_with_context(name, batch, heads, context, data):
    kv_dtype = data.draw(st.sampled_from(["bf16"] if name == "a100-sxm" else ["bf16", "fp8"]))
    shape = AttentionShape(*heads, 128, None, kv_dtype)
    more = data.draw(st.floats(0, 5000))
    first, second = COSTS[name].decode_attention_s(batch, np.array([context, context + more]), shape)
    assert first >= 2 * dtype_bytes(kv_dtype) * batch * heads[1] * context * 128 / bandwidth(name) * (1 - 1e-9)
    assert second >= first


@pytest.mark.parametrize("name", NAMES)
def test_little_kv_is_read_cold_in_serving(name):
    """KV that would fit in L2 still comes from memory: at no more than 99 % of its peak."""
    shape = AttentionShape(32, 8, 128)
    context = np.array([2048.0, 4096.0, 8192.0])
    moved = 2 * 2 * 8 * context * 128
    assert (moved < PROFILES[name].datasheet.l2_bytes).all()
    assert (COSTS[name].decode_attention_s(1, context, shape) >= moved / (0.99 * bandwidth(name))).all()


def test_a_window_caps_the_decode_cost():
    costs = COSTS["h100-sxm"]
    sliding = costs.decode_attention_s(64, np.array([100.0, 128.0, 129.0, 5000.0]), AttentionShape(64, 8, 64, 128))
    assert sliding[0] < sliding[1] == sliding[2] == sliding[3]
    assert sliding[3] < costs.decode_attention_s(64, 5000.0, AttentionShape(64, 8, 64))


@given(
    name=names,
    tokens=st.integers(1, 16384),
    model=st.sampled_from([(4096, 14336, 2, 8), (2048, 768, 8, 128), (4096, 1536, 8, 128), (6144, 16384, 2, 8)]),
    degrees=st.sampled_from([(1, 1), (8, 1), (1, 4), (1, 8), (2, 2)]),
    data=st.data(),
)
def test_no_experts_beat_the_roofline(name, tokens, model, degrees, data):
    hidden, inter, topk, experts = model
    tensor, ep = degrees
    dtype = data.draw(st.sampled_from(sorted(PROFILES[name].operators["moe"])))
    exponent = data.draw(st.sampled_from([0.0, 0.7, 1.2]))
    layer = MoeLayer(hidden, inter // tensor, topk, experts, ep, dtype, exponent)
    seconds = BURST[name].moe_s(tokens, layer)
    matrix = 3 * hidden * inter // tensor
    assert seconds >= 2 * tokens * topk / ep * matrix / peak(name, dtype) * (1 - 1e-9)
    touched = routing.touched_experts(tokens, experts, topk, exponent)
    assert seconds >= touched / ep * matrix * dtype_bytes(dtype) / bandwidth(name) * (1 - 1e-9)


@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]),
    group=st.sampled_from([2, 4, 8]),
    size=st.floats(1, 1e10),
    factor=st.floats(1, 100),
    custom=st.booleans(),
)
def test_collectives_never_get_faster_with_bytes(name, kind, group, size, factor, custom):
    own = custom and "custom_8" in PROFILES[name].operators["all_reduce"]
    first, second = COSTS[name].collective_s(kind, group, np.array([size, size * factor]), own)
    assert 0 < first <= second


def test_nothing_to_do_takes_no_time():
    costs = COSTS["h100-sxm"]
    assert costs.gemm_s(0, 4096, 4096, "bf16") == 0
    assert costs.moe_s(0, MoeLayer(4096, 14336, 2, 8)) == 0
    assert costs.prefill_attention(AttentionShape(32, 8, 128)).many(0, 0) == 0
    assert (costs.decode_attention_s(0, np.array([1.0, 2.0]), AttentionShape(32, 8, 128)) == 0).all()
    assert costs.sampling_s(0, 128256) == 0
    assert costs.collective_s("all_reduce", 1, 1e6) == 0
    assert costs.collective_s("all_gather", 2, 0) == 0


def test_an_array_of_batches_equals_one_at_a_time():
    costs, shape = COSTS["h200-sxm"], AttentionShape(8, 1, 128)
    batches, contexts = np.array([4, 0, 16, 4]), np.array([100.0, 5.0, 3000.0, 900.0])
    one = [float(costs.decode_attention_s(int(b), c, shape)) for b, c in zip(batches, contexts, strict=True)]
    np.testing.assert_array_equal(costs.decode_attention_s(batches, contexts, shape), one)


def test_what_a_device_lacks_is_named():
    costs = COSTS["a100-sxm"]
    with pytest.raises(Unsupported, match="a100-sxm has no gemm cost for fp8; it has: bf16, int4_wo, int8_wo"):
        costs.gemm_s(1, 4096, 4096, "fp8")
    with pytest.raises(Unsupported, match="no prefill_attention cost for fp8_d128"):
        costs.prefill_attention(AttentionShape(32, 8, 128, None, "fp8"))
    with pytest.raises(Unsupported, match="no moe cost for mxfp4"):
        costs.moe_s(1, MoeLayer(2880, 2880, 4, 32, dtype="mxfp4"))
    with pytest.raises(Unsupported, match="no all_reduce cost for nccl_3; it has: custom_2"):
        costs.collective_s("all_reduce", 3, 1e6)


def test_estimates_and_extrapolation_are_marked():
    costs = COSTS["h100-sxm"]
    assert costs.evidence("gemm", "bf16") == "fitted"
    assert costs.evidence("elementwise", "any") == "estimated"
    assert costs.evidence("moe", "fp8") == "estimated"
    assert COSTS["h200-sxm"].evidence("moe", "fp8") == "fitted"
    outside = costs.extrapolated("gemm", "bf16", m=np.array([1, 40000]), n=4096, k=4096)
    np.testing.assert_array_equal(outside, [False, True])
    assert costs.extrapolated("prefill_attention", "bf16_d128", chunk=512, history=1)
    assert not costs.extrapolated("prefill_attention", "bf16_d128", chunk=512, history=0)


def test_sustained_clocks_slow_large_products_only():
    burst, held = BURST["h200-sxm"], COSTS["h200-sxm"]
    m = np.array([1, 64, 128, 512, 2048])
    ratio = held.gemm_s(m, 8192, 8192, "bf16") / burst.gemm_s(m, 8192, 8192, "bf16")
    np.testing.assert_allclose(ratio[:3], 1, atol=0.02)
    assert (ratio[3:] > 1.05).all()
    assert (ratio < 1.25).all()


@pytest.mark.parametrize("name", NAMES)
def test_more_rows_rarely_cost_less(name):
    """Tiles make small steps down; over the served shapes at most one in twenty is larger than 1 %."""
    m = np.unique(np.geomspace(1, 8192, 60).astype(int))
    falls = []
    for n, k in [(6144, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 28672), (2560, 5120)]:
        seconds = BURST[name].gemm_s(m, n, k, "bf16")
        falls.append(np.diff(seconds) < -0.01 * seconds[1:])
    assert np.mean(falls) <= 0.05
