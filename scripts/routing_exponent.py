#!/usr/bin/env python3
"""How uneven routers choose experts: errors of measured runs under several exponents, by model, device and engine.

python scripts/routing_exponent.py $APEXSIM_DATA/ground_truth/silicon/runs.csv --models gpt-oss-120b deepseek-r1
python scripts/routing_exponent.py $APEXSIM_DATA/ground_truth/energy_h100_b200/runs.csv --device h100-sxm

A group's kernels and host terms may be off by a constant factor whatever the exponent; how the error moves from few to
many requests in flight is what the exponent decides. Closed loops of short prompts (mean TPOT; random tokens) are drawn
up to 128 in flight, full servers (median ITL; text) up to 64 seats.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np

from apexsim.serving.simulator import simulate
from apexsim.specs.deployment import Deployment
from apexsim.specs.server import Load
from apexsim.validation.cases import case_of
from apexsim.validation.loads import requests_of
from apexsim.validation.runs import MeasuredRun, RunRow, read_runs
from apexsim.validation.steady import steady_figures

FEW = 16
MOST = {"closed_loop": 128, "saturated": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs")
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--rows-per-group", type=int, default=14)
    parser.add_argument("--models", nargs="+", help="Only these models.")
    parser.add_argument("--device", help="Only this device.")
    options = parser.parse_args()
    print(f"{'group':52} {'exponent':>8} {'MAPE %':>7} {'few %':>7} {'many %':>7} {'moves %':>7}")
    found = groups(options.runs, options.rows_per_group, options.models, options.device)
    for exponent in options.exponents:
        figures = {name: figures_of(runs, exponent) for name, runs in sorted(found.items())}
        for name, of_group in (*figures.items(), (f"mean of {len(figures)}", np.mean([*figures.values()], axis=0))):
            print(f"{name:52} {exponent:8.2f}" + "".join(f" {100 * figure:7.1f}" for figure in of_group), flush=True)


def figures_of(runs: list[MeasuredRun], exponent: float) -> list[float]:
    """Mean size of the error, its mean with few and with many requests in flight, and how far those two lie apart."""
    errors = np.array([error_of(run, exponent) for run in runs])
    few = np.array([in_flight(run.row) <= FEW for run in runs])
    with_few, with_many = errors[few].mean(), errors[~few].mean()
    return [np.abs(errors).mean(), with_few, with_many, abs(with_many - with_few)]


def groups(path: str, most: int, models: list[str] | None, device: str | None) -> dict[str, list[MeasuredRun]]:
    """Clean rows of models with experts by group, at most ``most`` of each, some with few and some with many."""
    found: dict[str, list[MeasuredRun]] = defaultdict(list)
    for run in read_runs(path):
        row = run.row
        if (models and row.model not in models) or (device and row.device != device):
            continue
        if row.exclude or (row.attention_data or 1) > 1 or not 0 < in_flight(row) <= MOST.get(row.workload, 0):
            continue
        if (row.prompt_tokens or 0) <= 1024 and (row.tensor or 99) <= 8 and case_of(row).deployment.model.moe:
            found[f"{row.engine} {row.device} {row.model} {row.weight_dtype}"].append(run)
    order = {name: np.random.default_rng(0).permutation(len(runs))[:most] for name, runs in found.items()}
    drawn = {name: [found[name][at] for at in places] for name, places in order.items()}
    return {name: runs for name, runs in drawn.items() if 0 < sum(in_flight(r.row) <= FEW for r in runs) < len(runs)}


def in_flight(row: RunRow) -> int:
    return row.concurrency or row.max_num_seqs or 0


def error_of(run: MeasuredRun, exponent: float) -> float:
    """Relative error of mean TPOT, or of the median ITL of a full server, under this exponent."""
    deployment = with_exponent(case_of(run.row).deployment, exponent)
    server = deployment.colocated_server()
    requests, _ = requests_of(run, longest=server.context_limit, seed=0)
    if run.row.max_num_batched_tokens is None:
        deployment = deployment.as_run(deployment.servers(Load.of(requests)))
    if run.row.workload == "saturated":
        return float(steady_figures(deployment, requests)["itl_p50_s"]) / run.row.itl_p50_s - 1
    return float(simulate(deployment, requests).summary()["tpot_s"]["mean"]) / run.row.tpot_mean_s - 1


def with_exponent(deployment: Deployment, exponent: float) -> Deployment:
    exponents = {"routing_exponent": exponent, "random_routing_exponent": exponent}
    moe = deployment.model.moe.model_copy(update=exponents)
    return deployment.model_copy(update={"model": deployment.model.model_copy(update={"moe": moe})})


if __name__ == "__main__":
    main()
