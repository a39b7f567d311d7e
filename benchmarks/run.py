"""How fast and how large apexsim is: ``python benchmarks/run.py [--json FILE] [--requests N] [--repeats N]``.

Every figure comes from an interpreter of its own. Times are CPU seconds of one process, the least of several repeats,
because a busy machine only ever adds to them. The traces are those of $APEXSIM_DATA (or ../shared/data beside the
checkout); where they are absent the generated ``chat`` workload stands in, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRACE_REQUESTS = 19_366  # of the azure-conv trace; as many are drawn where it is absent
SEARCH_REQUESTS = 1024
DEPENDENCIES = "simpy, numpy, pandas, pyarrow, scipy, yaml, pydantic, networkx, matplotlib, typer, rich"

# What the first rows of the table are of: the runs that the project's targets speak of.
RUNS: dict[str, dict[str, Any]] = {
    "8B on 1 device": {"model": "llama-3.1-8b"},
    "70B, tensor 4 x 2 replicas": {"model": "llama-3.1-70b", "tensor": 4, "replicas": 2},
    "70B, tensor 2, pipeline 2": {"model": "llama-3.1-70b", "tensor": 2, "pipeline": 2},
    "Mixtral, tensor 2": {"model": "mixtral-8x7b", "tensor": 2},
}


def trace(name: str) -> str:
    """Path of a request trace, or ``chat``."""
    folder = Path(os.environ.get("APEXSIM_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "traces" / name
    return str(path) if path.is_file() else "chat"


def cpu_s(work: Callable[[], Any]) -> float:
    """CPU seconds that ``work`` takes in this process."""
    begun_s = time.process_time()
    work()
    return time.process_time() - begun_s


def bare_simpy_s(events: int) -> float:
    """CPU seconds of a SimPy process that does nothing but wait ``events`` times."""
    import simpy

    environment = simpy.Environment()

    def wait() -> Any:
        for _ in range(events):
            yield environment.timeout(1)

    environment.process(wait())
    return cpu_s(environment.run)


def measure_run(name: str, requests: int) -> dict[str, Any]:
    """One simulation: the first of its process, which fills the tables of costs, and then a second one."""
    import apexsim

    deployment = apexsim.deployment(device="h100-sxm", **RUNS[name])
    load = apexsim.workload(trace("azure-conv-2023.parquet"), requests=requests)
    slo = apexsim.SLO(ttft_s=0.5, tpot_s=0.05)
    results = []

    def run() -> None:
        results.append(apexsim.simulate(deployment, load, slo=slo))

    first_s, again_s = cpu_s(run), cpu_s(run)
    steps = int(results[0].step_columns["repeats"].sum())
    return {
        "requests": len(load),
        "steps": steps,
        "first_s": first_s,
        "again_s": again_s,
        "first_requests_per_s": len(load) / first_s,
        "requests_per_s": len(load) / again_s,
        "steps_per_s": steps / again_s,
        # The fewest events that a simulator which takes steps one by one could do with: one a step, one a request.
        "bare_simpy_s": bare_simpy_s(steps + len(load)),
        "peak_rss_mib": peak_rss_mib(),
    }


def measure_search(requests: int) -> dict[str, Any]:
    """A whole search in one process; imports are made before and do not count."""
    import apexsim
    import apexsim.io.search_files
    import apexsim.search.study

    load, studies = trace("apex-lmsys-llama.parquet"), []
    slo = {"ttft_s": 0.2, "tpot_s": 0.03}

    def search() -> None:
        choices = {"model": "llama-3.1-70b", "devices": "8xh100-sxm", "workload": load, "requests": requests}
        studies.append(apexsim.search(**choices, slo=slo, objective="latency", jobs=1))

    spent_s = cpu_s(search)
    plans = len(studies[0].rows)
    return {"plans": plans, "requests": requests, "search_s": spent_s, "peak_rss_mib": peak_rss_mib()}


def peak_rss_mib() -> float:
    """The most memory this process has held. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(task: str, *, requests: int) -> dict[str, Any]:
    """Figures of one task, in this process."""
    kind, _, name = task.partition(":")
    return measure_run(name, requests) if kind == "run" else measure_search(min(requests, SEARCH_REQUESTS))


