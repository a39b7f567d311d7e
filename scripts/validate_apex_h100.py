"""Replay the served runs of the APEX artifact (vLLM 0.6.0 on 8 x H100) and hold simulated latencies against measured.

    python scripts/validate_apex_h100.py [--data DIR] [--rows]

The host terms of the engine profile ``vllm-0.6`` are fitted here, on the *creation* runs of Llama-3.1-70B alone; every
other run is a prediction. Ends with status 1 if the shipped profile is not what this fit gives, or a bar is missed.
Each run is replayed with the flags of its row and its own requests; a data-parallel replica is a server of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

import apexsim
from apexsim import catalog

ENGINE = "vllm-0.6"
FITTED_ON = ("llama-3.1-70b", "creation")
BARS = {("llama-3.1-70b", "lmsys_025"): 6.0, ("mistral-large-2407", "lmsys_025"): 10.0}
"""Largest error of the mean inter-token latency of a run, in percent, by model and load."""

HostTerms = Mapping[str, float]
FITTED_TERMS = ("step_s", "per_sequence_s", "response_s")
NO_HOST = dict.fromkeys(FITTED_TERMS, 0.0)
DIGITS = 2
"""Significant digits of a host term in the profile."""
TITLES = {"itl_s": ("ITL (ms)", 1e3, 1), "ttft_s": ("TTFT (ms)", 1e3, 1), "e2e_s": ("e2e (s)", 1.0, 2)}
"""What is compared: title, scale and decimals of its table."""


@dataclass(frozen=True)
class Latencies:
    """Means of a run: time to first token, between tokens (each token counts once), to the last token; seconds."""

    itl_s: float
    ttft_s: float
    e2e_s: float


@dataclass(frozen=True)
class ServedRun:
    """One measured server: ``load`` names its requests and their rate, ``choices`` are keys of a deployment."""

    name: str
    load: str
    choices: dict[str, Any]
    requests: apexsim.Requests
    measured: Latencies

    @property
    def group(self) -> tuple[str, str, int]:
        """Model, load and tensor degree."""
        return self.choices["model"], self.load, self.choices["tensor"]

    @property
    def fitted(self) -> bool:
        """Whether host terms are fitted on this run."""
        model, load = FITTED_ON
        return self.choices["model"] == model and self.load.startswith(load)


def find_data(named: str | None = None) -> Path:
    """The reference data: what is named, else $APEXSIM_DATA, else ``../shared/data`` beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(named or os.environ.get("APEXSIM_DATA") or default)


def read_runs(data: Path) -> list[ServedRun]:
    """The vLLM rows of the artifact's runs."""
    folder = data / "ground_truth" / "apex_h100"
    rows = pd.read_csv(folder / "runs.csv").query("engine == 'vllm'")
    return [_served_run(row, folder) for _, row in rows.iterrows()]


def _served_run(row: pd.Series, folder: Path) -> ServedRun:
    load = re.search(r"_([a-z]+_\d+)_validation", row["run_id"])
    assert load, f"{row['run_id']} names no load"
    choices = {
        "model": row["model"],
        "device": row["device"],
        "engine": ENGINE,
        "tensor": int(row["tensor"]),
        "weights": row["weight_dtype"],
        "kv_cache": row["kv_dtype"],
        "engine_options": {"gpu_memory_utilization": float(row["gpu_memory_utilization"]), **_options(row["flags"])},
    }
    scheduler = apexsim.deployment(**choices).scheduler
    assert scheduler.chunked_prefill == (str(row["chunked_prefill"]) == "True"), f"{row['run_id']}: chunked prefill"
    if scheduler.chunked_prefill:
        assert scheduler.token_budget == row["max_num_batched_tokens"], f"{row['run_id']}: token budget"
    measured = Latencies(row["itl_mean_s"], row["ttft_mean_s"], row["e2e_mean_s"])
    requests = apexsim.workload(folder / row["requests_file"])
    return ServedRun(row["run_id"].replace("_validation", ""), load[1], choices, requests, measured)


def _options(flags: str) -> dict[str, object]:
    """Engine options for the flags that a server was started with."""
    options: dict[str, object] = {}
    if "--disable-custom-all-reduce" in flags:
        options["custom_all_reduce"] = False
    if limit := re.search(r"--max-model-len (\d+)", flags):
        options["max_model_len"] = int(limit[1])
    return options


def replay(run: ServedRun, host: HostTerms | None = None) -> Latencies:
    """Simulate a run with these host terms, or with those of the shipped engine profile."""
    options = {**run.choices["engine_options"], **(host or {})}
    deployment = apexsim.deployment(**{**run.choices, "engine_options": options})
    summary = apexsim.simulate(deployment, run.requests).summary()
    finished, total = summary["requests"]["finished"], summary["requests"]["total"]
    assert finished == total, f"{run.name}: {finished} of {total} requests finished"
    return Latencies(**{key: summary[key]["mean"] for key in TITLES})


