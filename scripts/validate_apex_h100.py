"""Replay the served runs of the APEX artifact (vLLM 0.6.0 on 8 x H100) and hold simulated latencies against measured.

    python scripts/validate_apex_h100.py [--data DIR] [--rows]

The host terms are calibrated here, on the *creation* runs of Llama-3.1-70B alone (the shipped profile is calibrated on
all loads): every other run is a prediction. Beside it stands the same with no host time at all. Ends with status 1 if a
bar is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from apexsim import catalog
from apexsim.calibration import Group, calibrate
from apexsim.validation.replay import OK, replay
from apexsim.validation.runs import MeasuredRun, read_runs

ENGINE = "vllm-0.6"
FITTED_ON = ("llama-3.1-70b", "creation")
TERMS = ("step_s", "per_sequence_s", "response_s", "launch_s")
NO_HOST = dict.fromkeys(TERMS, 0.0)
BARS = {("llama-3.1-70b", "lmsys_025"): 6.0, ("mistral-large-2407", "lmsys_025"): 10.0}
"""Largest error of the mean inter-token latency of a group of like runs, in percent, by model and load."""
TITLES = {"itl": ("ITL (ms)", 1e3, 1), "ttft": ("TTFT (ms)", 1e3, 1), "e2e": ("e2e (s)", 1.0, 2)}
"""What is compared: title, scale and decimals of its table."""
Terms = Mapping[str, float]


def find_data(named: str | None = None) -> Path:
    """The reference data: what is named, else $APEXSIM_DATA, else ``../shared/data`` beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(named or os.environ.get("APEXSIM_DATA") or default)


def served_runs(data: Path) -> list[MeasuredRun]:
    """The vLLM rows of the artifact's runs."""
    runs = read_runs(data / "ground_truth" / "apex_h100" / "runs.csv")
    return [run for run in runs if run.row.engine == "vllm"]


def load_of(run: MeasuredRun) -> str:
    """What was asked of a server, and how often: ``lmsys_025`` is 0.25 requests/s over all servers of a run."""
    load = re.search(r"_([a-z]+_\d+)_validation", run.row.run_id)
    assert load, f"{run.row.run_id} names no load"
    return load[1]


def is_fitted_on(run: MeasuredRun) -> bool:
    """Whether host terms are calibrated on this run."""
    return run.row.model == FITTED_ON[0] and load_of(run).startswith(FITTED_ON[1])


def fitted_terms(runs: Sequence[MeasuredRun]) -> dict[str, float]:
    """Host terms calibrated on the creation runs."""
    group = Group("creation", tuple(run for run in runs if is_fitted_on(run)))
    host = calibrate(catalog.load("engine", ENGINE), [group], terms=TERMS).host
    return {term: float(getattr(host, term)) for term in TERMS}


def score(runs: Sequence[MeasuredRun], terms: Terms) -> pd.DataFrame:
    """One row a run: measured, simulated with ``terms``, and with no host time (``kernels``); seconds, percent."""
    rows = []
    for run in runs:
        named = {"run": run.row.run_id, "model": run.row.model, "load": load_of(run), "tensor": run.row.tensor}
        row = {**named, "fitted": is_fitted_on(run)}
        found = {"simulated": replay(run, engine_options=terms), "kernels": replay(run, engine_options=NO_HOST)}
        for key in TITLES:
            row[f"measured_{key}"] = getattr(run.row, f"{key}_mean_s")
            for source, replayed in found.items():
                assert replayed.status == OK, f"{run.row.run_id}: {replayed.status}"
                row[f"{source}_{key}"] = replayed.figures[f"{key}_mean_s"]
        rows.append(row)
    scores = pd.DataFrame(rows).sort_values(["model", "load", "tensor"], ascending=[True, True, False], kind="stable")
    for key in TITLES:
        scores[f"error_{key}"] = 100 * (scores[f"simulated_{key}"] / scores[f"measured_{key}"] - 1)
    return scores


def missed_bars(scores: pd.DataFrame) -> list[str]:
    """Every group of like runs whose mean inter-token latency misses its bar."""
    means = scores.groupby(["model", "load", "tensor"])["error_itl"].mean()
    return [
        f"{model} {load} tensor {tensor}: ITL {error:+.1f} %, allowed {BARS[model, load]:g} %"
        for (model, load, tensor), error in means.items()
        if (model, load) in BARS and not abs(error) <= BARS[model, load]
    ]


def table_of(scores: pd.DataFrame, by: Sequence[str], key: str) -> str:
    """One latency, averaged over the runs of a group; ``worst`` is the largest error of one run of it."""
    title, scale, digits = TITLES[key]
    rows = []
    for names, runs in scores.groupby(list(by), sort=False):
        row: dict[str, object] = {**dict(zip(by, names, strict=True)), "runs": len(runs)}
        for column in ("measured", "kernels", "simulated"):
            row[column] = f"{scale * runs[f'{column}_{key}'].mean():.{digits}f}"
        errors = runs[f"error_{key}"]
        row["error %"], row["worst %"] = f"{errors.mean():+.1f}", f"{max(errors, key=abs):+.1f}"
        row["host terms"] = "fitted on it" if runs["fitted"].all() else "not fitted"
        rows.append(row)
    return f"{title}\n{pd.DataFrame(rows).to_string(index=False)}"


def mean_errors(scores: pd.DataFrame) -> str:
    """Mean absolute error and mean error over runs, fitted and other runs apart."""
    rows = []
    for (model, fitted), runs in scores.groupby(["model", "fitted"], sort=False):
        row = {"model": model, "host terms": "fitted on it" if fitted else "not fitted", "runs": len(runs)}
        for key, (title, *_) in TITLES.items():
            name, errors = title.split()[0], runs[f"error_{key}"]
            row[f"{name} |error| %"], row[f"{name} bias %"] = f"{errors.abs().mean():.1f}", f"{errors.mean():+.1f}"
        rows.append(row)
    return pd.DataFrame(rows).to_string(index=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="reference data; default $APEXSIM_DATA, else ../shared/data")
    parser.add_argument("--rows", action="store_true", help="print every run, not groups of like runs")
    arguments = parser.parse_args()
    data = find_data(arguments.data)
    if not data.is_dir():
        sys.exit(f"no reference data at {data}: set APEXSIM_DATA or give --data")
    runs = served_runs(data)
    terms = fitted_terms(runs)
    print(f"host terms of {ENGINE}, fitted on {sum(map(is_fitted_on, runs))} runs ({', '.join(FITTED_ON)})")
    print("\n".join(f"  {term:15s} {value:.3g}" for term, value in terms.items()))
    scores = score(runs, terms)
    print("\nkernels: simulated with zero host time; error: mean over runs; worst: of one run")
    for key in TITLES:
        print(f"\n{table_of(scores, ['run'] if arguments.rows else ['model', 'load', 'tensor'], key)}")
    print(f"\n{mean_errors(scores)}\n")
    missed = missed_bars(scores)
    bars = ", ".join(f"{model} {load} {bar:g} %" for (model, load), bar in BARS.items())
    print("\n".join(missed) or f"ITL within its bar on every number of devices: {bars}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
