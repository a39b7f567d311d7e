"""Collectives: measured (bytes, seconds) points, log-log between them, linear in bytes beyond the last two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from apexsim.costs.forms.hardware import Array
from apexsim.specs.device import DeviceProfile, FittedOperator, HoldOut, Points

ACROSS_NODES = re.compile(r"nccl_(?P<ranks>\d+)_over_(?P<nodes>\d+)")
# What each collective over nodes does inside a node, with the share of its bytes there.
_INSIDE = {
    "all_reduce": {"reduce_scatter": 1.0, "all_gather": 1.0},
    "all_gather": {"all_gather": 1.0},
    "reduce_scatter": {"reduce_scatter": 1.0},
}
# The estimate against the only all-reduce measured over nodes: 2 x 8 A100, errors at its 14 sizes.
MEASURED_ACROSS = HoldOut(median=0.2249, p90=0.4982, rows=14)


class CollectiveTable:
    """Seconds of one collective on one group size, as a non-decreasing function of message bytes."""

    def __init__(self, points: Points) -> None:
        self.bytes, self.seconds = np.array(points.bytes, dtype=float), np.array(points.seconds)
        rise = self.seconds[-1] - self.seconds[-2]
        self._s_per_byte = max(0.0, float(rise / (self.bytes[-1] - self.bytes[-2])))

    def __call__(self, message_bytes: Any) -> Array:
        """Seconds at ``message_bytes``; below the first point its time holds (latency)."""
        size = np.maximum(np.asarray(message_bytes, dtype=float), 1.0)
        inside = np.exp(np.interp(np.log(size), np.log(self.bytes), np.log(self.seconds)))
        return np.asarray(inside + self._s_per_byte * np.maximum(0.0, size - self.bytes[-1]))


def across_nodes(profile: DeviceProfile, kind: str, key: str) -> FittedOperator | None:
    """An estimate of a collective over nodes, from those inside a node and a hand-over between nodes; None without.

    Sums are made inside each node, passed round a ring of nodes in pieces of 1/nodes, and spread inside each node. The
    nodes are taken to talk over one link at a time, which agrees best with what was measured (``MEASURED_ACROSS``);
    a network with a card for every device may be several times faster with large messages. In an all-to-all every rank
    sends over a link of its own what leaves its node, after what stays.
    """
    asked = ACROSS_NODES.fullmatch(key)
    link = profile.operators.get("send_recv_across_nodes", {}).get("p2p")
    if asked is None or link is None or link.points is None or int(asked["ranks"]) % int(asked["nodes"]):
        return None
    nodes, inside = int(asked["nodes"]), int(asked["ranks"]) // int(asked["nodes"])
    parts = {"all_to_all": 1 / nodes} if kind == "all_to_all" else _INSIDE.get(kind, {})
    trips, share = {"all_to_all": (1, 1 - 1 / nodes), "all_reduce": (2 * (nodes - 1), 1 / nodes)}.get(
        kind, (nodes - 1, 1 / nodes)
    )
    curves = [(trips, share, link.points)]
    for part, part_share in parts.items() if inside > 1 else ():
        found = profile.operators.get(part, {}).get(f"nccl_{inside}")
        if found is None or found.points is None:
            return None
        curves.append((1, part_share, found.points))
    return FittedOperator(
        form="table",
        points=_summed(curves),
        evidence="estimated",
        source=f"{kind} of {inside} ranks in each of {nodes} nodes, and hand-overs between nodes ({link.source})",
        quality={"measured_all_reduce": MEASURED_ACROSS},
    )


def _summed(curves: Sequence[tuple[float, float, Points]]) -> Points:
    """The sum of curves, each (times, share of the bytes, points), over sizes at which all of them were measured."""
    low = max(points.bytes[0] / share for _, share, points in curves)
    high = min(points.bytes[-1] / share for _, share, points in curves)
    sizes = sorted({round(size / share) for _, share, points in curves for size in points.bytes} | {round(high)})
    sizes = [size for size in sizes if low <= size <= high]
    seconds = sum(times * CollectiveTable(points)(np.array(sizes) * share) for times, share, points in curves)
    return Points(bytes=tuple(sizes), seconds=tuple(np.maximum.accumulate(seconds).tolist()))


def copies_sent(topk: Any, ranks: int) -> Any:
    """Ranks that the ``topk`` experts of a token lie on, expected for experts spread evenly: a rank gets it once."""
    return ranks * (1.0 - (1.0 - 1.0 / ranks) ** topk)


def clean_points(
    points: Sequence[tuple[float, float]], tolerance: float = 1.15
) -> tuple[list[tuple[float, float]], int]:
    """Drop points slower than ``tolerance`` x the fastest larger message, then make the rest monotone.

    A larger message contains the smaller one, so a much slower small message is an artefact of the measurement.
    Returns the points kept and how many were dropped; small inversions are levelled down, not dropped.
    """
    kept: list[tuple[float, float]] = []
    fastest = float("inf")
    for size, seconds in sorted(points, reverse=True):
        if seconds <= tolerance * fastest:
            fastest = min(fastest, seconds)
            kept.append((size, fastest))
    return kept[::-1], len(points) - len(kept)


def thin_points(points: Sequence[tuple[float, float]], tolerance: float = 0.01) -> list[tuple[float, float]]:
    """Leave out points that log-log interpolation between those kept gives back within ``tolerance``."""
    kept = [points[0]]
    start = 0
    while start < len(points) - 1:
        end = start + 1
        while end + 1 < len(points) and _on_the_line(points[start : end + 2], tolerance):
            end += 1
        kept.append(points[end])
        start = end
    return kept


def _on_the_line(points: Sequence[tuple[float, float]], tolerance: float) -> bool:
    """Whether all points lie within ``tolerance`` of the log-log line from the first to the last."""
    size, seconds = np.log(np.array(points, dtype=float)).T
    line = np.interp(size, size[[0, -1]], seconds[[0, -1]])
    return bool(np.abs(np.expm1(line - seconds)).max() <= tolerance)
