"""``apexsim fit``: device profiles from tables of measured kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexsim.errors import BadInput

if TYPE_CHECKING:
    from apexsim.specs.device import DeviceProfile


def fit(
    tables: Annotated[
        Path | None, typer.Argument(metavar="[TABLES]", help="Folder of the reference data; else $APEXSIM_DATA.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device to fit.")] = None,
    out: Annotated[Path | None, typer.Option(help="Profile YAML to write.")] = None,
    all_devices: Annotated[bool, typer.Option("--all", help="Fit and replace every shipped profile.")] = False,
) -> None:
    """Fit the operator costs of a device and report the error on rows held out."""
    from apexsim.cli.facts import device_tables, print_tables
    from apexsim.io.yaml_files import write_yaml

    for name, target in _targets(device, out, all_devices=all_devices).items():
        profile = _fit(name, tables)
        write_yaml(target, profile.model_dump(mode="json", exclude_defaults=True))
        typer.echo(f"{name}: written to {target}", err=True)
        print_tables(*device_tables(profile))


def _targets(device: str | None, out: Path | None, *, all_devices: bool) -> dict[str, Path]:
    """Devices to fit, each with the file that its profile goes to."""
    from apexsim import catalog
    from apexsim.atomic import check_writable
    from apexsim.fitting.facts import devices

    if all_devices:
        if device or out:
            raise BadInput("fits every device into the shipped profiles; leave --device and --out away", where="--all")
        folder = catalog.data_root() / catalog.FOLDERS["device"]
        return {name: folder / f"{name}.yaml" for name in devices()}
    if device is None or out is None:
        raise BadInput("give both, or --all", where="--device --out")
    check_writable(out, where="--out")
    return {device: out}


def _fit(name: str, tables: Path | None) -> DeviceProfile:
    from rich.console import Console

    from apexsim.fitting.pipeline import fit_device

    console = Console(stderr=True)
    if not console.is_terminal:
        return fit_device(name, tables)
    with console.status(f"fitting {name}") as status:
        return fit_device(name, tables, progress=status.update)
