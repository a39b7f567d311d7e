"""``prove``: measure, fit, simulate, serve for real and compare, in one command."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from apexsim.cli.options import JsonFlag, check_targets, emit_json, progress_bar, table_console, with_flags
from kernels_profiling.serving_flags import TINY, ModelFlags

if TYPE_CHECKING:
    from rich.console import Console

    from kernels_profiling.verdict import Verdict

HERE = Path(__file__).parent
# What is served where nothing is named, by device.
MODELS = {"cpu": str(TINY), "cuda": "llama-3.1-8b"}
WORKLOADS = {"cpu": str(HERE / "workloads" / "short.yaml"), "cuda": "chat"}
QUICK_S, USUAL_S = 18.0, 60.0
# Exit status where the machine was too busy for anything to be said.
TOO_NOISY = 4
# Largest errors that pass, of means, by device and strictness.
BOUNDS = {
    ("cpu", "stated"): {"ttft": 0.25, "tpot": 0.15, "e2e": 0.15},
    ("cuda", "stated"): {"ttft": 0.10, "tpot": 0.03, "e2e": 0.03},
    ("cpu", "loose"): {"ttft": 0.60, "tpot": 0.40, "e2e": 0.40},
    ("cuda", "loose"): {"ttft": 0.30, "tpot": 0.10, "e2e": 0.10},
}


@dataclass(frozen=True)
class ProofFlags:
    """What is proved, and how strictly."""

    model: Annotated[str | None, typer.Option(help="Model name or YAML; else one that suits the device.")] = None
    workload: Annotated[str | None, typer.Option(help="Workload whose lengths are served.")] = None
    quick: Annotated[bool, typer.Option("--quick", help="Small grids and short runs: under 6 minutes on a CPU.")] = (
        False
    )
    repeats: Annotated[int, typer.Option(min=1, help="How often every load is served; the median counts.")] = 3
    seconds: Annotated[
        float | None, typer.Option(min=1, max=86_400, help="Seconds that a load is served: 60; 18 with --quick.")
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU; else one.")] = None
    bounds: Annotated[
        Literal["stated", "loose"], typer.Option(help="Largest errors that pass; loose ones for shared machines.")
    ] = "stated"


@with_flags
def prove(
    flags: ProofFlags,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[
        Path | None, typer.Option(help="Folder that keeps tables, profiles and runs; else they are not kept.")
    ] = None,
    json_target: JsonFlag = None,
) -> None:
    """Measure this device, fit it, simulate three loads, serve them for real, and compare.

    Exit status 1 where an error is beyond its bound, 4 where the machine was too noisy to prove anything.
    """
    from kernels_profiling.clock import HostClock
    from kernels_profiling.machine import torch_device
    from kernels_profiling.noise import TooNoisyError
    from kernels_profiling.proof import Plan, Proof

    check_targets({"--json": json_target})
    torch_device(device)
    with _folder(out) as folder, progress_bar("proving") as report:
        plan = Plan(
            folder=folder,
            model=ModelFlags(flags.model or MODELS[device], device, "bf16", flags.threads),
            workload=flags.workload or WORKLOADS[device],
            quick=flags.quick,
            repeats=flags.repeats,
            seconds=flags.seconds or (QUICK_S if flags.quick else USUAL_S),
        )
        proof = Proof(plan, lambda said: typer.echo(said, err=True), report, clock=HostClock())
        try:
            found = proof.verdict(BOUNDS[device, flags.bounds])
        except TooNoisyError as error:
            typer.echo(f"too noisy, nothing proved: {error}", err=True)
            raise typer.Exit(TOO_NOISY) from None
    _show(table_console(json_target), found)
    if json_target:
        emit_json(found.as_json(), json_target)
    if found.broken:
        raise typer.Exit(1)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    from apexsim.atomic import make_folder

    if out is not None:
        yield make_folder(out)
        return
    with tempfile.TemporaryDirectory(prefix="apexsim-proof-") as scratch:
        yield Path(scratch)


def _show(console: Console, found: Verdict) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for load in found.loads:
        title = f"{load.name}: {load.rate_per_s:.3g} requests/s, {load.requests} requests; {load.role}"
        console.print(title, highlight=False)
        table = Table("seconds", box=SIMPLE_HEAD)
        for heading in ("predicted", "measured", "error", "error of each repeat"):
            table.add_column(heading, justify="right")
        for figure in load.figures:
            each = " ".join(f"{100 * error:+.1f}" for error in figure.errors)
            table.add_row(
                f"{figure.latency.upper() if figure.latency != 'e2e' else 'e2e'} {figure.statistic}",
                f"{figure.predicted_s:.4g}",
                f"{figure.measured_s:.4g}",
                f"{100 * figure.error:+.1f} %",
                each,
            )
        console.print(table)
    for line in found.said():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
