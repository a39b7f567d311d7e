"""Tables that ``python -m kernels_profiling measure`` writes: recognised by their ``device.yaml``, read for the fits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd

from apexsim.errors import BadInput
from apexsim.fitting.tables import read_table
from apexsim.specs.base import Spec
from apexsim.specs.device import Datasheet, Price

DEVICE_FILE = "device.yaml"


class MeasuredDevice(Spec):
    """What was measured and with what: the ``device.yaml`` beside the tables.

    ``profile`` is the shipped profile of the same hardware, if there is one: its datasheet and price are taken. Those
    of any other device are measured or assumed, as the sources say. ``idle_power_w`` is None where nothing meters it.
    """

    device: str
    kind: Literal["cpu", "cuda"]
    profile: str | None = None
    threads: int | None = None
    datasheet: Datasheet
    price: Price
    idle_power_w: float | None = None
    driver: str
    library: str
    date: str


def is_own(folder: Path | None) -> bool:
    """Whether a folder holds tables of our own measuring."""
    return folder is not None and (folder / DEVICE_FILE).is_file()


def rows(folder: Path, name: str, numbers: list[str], labels: list[str]) -> pd.DataFrame:
    """Rows of a table that were measured, with ``seconds``, ``kernel_source`` and ``source``; empty without the table.

    Failed and unsupported rows have no time and are left out.
    """
    path = folder / f"{name}.parquet"
    if not path.is_file():
        return pd.DataFrame(columns=[*numbers, *labels, "seconds", "kernel_source"])
    status = read_table(path, [], ["status"])["status"]
    frame = read_table(path, numbers, [*labels, "kernel_source", "table_version"], keep=(status == "ok").to_numpy())
    frame["seconds"] = read_table(path, ["latency_s"], keep=(status == "ok").to_numpy())["latency_s"]
    if (frame["seconds"] <= 0).any():
        raise BadInput("a measured row takes no time", where=path, key="latency_s")
    return frame
