"""``apexsim calibrate``: the terms of an engine profile from measured runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexsim.cli.options import AllowPluginsFlag, check_targets, progress_bar, with_flags

if TYPE_CHECKING:
    from apexsim.specs.engine import CalibrationReport


@dataclass(frozen=True)
class DrawFlags:
    """Flags that say which rows are used, and what their files may do."""

    rows_per_group: Annotated[int, typer.Option(help="Most rows drawn of one model on one device.", min=1)] = 20
    seed: Annotated[int, typer.Option(help="Seed of the draw.", min=0)] = 0
    where: Annotated[
        list[str] | None, typer.Option(help="Only rows whose column has this value, as device=h100-sxm (repeatable).")
    ] = None
    allow_plugins: AllowPluginsFlag = False


@with_flags
def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="runs.csv files: one measured run a row.")],
    draw: DrawFlags,
    *,
    engine: Annotated[str, typer.Option(help="Engine profile to begin with; rows of its versions are used.")],
    out: Annotated[Path, typer.Option(help="YAML file for the calibrated profile.")],
    terms: Annotated[
        str | None, typer.Option(help="Terms to fit, as step_s,top_p_passes; default all that the rows can see.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default all cores.", min=1)] = None,
) -> None:
    """Fit the few terms of an engine profile on measured runs, and say what leaving groups out shows."""
    from apexsim import catalog
    from apexsim.calibration import calibrate as run_calibration
    from apexsim.calibration import drawn_groups
    from apexsim.io.engines import check_engine
    from apexsim.io.yaml_files import write_yaml
    from apexsim.validation.runs import read_runs, selected

    check_targets({"--out": out})
    check_engine(engine, allowed=draw.allow_plugins)
    profile = catalog.load("engine", engine)
    rows = [
        run
        for file in runs
        for run in selected(read_runs(file, allow_plugins=draw.allow_plugins), draw.where or (), file)
    ]
    groups = drawn_groups(rows, profile, draw.rows_per_group, draw.seed)
    with progress_bar("Calibrating") as report:
        wanted = None if terms is None else terms.split(",")
        fitted = run_calibration(profile, groups, terms=wanted, jobs=jobs, progress=report)
    assert fitted.calibration is not None, "a calibrated profile has a report"
    names = ", ".join(sorted({group.runs[0].set_name for group in groups}))
    drawn = f"at most {draw.rows_per_group} rows a group drawn with seed {draw.seed}"
    drawn += f", {' '.join(draw.where)}" if draw.where else ""
    source = f"apexsim calibrate on the sets {names}: {fitted.calibration.rows} rows of {len(groups)} groups, {drawn}"
    write_yaml(out, fitted.model_copy(update={"source": source}).model_dump(mode="json", exclude_defaults=True))
    _show(fitted.calibration)


def _show(report: CalibrationReport) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    terms = Table("term", box=SIMPLE_HEAD, title=f"Fitted on {report.rows} rows", title_justify="left")
    for heading in ("value", "standard error", "unit"):
        terms.add_column(heading, justify="right")
    for name, term in report.terms.items():
        scale, unit = (1e3, "ms") if name.endswith("_s") else (1.0, "")
        terms.add_row(name.removesuffix("_s"), f"{scale * term.value:.4g}", f"{scale * term.standard_error:.2g}", unit)
    console.print(terms)
    errors = Table("rows", box=SIMPLE_HEAD, title="Errors in %", title_justify="left")
    for heading in ("TPOT", "bias", "TTFT", "bias"):
        errors.add_column(heading, justify="right")
    named = {"before": report.before, "fitted": report.fitted}
    for name, found in {**named, **{f"left out: {group}": found for group, found in report.left_out.items()}}.items():
        figures = (found.tpot_mape, found.tpot_bias, found.ttft_mape, found.ttft_bias)
        errors.add_row(name, *("-" if figure is None else f"{figure:.1f}" for figure in figures))
    console.print(errors)
