"""``apexsim sweep``: a grid of simulations into one table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import AllowPluginsFlag, keeping, progress_bar
from apexsim.errors import printable

if TYPE_CHECKING:
    import pandas as pd

# Heading of a column: the figure it shows and its format, as in the table of a search.
_FIGURES = {
    "SLO kept": ("slo.attainment", "{:.1%}"),
    "TTFT p90 s": ("ttft_s.p90", "{:.3f}"),
    "TPOT p90 s": ("tpot_s.p90", "{:.4f}"),
    "tokens /s": ("throughput.output_tokens_per_s", "{:.0f}"),
    "USD /Mtoken": ("steady.usd_per_million_output_tokens", "{:.3g}"),
}


def sweep(
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Base, and a grid of paths into it.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for sweep.parquet and the journal.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --out; the grid may have grown.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; the cores at hand.", min=1)] = None,
    allow_plugins: AllowPluginsFlag = False,
) -> None:
    """Simulate every point of a grid; a run that fails is a row with its error, one that misses its SLO says so.

    Exit status 1 when no run gives figures.
    """
    from apexsim.sweep import TABLE
    from apexsim.sweep import sweep as run_sweep

    with progress_bar("Sweeping") as report, keeping(out, "runs", report) as count:
        table = run_sweep(sweep_file, out=out, resume=resume, jobs=jobs, progress=count, allow_plugins=allow_plugins)
    missed = int((table["verdict"] == "misses_slo").sum())
    done = missed + int((table["verdict"] == "ok").sum())
    _show(table)
    short = f"; {missed} {'misses' if missed == 1 else 'miss'} the SLO" if missed else ""
    typer.echo(f"{done} of {len(table)} runs done{short}, written to {out / TABLE}")
    if not done:
        raise typer.Exit(1)


def _show(table: pd.DataFrame) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    grid = list(table.columns[: list(table.columns).index("verdict")])
    shown = Table(*(Column(printable(path), no_wrap=True) for path in grid), box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in _FIGURES:
        shown.add_column(heading.replace(" ", "\n", 1), justify="right")
    shown.add_column("verdict")
    for record in table.to_dict("records"):
        figures = [_format(record.get(figure), form) for figure, form in _FIGURES.values()]
        shown.add_row(*(printable(str(record[path])) for path in grid), *figures, record["verdict"])
    console = Console(markup=False, emoji=False)
    console.print(shown)
    for error, rows in table[~table["verdict"].isin(("ok", "misses_slo"))].groupby("error", sort=False):
        console.print(f"{len(rows)} {rows['verdict'].iloc[0]}: {error}", highlight=False, markup=False)


def _format(value: Any, form: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    # Shares are rounded down, so that none reads as the target that it misses; 0.57 x 1000 is a hair below 570.
    return form.format(math.floor(1000 * value + 1e-9) / 1000 if form.endswith("%}") else value)
