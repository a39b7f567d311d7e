"""Collectives, send/receive and the exchanges of expert layers: cleaned tables of points."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.collectives import CollectiveTable, clean_points, copies_sent, thin_points
from apexsim.costs.forms.hardware import Array
from apexsim.fitting.facts import Facts
from apexsim.fitting.problems import Operators, summary
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.specs.cluster import DEVICES_PER_NODE
from apexsim.specs.device import Evidence, FittedOperator, HoldOut, Points

NCCL_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
SECONDS_PER_MS = 1e-3
ACTIVATION_BYTES = 2
# Devices of one NVLink domain whose tables stop at 4 ranks take those of 8 from the same chip on an 8-GPU board.
WIDER = {"gb200": "b200_sxm", "gb300": "b300_sxm"}
# Multiprocessors that DeepEP takes by default, of the counts in the tables.
DEEPEP_SMS = 20
# Groups of these exchanges are listed by nodes; trays of GB200 and GB300 hold fewer devices than the nodes of others.
TRAY_DEVICES = {"gb200": 4, "gb300": 4}
# Points are left out that those kept give back within this; shapes that send alike already differ by more.
TOLERANCE, EXCHANGE_TOLERANCE = 0.01, 0.08
PCIE = ("l40s", "rtx_pro_6000_server", "rtx_4090")
# Boards whose links nobody measured, and those with the same link: L40S and RTX 4090 are one chip on PCIe 4.0 x16.
# GeForce boards have no access to each other's memory. Nor had the L40S in groups of 8, by their times (README of the
# tables). An all-to-all of a few bytes between two RTX 4090 takes 11.3 to 11.9 us
# (github.com/tinygrad/open-gpu-kernel-modules/issues/17).
SAME_LINK = {"rtx_4090": "l40s"}
# Trays of these reach each other over the NVLink that joins the devices of a tray.
ONE_NVLINK = ("gb200", "gb300")


class Curve(NamedTuple):
    """A measured curve: what it is called in a profile, its points (bytes, seconds), where they come from."""

    kind: str
    key: str
    points: list[tuple[float, float]]
    source: str
    evidence: Evidence = "fitted"


def operators(device: Facts, kernels: Path) -> Operators:
    """Everything that sends between devices, from the tables under ``kernels``; nothing where there are none."""
    found: Operators = {}
    folder = kernels / "datacenter" / device.folder
    curves = [*_collectives(folder), *_exchanges(folder), *_across_nodes(kernels, device.folder)]
    if not curves:
        return found
    for curve in curves:
        found.setdefault(curve.kind, {})[curve.key] = operator(curve)
    for curve in _hand_overs(kernels, device.folder):
        found[curve.kind] = {curve.key: operator(curve)}
    return found


def _collectives(folder: Path) -> Iterator[Curve]:
    """NCCL, and the engine's all-reduce inside a CUDA graph; groups of 8 from kin where the table stops at 4."""
    if folder.name in SAME_LINK:
        # Not an engine's own all-reduce, which reads the memory of other devices.
        yield from _library(folder.parent / SAME_LINK[folder.name], "estimated")
        return
    if not (folder / "nccl.parquet").is_file():
        return
    yield from _own_collectives(folder, "fitted")
    if folder.name in WIDER:
        wider = _own_collectives(folder.parent / WIDER[folder.name], "estimated")
        yield from (curve for curve in wider if curve.key.endswith("_8"))


def _own_collectives(folder: Path, evidence: Evidence) -> Iterator[Curve]:
    table = folder / "custom_allreduce.parquet"
    custom = read_table(table, ["num_gpus", "bytes", "latency_us"], ["implementation"])
    custom = custom[custom["implementation"].str.endswith("graph")]
    source = f"{folder.name}/{table.name}, graph ({table_version(table)})"
    for group in np.unique(custom["num_gpus"]).astype(int):
        rows = custom[custom["num_gpus"] == group]
        yield Curve("all_reduce", f"custom_{group}", _sized(rows), source, evidence)
    yield from _library(folder, evidence)


