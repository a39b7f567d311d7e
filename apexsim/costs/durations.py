"""Inter-token times of decode runs, gathered while a clock runs and added up afterwards."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.steps import PlainRun
from apexsim.costs.timing import RunTimes

Integers = NDArray[np.int64]
SPANS = 1 << 14  # spans whose times are added up together, which bounds the memory that takes


class Tally:
    """Distinct whole numbers, ascending, and how often each came."""

    def __init__(self) -> None:
        self.values = np.empty(0, dtype=np.int64)
        self.counts = np.empty(0, dtype=np.int64)

    def add(self, values: Integers, counts: Integers) -> None:
        """Numbers came so many times more; one that came no time is left out."""
        some = counts > 0
        values, counts = np.append(self.values, values[some]), np.append(self.counts, counts[some])
        order = np.argsort(values, kind="stable")
        values = values[order]
        first = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
        self.values = values[first]
        self.counts = np.add.reduceat(counts[order], first) if len(first) else counts


class RunDurations:
    """How long the steps of many runs took, each with a weight; runs are noted, and added up many at a time.

    Plain runs of one kind are counted together: how often each mean context was decoded at.
    """

    def __init__(self) -> None:
        # (run, steps, weight): steps 1, 2 ... ``steps`` - 1 of a run; its step 0 is somebody else's affair. Whoever
        # appends has them added up when there are SPANS.
        self.noted: list[tuple[RunTimes, int, int]] = []
        self._tally = Tally()
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._kinds: list[PlainRun] = []
        self._spans = array("q")

    def collect(self) -> Tally:
        """Distinct durations in nanoseconds, and the weight of each."""
        self.add_up()
        return self._tally

    def add_up(self) -> None:
        """Count what was noted, and forget it."""
        durations, weights = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for run, steps, weight in self.noted:
            if isinstance(run, PlainRun):
                self._add_plain(run, steps, weight)
            else:
                durations.append(run.durations_ns(steps)[1:])
                weights.append(np.full(steps - 1, weight, dtype=np.int64))
        self.noted.clear()
        self._add_up_plain(durations, weights)
        self._tally.add(np.concatenate(durations), np.concatenate(weights))

    def _add_plain(self, run: PlainRun, steps: int, weight: int) -> None:
        number = self._numbers.get(run.kind)
        if number is None:
            number = self._numbers[run.kind] = len(self._kinds)
            self._kinds.append(run)
        self._spans.extend((number, run.mean + 1, run.mean + steps, weight))

    def _add_up_plain(self, durations: list[Integers], weights: list[Integers]) -> None:
        """Add the durations of plain runs, by how often each mean context was decoded at."""
        number, first, last, times = np.array(self._spans, dtype=np.int64).reshape(-1, 4).T
        low, high, shift = _asked(len(self._kinds), number, first, last)
        change = np.zeros(int((high + 1 - low).sum()), dtype=np.int64)
        np.add.at(change, first + shift[number], times)
        np.subtract.at(change, last + shift[number], times)
        weights.append(np.cumsum(change))
        nothing = np.zeros(1, dtype=np.int64)
        for run, begin, end in zip(self._kinds, low.tolist(), high.tolist(), strict=True):
            # Behind the last of each kind nothing was decoded.
            durations.extend((run.durations_between(begin, end), nothing))
        self._numbers, self._kinds, self._spans = {}, [], array("q")


class WeightedTimes:
    """Spans of a common count of steps, in each of which the steps of a run follow one another; only noted at first.

    ``sum`` then gives, for weights of all steps, the weighted time from each step's start to the end of its span.
    """

    def __init__(self) -> None:
        # (step, steps, left_ns, run): a span of ``steps`` from ``step`` on, whose first starts ``left_ns`` before the
        # span ends. Whoever appends has them packed when there are many.
        self.noted: list[tuple[int, int, int, RunTimes]] = []
        self.count = 0
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._kinds: list[PlainRun] = []
        self._plain = array("q")
        self._others: list[tuple[int, int, int, RunTimes]] = []

    def pack(self) -> None:
        """Keep what was noted in little room."""
        self.count += len(self.noted)
        for span in self.noted:
            step, steps, left_ns, run = span
            if not isinstance(run, PlainRun):
                self._others.append(span)
                continue
            number = self._numbers.get(run.kind)
            if number is None:
                number = self._numbers[run.kind] = len(self._kinds)
                self._kinds.append(run)
            self._plain.extend((step, steps, left_ns, number, run.mean))
        self.noted.clear()

    @property
    def steps(self) -> int:
        """Where the last span ends."""
        self.pack()
        ends = [step + steps for step, steps, *_ in self._others[-1:]]
        return max([*ends, *([self._plain[-5] + self._plain[-4]] if self._plain else [])], default=0)

    def sum(self, weights: Integers, origin: int) -> int:
        """Over all spans; ``weights[n]`` is that of common step ``origin`` + n."""
        self.pack()
        total = 0
        for step, steps, left_ns, run in self._others:
            elapsed_ns = np.zeros(steps, dtype=np.int64)
            elapsed_ns[1:] = np.cumsum(run.durations_ns(steps - 1)) if steps > 1 else 0
            total += int((weights[step - origin : step - origin + steps] * (left_ns - elapsed_ns)).sum())
        spans = np.array(self._plain, dtype=np.int64).reshape(-1, 5)
        spans[:, 0] -= origin
        for first in range(0, len(spans), SPANS):
            total += sum(self._sums_of(spans[first : first + SPANS].T, weights).tolist())
        return total

    def _sums_of(self, spans: Integers, weights: Integers) -> Integers:
        """Of spans of plain runs, whose step k starts E(mean + k) - E(mean) after the first.

        Products may leave the range of 64 bits and come back: what they add up to is exact.
        """
        step, steps, left_ns, _, _ = spans
        elapsed_ns, mean_at = self._elapsed(spans)
        edges = np.stack((step, step + steps), axis=1).ravel() - step[0]
        # What lies between two spans counts for neither: it is added up and left out.
        lengths, shift = np.diff(edges), np.repeat(mean_at - edges[::2], 2)[:-1]
        entry = np.arange(edges[-1]) + np.repeat(shift, lengths)
        weight = weights[step[0] : step[0] + edges[-1]]
        start = edges[:-1]
        count = np.add.reduceat(weight, start)[::2]
        passed_ns = np.add.reduceat(weight * elapsed_ns.take(entry, mode="clip"), start)[::2]
        return np.asarray(count * (left_ns + elapsed_ns[mean_at]) - passed_ns)

    def _elapsed(self, spans: Integers) -> tuple[Integers, Integers]:
        """E(n) = n x step_ns + layers x (T(0) + ... + T(n - 1)) where spans ask for it, and where their means stand.

        One kind of run stands behind the other.
        """
        _, steps, _, number, mean = spans
        low, high, shift = _asked(len(self._kinds), number, mean, mean + steps)
        parts = [
            run.elapsed_at(begin, end) for run, begin, end in zip(self._kinds, low.tolist(), high.tolist(), strict=True)
        ]
        return np.concatenate(parts), mean + shift[number]


def _asked(kinds: int, number: Integers, first: Integers, last: Integers) -> tuple[Integers, Integers, Integers]:
    """The least and most that spans ask for of every kind, and what to add to find it where kinds stand in a row."""
    low, high = np.full(kinds, np.iinfo(np.int64).max), np.zeros(kinds, dtype=np.int64)
    np.minimum.at(low, number, first)
    np.maximum.at(high, number, last)
    np.minimum(low, high, out=low)
    lengths = high + 1 - low
    return low, high, np.cumsum(lengths) - lengths - low
