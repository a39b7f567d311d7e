"""Reading kernel tables: every column that is needed must be there and hold numbers; faults name file and column."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.errors import BadInput

SECONDS_PER_US = 1e-6


def data_root(given: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the reference data: as given, else ``$APEXSIM_DATA``, else ``../shared/data`` by the checkout."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(given or os.environ.get("APEXSIM_DATA") or beside)
    if not (root / "kernels").is_dir():
        raise BadInput("point APEXSIM_DATA at the folder that holds kernels/", where=root)
    return root


def read_table(
    path: Path, numbers: Sequence[str], labels: Sequence[str] = (), *, only: tuple[str, str] | None = None
) -> pd.DataFrame:
    """The columns ``numbers`` (as float64) and ``labels`` (as text) of a parquet table.

    ``only`` keeps the rows that have a value in a column: (column, value). Raises BadInput for a file that cannot be
    read, a missing column, or a number that is missing.
    """
    if not path.is_file():
        raise BadInput("no such table", where=path)
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"not a readable parquet table: {error}", where=path) from None
    for column in [*numbers, *labels, *(only or ())[:1]]:
        if column not in frame.columns:
            raise BadInput(f"the table lacks it; it has: {', '.join(map(str, frame.columns))}", where=path, key=column)
    if only:
        frame = frame[frame[only[0]] == only[1]].reset_index(drop=True)
    out = pd.DataFrame({column: _numbers(frame[column], path, column) for column in numbers})
    for column in labels:
        out[column] = frame[column].astype(str)
    return out


def _numbers(column: pd.Series[float], path: Path, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise BadInput(f"row {row} is not a number", where=path, key=name, got=str(column.iloc[row]))
    return values


def table_version(path: Path) -> str:
    """Engine and version that measured a table, as its own columns say."""
    frame = pd.read_parquet(path, columns=["backend", "table_version"])
    return f"{frame['backend'].iloc[0]} {frame['table_version'].iloc[0]}"
