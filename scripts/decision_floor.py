#!/usr/bin/env python3
"""How many decisions predictions as good as a repeated measurement would get right, with some groups as they are.

apexsim validate $APEXSIM_DATA/ground_truth/silicon/runs.csv --out rows.csv
python scripts/decision_floor.py rows.csv --keep deepseek-r1@b200-sxm gpt-oss-120b@h100-sxm

Every row of the other groups is predicted as measured, times a log-normal scatter; the mean over several draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.validation import decisions, scores

DRAWS = 5
FIGURES = ("right", "mean_regret", "p90_regret")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="what apexsim validate --out wrote")
    parser.add_argument("--keep", nargs="*", default=[], metavar="MODEL@DEVICE", help="groups predicted as they are")
    parser.add_argument("--tpot-scatter", type=float, default=0.016, help="relative scatter of a repeated TPOT")
    parser.add_argument("--ttft-scatter", type=float, default=0.031, help="relative scatter of a repeated TTFT")
    options = parser.parse_args()
    table = scores.with_parts(pd.read_csv(options.rows, low_memory=False))
    keep = (table["model"] + "@" + table["device"]).isin(options.keep)
    scatter = {"tpot_mean_s": options.tpot_scatter, "ttft_mean_s": options.ttft_scatter}
    found = [repeated(table, keep, scatter, seed) for seed in range(DRAWS)]
    for name, value in zip(FIGURES, np.mean(found, axis=0), strict=True):
        print(f"{name:12} {value:5.1f} %")


def repeated(table: pd.DataFrame, keep: pd.Series, scatter: dict[str, float], seed: int) -> list[float]:
    """Share right, mean regret and its 90th percentile when all but ``keep`` is predicted as a repeat would be."""
    random = np.random.default_rng(seed)
    again = {f"predicted_{name}": table[name] * np.exp(random.normal(0, s, len(table))) for name, s in scatter.items()}
    again = {name: table[name].where(keep, values) for name, values in again.items()}
    summary = decisions.summary(decisions.decisions(table.assign(**again))).set_index("chooser")
    return [float(summary.loc["apexsim", name]) for name in FIGURES]


if __name__ == "__main__":
    main()
