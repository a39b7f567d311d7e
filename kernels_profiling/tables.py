"""The tables that measuring writes: their columns, parts that survive a kill, and one parquet file an operator.

Rows go to ``parts/OPERATOR-NNNNN.parquet`` a few at a time; when an operator is done its parts become
``OPERATOR.parquet``. Every file appears whole or not at all, so a killed run loses the rows of its last
seconds at most. docs/profiling.md lists the columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from apexsim.atomic import atomic_path, make_folder
from apexsim.errors import BadInput

Point = Mapping[str, Any]
Key = tuple[Any, ...]

# Besides its sizes, what tells the rows of a table apart: all points are measured in as many rounds, one after another.
ROUND = "round"
# Sizes of an operator, by table.
SIZES: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k", "dtype"),
    "prefill_attention": ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "window_size", "kv_dtype"),
    "decode_attention": ("batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "window_size", "kv_dtype"),
    "mixed_attention": ("chunk", "history", "decodes", "keys", "heads", "kv_heads", "head_dim", "kv_dtype"),
    "elementwise": ("kind", "rows", "bytes", "hidden", "heads", "kv_heads", "head_dim", "width"),
    "sampling": ("sequences", "vocab", "method"),
    "moe": ("tokens", "hidden", "inter", "topk", "experts", "tp", "ep", "routing", "dtype"),
    "memory_copy": ("bytes",),
    "launch": ("kernels", "mode"),
    "collective": ("collective", "num_gpus", "bytes", "dtype"),
    "sustained": ("operator", "content", "size_0", "size_1", "size_2", "held_s"),
}
TEXT = {"dtype", "kv_dtype", "kind", "method", "routing", "mode", "collective", "operator", "content"}
# What every row says besides its sizes. A number that is not known is null.
MEASURED = (
    "status",  # ok, failed or unsupported
    "error",  # why, where it is not ok
    "kernel_source",
    "latency_s",  # median of the repeats
    "latency_p10_s",
    "latency_p90_s",
    "latency_mean_s",
    "burst_latency_s",  # of sustained rows: before they were held
    "repeats",
    "calls",  # kernels timed together in one repeat
    "buffers",  # sets of operands that took turns
    "rotated_bytes",  # of all of them
    "power_w",
    "idle_power_w",
    "sm_clock_mhz",
    "device",
    "driver",
    "backend",
    "table_version",
    "date",
)
TEXT_MEASURED = {"status", "error", "kernel_source", "device", "driver", "backend", "table_version", "date"}
FLUSH_ROWS, FLUSH_S = 32, 10.0


class Tables:
    """The tables in a folder: which points are done, and rows added to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self._parts = make_folder(folder / "parts")
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._flushed = time.monotonic()

    def done(self, name: str) -> set[Key]:
        """Sizes of the rows that a table has, failed and unsupported ones too."""
        frame = self.read(name)
        return set() if frame is None else {key_of(name, dict(row)) for _, row in frame.iterrows()}

    def read(self, name: str) -> pd.DataFrame | None:
        """Every row of a table, its parts included; None where there is none."""
        found = [read_parquet(path, name) for path in self._files(name)]
        return pd.concat(found, ignore_index=True) if found else None

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row; it is written with those of the next seconds."""
        self._rows.setdefault(name, []).append(dict(row))
        rows = sum(map(len, self._rows.values()))
        if rows >= FLUSH_ROWS or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        for name, rows in self._rows.items():
            numbers = [int(path.stem.rpartition("-")[2]) for path in self._part_files(name)]
            _write(self._parts / f"{name}-{max(numbers, default=-1) + 1:05d}.parquet", as_frame(name, rows))
        self._rows.clear()
        self._flushed = time.monotonic()

    def merge(self) -> None:
        """Make one file of the parts of every table."""
        self.flush()
        for name, sizes in SIZES.items():
            parts = self._part_files(name)
            frame = self.read(name)
            if parts and frame is not None:
                _write(self.folder / f"{name}.parquet", frame.drop_duplicates([*sizes, ROUND], keep="last"))
                for part in parts:
                    part.unlink()

    def _files(self, name: str) -> list[Path]:
        whole = self.folder / f"{name}.parquet"
        return [*([whole] if whole.exists() else []), *self._part_files(name)]

    def _part_files(self, name: str) -> list[Path]:
        return sorted(self._parts.glob(f"{name}-[0-9]*.parquet"))


def key_of(name: str, point: Mapping[Any, Any]) -> Key:
    """What tells a point of a table apart."""
    return tuple(point[column] if column in TEXT else float(point[column]) for column in (*SIZES[name], ROUND))


def as_frame(name: str, rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with every column of the schema, in its order and type."""
    frame = pd.DataFrame(list(rows)).reindex(columns=[*SIZES[name], ROUND, *MEASURED])
    text = [column for column in frame.columns if column in TEXT | TEXT_MEASURED]
    numbers = [column for column in frame.columns if column not in text]
    return frame.astype(dict.fromkeys(text, "string") | dict.fromkeys(numbers, "float64"))


def read_parquet(path: Path, name: str) -> pd.DataFrame:
    """A file of the table ``name``; BadInput names one that is corrupt or lacks a column."""
    mend = "delete it to measure its rows again"
    try:
        frame = pd.read_parquet(path)
        if missing := [column for column in as_frame(name, ()).columns if column not in frame.columns]:
            raise BadInput(f"the table lacks it; {mend}", where=path, key=missing[0])
        return frame.astype(as_frame(name, ()).dtypes.to_dict())
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"not a readable table of {name} ({error}); {mend}", where=path) from None


def _write(path: Path, frame: pd.DataFrame) -> None:
    with atomic_path(path) as scratch:
        frame.to_parquet(scratch, index=False)
