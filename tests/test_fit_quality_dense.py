"""Products and attention of the shipped profiles: how good the fits are, on rows that were kept out of them.

Where a device stays behind the common limits, its own stand here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms.residual import LogGrid
from apexsim.fitting import gemm, layers
from apexsim.fitting.facts import devices, hardware
from apexsim.fitting.gaps import launch_gap_s
from apexsim.fitting.inside import combined
from apexsim.fitting.problems import fit_all_rows, predicted_s
from apexsim.plots import plot_fit
from apexsim.specs.device import ResidualGrid

HOPPER = ("h100-sxm", "h200-sxm")
BLACKWELL = ("b200-sxm", "b300-sxm", "gb200", "gb300")
OWN = ("a100-sxm", *HOPPER, *BLACKWELL, "l40s", "rtx-pro-6000")
PROFILES = {name: catalog.load("device", name) for name in (*OWN, "rtx-4090")}
KV = [(name, "bf16") for name in OWN] + [(name, "fp8") for name in OWN if name != "a100-sxm"]


def check(name, kind, key, score, limits):
    """Median and 90th percentile of a score stay within the limits."""
    found = PROFILES[name].operators[kind][key].quality[score]
    told = f"{name} {kind} {key} {score}: {found.median:.1%} / {found.p90:.1%}, {found.rows} rows"
    assert found.median <= limits[0], told
    assert found.p90 <= limits[1], told


@pytest.mark.parametrize("name", OWN)
def test_bf16_products_of_models_kept_out(name):
    limits = {"a100-sxm": (0.05, 0.14), "l40s": (0.08, 0.20), "gb200": (0.055, 0.14)}
    check(name, "gemm", "bf16", "served_shapes", limits.get(name, (0.053, 0.135)))


@pytest.mark.parametrize("name", [name for name in OWN if name != "a100-sxm"])
def test_small_products_of_models_kept_out(name):
    check(name, "gemm", "fp8", "served_shapes", (0.10, 0.27) if name == "l40s" else (0.067, 0.18))
    block = {"l40s": (0.06, 0.28), **dict.fromkeys(BLACKWELL, (0.04, 0.09))}
    check(name, "gemm", "fp8_block", "served_shapes", block.get(name, (0.066, 0.215)))
    if "nvfp4" in PROFILES[name].operators["gemm"]:
        check(name, "gemm", "nvfp4", "served_shapes", (0.065, 0.18))


@pytest.mark.parametrize("name", ["a100-sxm", *HOPPER, *BLACKWELL])
def test_products_of_more_rows_than_any_fitted(name):
    check(name, "gemm", "bf16", "largest", (0.065, 0.15))


def test_layers_of_another_laboratory_off_the_grid():
    check("rtx-pro-6000", "gemm", "bf16", "sum_of_vllm_layers", (0.04, 0.11))


def test_what_products_and_decodes_take_inside_layers_of_models_kept_out():
    """Both are corrected by layers of a few models; the layers of each were predicted from those of the others."""
    for kind, key, models, limits in (
        ("gemm", "bf16", 2, (0.045, 0.12)),
        ("decode_attention", "bf16_d128", 3, (0.045, 0.14)),
    ):
        names = [name for name in PROFILES["rtx-pro-6000"].operators[kind][key].quality if "in_layers_" in name]
        assert len(names) == models
        for name in names:
            check("rtx-pro-6000", kind, key, name, limits)


def test_two_corrections_are_one():
    first = ResidualGrid(axes={"n": (2.0, 32.0), "m": (1.0, 16.0)}, percent=((0, 10), (20, 30)))
    second = ResidualGrid(axes={"n": (8.0,), "m": (1.0, 4.0, 64.0)}, percent=((4, -6, 8),))
    both = combined(first, second)
    assert both.axes == {"n": (2.0, 8.0, 32.0), "m": (1.0, 4.0, 16.0, 64.0)}
    for at in ((1.0, 1.0), (2.0, 4.0), (8.0, 16.0), (32.0, 30.0), (100.0, 500.0)):
        apart = LogGrid.of(first).log_factor(*at) + LogGrid.of(second).log_factor(*at)
        assert LogGrid.of(both).log_factor(*at) == pytest.approx(apart, abs=0.0101)


def test_a_kernel_of_a_graph_starts_less_than_a_microsecond_after_the_last(data):
    assert launch_gap_s(data / "kernels") == pytest.approx(0.78e-6)


def test_products_and_attention_from_timed_layers_alone():
    """The RTX 4090 has no tables but its layers: its bf16 operators are fitted on them, the others carried over."""
    operators = PROFILES["rtx-4090"].operators
    for kind, key in (("gemm", "bf16"), ("prefill_attention", "bf16_d128"), ("decode_attention", "bf16_d128")):
        assert operators[kind][key].evidence == "fitted"
        assert operators[kind][key].source.startswith("vllm_layers/RTX4090")
    assert operators["gemm"]["fp8"].evidence == operators["prefill_attention"]["bf16_d64"].evidence == "estimated"
    check("rtx-4090", "gemm", "bf16", "served_shapes", (0.03, 0.09))
    check("rtx-4090", "gemm", "bf16", "largest", (0.025, 0.05))
    check("rtx-4090", "gemm", "bf16", "sum_of_vllm_layers", (0.02, 0.045))
    check("rtx-4090", "prefill_attention", "bf16_d128", "random", (0.03, 0.07))
    check("rtx-4090", "prefill_attention", "bf16_d128", "largest", (0.05, 0.08))
    check("rtx-4090", "decode_attention", "bf16_d128", "random", (0.04, 0.12))
    check("rtx-4090", "decode_attention", "bf16_d128", "largest", (0.025, 0.04))


@pytest.mark.parametrize(("name", "kv_dtype"), KV)
def test_prompts(name, kv_dtype):
    key, bf16 = f"{kv_dtype}_d128", kv_dtype == "bf16"
    check(name, "prefill_attention", key, "random_served_full", (0.055, 0.17) if bf16 else (0.066, 0.21))
    check(name, "prefill_attention", key, "served_shapes", (0.06, 0.19) if bf16 else (0.07, 0.215))
    check(name, "prefill_attention", key, "largest", (0.045, 0.12))


@pytest.mark.parametrize(("name", "kv_dtype"), KV)
def test_decodes_of_cold_caches(name, kv_dtype):
    key = f"{kv_dtype}_d128"
    limits = {"a100-sxm": (0.04, 0.10), "rtx-pro-6000": (0.04, 0.14), "l40s": (0.065, 0.16)}
    check(name, "decode_attention", key, "random_served_cold", limits.get(name, (0.035, 0.12)))
    if name in (*HOPPER, *BLACKWELL):
        check(name, "decode_attention", key, "largest", (0.048, 0.13))


@pytest.mark.parametrize("name", ["h200-sxm", "b200-sxm", "gb200"])
def test_sustained_clocks_come_from_long_replays(name):
    sustained = PROFILES[name].sustained
    assert sustained.evidence == "fitted"
    assert 1.05 < max(sustained.factors) < 1.25
    costs, burst = OperatorCosts(PROFILES[name]), OperatorCosts(PROFILES[name], sustained=False)
    slower = float(costs.gemm_s(4096, 8192, 8192, "bf16") / burst.gemm_s(4096, 8192, 8192, "bf16"))
    assert slower == pytest.approx(np.interp(4096, sustained.tokens, sustained.factors), rel=1e-6)
    for dtype in sustained.unaffected:
        assert float(costs.sustained_factor(4096.0, dtype)) == 1


def test_nothing_is_slowed_down_without_evidence():
    for name in ("a100-sxm", "l40s", "rtx-pro-6000", "rtx-4090"):
        assert PROFILES[name].sustained.factors == (1.0,)


def test_a_refit_of_products_gives_the_shipped_ones_again(data):
    """The smallest fit there is: weights of 8 bits on A100."""
    table = next(table for table in gemm.tables_for("a100_sxm") if table.dtype == "int8_wo")
    problem = gemm.problem(data / "kernels" / "datacenter" / table.folder / f"{table.name}.parquet", table.dtype)
    c, grid = fit_all_rows(problem)
    shipped = PROFILES["a100-sxm"].operators["gemm"]["int8_wo"]
    assert shipped.rows_used == len(problem.frame)
    first, second = predicted_s(problem, c, grid), predicted_s(problem, shipped.coefficients, shipped.residual)
    np.testing.assert_allclose(first, second, rtol=0.05)


def test_layer_sums_know_a_layer(data):
    """The shipped products of the RTX PRO 6000 give the shipped score again."""
    op = PROFILES["rtx-pro-6000"].operators["gemm"]["bf16"]
    folder = data / "kernels" / "vllm_layers" / layers.TIMED["rtx_pro_6000_server"]
    found = layers.layer_sums(folder, op.coefficients, op.residual, hardware("rtx_pro_6000_server", "bf16"))
    assert found["sum_of_vllm_layers"].rows == 608
    assert found["sum_of_vllm_layers"].median == pytest.approx(op.quality["sum_of_vllm_layers"].median, abs=1e-3)


def test_dtypes_follow_tensor_cores():
    for name, known in devices().items():
        dtypes = set(PROFILES[name].operators["gemm"])
        assert ("nvfp4" in dtypes) == ("nvfp4" in known.datasheet.flops_per_s)
        assert ("fp8" in dtypes) == ("fp8" in known.datasheet.flops_per_s)
        assert {"bf16", "int4_wo", "int8_wo"} <= dtypes


def test_a_fit_is_drawn(tmp_path):
    seconds = np.geomspace(1e-6, 1e-3, 40)
    rows = pd.DataFrame({"m": np.arange(1.0, 41.0), "measured_s": seconds, "predicted_s": seconds * 1.1})
    plot_fit(rows, tmp_path / "fit.png", title="a fit", size="m")
    assert (tmp_path / "fit.png").stat().st_size > 5000
