"""Print what a workload in ``workloads/`` takes from a trace: length quantiles, rank correlation, arrival statistics.

    python scripts/workload_statistics.py $APEXSIM_DATA/traces/azure-conv-2023.parquet [--pause-s 2]
    python scripts/workload_statistics.py chat --requests 200000

The second line prints the same of a generator's draws, to hold against those of its trace. With ``--pause-s`` the gaps
longer than that are pauses, and the arrivals are printed as an on/off law.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from apexsim.io.requests import resolve_workload
from apexsim.io.yaml_files import format_yaml
from apexsim.specs.laws import Floats, Integers
from apexsim.specs.workload import Requests

PROBABILITIES = (0, 0.01, 0.05, *np.round(np.arange(0.1, 0.91, 0.05), 2).tolist(), 0.95, 0.98, 0.99, 0.995, 0.999, 1)


def statistics(rows: Requests, pause_s: float | None) -> dict[str, Any]:
    """The keys of a workload file that rest on figures."""
    assert rows.arrival_s is not None
    gaps = np.diff(rows.arrival_s)
    correlation = round(rank_correlation(rows.prompt_tokens, rows.output_tokens), 3)
    rate_per_s, gap_cv = round(rows.rate_per_s, 3), round(float(gaps.std() / gaps.mean()), 2)
    law = {"kind": "gamma", "rate_per_s": rate_per_s, "cv": gap_cv}
    return {
        "prompt_tokens": quantiles(rows.prompt_tokens),
        "output_tokens": quantiles(rows.output_tokens),
        "rank_correlation": correlation,
        "arrivals": law if pause_s is None else on_off(gaps, pause_s, rate_per_s),
        "published": {
            "prompt_tokens": summary(rows.prompt_tokens),
            "output_tokens": summary(rows.output_tokens),
            "rank_correlation": correlation,
            "rate_per_s": rate_per_s,
            "gap_cv": gap_cv,
        },
    }


def quantiles(tokens: Integers) -> dict[str, Any]:
    """A table of quantiles."""
    table = np.round(np.quantile(tokens, PROBABILITIES), 1).tolist()
    return {"kind": "quantiles", "probabilities": list(PROBABILITIES), "tokens": table}


def summary(tokens: Integers) -> dict[str, float]:
    """Mean, median and 90th percentile."""
    p50, p90 = np.quantile(tokens, [0.5, 0.9])
    return {"mean": round(float(tokens.mean()), 1), "p50": round(float(p50), 1), "p90": round(float(p90), 1)}


def on_off(gaps: Floats, pause_s: float, rate_per_s: float) -> dict[str, Any]:
    """Shares and variations of the gaps above and below ``pause_s``."""
    pauses, bursts = gaps[gaps > pause_s], gaps[gaps <= pause_s]
    return {
        "kind": "on_off",
        "rate_per_s": rate_per_s,
        "pause_share": round(len(pauses) / len(gaps), 4),
        "pause_time_share": round(float(pauses.sum() / gaps.sum()), 3),
        "burst_cv": round(float(bursts.std() / bursts.mean()), 2),
        "pause_cv": round(float(pauses.std() / pauses.mean()), 2),
    }


def rank_correlation(first: Integers, second: Integers) -> float:
    """Spearman's, ties at their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def dispersion(arrival_s: Floats, window_s: float) -> float:
    """Variance over mean of the counts in windows: 1 for Poisson, more where arrivals cluster."""
    counts = np.bincount((arrival_s / window_s).astype(np.int64))
    return float(counts.var() / counts.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", help="request file or name of a workload")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--pause-s", type=float)
    options = parser.parse_args()
    rows = resolve_workload(options.workload, requests=options.requests)
    print(format_yaml(statistics(rows, options.pause_s)), end="")
    assert rows.arrival_s is not None
    shown = ", ".join(f"{window_s} s: {dispersion(rows.arrival_s, window_s):.1f}" for window_s in (1, 10, 60))
    print(f"# {len(rows)} requests; variance over mean of counts in windows of {shown}")