def _library(folder: Path, evidence: Evidence) -> Iterator[Curve]:
    table = folder / "nccl.parquet"
    nccl = read_table(table, ["num_gpus", "bytes", "latency_us"], ["collective"])
    source = f"{folder.name}/{table.name} ({table_version(table)})"
    for collective, kind in NCCL_KINDS.items():
        for group in np.unique(nccl["num_gpus"]):
            rows = nccl[(nccl["collective"] == collective) & (nccl["num_gpus"] == group)]
            yield Curve(kind, f"nccl_{int(group)}", _sized(rows), source, evidence)


def _sized(rows: pd.DataFrame) -> list[tuple[float, float]]:
    return list(zip(rows["bytes"], rows["latency_us"] * SECONDS_PER_US, strict=True))


def _exchanges(folder: Path) -> Iterator[Curve]:
    """Tokens sent to the ranks of their experts and back, by what a rank sends in bf16 (see ``copies_sent``)."""
    per_node = TRAY_DEVICES.get(folder.name, DEVICES_PER_NODE)
    for name in ("deepep_normal__multinode", "deepep_normal", "deepep_ll__multinode", "deepep_ll"):
        table = folder / f"{name}.parquet"
        if table.is_file():
            yield from _deepep(table, per_node, low_latency="_ll" in name)
    table = folder / "trtllm_alltoall.parquet"
    if table.is_file():
        yield from _trtllm(table)


def _deepep(table: Path, per_node: int, *, low_latency: bool) -> Iterator[Curve]:
    """DeepEP: its normal kernels send a token once to a rank, those of low latency once to an expert."""
    middle = "avg_t_us" if low_latency else "transmit_us"
    columns = [f"dispatch_{middle}", f"combine_{middle}"]
    frame = read_table(table, ["node_num", "hidden", "tokens", "topk", "experts", *columns])
    if not low_latency:
        sms = read_table(table, ["dispatch_sms", "combine_sms"])
        frame = frame[(sms["dispatch_sms"] == DEEPEP_SMS) & (sms["combine_sms"] == DEEPEP_SMS)]
    frame = frame[(frame["topk"] < frame["experts"]) & (frame[columns] > 0).all(axis=1)]
    for nodes in np.unique(frame["node_num"]):
        rows = frame[frame["node_num"] == nodes]
        ranks = int(nodes) * per_node
        copies = rows["topk"] if low_latency else copies_sent(rows["topk"].to_numpy(), ranks)
        size = (rows["tokens"] * rows["hidden"] * ACTIVATION_BYTES * copies).to_numpy()
        source = f"{table.parent.name}/{table.name} ({table_version(table)})"
        group = f"ranks_{ranks}_over_{int(nodes)}" if nodes > 1 else f"ranks_{ranks}"
        for column, phase in zip(columns, ("dispatch", "combine"), strict=True):
            points = _by_octave(size, rows[column].to_numpy() * SECONDS_PER_US)
            yield Curve(f"{'deepep_ll' if low_latency else 'deepep'}_{phase}", group, points, source)


def _trtllm(table: Path) -> Iterator[Curve]:
    """TensorRT-LLM over NVLink: nvfp4 out (with the preparation), bf16 back."""
    frame = read_table(table, ["tokens", "hidden", "topk", "ep", "latency_us"], ["phase", "dtype", "kernel_source"])
    frame = frame[(frame["dtype"] == "nvfp4") & (frame["kernel_source"] == "NVLinkTwoSided")]
    parts = {"dispatch": ("alltoall_prepare", "alltoall_dispatch"), "combine": ("alltoall_combine",)}
    source = f"{table.parent.name}/{table.name} ({table_version(table)}), two-sided, nvfp4"
    for ranks in np.unique(frame["ep"]).astype(int):
        rows = frame[frame["ep"] == ranks]
        for phase, names in parts.items():
            total = rows[rows["phase"].isin(names)].groupby(["tokens", "hidden", "topk"])["latency_us"].sum()
            sent = [
                tokens * hidden * ACTIVATION_BYTES * copies_sent(topk, ranks) for tokens, hidden, topk in total.index
            ]
            points = list(zip(sent, total.to_numpy() * SECONDS_PER_US, strict=True))
            yield Curve(f"trtllm_{phase}", f"ranks_{ranks}", points, source)