def shipped_terms() -> dict[str, float]:
    """The host terms of the engine profile."""
    host = catalog.load("engine", ENGINE).host
    return {term: float(getattr(host, term)) for term in FITTED_TERMS}


def fit_host_terms(runs: Sequence[ServedRun]) -> dict[str, float]:
    """Least squares on relative errors: step and per-sequence time on mean ITL, then the response on mean TTFT."""

    def errors(terms: np.ndarray) -> np.ndarray:
        host = {**NO_HOST, "step_s": float(terms[0]), "per_sequence_s": float(terms[1])}
        return np.array([replay(run, host).itl_s / run.measured.itl_s - 1 for run in runs])

    # The start is no guess that matters: inter-token latency is all but linear in both terms.
    found = least_squares(errors, [1e-3, 1e-4], x_scale=[1e-3, 1e-4], diff_step=0.05, xtol=1e-4, ftol=1e-5).x
    host = {**NO_HOST, "step_s": float(found[0]), "per_sequence_s": float(found[1])}
    inverse = np.array([1 / run.measured.ttft_s for run in runs])
    missing = np.array([run.measured.ttft_s - replay(run, host).ttft_s for run in runs])
    return {**host, "response_s": float(missing * inverse @ inverse / (inverse @ inverse))}


def rounded(value: float) -> float:
    """A host term as the profile writes it."""
    return float(f"{value:.{DIGITS - 1}e}")


def score(runs: Sequence[ServedRun]) -> pd.DataFrame:
    """One row a run: measured, simulated with the shipped profile, simulated without host time; seconds, percent."""
    rows = []
    for run in runs:
        (model, load, tensor), found = run.group, {"measured": run.measured, "simulated": replay(run)}
        row = {"run": run.name, "model": model, "load": load, "tensor": tensor, "fitted": run.fitted}
        for source, times in {**found, "kernels": replay(run, NO_HOST)}.items():
            row |= {f"{source}_{key}": value for key, value in vars(times).items()}
        rows.append(row)
    scores = pd.DataFrame(rows).sort_values(["model", "load", "tensor"], ascending=[True, True, False], kind="stable")
    for key in TITLES:
        scores[f"error_{key}"] = 100 * (scores[f"simulated_{key}"] / scores[f"measured_{key}"] - 1)
    return scores


def missed_bars(scores: pd.DataFrame) -> list[str]:
    """Every run whose mean inter-token latency misses its bar."""
    missed = []
    for (model, load), bar in BARS.items():
        for _, run in scores[(scores["model"] == model) & (scores["load"] == load)].iterrows():
            if not abs(run["error_itl_s"]) <= bar:
                missed.append(f"{run['run']}: ITL {run['error_itl_s']:+.1f} %, allowed {bar:g} %")
    return missed


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


def check_profile(runs: Sequence[ServedRun]) -> bool:
    """Fit the host terms anew, print what came out, and return whether the shipped profile says the same."""
    fitted, shipped = fit_host_terms(runs), shipped_terms()
    print(f"host terms of {ENGINE}, fitted on {len(runs)} runs ({FITTED_ON[0]}, {FITTED_ON[1]})")
    for term, value in fitted.items():
        verdict = "as shipped" if rounded(value) == shipped[term] else f"SHIPPED: {shipped[term]:g}"
        print(f"  {term:15s} {value:.5f} = {rounded(value):g} rounded, {verdict}")
    return all(rounded(value) == shipped[term] for term, value in fitted.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="reference data; default $APEXSIM_DATA, else ../shared/data")
    parser.add_argument("--rows", action="store_true", help="print every run, not groups of like runs")
    arguments = parser.parse_args()
    data = find_data(arguments.data)
    if not data.is_dir():
        sys.exit(f"no reference data at {data}: set APEXSIM_DATA or give --data")
    runs = read_runs(data)
    same = check_profile([run for run in runs if run.fitted])
    scores = score(runs)
    print("\nkernels: simulated with zero host time; error: mean over runs; worst: of one run")
    for key in TITLES:
        print(f"\n{table_of(scores, ['run'] if arguments.rows else ['model', 'load', 'tensor'], key)}")
    print(f"\n{mean_errors(scores)}\n")
    missed = missed_bars(scores)
    bars = ", ".join(f"{model} {load} {bar:g} %" for (model, load), bar in BARS.items())
    print("\n".join(missed) or f"ITL of every run within its bar: {bars}")
    return int(bool(missed) or not same)


if __name__ == "__main__":
    sys.exit(main())
