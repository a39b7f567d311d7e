"""Runs of decode steps: one batch whose contexts grow by a token a step, summed without stepping through it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.tables import PrefixTable

Nanoseconds = Sequence[int]
Layers = tuple[tuple[int, ...], ...]


class DecodeRow:
    """What a decode batch of one size costs whatever its context: looked up once per batch size.

    ``fixed`` nanoseconds per stage, of which none takes less than its one of ``floors`` (host time that overlaps with
    it, launches that no graph replays); ``floor`` is that of stage 0. One of ``tables`` for each kind of attention
    answers for decode attention of one layer; ``layers`` counts the layers of that kind, stage by stage.
    """

    __slots__ = ("fixed", "floor", "floors", "kind", "layers", "prefix", "tables")

    def __init__(
        self, fixed: Nanoseconds, floors: Nanoseconds, layers: Layers, tables: tuple[PrefixTable, ...]
    ) -> None:
        self.fixed = fixed
        self.floors = floors
        self.floor = floors[0]
        self.layers = layers
        self.tables = tables
        self.prefix = tables[0].prefix
        self.kind = id(tables[0]), fixed[0], layers[0][0]

    def stage_ns(self, means: Sequence[int]) -> tuple[int, ...]:
        """Nanoseconds of every stage at these mean contexts, one per kind of attention."""
        spent = [table.at(mean) for table, mean in zip(self.tables, means)]  # noqa: B905 - a hot path
        return add_stages(self.fixed, self.floors, self.layers, spent)


def add_stages(fixed: Nanoseconds, floors: Nanoseconds, layers: Layers, spent: Sequence[int]) -> tuple[int, ...]:
    """Fixed nanoseconds plus those of each kind of attention in every layer, and no less than the stage's floor."""
    stages = list(fixed)
    for counts, ns in zip(layers, spent):  # noqa: B905 - a hot path
        for stage, count in enumerate(counts):
            stages[stage] += count * ns
    return tuple(map(max, stages, floors))