def _by_octave(size: Array, seconds: Array) -> list[tuple[float, float]]:
    """Median size and time of the rows in every factor of two of sizes, since many shapes send alike."""
    octave = np.round(np.log2(size))
    groups = [octave == value for value in np.unique(octave)]
    return [(float(np.median(size[at])), float(np.median(seconds[at]))) for at in groups]


def _across_nodes(kernels: Path, folder: str) -> Iterator[Curve]:
    """All-reduce over two nodes of 8, measured on A100 only."""
    if folder != "a100_sxm":
        return
    table = kernels / "a100_h100_2024" / "network" / "a100_dgx" / "all_reduce.parquet"
    column = "time_stats.all_reduce.median"
    frame = read_table(table, ["num_workers", "size", column])
    frame = frame[frame["num_workers"] == 16]
    points = _octaves(frame["size"].to_numpy(), frame[column].to_numpy() * SECONDS_PER_MS)
    yield Curve("all_reduce", "nccl_16_over_2", points, f"{table.parent.name}/{table.name} (2024), two nodes")


def _hand_overs(kernels: Path, folder: str) -> Iterator[Curve]:
    """Send/receive between two devices, inside a node and across: of A100 and H100, the others take the latter's.

    Across nodes that one NVLink joins it is as inside; across nodes of PCIe boards, whose network cards share the bus,
    no faster than inside.
    """
    near = "a100_dgx" if folder.startswith("a100") else "h100_dgx"
    evidence: Evidence = "fitted" if folder[:4] == near[:4] else "estimated"
    table = kernels / "a100_h100_2024" / "network" / near / "send_recv.parquet"
    column = "time_stats.send_recv.median"
    frame = read_table(table, ["devices_per_node", "size", column])

    def curve(kind: str, per_node: int) -> Curve:
        rows = frame[frame["devices_per_node"] == per_node]
        points = _octaves(rows["size"].to_numpy(), rows[column].to_numpy() * SECONDS_PER_MS)
        return Curve(kind, "p2p", points, f"{table.parent.name}/{table.name} (2024)", evidence)

    inside = _over_pcie(kernels, folder) if folder in PCIE else curve("send_recv", 2)
    across = curve("send_recv_across_nodes", 2 if folder in ONE_NVLINK else 1)
    yield inside
    yield across._replace(points=_no_faster(across.points, inside.points)) if folder in PCIE else across


def _over_pcie(kernels: Path, folder: str) -> Curve:
    """Hand-over inside a node over PCIe: half of an all-to-all over two ranks.

    That is 20 to 80 % slower where both are measured.
    """
    table = kernels / "datacenter" / SAME_LINK.get(folder, folder)
    (both,) = (each for each in _library(table, "estimated") if (each.kind, each.key) == ("all_to_all", "nccl_2"))
    points = [(size / 2, s) for size, s in both.points]
    return both._replace(kind="send_recv", key="p2p", points=points, source=f"half of {both.source}")


def _no_faster(points: list[tuple[float, float]], than: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """``points``, raised to the curve ``than`` where it is slower."""
    slower = CollectiveTable(_points(clean_points(than)[0]))
    return [(size, max(seconds, float(slower(size)))) for size, seconds in points]


def _octaves(sizes: Array, seconds: Array) -> list[tuple[float, float]]:
    """Median time of the rows within 20 % of every power of two."""
    points = []
    for exponent in range(10, 31):
        size = float(2**exponent)
        near = (sizes >= size / 1.2) & (sizes <= size * 1.2)
        if near.any():
            points.append((size, float(np.median(seconds[near]))))
    return points


def operator(curve: Curve) -> FittedOperator:
    """A measured curve as an operator: cleaned, and thinned where points give each other back."""
    kept, dropped = clean_points(curve.points)
    exchange = curve.key.startswith("ranks_")
    table = _points(thin_points(kept, EXCHANGE_TOLERANCE if exchange else TOLERANCE))
    return FittedOperator(
        form="table",
        points=table,
        evidence=curve.evidence,
        source=curve.source,
        rows_used=len(kept),
        rows_dropped={"over 1.15x a larger message": dropped} if dropped else {},
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
    return summary(np.array(errors))
