"""What each replica of a run did, added up over its rows a block at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from apexsim.metrics import ratio
from apexsim.quantiles import Integers
from apexsim.tables import blocks
from apexsim.units import NS_PER_S

if TYPE_CHECKING:
    from apexsim.results import SimulationResult

HELD = 256


def replica_figures(result: SimulationResult) -> list[dict[str, float]]:
    """One entry a replica: what it served, the share of the run it worked, and how full its KV cache was."""
    kv_blocks = [result.of_pools[pool.name].kv_blocks for pool in result.deployment.pools for _ in range(pool.replicas)]
    count = len(result.block_ns)
    requests, outputs, preemptions = _served(result, count)
    steps, peaks = _stepped(result, count)
    busy_ns = _busy_ns(result, count)
    duration_ns = result.duration_s * NS_PER_S
    return [
        {
            "requests": int(requests[replica]),
            "output_tokens": int(outputs[replica]),
            "preemptions": int(preemptions[replica]),
            "steps": int(steps[replica]),
            "busy": ratio(float(busy_ns[replica]), duration_ns),
            "kv_cache_mean": ratio(result.block_ns[replica], duration_ns * kv_blocks[replica]),
            "kv_cache_peak": ratio(int(peaks[replica]), kv_blocks[replica]),
        }
        for replica in range(len(kv_blocks))
    ]


def _served(result: SimulationResult, count: int) -> tuple[Integers, Integers, Integers]:
    """Requests, output tokens of finished ones, and preemptions of every replica."""
    requests, outputs, preemptions = np.zeros((3, count), dtype=np.int64)
    columns = "replica", "output_tokens", "preemptions", "status"
    for replica, tokens, lost, status in blocks(result.request_columns, *columns):
        taken = np.isfinite(replica)
        done = taken & (status == "finished")
        requests += np.bincount(replica[taken].astype(np.int64), minlength=count)
        outputs += _sums(replica[done], tokens[done], count)
        preemptions += _sums(replica[taken], lost[taken], count)
    return requests, outputs, preemptions


def _stepped(result: SimulationResult, count: int) -> tuple[Integers, Integers]:
    """Steps of every replica, and the most KV blocks that it held."""
    steps, peaks = np.zeros((2, count), dtype=np.int64)
    for replica, repeats, peak in blocks(result.step_columns, "replica", "repeats", "kv_blocks_peak"):
        steps += _sums(replica, repeats, count)
        np.maximum.at(peaks, replica, peak)
    return steps, peaks


def _sums(replica: npt.NDArray[Any], amounts: Integers, count: int) -> Integers:
    """Whole numbers added up by replica; below 2**53 floats do that exactly."""
    return np.bincount(replica.astype(np.int64), weights=amounts, minlength=count).astype(np.int64)


def _busy_ns(result: SimulationResult, count: int) -> list[int]:
    """Time in which every replica had a step in flight."""
    # Asynchronous engines run a step on after the last token left; it is outside the duration.
    end_ns = round(result.end_s * NS_PER_S)
    unions = [Union() for _ in range(count)]
    for replica, start, end in blocks(result.step_columns, "replica", "start_ns", "end_ns", backwards=True):
        for each in np.unique(replica).tolist():
            mine = replica == each
            unions[each].add(start[mine], np.maximum(start[mine], np.minimum(end[mine], end_ns)))
    return [union.length() for union in unions]


class Union:
    """The length of a union of intervals that are given in parts, the last part first.

    They come nearly in order of their end: batches of a pipeline that decode together stand in any order, but no
    interval stands ``HELD`` places from where it belongs.
    """

    def __init__(self) -> None:
        self._length = 0
        self._earliest = np.full(1, np.iinfo(np.int64).max)
        self._held = np.zeros((2, 0), dtype=np.int64)

    def add(self, starts: Integers, ends: Integers) -> None:
        """Intervals that stand before those given so far."""
        part = np.concatenate((np.stack((starts, ends)), self._held), axis=1)
        part = part[:, np.argsort(part[1], kind="stable")]
        self._take(part[:, HELD:])
        self._held = part[:, :HELD]

    def length(self) -> int:
        """Of all intervals, when all are given."""
        self._take(self._held)
        self._held = self._held[:, :0]
        return self._length

    def _take(self, part: Integers) -> None:
        """From the last end to the first, an interval adds what lies before the earliest start of those that end later.

        ``part`` is in order of the ends.
        """
        starts, ends = part[:, ::-1]
        since = np.minimum.accumulate(np.concatenate((self._earliest, starts)))
        self._length += int(np.maximum(np.minimum(ends, since[:-1]) - starts, 0).sum())
        self._earliest = since[-1:]
