"""Tables that ``python -m kernels_profiling measure`` writes: recognised by their ``device.yaml``, read for fits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from apexsim import catalog
from apexsim.costs.forms.hardware import COMPUTE_DTYPE
from apexsim.errors import BadInput, nearest
from apexsim.fitting.tables import read_table
from apexsim.io.yaml_files import load_spec
from apexsim.specs.base import Spec
from apexsim.specs.device import Datasheet, Price

DEVICE_FILE = "device.yaml"
# How `kernel_source` of a mixed batch ends whose kernel takes chunks and decodes at once.
ONE_LAUNCH = "one launch"
# Sizes that may be nothing.
_ZERO = {"window_size", "history", "decodes", "keys", "size_1", "size_2"}
TIMES = ("latency_s", "latency_p10_s", "latency_mean_s")


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


class TooFewRows(BadInput):
    """Tables with too few rows that a fit can use: those beyond the roofline are noise and count for nothing."""


class OwnTables:
    """The tables of a measured device in their folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = load_spec(MeasuredDevice, folder / DEVICE_FILE)
        profile, known = self.device.profile, catalog.names("device")
        if profile is not None and profile not in known:
            raise BadInput(nearest(profile, known), where=folder / DEVICE_FILE, key="profile", got=profile)
        if parts := sorted((folder / "parts").glob("*.parquet")):
            would_do = "the measuring was cut short; run it again to the end"
            raise BadInput(would_do, where=folder / "parts", got=f"{len(parts)} unmerged files")

    @staticmethod
    def found_in(folder: Path | None) -> bool:
        """Whether a folder holds tables of our own measuring."""
        return folder is not None and (folder / DEVICE_FILE).is_file()

    def rows(self, name: str, numbers: Sequence[str], labels: Sequence[str] = ()) -> pd.DataFrame:
        """Measured rows of a table, with ``seconds`` and ``kernel_source``; none without the table.

        A point that was measured in several rounds is one row: the median of its rounds. Failed and unsupported rows
        have no time and are left out.
        """
        frame = self._read(name, [*numbers, *TIMES], [*labels, "kernel_source"])
        points = frame.groupby([*numbers, *labels], as_index=False, sort=False)
        times = points[list(TIMES)].median()
        sources = points["kernel_source"].first()["kernel_source"]
        return times.assign(seconds=times["latency_s"] * self.interruption, kernel_source=sources)

    @cached_property
    def interruption(self) -> float:
        """Mean over median time of the products of a CPU: what others' work adds to a long step. 1 for a GPU.

        Medians of kernels do not add up to the time of a step where some of them are always interrupted.
        """
        rows = self._read("gemm", TIMES, ["kernel_source"]) if self.device.kind == "cpu" else pd.DataFrame()
        return max(1.0, float(rows["latency_mean_s"].sum() / rows["latency_s"].sum())) if len(rows) else 1.0

    def _read(self, name: str, numbers: Sequence[str], labels: Sequence[str]) -> pd.DataFrame:
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            return pd.DataFrame(columns=[*numbers, *labels])
        frame = read_table(path, numbers, labels, only=("status", "ok"))
        for column in numbers:
            least = 0.0 if column in _ZERO else np.nextafter(0.0, 1.0)
            if len(wrong := frame[~frame[column].between(least, np.inf, inclusive="left")]):
                said = f"a measured row has a number {'of at least' if column in _ZERO else 'above'} 0 there"
                raise BadInput(said, where=path, key=column, got=float(wrong[column].iloc[0]))
        for column in (each for each in ("dtype", "kv_dtype") if each in labels):
            if unknown := set(frame[column]) - set(COMPUTE_DTYPE):
                raise BadInput(nearest(min(unknown), COMPUTE_DTYPE), where=path, key=column, got=min(unknown))
        return frame

    def source(self, frame: pd.DataFrame) -> str:
        """Where rows come from, for a profile."""
        kernels = ", ".join(sorted(frame["kernel_source"].unique()))
        stretched = f"; medians times {self.interruption:.3f} for interruptions" if self.interruption > 1 else ""
        return f"measured on {self.device.device}, {self.device.date}: {kernels}{stretched}"