class DecodeRun:
    """Consecutive steps of one decode batch: every context grows by one token a step.

    ``limit`` (>= 1) is the number of steps for which that growth is regular. On one stage ``elapsed_ns`` is the exact
    sum of ``stage_ns`` of the steps, in closed form: integer prefix sums, and, where the host overlaps with the device,
    the device time (which never falls with context) crosses the host time at most once: steps before that take the host
    time, later ones the device time.
    """

    __slots__ = ("_below", "_constant", "_floor", "_growing", "_means", "_moving", "_row", "limit")

    def __init__(self, row: DecodeRow, means: tuple[int, ...], moving: tuple[bool, ...], limit: int) -> None:
        """Per kind of attention: its mean context now, and whether that grows from step to step."""
        self.limit = limit
        self._row = row
        self._means = means
        self._moving = moving
        # Stage 0: nanoseconds of every step, and (layers, table, mean context) of the attention that grows.
        self._constant = row.fixed[0]
        self._growing: list[tuple[int, PrefixTable, int]] = []
        for table, layers, mean, moves in zip(row.tables, row.layers, means, moving):  # noqa: B905 - a hot path
            if moves:
                self._growing.append((layers[0], table, mean))
            else:
                self._constant += layers[0] * table.at(mean)
        self._floor = row.floor if row.floor and self._device_ns(0, 1) < row.floor else 0
        self._below = 1  # with a floor: steps known to take less device than host time

    def stage_ns(self, step: int) -> tuple[int, ...]:
        """Nanoseconds of step 0, 1, ... of the run on each stage."""
        return self._row.stage_ns([mean + step * moves for mean, moves in zip(self._means, self._moving, strict=True)])

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        """``stage_ns`` of ``count`` steps from step ``first`` on, computed together."""
        total = np.tile(np.array(self._row.fixed, dtype=np.int64), (count, 1))
        row = self._row
        for table, layers, mean, moves in zip(row.tables, row.layers, self._means, self._moving, strict=True):
            if moves:
                table.between(mean + first, mean + first + count)
                prefix = np.frombuffer(table.prefix[mean + first : mean + first + count + 1], dtype=np.int64)
                total += np.multiply.outer(prefix[1:] - prefix[:-1], np.array(layers, dtype=np.int64))
            else:
                total += table.at(mean) * np.array(layers, dtype=np.int64)
        np.maximum(total, np.array(row.floors, dtype=np.int64), out=total)
        rows: list[list[int]] = total.tolist()
        return rows

    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps one after another, on one stage."""
        if not self._floor:
            total = steps * self._constant
            for layers, table, mean in self._growing:
                total += layers * table.between(mean, mean + steps)
            return total
        below = self._steps_below_floor(steps)
        return below * self._floor + self._device_ns(below, steps)

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        """Nanoseconds of each of the first ``steps`` steps, on one stage."""
        spent = np.full(steps, self._constant) if not self._growing else np.int64(self._constant)
        for layers, table, mean in self._growing:
            table.between(mean, mean + steps)
            prefix = np.frombuffer(table.prefix[mean : mean + steps + 1], dtype=np.int64)
            spent = spent + layers * (prefix[1:] - prefix[:-1])
        return np.maximum(spent, self._floor) if self._floor else np.asarray(spent)

    def _device_ns(self, start: int, end: int) -> int:
        """Device nanoseconds of steps ``start`` ... ``end - 1``."""
        total = (end - start) * self._constant
        for layers, table, mean in self._growing:
            total += layers * table.between(mean + start, mean + end)
        return total

    def _steps_below_floor(self, steps: int) -> int:
        """How many of the first ``steps`` steps take less device than host time."""

        def device_ns(step: int) -> int:
            return self._device_ns(step, step + 1)

        if self._below < steps and device_ns(self._below) < self._floor:
            self._below = bisect_left(range(steps), self._floor, lo=self._below + 1, key=device_ns)
        return min(self._below, steps)


class PlainRun(DecodeRun):
    """The common case, quickly: one stage, one kind of attention that grows, no step faster than the host.

    Step k takes ``constant`` + ``layers`` x T(mean + k), so n steps n x ``constant`` + ``layers`` x (prefix[mean + n] -
    prefix[mean]). Runs of one ``kind`` (table, ``constant``, ``layers``) take the same time at the same mean context.
    """

    __slots__ = ("_base", "_layers", "_prefix", "_table", "kind", "mean")

    def __init__(self, row: DecodeRow, layers: int, mean: int, limit: int) -> None:
        self.limit = limit
        self._constant = row.fixed[0]
        self._layers = layers
        self.mean = mean
        self._table = row.tables[0]
        self._prefix = row.prefix
        self.kind = row.kind
        if mean >= len(self._prefix):
            self._table.grow(mean)
        self._base = self._prefix[mean]

    def stage_ns(self, step: int) -> tuple[int, ...]:
        return (self._constant + self._layers * self._table.at(self.mean + step),)

    def elapsed_ns(self, steps: int) -> int:
        try:
            return steps * self._constant + self._layers * (self._prefix[self.mean + steps] - self._base)
        except IndexError:
            self._table.grow(self.mean + steps)
            return self.elapsed_ns(steps)

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        return [[ns] for ns in self.durations_between(self.mean + first, self.mean + first + count).tolist()]

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        return self.durations_between(self.mean, self.mean + steps)

    def durations_between(self, first: int, last: int) -> NDArray[np.int64]:
        """Nanoseconds of the steps at mean contexts ``first`` ... ``last`` - 1."""
        self._table.between(first, last)
        prefix = np.frombuffer(self._prefix[first : last + 1], dtype=np.int64)
        return self._constant + self._layers * (prefix[1:] - prefix[:-1])

    def elapsed_at(self, first: int, last: int) -> NDArray[np.int64]:
        """Nanoseconds from mean context 0 to every one from ``first`` to ``last``."""
        self._table.between(first, last)
        prefix = np.frombuffer(self._prefix[first : last + 1], dtype=np.int64)
        return np.arange(first, last + 1) * self._constant + self._layers * prefix
