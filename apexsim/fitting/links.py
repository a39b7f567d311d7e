"""Collectives and send/receive: cleaned tables of points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.collectives import CollectiveTable, clean_points, thin_points
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.specs.device import Evidence, FittedOperator, HoldOut, Points

NCCL_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
SECONDS_PER_MS = 1e-3
Operators = dict[str, dict[str, FittedOperator]]


def collectives(folder: Path) -> Operators:
    """Operators by kind and key of a device's own tables: NCCL, and the engine's all-reduce inside a CUDA graph."""
    found: Operators = {}
    custom = read_table(folder / "custom_allreduce.parquet", ["num_gpus", "bytes", "latency_us"], ["implementation"])
    custom = custom[custom["implementation"].str.endswith("graph")]
    for group in np.unique(custom["num_gpus"]):
        rows = custom[custom["num_gpus"] == group]
        source = f"custom_allreduce.parquet, graph ({table_version(folder / 'custom_allreduce.parquet')})"
        found.setdefault("all_reduce", {})[f"custom_{int(group)}"] = _table(rows, source)
    nccl = read_table(folder / "nccl.parquet", ["num_gpus", "bytes", "latency_us"], ["collective"])
    source = f"nccl.parquet ({table_version(folder / 'nccl.parquet')})"
    for collective, kind in NCCL_KINDS.items():
        of_kind = nccl[nccl["collective"] == collective]
        for group in np.unique(of_kind["num_gpus"]):
            rows = of_kind[of_kind["num_gpus"] == group]
            found.setdefault(kind, {})[f"nccl_{int(group)}"] = _table(rows, source)
    return found


def send_recv(table: Path, *, across_nodes: bool, evidence: Evidence) -> FittedOperator:
    """Send/receive between two devices from a table of sizes 8 KiB apart, thinned to the powers of two."""
    columns = ["devices_per_node", "size", "time_stats.send_recv.median"]
    frame = read_table(table, columns)
    frame = frame[frame["devices_per_node"] == (1 if across_nodes else 2)]
    sizes, seconds = frame["size"].to_numpy(), frame[columns[2]].to_numpy() * SECONDS_PER_MS
    points = []
    for exponent in range(11, 27):
        size = float(2**exponent)
        near = (sizes >= size / 1.2) & (sizes <= size * 1.2)
        if near.any():
            points.append((size, float(np.median(seconds[near]))))
    return _operator(points, len(frame), f"{table.parent.name}/{table.name} (2024)", evidence)


def _table(rows: pd.DataFrame, source: str) -> FittedOperator:
    sized = zip(rows["bytes"], rows["latency_us"] * SECONDS_PER_US, strict=True)
    return _operator([(float(size), float(seconds)) for size, seconds in sized], len(rows), source, "fitted")


def _operator(points: list[tuple[float, float]], rows: int, source: str, evidence: Evidence) -> FittedOperator:
    kept, dropped = clean_points(points)
    table = _points(thin_points(kept))
    return FittedOperator(
        form="table",
        points=table,
        evidence=evidence,
        source=source,
        rows_used=rows - dropped,
        rows_dropped={"over 1.15x the time of a larger message": dropped} if dropped else {},
        quality={"leave_one_out": _leave_one_out(_points(kept))},
    )


def _points(points: list[tuple[float, float]]) -> Points:
    seconds = tuple(float(f"{seconds:.4g}") for _, seconds in points)
    return Points(bytes=tuple(int(size) for size, _ in points), seconds=seconds)


def _leave_one_out(table: Points) -> HoldOut:
    """Error of every inner point predicted from the others."""
    errors = []
    for at in range(1, len(table.bytes) - 1):
        others = Points(
            bytes=table.bytes[:at] + table.bytes[at + 1 :], seconds=table.seconds[:at] + table.seconds[at + 1 :]
        )
        errors.append(abs(float(CollectiveTable(others)(table.bytes[at])) / table.seconds[at] - 1))
    median, p90 = np.quantile(errors, [0.5, 0.9])
    return HoldOut(median=round(float(median), 4), p90=round(float(p90), 4), rows=len(errors))
