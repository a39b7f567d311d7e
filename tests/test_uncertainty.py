"""Intervals of results: what kernels leave open, what measured runs do, and that groups left out lie inside."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apexsim import catalog, deployment, simulate, workload
from apexsim.cli.main import main
from apexsim.costs.fitted import NORMAL_P90, UNSCORED_SPREAD, OperatorCosts
from apexsim.errors import BadInput
from apexsim.fitting.relatives import Sheet, carried
from apexsim.results import SimulationResult
from apexsim.specs.device import HoldOut
from apexsim.uncertainty import (
    ANY,
    FIGURES,
    IntervalTable,
    Residuals,
    interval,
    kernel_spread,
    read_table,
    shipped_table,
)
from apexsim.usage import Usage
from apexsim.validation.intervals import (
    COLUMNS,
    PROBABILITIES,
    Group,
    calibrate_intervals,
    read_rows,
    residuals_of,
    weighted_quantiles,
)

H100 = catalog.load("device", "h100-sxm")


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    requests = workload("chat", requests=40, rate_per_s=4.0)
    return simulate(deployment(model="llama-3.1-8b", device="h100-sxm"), requests)


# -- kernels ---------------------------------------------------------------------------------------------------------


def test_operators_add_up_in_quadrature() -> None:
    """Two operators of 3 s and 1 s, off by 10 % and 40 %: 0.3 and 0.4 s of 4 s make 0.5 s."""
    seconds = {"gemm": {"fitted": 2.0, "extrapolated": 1.0}, "moe": {"estimated": 1.0}}
    assert kernel_spread(Usage(seconds=seconds, spread_s={"gemm": 0.3, "moe": 0.4})) == pytest.approx(0.5 / 4)
    assert math.isnan(kernel_spread(Usage()))


def test_spread_is_that_of_the_best_hold_out() -> None:
    gemm = H100.operators["gemm"]["bf16"]
    costs = OperatorCosts(H100)
    assert costs.spread("gemm", "bf16") == pytest.approx(gemm.quality["served_shapes"].p90 / NORMAL_P90)

    def spread(**quality: HoldOut) -> float:
        op = gemm.model_copy(update={"quality": quality})
        return OperatorCosts(H100.model_copy(update={"operators": {"gemm": {"bf16": op}}})).spread("gemm", "bf16")

    assert spread(leave_one_out=HoldOut(0.1, 0.329, 9)) == pytest.approx(0.2)
    assert spread(random=HoldOut(0.1, 0.1645, 9), served_shapes=HoldOut(0.1, 0.329, 9)) == pytest.approx(0.2)
    assert spread() == UNSCORED_SPREAD


def test_a_run_sums_the_spread_of_its_operators(result: SimulationResult) -> None:
    usage = result.usage
    assert usage.spread_s.keys() == usage.seconds.keys()
    costs = OperatorCosts(H100)
    for kind, key in (("gemm", "bf16"), ("prefill_attention", "bf16_d128"), ("decode_attention", "bf16_d128")):
        assert usage.spread_s[kind] == pytest.approx(costs.spread(kind, key) * sum(usage.seconds[kind].values()))
    assert usage.spread_s["host"] == 0
    assert 0.01 < kernel_spread(usage) < 0.2


def test_a_device_from_a_datasheet_is_less_certain() -> None:
    """Its operators carry the errors of devices left out, or the assumed spread where nothing was scored."""
    measured = [catalog.load("device", name) for name in ("h100-sxm", "h200-sxm")]
    guess = carried(Sheet.of(H100).model_copy(update={"generation": "other"}), "guess", measured)
    quality = {"generation_left_out": HoldOut(0.2, 0.5, 9), "served_shapes": HoldOut(0.01, 0.02, 9)}
    gemm = guess.operators["gemm"]["bf16"].model_copy(update={"quality": quality})
    profile = guess.model_copy(update={"operators": {**guess.operators, "gemm": {"bf16": gemm}}})
    assert OperatorCosts(profile).spread("gemm", "bf16") == pytest.approx(0.5 / NORMAL_P90)
    assert OperatorCosts(guess).spread("gemm", "bf16") == UNSCORED_SPREAD


# -- the interval of a result ----------------------------------------------------------------------------------------


def table(*residuals: Residuals, devices: tuple[str, ...] = ("h100-sxm",)) -> IntervalTable:
    return IntervalTable(source="made up", devices=devices, probabilities=(0.0, 1.0), residuals=residuals)


def residuals(engine: str = "vllm", kind: str = "dense", *, groups: int = 20, reach: float = 1.0) -> Residuals:
    return Residuals(
        engine=engine, model_kind=kind, figure="tpot_s", groups=groups, rows=groups, median=0.1, spread=(0.0, reach)
    )


def test_measured_runs_widen_what_kernels_leave_open(result: SimulationResult) -> None:
    found = interval(result, 1.0, "tpot_s", 0.8, table(residuals()))
    assert found is not None
    reach = 0.8 * 21 / 20
    assert (found.low, found.high) == pytest.approx((math.exp(0.1 - reach), math.exp(0.1 + reach)))
    assert "20 groups of measured runs, vllm, dense models" in found.basis
    assert "none on" not in found.basis


def test_kernels_hold_where_measured_runs_say_less(result: SimulationResult) -> None:
    sigma = kernel_spread(result.usage)
    exact = residuals(reach=0.0).model_copy(update={"median": 0.0})
    found = interval(result, 2.0, "tpot_s", 0.8, table(exact))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-1.28155 * sigma), 2 * math.exp(1.28155 * sigma)))


def test_a_class_that_is_too_small_gives_way_and_says_so(result: SimulationResult) -> None:
    small, wide = residuals(groups=5, reach=0.2), residuals(ANY, groups=30, reach=0.5)
    found = interval(result, 1.0, "tpot_s", 0.8, table(small, wide))
    assert found is not None
    assert "30 groups of measured runs, any engine, dense models" in found.basis
    six = table(residuals(groups=6, reach=0.2))
    alone = interval(result, 1.0, "tpot_s", 0.85, six)  # its worst row will do
    assert alone is not None
    assert "6 groups" in alone.basis
    for level, known in ((0.9, six), (0.8, table(small))):
        nothing = interval(result, 1.0, "tpot_s", level, known)
        assert nothing is not None
        assert "too few measured runs are like it" in nothing.basis
    other_kind = interval(result, 1.0, "tpot_s", 0.8, table(residuals(kind="mla")))
    assert other_kind is not None
    assert "too few measured runs are like it" in other_kind.basis


def test_a_higher_level_is_never_narrower() -> None:
    """Also where it rests on a wider class, whose runs scatter less."""
    shipped = table(residuals(groups=6, reach=3.0), residuals(ANY, groups=9, reach=0.3), residuals(ANY, ANY, groups=40))
    ranges = [shipped.range_of("tpot_s", level, "vllm", "dense") for level in np.linspace(0.05, 0.95, 19)]
    known = [found for found in ranges if found]
    assert len({found[2] for found in known}) == 3
    for narrow, wide in itertools.pairwise(known):
        assert wide[0] <= narrow[0]
        assert wide[1] >= narrow[1]


def test_a_device_that_was_not_measured_is_named(result: SimulationResult) -> None:
    found = interval(result, 1.0, "tpot_s", 0.8, table(residuals(), devices=("a100-sxm",)))
    assert found is not None
    assert found.basis.endswith("none on h100-sxm")


def test_every_result_has_its_intervals(result: SimulationResult) -> None:
    summary = result.summary()
    said = summary["uncertainty"]
    assert said["level"] == 0.8
    for figure in FIGURES:
        low, high = said[figure]["low"], said[figure]["high"]
        found = result.interval(figure)
        assert found is not None
        assert (low, high) == (found.low, found.high)
        wider = result.interval(figure, 0.9)
        assert wider is not None
        assert wider.low <= found.low < found.high <= wider.high
    assert said["tpot_s"]["low"] < summary["tpot_s"]["mean"] < said["tpot_s"]["high"]
    rate = summary["throughput"]["output_tokens_per_s"]
    assert said["output_tokens_per_s"]["low"] < rate < said["output_tokens_per_s"]["high"]


def test_intervals_survive_saving(result: SimulationResult, tmp_path: Path) -> None:
    result.save(tmp_path)
    assert SimulationResult.load(tmp_path).interval("ttft_s", 0.7) == result.interval("ttft_s", 0.7)


def test_unknown_figures_and_levels_are_refused(result: SimulationResult) -> None:
    with pytest.raises(BadInput, match="figure: got 'tpot'; did you mean tpot_s"):
        result.interval("tpot")
    with pytest.raises(BadInput, match="level: got 80; give a share between 0 and 1"):
        result.interval("tpot_s", 80)


def test_a_figure_that_does_not_exist_has_no_interval(result: SimulationResult) -> None:
    assert interval(result, None, "tpot_s", 0.8) is None
    assert interval(result, math.nan, "tpot_s", 0.8) is None


# -- conformal -------------------------------------------------------------------------------------------------------


def test_quantiles_weigh_groups_alike() -> None:
    values, weights = np.array([3.0, 1.0, 2.0, 10.0]), np.array([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert weighted_quantiles(values, weights, [0.0, 0.5, 0.51, 1.0]).tolist() == [1.0, 3.0, 10.0, 10.0]


def groups_drawn(random: np.random.Generator, count: int) -> list[Group]:
    """Groups of 1 to 60 rows whose errors share an offset larger than what is between rows."""
    drawn = []
    for number in range(count):
        rows = int(random.integers(1, 60))
        values = 0.1 + random.normal(0, 0.15) + random.normal(0, 0.05, rows)
        drawn.append(Group("vllm", "dense", f"device-{number}", values))
    return drawn


@pytest.mark.parametrize(("level", "groups"), [(0.8, 12), (0.8, 40), (0.9, 20), (0.9, 40)])
def test_new_groups_are_covered_as_often_as_promised(level: float, groups: int) -> None:
    """Coverage of rows of new groups, over many draws of the calibration groups: at least the level, not much more."""
    random = np.random.default_rng(7)
    inside = []
    for _ in range(150):
        known = residuals_of(groups_drawn(random, groups), "tpot_s", "vllm", "dense")
        fitted = IntervalTable(source="drawn", devices=(), probabilities=PROBABILITIES, residuals=(known,))
        found = fitted.range_of("tpot_s", level, "vllm", "dense")
        assert found is not None
        low, high = math.log(found[0]), math.log(found[1])
        inside += [((new.residuals > low) & (new.residuals < high)).mean() for new in groups_drawn(random, 10)]
    assert level - 0.025 < np.mean(inside) < level + 0.08


def rows_of(groups: list[Group]) -> pd.DataFrame:
    """Rows as ``validate`` writes them, with the residuals of the groups."""
    records: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        for value in group.residuals:
            said = {"set": "made-up", "model": f"m{number}", "device": group.device, "engine": group.engine}
            row = {**said, "model_kind": group.model_kind, "version_known": True, "status": "ok", "gpus": 1}
            for column in COLUMNS.values():
                row |= {column: math.exp(value), f"predicted_{column}": 1.0}
            records.append({**row, "exclude": ""})
    return pd.DataFrame(records)


def test_calibration_gives_the_residuals_back_and_leaves_excluded_rows_out() -> None:
    rows = rows_of(groups_drawn(np.random.default_rng(3), 24))
    found = calibrate_intervals([rows], "made up")
    classes = {(each.engine, each.model_kind) for each in found.residuals}
    assert classes == {("vllm", "dense"), (ANY, "dense"), (ANY, ANY)}
    tpot = next(each for each in found.residuals if each.figure == "tpot_s")
    assert (tpot.groups, tpot.rows) == (24, len(rows))
    assert tpot.median == pytest.approx(0.1, abs=0.1)
    assert [coverage.level for coverage in tpot.coverage] == [0.8, 0.9]
    for coverage in tpot.coverage:
        assert abs(coverage.share - coverage.level) < 0.1
    wrong = rows.head(5).assign(exclude="broken", tpot_mean_s=1e6)
    assert calibrate_intervals([pd.concat([rows, wrong])], "made up") == found


def test_the_command_writes_what_results_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.csv"
    rows_of(groups_drawn(np.random.default_rng(5), 24)).to_csv(source, index=False)
    texts = []
    for name in ("a.json", "b.json"):
        assert main(["calibrate-intervals", str(source), "--out", str(tmp_path / name)]) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert "tpot_s" in capsys.readouterr().out
    found = read_table(texts[0], "a.json")
    assert found == calibrate_intervals([read_rows(source)], found.source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "rows.csv: set: give a file that apexsim validate --out wrote"),
        ("", "rows.csv: is not a CSV file"),
    ],
)
def test_other_files_are_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "rows.csv", tmp_path / "out.json"
    source.write_text(text)
    assert main(["calibrate-intervals", str(source), "--out", str(target)]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


def test_rows_without_predictions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.csv"
    rows = rows_of(groups_drawn(np.random.default_rng(5), 2))
    rows.assign(**{f"predicted_{column}": math.nan for column in COLUMNS.values()}).to_csv(source, index=False)
    assert main(["calibrate-intervals", str(source), "--out", str(tmp_path / "out.json")]) == 2
    assert "no row is both measured and predicted" in capsys.readouterr().err


def test_the_shipped_table_covers_groups_left_out() -> None:
    """Mean over all groups that were measured, each left out in turn."""
    shipped = shipped_table()
    assert {each.figure for each in shipped.residuals} == set(FIGURES)
    assert set(shipped.devices) <= set(catalog.names("device"))
    for each in shipped.residuals:
        if (each.engine, each.model_kind) == (ANY, ANY):
            for coverage in each.coverage:
                assert coverage.share > coverage.level - 0.1, each.figure


def test_a_broken_table_is_named() -> None:
    with pytest.raises(BadInput, match=r"mine\.json: not valid JSON"):
        read_table("{", "mine.json")
    data = json.loads(shipped_table().model_dump_json())
    data["residuals"][0]["spread"] = [1.0]
    with pytest.raises(BadInput, match="every spread needs a quantile"):
        read_table(json.dumps(data), "mine.json")


@pytest.mark.parametrize("cell", ["abc", "inf"])
def test_cells_that_are_no_numbers_are_named(cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "rows.csv", tmp_path / "out.json"
    rows = rows_of(groups_drawn(np.random.default_rng(5), 2)).astype({"predicted_tpot_mean_s": object})
    rows.loc[3, "predicted_tpot_mean_s"] = cell
    rows.to_csv(source, index=False)
    assert main(["calibrate-intervals", str(source), "--out", str(target)]) == 2
    assert "predicted_tpot_mean_s, row 4" in capsys.readouterr().err
    assert not target.exists()
