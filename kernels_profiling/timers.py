"""Timing a case: calls over buffers that take turns, so that what serving finds cold is cold here too.

On CUDA the calls are captured in one graph and replayed between two events; on a CPU the clock is read
around each. Median of the repeats, with the 10th and 90th percentile beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels_profiling.clock import Clock, seconds_since
from kernels_profiling.power import Drawn, Meter
from kernels_profiling.rig import Rig

LEAST_REPEAT_S = 2e-4
MOST_REPEAT_S = 0.05
MOST_CALLS = 64
WARM_UP = 2
LEAST_REPEATS, MOST_REPEATS = 5, 300


@dataclass(frozen=True)
class Case:
    """Something to time: ``call(i)`` runs it on the i-th of ``buffers`` sets of operands (``rotated_bytes`` in all)."""

    call: Callable[[int], Any]
    buffers: int
    rotated_bytes: int
    kernel_source: str


class Timing(NamedTuple):
    """Seconds of one call."""

    latency_s: float
    latency_p10_s: float
    latency_p90_s: float
    latency_mean_s: float
    repeats: int
    calls: int


def time_case(case: Case, rig: Rig, budget_s: float) -> Timing:
    """Time a case for about ``budget_s``."""
    return _cuda(case, rig.clock, budget_s) if rig.device.type == "cuda" else _cpu(case, rig, budget_s)


def _cpu(case: Case, rig: Rig, budget_s: float) -> Timing:
    """Every call alone, behind other kernels of a layer, which sweep the inner caches.

    In a forward pass weights of other layers run through these between two calls of a kind, and take Python's code and
    data with them: in a tight loop small kernels are up to eight times as fast as they ever are in serving.
    """
    turn = iter(itertools.count())

    def repeat() -> float:
        index = next(turn) % case.buffers
        rig.sweep()
        start_ns = rig.clock.now_ns()
        case.call(index)
        return seconds_since(rig.clock, start_ns)

    return _summary(repeat, 1, rig.clock, budget_s)


def _cuda(case: Case, clock: Clock, budget_s: float) -> Timing:
    once_s = _eager_cuda_s(case, clock)
    # All buffers in one graph, or a replay would find the few that it uses in the cache; long kernels fill it anyway.
    calls = max(_calls(once_s), min(case.buffers, int(MOST_REPEAT_S / once_s)))
    graph = captured(case, calls)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def repeat() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / calls

    return _summary(repeat, calls, clock, budget_s)


def captured(case: Case, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of ``calls`` calls, one buffer after another."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            case.call(index % case.buffers)
    return graph


def hold(case: Case, rig: Rig, seconds: float, meter: Meter | None) -> tuple[float, Drawn]:
    """Replay a case for ``seconds``: the mean seconds of one call, and what was drawn meanwhile."""
    calls = max(1, min(MOST_CALLS, case.buffers))
    graph = captured(case, calls) if rig.device.type == "cuda" else None
    taken: list[float] = []

    def work() -> None:
        start_ns, count = rig.clock.now_ns(), 0
        while seconds_since(rig.clock, start_ns) < seconds:
            for index in range(calls if graph is None else 0):
                case.call(index)
            for _ in range(8 if graph else 0):
                graph.replay()  # type: ignore[union-attr]
            count += calls * (8 if graph else 1)
            if graph:
                torch.cuda.synchronize()
        taken.append(seconds_since(rig.clock, start_ns) / count)

    drawn = meter.during(work) if meter else _unmetered(work)
    return taken[0], drawn


def _unmetered(work: Callable[[], None]) -> Drawn:
    work()
    return Drawn()


def _calls(once_s: float) -> int:
    """Calls that make a repeat long enough for the clock."""
    return int(np.clip(np.ceil(LEAST_REPEAT_S / max(once_s, 1e-7)), 1, MOST_CALLS))


def _eager_cuda_s(case: Case, clock: Clock) -> float:
    """Seconds of one call outside a graph, after warming up on the stream that captures."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(WARM_UP):
            case.call(index % case.buffers)
        stream.synchronize()
        start_ns = clock.now_ns()
        case.call(0)
        stream.synchronize()
    return seconds_since(clock, start_ns)


def _summary(repeat: Callable[[], float], calls: int, clock: Clock, budget_s: float) -> Timing:
    """Warm up, then repeat for about ``budget_s``."""
    for _ in range(WARM_UP):
        repeat()
    start_ns = clock.now_ns()
    taken: list[float] = []
    while len(taken) < LEAST_REPEATS or (seconds_since(clock, start_ns) < budget_s and len(taken) < MOST_REPEATS):
        taken.append(repeat())
    return summarised(taken, calls)


def summarised(seconds: Sequence[float], calls: int) -> Timing:
    """Median and spread of repeats."""
    low, middle, high = np.quantile(seconds, [0.1, 0.5, 0.9]).tolist()
    return Timing(middle, low, high, float(np.mean(seconds)), len(seconds), calls)


def clocked(work: Callable[[], object], rig: Rig, budget_s: float) -> Timing:
    """Time work by the host's clock, until the device has done it."""

    def repeat() -> float:
        start_ns = rig.clock.now_ns()
        work()
        if rig.device.type == "cuda":
            torch.cuda.synchronize()
        return seconds_since(rig.clock, start_ns)

    return _summary(repeat, 1, rig.clock, budget_s)
