"""Cost forms: arithmetic by hand, limits, and the fast paths against the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim.costs.attention import interpolate
from apexsim.costs.collectives import CollectiveTable, clean_points, thin_points
from apexsim.costs.forms import decode, gemm, moe, prefill, routing, small
from apexsim.costs.forms.hardware import Hardware, pnorm
from apexsim.costs.forms.residual import LogGrid
from apexsim.costs.forms.scalar import SCALAR
from apexsim.specs.device import Points, ResidualGrid

# Round numbers: 100 TFLOP/s, 1 TB/s, 100 multiprocessors, 10 MB of L2.
HW = Hardware(100e12, 1e12, 100, 10e6)


def starts(coefficients, **fixed):
    return {c.name: c.start for c in coefficients} | fixed


GEMM = starts([*gemm.COEFFICIENTS, gemm.SPLIT])
PREFILL = starts([*prefill.COEFFICIENTS, prefill.WINDOW_EFFICIENCY], query_tile=128.0, causal_skip=1.0)
DECODE = starts(decode.COEFFICIENTS, split_ungrouped=1.0)
MOE = starts(moe.COEFFICIENTS)


def test_gemm_roofline_by_hand():
    thin = gemm.GemmShape(np.array([1.0]), np.array([4096.0]), np.array([4096.0]), 2.0, 2.0)
    weights, activations = 2 * 4096 * 4096, 2 * 4096 + 2 * 4096
    assert gemm.roofline_s(thin, HW) == pytest.approx((weights + activations) / 1e12)
    wide = gemm.GemmShape(np.array([8192.0]), np.array([4096.0]), np.array([4096.0]), 2.0, 2.0)
    assert gemm.roofline_s(wide, HW) == pytest.approx(2 * 8192 * 4096 * 4096 / 100e12)


def test_gemm_of_one_full_wave_by_hand():
    """100 tiles of 128 x 128 on 100 multiprocessors, so deep that the work of a tile is all that counts."""
    c = GEMM | {"compute_efficiency": 0.5, "launch_s": 0.0, "wave_s": 0.0, "sharpness": 13.0, "throttle": 0.0}
    del c["split_s"]
    seconds = gemm.gemm_s(gemm.GemmShape(np.float64(1280), np.float64(1280), np.float64(65536), 2.0, 2.0), c, HW)
    assert seconds == pytest.approx(2 * 1280 * 1280 * 65536 / (100e12 * 0.5), rel=0.1)


@given(m=st.integers(1, 10000), n=st.integers(32, 60000), k=st.integers(32, 30000))
def test_gemm_race_finds_the_fastest_tile(m, n, k):
    shape = gemm.GemmShape(np.float64(m), np.float64(n), np.float64(k), 2.0, 2.0)
    terms, extra = gemm._candidates(shape, GEMM, HW, True)
    every = pnorm([np.broadcast_to(t, extra.shape) for t in terms], GEMM["sharpness"]) + extra
    assert gemm._best_s(shape, GEMM, HW, True) == pytest.approx(every.min(), rel=1e-12)


def test_replayed_weights_are_faster_only_when_they_fit_in_cache():
    little, large = (gemm.GemmShape(np.float64(1), np.float64(n), np.float64(1024), 2.0, 2.0) for n in (512, 65536))
    assert gemm.gemm_s(little, GEMM, HW, cold=False) < 0.9 * gemm.gemm_s(little, GEMM, HW)
    assert gemm.gemm_s(large, GEMM, HW, cold=False) == pytest.approx(gemm.gemm_s(large, GEMM, HW), rel=1e-3)


@given(
    terms=st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=4),
    sharpness=st.floats(1, 13),
)
def test_pnorm_is_a_smooth_maximum(terms, sharpness):
    value = pnorm([np.float64(t) for t in terms], sharpness)
    assert max(terms) * (1 - 1e-12) <= value <= max(terms) * len(terms) ** (1 / sharpness) * (1 + 1e-12)


@given(chunk=st.integers(1, 60), history=st.integers(0, 60), window=st.one_of(st.none(), st.integers(1, 80)))
def test_causal_pairs_count(chunk, history, window):
    counted = sum(min(history + i, window or 10**9) for i in range(1, chunk + 1))
    assert prefill.causal_pairs(float(chunk), float(history), window, SCALAR) == counted
    assert prefill.causal_pairs(np.array([float(chunk)]), np.array([float(history)]), window) == counted


@given(chunk=st.integers(1, 20000), history=st.integers(0, 200000), window=st.one_of(st.none(), st.just(128)))
def test_prefill_scalar_equals_arrays(chunk, history, window):
    bound = prefill.bind(prefill.Heads(32, 8, 128, window, 2.0), PREFILL, HW)
    one = prefill.prefill_s(prefill.Chunks(chunk, history), bound, SCALAR)
    many = prefill.prefill_s(prefill.Chunks(np.array([float(chunk)]), np.array([float(history)])), bound)
    assert one[0] == pytest.approx(float(many[0][0]), rel=1e-9)
    assert one[1] == pytest.approx(float(many[1][0]), rel=1e-9)


def test_prefill_grows_with_history_and_shrinks_with_a_window():
    full, sliding = (prefill.bind(prefill.Heads(32, 8, 128, w, 2.0), PREFILL, HW) for w in (None, 128))
    histories = np.arange(0, 32768, 512.0)
    chunks = prefill.Chunks(np.full_like(histories, 512), histories)
    assert (np.diff(prefill.prefill_s(chunks, full)[0]) > 0).all()
    assert (prefill.prefill_s(chunks, sliding)[0][1:] < prefill.prefill_s(chunks, full)[0][1:]).all()


def test_a_kernel_that_skips_nothing_behind_a_history_pays_for_the_rectangle():
    chunk, history = 4096.0, 16.0
    heads = prefill.Heads(32, 8, 128, None, 2.0)
    skips, computes = (
        prefill.prefill_s(
            prefill.Chunks(chunk, history), prefill.bind(heads, PREFILL | {"causal_skip": s}, HW), SCALAR
        )[0]
        for s in (1.0, 0.0)
    )
    assert 1.6 < computes / skips < 2.1


def test_decode_cold_reads_all_keys_from_memory():
    shape = decode.DecodeShape(4.0, np.array([1024.0]), 32.0, 8.0, 128.0, 2.0)
    keys_and_values = 2 * 2 * 4 * 8 * 1024 * 128
    assert decode.moved_bytes(shape)[0] == keys_and_values + 4 * 4 * 32 * 128
    hot, cold = (decode.decode_s(shape, DECODE, HW, cold=cold)[0] for cold in (False, True))
    assert cold > decode.moved_bytes(shape)[0] / 1e12
    large = shape._replace(keys=np.array([1e6]))
    assert decode.decode_s(large, DECODE, HW, cold=False) == pytest.approx(decode.decode_s(large, DECODE, HW), rel=1e-6)
    assert hot < cold


@given(experts=st.sampled_from([8, 16, 128, 512]), topk=st.integers(1, 8), alpha=st.sampled_from([1.01, 1.2]))
def test_every_token_picks_topk_experts(experts, topk, alpha):
    chances = routing.pick_chances(experts, topk, alpha)
    assert chances.sum() == pytest.approx(topk)
    assert (chances > 0).all()
    assert (chances <= 1 + 1e-12).all()
    touched = routing.touched_experts(np.array([1.0, 2.0, 8.0, 64.0, 4096.0]), experts, topk, alpha)
    assert touched[0] == pytest.approx(topk)
    assert (np.diff(touched) >= 0).all()
    assert touched[-1] <= experts


def test_balanced_routing_touches_as_many_experts_as_it_can():
    np.testing.assert_array_equal(routing.touched_experts([1, 4, 16, 1000], 128, 8, 0.0), [8, 32, 128, 128])


def test_moe_pays_for_the_experts_touched():
    def seconds(active):
        shape = moe.MoeShape(16.0, 4096.0, 1536.0, 8.0, 128.0, 1.0, 3.0, active, 128.0)
        return float(moe.moe_s(shape, 2.0, MOE, HW))

    one = 3 * 4096 * 1536 * 2 / (1e12 * MOE["memory_efficiency"])
    assert seconds(100.0) - seconds(50.0) == pytest.approx(50 * one, rel=0.05)


def test_sampler_has_a_knee():
    c = {"launch_s": 1e-5, "passes": 1.0, "extra_passes": 3.0, "knee_l2_share": 0.5}
    first, second, third, fourth = small.sampling_s(np.array([1, 2, 100, 101]), 128000, c, HW)
    assert second - first == pytest.approx(4 * 128000 / 1e12)
    assert fourth - third == pytest.approx(4 * (4 * 128000 / 1e12))


GRID = ResidualGrid(axes={"a": (1.0, 10.0), "b": (1.0, 4.0, 16.0)}, percent=((0, 10, 20), (100, -10, 0)))


def test_residual_is_exact_at_knots_linear_in_logs_and_clamped():
    grid = LogGrid.of(GRID)
    assert grid.log_factor(10.0, 4.0) == pytest.approx(-0.1)
    assert grid.log_factor(1.0, 2.0) == pytest.approx(0.05)
    assert grid.log_factor(0.001, 1e9) == pytest.approx(0.2)
    middle = np.sqrt(10.0)
    assert grid.log_factor(middle, 1.0) == pytest.approx(0.5)
    line = grid.along_last([middle])
    points = np.array([0.5, 1, 2, 3, 5, 16, 99])
    np.testing.assert_allclose(line.log_factor(points), grid.log_factor(middle, points))


def test_a_grid_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="percent must be 2 rows of 3"):
        ResidualGrid(axes=GRID.axes, percent=((0, 1), (2, 3)))
    with pytest.raises(ValueError, match="ascend"):
        ResidualGrid(axes={"a": (2.0, 1.0)}, percent=((0, 1),))


@given(x=st.floats(-5, 5))
def test_interpolate_is_numpys(x):
    knots, values = [-2.0, 0.0, 1.0, 3.0], [1.0, -1.0, 4.0, 2.0]
    assert interpolate(x, (knots, values)) == pytest.approx(float(np.interp(x, knots, values)), abs=1e-12)


def test_collectives_are_exact_at_points_flat_below_and_linear_beyond():
    table = CollectiveTable(Points(bytes=(1024, 2048, 4096), seconds=(1e-6, 2e-6, 3e-6)))
    np.testing.assert_allclose(table([1024, 2048, 4096]), [1e-6, 2e-6, 3e-6])
    assert table(1) == pytest.approx(1e-6)
    assert table(4096 + 2048 * 10) == pytest.approx(13e-6)


@given(st.lists(st.floats(1e-6, 1e-3), min_size=2, max_size=12))
def test_cleaned_points_never_fall(seconds):
    kept, dropped = clean_points([(float(2**i), s) for i, s in enumerate(seconds)])
    assert len(kept) + dropped == len(seconds)
    assert [s for _, s in kept] == sorted(s for _, s in kept)
    assert kept[-1] == (float(2 ** (len(seconds) - 1)), seconds[-1])


@given(st.lists(st.floats(1e-6, 1e-3), min_size=2, max_size=12))
def test_thinned_points_give_the_others_back(seconds):
    points = [(float(4**i), s) for i, s in enumerate(sorted(seconds))]
    kept = thin_points(points)
    assert {points[0], points[-1]} <= set(kept)
    table = CollectiveTable(Points(bytes=[int(b) for b, _ in kept], seconds=[s for _, s in kept]))
    np.testing.assert_allclose(table([b for b, _ in points]), [s for _, s in points], rtol=0.0101)


@given(
    st.sampled_from([8, 64, 128, 256]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0.0, 1.01]),
    st.integers(1, 9999),
)
def test_the_fullest_device_has_its_share_at_least_and_all_at_most(experts, ep, alpha, tokens):
    load = routing.fullest_device(tokens, experts, 2, ep, alpha)
    touched = routing.touched_experts(float(tokens), experts, 2, alpha)
    assert touched / ep * (1 - 1e-6) <= load.active <= min(experts / ep, touched) * (1 + 1e-6) or load.active == 1
    assert 2 * tokens / ep * (1 - 1e-6) <= load.rows <= 2 * tokens
