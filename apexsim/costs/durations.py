"""Inter-token times of decode runs, gathered while a clock runs and added up afterwards."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.runs import PlainRun
from apexsim.costs.timing import RunTimes


class RunDurations:
    """How long the steps of many runs took, each with a weight; only integers are kept until they are asked for.

    Plain runs of one kind are counted together: how often each mean context was decoded at.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._kinds: list[PlainRun] = []
        self._spans = array("q")
        self._others: list[tuple[RunTimes, int, int]] = []

    def add(self, run: RunTimes, steps: int, weight: int) -> None:
        """Note steps 1, 2 ... ``steps`` - 1 of a run (its step 0 is somebody else's affair)."""
        if not isinstance(run, PlainRun):
            self._others.append((run, steps, weight))
            return
        number = self._numbers.setdefault(run.kind, len(self._kinds))
        if number == len(self._kinds):
            self._kinds.append(run)
        self._spans.extend((number, run.mean + 1, run.mean + steps, weight))

    def collect(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Durations in nanoseconds and their weights, in no order."""
        durations, weights = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for run, steps, weight in self._others:
            durations.append(run.durations_ns(steps)[1:])
            weights.append(np.full(steps - 1, weight, dtype=np.int64))
        spans = np.array(self._spans, dtype=np.int64).reshape(-1, 4)
        for number, run in enumerate(self._kinds):
            first, last, weight = spans[spans[:, 0] == number, 1:].T
            low, high = int(first.min()), int(last.max())
            change = np.zeros(high - low + 1, dtype=np.int64)
            np.add.at(change, first - low, weight)
            np.subtract.at(change, last - low, weight)
            durations.append(run.durations_between(low, high))
            weights.append(np.cumsum(change)[:-1])
        where = (counts := np.concatenate(weights)) > 0
        return np.concatenate(durations)[where], counts[where]


def elapsed_times(runs: Sequence[RunTimes], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``elapsed_ns`` of 0, 1 ... ``count`` - 1 steps of each run, one run after another."""
    starts = np.cumsum(counts) - counts
    times = np.zeros(int(counts.sum()), dtype=np.int64)
    plain: dict[int, list[int]] = {}
    for number, run in enumerate(runs):
        if isinstance(run, PlainRun):
            plain.setdefault(run.kind[0], []).append(number)
        elif counts[number] > 1:
            first, last = int(starts[number]) + 1, int(starts[number] + counts[number])
            times[first:last] = np.cumsum(run.durations_ns(last - first))
    for numbers in plain.values():
        some = np.array(numbers)
        within = np.arange(int(counts[some].sum())) - np.repeat(np.cumsum(counts[some]) - counts[some], counts[some])
        times[np.repeat(starts[some], counts[some]) + within] = _of_table(
            [runs[n] for n in numbers], counts[some], within
        )
    return times


def _of_table(runs: Sequence[Any], counts: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same for plain runs of one table; ``within`` counts the steps of each from 0."""
    farthest = max(range(len(runs)), key=lambda number: runs[number].mean + int(counts[number]))
    prefix = runs[farthest].prefix_to(int(counts[farthest]))
    mean = np.array([run.mean for run in runs])
    constant, layers = np.array([run.kind[1:] for run in runs]).T
    spent = prefix[np.repeat(mean, counts) + within] - np.repeat(prefix[mean], counts)
    return np.asarray(np.repeat(constant, counts) * within + np.repeat(layers, counts) * spent)
