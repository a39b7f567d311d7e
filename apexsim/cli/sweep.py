"""``apexsim sweep``: a grid of simulations into one table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import progress_bar

if TYPE_CHECKING:
    import pandas as pd

_FIGURES = ("slo.attainment", "ttft_s.p90", "tpot_s.p90", "throughput.output_tokens_per_s")


def sweep(
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Base, and a grid of paths into it.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for sweep.parquet and the journal.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; the cores at hand.", min=1)] = None,
) -> None:
    """Simulate every point of a grid; a run that fails is a row with its error.

    Exit status 1 when no run succeeds.
    """
    from apexsim.sweep import TABLE
    from apexsim.sweep import sweep as run_sweep

    with progress_bar("Sweeping") as report:
        table = run_sweep(
            sweep_file, out=out, resume=resume, jobs=jobs, progress=lambda done, runs: report(done / runs)
        )
    done = int((table["verdict"] == "ok").sum())
    _show(table)
    typer.echo(f"{done} of {len(table)} runs done, written to {out / TABLE}")
    if not done:
        raise typer.Exit(1)


def _show(table: pd.DataFrame) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = list(table.columns[: list(table.columns).index("verdict")])
    shown = Table(*grid, *_FIGURES, "verdict")
    for record in table.to_dict("records"):
        figures = [_format(record.get(figure)) for figure in _FIGURES]
        verdict = record["verdict"] if record["verdict"] == "ok" else f"{record['verdict']}: {record['error']}"
        shown.add_row(*(str(record[path]) for path in grid), *figures, verdict)
    Console().print(shown)


def _format(value: Any) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
