"""``apexsim fit``: device profiles from tables of measured kernels."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from apexsim.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apexsim.fitting.problems import Problem
    from apexsim.specs.device import DeviceProfile, FittedOperator


class _Job(NamedTuple):
    """One profile to fit: where the tables lie, which parts (None: all), a folder for plots, the file it goes to."""

    name: str
    tables: Path | None
    only: tuple[str, ...] | None
    plots: Path | None
    target: Path


def fit(
    tables: Annotated[
        Path | None,
        typer.Argument(metavar="[TABLES]", help="Folder of the reference data, or of own tables; else $APEXSIM_DATA."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device to fit.")] = None,
    out: Annotated[Path | None, typer.Option(help="Profile YAML to write; else the shipped one is replaced.")] = None,
    all_devices: Annotated[bool, typer.Option("--all", help="Fit and replace every shipped profile.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Parts to fit again, by comma (gemm,attention,...); the rest is kept.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for a plot of every fitted operator.")] = None,
) -> None:
    """Fit the operator costs of a device and report the error on rows held out."""
    from apexsim.cli.facts import device_tables, print_tables
    from apexsim.io.yaml_files import write_yaml

    parts = tuple(part.strip() for part in only.split(",")) if only else None
    _check_own(tables, out, parts)
    targets = _targets(device, out, all_devices=all_devices)
    todo = [_Job(name, tables, parts, plots, file) for name, file in targets.items()]
    written = {}
    for job, profile in _fitted(todo):
        write_yaml(job.target, profile.model_dump(mode="json", exclude_defaults=True))
        typer.echo(f"{job.name}: written to {job.target}", err=True)
        written[job.name] = profile
    for profile in written.values():
        print_tables(*device_tables(profile))


def _check_own(tables: Path | None, out: Path | None, parts: tuple[str, ...] | None) -> None:
    """Tables of our own measuring make a new profile, whole."""
    from apexsim.fitting.own import DEVICE_FILE, OwnTables

    if tables and not OwnTables.found_in(tables) and not (tables / "kernels").is_dir():
        would_do = f"holds neither {DEVICE_FILE}, as own tables do, nor kernels/, as the reference data does"
        raise BadInput(would_do, where="TABLES", got=str(tables))
    if OwnTables.found_in(tables) and out is None:
        raise BadInput("give the profile YAML to write", where="--out")
    if OwnTables.found_in(tables) and parts:
        raise BadInput("own tables are fitted whole; leave it away", where="--only", got=",".join(parts))


def _targets(device: str | None, out: Path | None, *, all_devices: bool) -> dict[str, Path]:
    """Devices to fit, each with the file that its profile goes to."""
    from apexsim import catalog
    from apexsim.atomic import check_writable
    from apexsim.fitting.facts import devices

    folder = catalog.data_root() / catalog.FOLDERS["device"]
    if all_devices:
        if device or out:
            raise BadInput("fits every device into the shipped profiles; leave --device and --out away", where="--all")
        return {name: folder / f"{name}.yaml" for name in devices()}
    if not device:
        raise BadInput("give one, or --all", where="--device")
    if out:
        check_writable(out, where="--out")
    return {device: out or folder / f"{device}.yaml"}


def _fitted(todo: list[_Job]) -> Iterator[tuple[_Job, DeviceProfile]]:
    """Every job with its profile, in order; several of them side by side, one a core.

    The power of a device may rest on its relatives' shipped profiles: it comes last, one device after another.
    """
    from apexsim.fitting.pipeline import PARTS

    if len(todo) == 1:
        yield todo[0], _run(todo[0])
        return
    kernels = [job._replace(only=tuple(part for part in job.only or PARTS if part != "power")) for job in todo]
    with ProcessPoolExecutor() as pool:
        yield from zip(kernels, pool.map(_run, kernels), strict=True)
    for job in todo:
        if "power" in (job.only or PARTS):
            yield job, _run(job._replace(only=("power",)))


def _run(job: _Job) -> DeviceProfile:
    """Fit one profile, telling on a line of standard error what is being fitted."""
    from apexsim import catalog
    from apexsim.fitting.own import OwnTables
    from apexsim.fitting.pipeline import PARTS, fit_device, fit_measured

    base = catalog.load("device", job.name) if job.only else None

    def tell(what: str) -> None:
        typer.echo(what, err=True)

    def draw(problem: Problem, found: FittedOperator) -> None:
        if job.plots:
            _draw(job.plots, job.name, problem, found)

    if job.tables and OwnTables.found_in(job.tables):
        return fit_measured(job.name, OwnTables(job.tables), tell, fitted=draw)
    return fit_device(job.name, job.tables, tell, only=job.only or PARTS, base=base, fitted=draw)


def _draw(folder: Path, device: str, problem: Problem, found: FittedOperator) -> None:
    """A picture of one fit on all its rows."""
    import pandas as pd

    from apexsim.fitting.problems import predicted_s
    from apexsim.plots import plot_fit

    assert found.residual is not None, "every fit has a residual"
    size, column = next(iter(problem.valid.items()))
    rows = pd.DataFrame(
        {
            size: problem.frame[column],
            "measured_s": problem.frame["seconds"],
            "predicted_s": predicted_s(problem, found.coefficients, found.residual, found.shapes),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{device}: {problem.kind} {problem.key} ({len(rows):,} rows of {problem.source})"
    plot_fit(rows, folder / f"{device}-{problem.kind}-{problem.key}.png", title=title, size=size)
