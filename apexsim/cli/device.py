"""``apexsim device``: a profile of an unmeasured device from its datasheet, and how far such profiles are off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexsim.errors import BadInput

if TYPE_CHECKING:
    from apexsim.specs.device import DeviceProfile

_NONE_OUT = "leave --name and --out away: --errors writes nothing"


def device(
    from_datasheet: Annotated[Path | None, typer.Option(help="Datasheet YAML; see docs/devices.md.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the device.")] = None,
    out: Annotated[Path | None, typer.Option(help="Profile YAML to write.")] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Print what leaving each measured device out shows, and no more.")
    ] = False,
) -> None:
    """Build the profile of a device that nobody measured from its datasheet and its nearest measured relatives."""
    from apexsim import catalog

    measured = [catalog.load("device", known) for known in catalog.names("device")]
    if errors:
        if from_datasheet or name or out:
            raise BadInput(_NONE_OUT, where="--errors")
        _print_errors(measured)
        return
    for flag, given in (("--from-datasheet", from_datasheet), ("--name", name), ("--out", out)):
        if given in (None, ""):
            raise BadInput("give a datasheet, a name and a file for the profile, or --errors alone", where=flag)
    assert from_datasheet is not None, "asked for above"
    assert name is not None, "asked for above"
    assert out is not None, "asked for above"
    _build(from_datasheet, name, out, measured)


def _build(source: Path, name: str, out: Path, measured: Sequence[DeviceProfile]) -> None:
    from apexsim import catalog
    from apexsim.atomic import check_writable
    from apexsim.cli.facts import device_tables, print_tables
    from apexsim.fitting.relatives import Sheet
    from apexsim.fitting.transfer import profile_from_datasheet
    from apexsim.io.yaml_files import load_spec, write_yaml

    if name in catalog.names("device"):
        raise BadInput("a measured device has that name; choose another", where="--name", got=name)
    check_writable(out, where="--out")
    profile = profile_from_datasheet(load_spec(Sheet, source), name, measured)
    write_yaml(out, profile.model_dump(mode="json", exclude_defaults=True))
    typer.echo(f"{name}: written to {out}", err=True)
    print_tables(*device_tables(profile))


def _print_errors(measured: Sequence[DeviceProfile]) -> None:
    """Errors by operator, pooled and by device, then of whole runs: each device left out, then its generation too."""
    from apexsim.cli.facts import print_tables, table
    from apexsim.fitting.transfer import left_out_errors, pooled
    from apexsim.fitting.transfer_runs import run_errors

    for title, whole in (("the device", False), ("its generation", True)):
        found = left_out_errors(measured, whole_generation=whole)
        lines = [
            (error.device, error.kind, *_percent(error.held_out.median, error.held_out.p90), f"{error.bias:+.1%}")
            for error in [*pooled(found), *found]
        ]
        header: tuple[str, ...] = ("left out", "operator", "median", "p90", "bias")
        print_tables(table(header, lines, f"Kernel times with {title} left out"))
        runs = [
            (run.device, run.deployment, *_signed(run.tpot, run.ttft, run.joules), run.status)
            for run in run_errors(measured, whole_generation=whole)
        ]
        header = ("left out", "deployment", "TPOT", "TTFT", "J/token", "status")
        print_tables(table(header, runs, f"Whole runs with {title} left out"))


def _percent(*shares: float) -> tuple[str, ...]:
    return tuple(f"{share:.1%}" for share in shares)


def _signed(*errors: float | None) -> tuple[str, ...]:
    return tuple("-" if error is None else f"{error:+.1%}" for error in errors)
