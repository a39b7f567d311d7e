"""Names that a file gives: of the catalog, or of a short list."""

from __future__ import annotations

import os
from collections.abc import Mapping

from apexsim import catalog
from apexsim.errors import BadInput, nearest
from apexsim.specs.device import DeviceProfile


def device_named(name: str, clock_mhz: float | None, where: object) -> DeviceProfile:
    """The device of the catalog, or of a YAML file, at a clock."""
    check_catalog("device", name, where)
    return _clocked(catalog.load("device", name), clock_mhz, where)


def _clocked(device: DeviceProfile, clock_mhz: float | None, where: object) -> DeviceProfile:
    """The device at a clock; as it was measured for None and at its highest clock."""
    clock = device.power.clock
    if clock_mhz is None or (clock and clock_mhz == clock.nominal_mhz):
        return device
    if clock is None or clock_mhz > clock.nominal_mhz:
        would_do = f"give at most {clock.nominal_mhz:g}" if clock else f"no clocks of {device.name} are known"
        raise BadInput(would_do, where=where, key="clock_mhz", got=clock_mhz)
    return device.at_clock(clock_mhz)


def check_catalog(kind: catalog.Kind, name: str, where: object) -> None:
    """Unknown names and absent files are told with the file and key they stand in."""
    # A publisher's name of a model has a slash, too.
    if not name.endswith((".yaml", ".yml")) and ("/" not in name or (kind == "model" and not os.path.lexists(name))):
        catalog.locate(kind, name, where=f"{where}: {kind}")
    elif not os.path.lexists(name):
        raise BadInput("no such file; give a name, or the path of a YAML file", where=where, key=kind, got=name)


def check_known(name: str | None, known: Mapping[str, object] | tuple[str, ...], where: object, key: str) -> None:
    """Raise BadInput for a name that is not known; None is no name."""
    if name is not None and name not in known:
        raise BadInput(nearest(name, known), where=where, key=key, got=name)
