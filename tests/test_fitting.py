"""Fitting: tables at the door, cleaning rules, recovery of known truths, and one real refit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog
from apexsim.costs.forms.hardware import Coefficient, Hardware
from apexsim.costs.forms.residual import LogGrid
from apexsim.errors import BadInput
from apexsim.fitting import attention, cleaning, facts, moe, pipeline, routing, served
from apexsim.fitting.fit import fit_coefficients, fit_residual
from apexsim.fitting.problems import fit_all_rows
from apexsim.fitting.tables import data_root, read_table

LINE = (
    Coefficient("fixed_s", 1e-6, 1e-8, 1e-4, "intercept"),
    Coefficient("per_item_s", 1e-6, 1e-9, 1e-4, "slope"),
)
ITEMS = np.arange(1.0, 200.0)


def line(c):
    return c["fixed_s"] + c["per_item_s"] * ITEMS


def test_a_missing_column_names_file_and_column(tmp_path):
    path = tmp_path / "gemm.parquet"
    pd.DataFrame({"m": [1], "latency_us": [2.0]}).to_parquet(path)
    with pytest.raises(BadInput, match=r"gemm\.parquet: n: the table lacks it; it has: m, latency_us"):
        read_table(path, ["m", "n", "latency_us"])


def test_a_number_that_is_none_names_its_row(tmp_path):
    path = tmp_path / "gemm.parquet"
    pd.DataFrame({"m": [1.0, None]}).to_parquet(path)
    with pytest.raises(BadInput, match="m: got 'nan'; row 1 is not a number"):
        read_table(path, ["m"])


def test_an_unreadable_table_and_a_missing_folder(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("not parquet")
    with pytest.raises(BadInput, match="not a readable parquet table"):
        read_table(path, ["m"])
    with pytest.raises(BadInput, match="no such table"):
        read_table(tmp_path / "y.parquet", ["m"])
    with pytest.raises(BadInput, match="APEXSIM_DATA"):
        data_root(tmp_path)


def test_an_unknown_device_is_named(tmp_path):
    with pytest.raises(BadInput, match="did you mean h100-sxm"):
        pipeline.fit_device("h100", tmp_path)


def test_isolated_slow_rows_are_dropped_and_counted():
    frame = pd.DataFrame({"n": 1.0, "m": [1.0, 2.0, 4.0, 100.0, 4096.0], "seconds": [2.0, 1.0, 1.0, 1.2, 1.3]})
    kept, dropped = cleaning.clean(frame, [cleaning.slower_than_larger(["n"], "m")])
    assert kept["m"].tolist() == [2.0, 4.0, 100.0, 4096.0]
    assert list(dropped.values()) == [1]


def test_a_slow_row_of_another_shape_or_a_far_larger_size_says_nothing():
    frame = pd.DataFrame({"n": [1.0, 2.0, 2.0], "m": [8.0, 9.0, 64.0], "seconds": [9.0, 4.0, 1.0]})
    kept, dropped = cleaning.clean(frame, [cleaning.slower_than_larger(["n"], "m")])
    assert len(kept) == 3
    assert dropped == {}


def test_rows_far_slower_than_on_a_lesser_device_are_dropped():
    kin = pd.DataFrame({"m": [1.0, 2.0, 2.0], "seconds": [1.0, 1.0, 1.0]})
    frame = pd.DataFrame({"m": [1.0, 2.0, 3.0], "seconds": [1.2, 1.3, 9.0]})
    kept, dropped = cleaning.clean(frame, [cleaning.slower_than_kin(kin, ["m"])])
    assert kept["m"].tolist() == [1.0, 3.0]
    assert list(dropped.values()) == [1]


def test_rows_that_beat_the_roofline_are_dropped():
    frame = pd.DataFrame({"seconds": [0.9, 0.99, 2.0]})
    kept, dropped = cleaning.clean(frame, [cleaning.faster_than(lambda rows: np.ones(len(rows)))])
    assert kept["seconds"].tolist() == [0.99, 2.0]
    assert dropped == {"faster than the roofline by over 5%": 1}


def test_served_shapes_hold_a_known_layer():
    assert {(6144, 4096), (28672, 4096), (4096, 14336), (1280, 8192), (128256, 4096)} <= served.gemm_shapes()
    assert {(32, 8), (8, 1), (64, 4)} <= served.head_shapes()
    assert (4096, 14336, 2, 8) in served.expert_shapes()


def test_coefficients_are_recovered_within_bounds():
    measured = line({"fixed_s": 3e-6, "per_item_s": 2e-7})
    found = fit_coefficients(line, measured, np.ones_like(ITEMS), LINE, {"constant": 7.0})
    assert found["fixed_s"] == pytest.approx(3e-6, rel=1e-3)
    assert found["per_item_s"] == pytest.approx(2e-7, rel=1e-3)
    assert found["constant"] == 7.0
    tight = (LINE[0], LINE[1]._replace(low=5e-7))
    assert fit_coefficients(line, measured, np.ones_like(ITEMS), tight, {})["per_item_s"] >= 5e-7


def test_a_tenth_of_outliers_does_not_move_the_fit():
    measured = line({"fixed_s": 3e-6, "per_item_s": 2e-7})
    measured[::10] *= 3
    found = fit_coefficients(line, measured, np.ones_like(ITEMS), LINE, {})
    np.testing.assert_allclose(line(found), line({"fixed_s": 3e-6, "per_item_s": 2e-7}), rtol=0.03)


def test_the_residual_follows_a_smooth_error_and_stays_flat_without_one():
    rng = np.random.default_rng(0)
    x, y = np.exp(rng.uniform(0, 5, (2, 4000)))
    knots = {"x": (1.0, 3.0, 10.0, 30.0, 148.0), "y": (1.0, 12.0, 148.0)}
    error = 0.1 * np.log(x) / 5 - 0.05
    grid = fit_residual(error + rng.normal(0, 0.02, 4000), np.ones(4000), [x, y], knots)
    assert np.abs(LogGrid.of(grid).log_factor(x, y) - error).mean() < 0.01
    flat = fit_residual(np.zeros(4000), np.ones(4000), [x, y], knots)
    assert {value for row in flat.percent for value in row} == {0}


def test_every_device_has_facts_that_agree_with_its_profile():
    for name, known in facts.devices().items():
        profile = catalog.load("device", name)
        assert (profile.datasheet, profile.price) == (known.datasheet, known.price)


def test_half_the_experts_of_group_limited_routing_are_read(data):
    kernel = next(k for k in moe.kernels_of("h100_sxm") if k.dtype == "fp8_block")
    hw = Hardware.of(facts.devices()["h100-sxm"].datasheet, "fp8_block")
    problem = moe.problem(data / "kernels" / "datacenter", kernel, hw)
    grouped = (problem.frame["hidden"] == 7168) & (problem.frame["experts"] == 256)
    rows = problem.frame[grouped & (problem.frame["routing"] == "balanced")]
    assert rows.loc[rows["ep"] == 1, "active"].max() == 128
    assert (rows.loc[rows["ep"] == 8, "local"] == (rows.loc[rows["ep"] == 8, "tokens"] * 2).clip(lower=1)).all()
    assert problem.frame["active"].max() > 128


def test_a_refit_gives_the_shipped_operator_again(data):
    """The A100 decode fit: same tables, same coefficients (a tolerance for other linear algebra libraries)."""
    table = data / "kernels" / "datacenter" / "a100_sxm" / "generation_attention.parquet"
    problem = attention.decode_problem(table, attention.Heads("bf16", 128, facts.hardware("a100_sxm", "bf16")))
    first, second = fit_all_rows(problem), fit_all_rows(problem)
    assert first == second
    shipped = catalog.load("device", "a100-sxm").operators["decode_attention"]["bf16_d128"]
    again, was = (problem.predict(problem.frame, c) for c in (first[0], shipped.coefficients))
    np.testing.assert_allclose(again, was, rtol=0.01)
    difference = np.array(first[1].percent) - np.array(shipped.residual.percent)
    assert np.abs(difference).max() <= 2
    assert shipped.rows_used == len(problem.frame)


def test_the_timed_device_of_a_power_law_has_what_the_collector_gave_it():
    """Every expert once where there are fewer picks than experts; the fullest of ep groups; no token twice."""
    for tokens, ep in ((1, 1), (4, 1), (64, 4), (4096, 8)):
        load = routing.timed_device(tokens, 128, 8, ep, 1.01)
        assert 8 * tokens / ep <= load.rows <= 8 * tokens
        assert load.active <= min(128 // ep, load.rows)
    assert routing.timed_device(1, 128, 8, 1, 1.01).active == 8
    assert routing.timed_device(64, 128, 8, 4, 0.0) == (32, 128)
    assert routing.timed_device(16, 128, 8, 4, 1.2).rows > routing.timed_device(16, 128, 8, 4, 1.01).rows > 32
