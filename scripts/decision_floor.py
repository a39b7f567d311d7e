#!/usr/bin/env python3
"""How many decisions predictions as good as a repeated measurement would get right, with some groups as they are.

apexsim validate $APEXSIM_DATA/ground_truth/silicon/runs.csv --out rows.csv
python scripts/decision_floor.py rows.csv --keep deepseek-r1@b200-sxm gpt-oss-120b@h100-sxm
python scripts/decision_floor.py rows.csv --unbiased tensor expert concurrency

Every row of the other groups is predicted as measured, times a log-normal scatter; the mean over several draws. With
``--unbiased`` predictions stay, less the median error in TPOT of the rows of their group that are alike in these
columns: what a model could do that was told all of that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from apexsim.validation import decisions, scores

DRAWS = 5
GROUP = ("engine", "device", "model", "weight_dtype")
FIGURES = ("right", "mean_regret", "p90_regret")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="what apexsim validate --out wrote")
    parser.add_argument("--keep", nargs="*", default=[], metavar="MODEL@DEVICE", help="groups predicted as they are")
    parser.add_argument("--tpot-scatter", type=float, default=0.016, help="relative scatter of a repeated TPOT")
    parser.add_argument("--ttft-scatter", type=float, default=0.031, help="relative scatter of a repeated TTFT")
    parser.add_argument("--unbiased", nargs="+", metavar="COLUMN", help="take out median errors by group and these")
    options = parser.parse_args()
    table = scores.with_parts(pd.read_csv(options.rows, low_memory=False))
    if options.unbiased:
        figures = decided(table.assign(predicted_tpot_mean_s=unbiased(table, [*GROUP, *options.unbiased])))
    else:
        keep = (table["model"] + "@" + table["device"]).isin(options.keep)
        scatter = {"tpot_mean_s": options.tpot_scatter, "ttft_mean_s": options.ttft_scatter}
        figures = np.mean([repeated(table, keep, scatter, seed) for seed in range(DRAWS)], axis=0)
    show(figures)


def show(figures: npt.ArrayLike) -> None:
    for name, value in zip(FIGURES, np.asarray(figures), strict=True):
        print(f"{name:12} {value:5.1f} %")


def unbiased(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Predicted TPOT less the median error of the decided rows that are alike in ``columns``."""
    used = (table["part"] != scores.EXCLUDED) & (table["workload"] == "closed_loop")
    error = np.log(table["predicted_tpot_mean_s"] / table["tpot_mean_s"]).where(used)
    alike = [table[column] for column in columns]
    return table["predicted_tpot_mean_s"] * np.exp(-error.groupby(alike, dropna=False).transform("median").fillna(0.0))


def repeated(table: pd.DataFrame, keep: pd.Series, scatter: dict[str, float], seed: int) -> list[float]:
    """Share right, mean regret and its 90th percentile when all but ``keep`` is predicted as a repeat would be."""
    random = np.random.default_rng(seed)
    again = {f"predicted_{name}": table[name] * np.exp(random.normal(0, s, len(table))) for name, s in scatter.items()}
    again = {name: table[name].where(keep, values) for name, values in again.items()}
    return decided(table.assign(**again))


def decided(table: pd.DataFrame) -> list[float]:
    summary = decisions.summary(decisions.decisions(table)).set_index("chooser")
    return [float(summary.loc["apexsim", name]) for name in FIGURES]


if __name__ == "__main__":
    main()