def in_child(task: str, requests: int) -> dict[str, Any]:
    """Figures of one task, in an interpreter of its own."""
    command = [sys.executable, __file__, "--task", task, "--requests", str(requests)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def command_s(command: list[str], repeats: int) -> float:
    """CPU seconds of a command, children and all; the least of several runs."""
    spent = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


def measure_start(repeats: int) -> dict[str, float]:
    """CPU seconds of bare Python, of imports and of short commands."""
    python, cli = [sys.executable, "-c"], [sys.executable, "-m", "apexsim.cli.main"]
    everything = "import apexsim\nfor name in apexsim.__all__: getattr(apexsim, name)"
    run = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--requests", "1"]
    commands = {
        "python": [*python, ""],
        "dependencies": [*python, f"import {DEPENDENCIES}"],
        "import_apexsim": [*python, "import apexsim"],
        "import_every_public_name": [*python, everything],
        "apexsim_help": [*cli, "--help"],
        "apexsim_list_models": [*cli, "list", "models"],
        "apexsim_simulate_1_request": [*cli, *run],
    }
    return {name: command_s(command, repeats) for name, command in commands.items()}


def measure_all(requests: int, repeats: int) -> dict[str, Any]:
    """Every figure."""
    runs = {}
    for name in RUNS:
        tries = [in_child(f"run:{name}", requests) for _ in range(repeats)]
        runs[name] = min(tries, key=lambda figures: figures["again_s"])
        runs[name]["bare_simpy_s"] = min(figures["bare_simpy_s"] for figures in tries)
        runs[name]["first_s"] = min(figures["first_s"] for figures in tries)
        runs[name]["first_requests_per_s"] = max(figures["first_requests_per_s"] for figures in tries)
        runs[name]["first_ratio"] = runs[name]["first_s"] / runs[name]["bare_simpy_s"]
        runs[name]["ratio"] = runs[name]["again_s"] / runs[name]["bare_simpy_s"]
    searches = [in_child("search", requests) for _ in range(repeats)]
    start = measure_start(repeats)
    return {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "workload": Path(trace("azure-conv-2023.parquet")).stem,
        "runs": runs,
        "search": min(searches, key=lambda figures: figures["search_s"]),
        "start_s": start,
        "import_ratio": start["import_apexsim"] / start["dependencies"],
        "import_every_public_name_ratio": start["import_every_public_name"] / start["dependencies"],
    }


def print_table(figures: dict[str, Any]) -> None:
    """The figures for a person."""
    print(f"{figures['machine']}; requests of {figures['workload']}; CPU seconds of one process")
    print(f"{'simulation':28}{'requests':>10}{'steps':>10}{'first':>9}{'again':>9}", end="")
    print(f"{'requests/s (first, again)':>28}{'steps/s':>12}{'x bare SimPy (first, again)':>29}{'peak RSS':>12}")
    for name, run in figures["runs"].items():
        print(
            f"{name:28}{run['requests']:>10,}{run['steps']:>10,}{run['first_s']:>7.2f} s{run['again_s']:>7.2f} s",
            end="",
        )
        rates = f"{run['first_requests_per_s']:>18,.0f}{run['requests_per_s']:>10,.0f}{run['steps_per_s']:>12,.0f}"
        print(f"{rates}{run['first_ratio']:>20.2f}{run['ratio']:>9.2f}{run['peak_rss_mib']:>8.0f} MiB")
    found = figures["search"]
    print(f"search: {found['plans']} plans, {found['requests']:,} requests each: {found['search_s']:.2f} s", end="")
    print(f", peak RSS {found['peak_rss_mib']:.0f} MiB")
    for name, spent_s in figures["start_s"].items():
        print(f"{name.replace('_', ' '):28}{spent_s:>7.2f} s")
    print(f"import apexsim / its dependencies: {figures['import_ratio']:.2f}; ", end="")
    print(f"with every public name: {figures['import_every_public_name_ratio']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--requests", type=int, default=TRACE_REQUESTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", help=argparse.SUPPRESS)  # measure one thing in this process
    asked = parser.parse_args()
    if asked.task:
        print(json.dumps(measure(asked.task, requests=asked.requests)))
        return
    figures = measure_all(asked.requests, asked.repeats)
    print_table(figures)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
