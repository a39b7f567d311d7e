"""Runs of decode steps: one batch whose contexts grow by a token a step, summed without stepping through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.tables import PrefixTable

Nanoseconds = Sequence[int]
Layers = tuple[tuple[int, ...], ...]


class DecodeRow:
    """What a decode batch of one size costs whatever its context: looked up once per batch size.

    ``fixed`` nanoseconds per stage. No stage takes less than its floor (host time that overlaps with it, launches that
    no graph replays); ``floor`` is that of stage 0. One of ``tables`` for each kind of attention
    answers for decode attention of one layer; ``layers`` counts the layers of that kind, stage by stage.
    """

    __slots__ = ("fixed", "floor", "floors", "kind", "layers", "prefix", "stages", "tables")

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
        self.stages = tuple(zip(fixed, layers[0], floors, strict=True))  # of the first kind of attention

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

    ``limit`` (>= 1) is the number of steps for which that growth is regular: in a window of the model as many sequences
    grow at each of them.
    """

    __slots__ = ("_attended", "_decodes", "_grows", "_row", "limit")

    def __init__(
        self, row: DecodeRow, decodes: int, attended: tuple[int, ...], grows: tuple[int, ...], limit: int
    ) -> None:
        """Per kind of attention: the tokens that ``decodes`` sequences attend to in sum, and how many of them grow."""
        self.limit = limit
        self._row = row
        self._decodes = decodes
        self._attended = attended
        self._grows = grows

    def stage_ns(self, step: int) -> tuple[int, ...]:
        """Nanoseconds of step 0, 1, ... of the run on each stage."""
        return self._row.stage_ns([
            (tokens + step * count) // self._decodes
            for tokens, count in zip(self._attended, self._grows, strict=True)
        ])  # fmt: skip

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        """``stage_ns`` of ``count`` steps from step ``first`` on."""
        row, decodes = self._row, self._decodes
        if len(row.tables) > 1 or self._grows[0] < decodes:
            return [list(self.stage_ns(step)) for step in range(first, first + count)]
        mean, prefix = self._attended[0] // decodes + first, row.prefix
        if mean + count >= len(prefix):
            row.tables[0].grow(mean + count)
        spent = [prefix[at + 1] - prefix[at] for at in range(mean, mean + count)]
        stages = row.stages
        return [
            [ns if (ns := fixed + layers * each) > floor else floor for fixed, layers, floor in stages]
            for each in spent
        ]  # fmt: skip


class Guessed(ABC):
    """How many steps of a run lie before a time: steps differ little, so that a straight line guesses well."""

    __slots__ = ()

    @abstractmethod
    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps."""

    def ended_before(self, time_ns: int, most: int) -> tuple[int, int]:
        """Of the first ``most`` steps on one stage, how many end less than ``time_ns`` after the first begins.

        And how long it takes until the next one ends.
        """
        count = min(most, time_ns * most // max(1, self.elapsed_ns(most)))
        next_ns = self.elapsed_ns(count + 1)
        while count < most and next_ns < time_ns:
            count += 1
            next_ns = self.elapsed_ns(count + 1)
        while count and (end_ns := self.elapsed_ns(count)) >= time_ns:
            count, next_ns = count - 1, end_ns
        return count, next_ns


class OneStageRun(Guessed, DecodeRun):
    """A run on one stage, whose ``elapsed_ns`` is the exact sum of ``stage_ns`` of its steps.

    Where every sequence grows, or none does, sums are differences of prefix sums. Device time never falls with context,
    so that it crosses host time once at most: steps before that take the host's time, later ones the device's. Where
    only some grow, the mean context moves by 0 or 1 a step. Those steps are added up one by one.
    """

    __slots__ = ("_below", "_constant", "_floor", "_growing", "_partly", "_parts", "_sums")

    def __init__(
        self, row: DecodeRow, decodes: int, attended: tuple[int, ...], grows: tuple[int, ...], limit: int
    ) -> None:
        super().__init__(row, decodes, attended, grows, limit)
        # Nanoseconds of every step, and (layers, table, mean context) of the attention that grows.
        self._constant = row.fixed[0]
        self._growing: list[tuple[int, PrefixTable, int]] = []
        self._parts: list[tuple[PrefixTable, int, int, int]] = []  # the same with its tokens in sum, and who grows
        self._partly = False
        for table, layers, tokens, count in zip(row.tables, row.layers, attended, grows):  # noqa: B905 - a hot path
            if not count:
                self._constant += layers[0] * table.at(tokens // decodes)
                continue
            self._parts.append((table, layers[0], tokens, count))
            if count == decodes:
                self._growing.append((layers[0], table, tokens // decodes))
            else:
                self._partly = True
        self._sums = [0]
        self._floor = 0
        if not self._partly:
            self._floor = row.floor if row.floor and self._device_ns(0, 1) < row.floor else 0
        self._below = 1  # with a floor: steps known to take less device than host time

    @property
    def first_ns(self) -> int:
        """Nanoseconds of the first step."""
        return self.elapsed_ns(1)

    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps one after another, on one stage."""
        if self._partly:
            if steps >= len(self._sums):
                self._add_up(steps)
            return self._sums[steps]
        if not self._floor:
            total = steps * self._constant
            for layers, table, mean in self._growing:
                total += layers * table.between(mean, mean + steps)
            return total
        below = self._steps_below_floor(steps)
        return below * self._floor + self._device_ns(below, steps)

    def _add_up(self, steps: int) -> None:
        """Have sums of that many steps: first what everybody's growth takes in each, then that of some."""
        sums, floor, decodes = self._sums, self._row.floor, self._decodes
        first, total = len(sums) - 1, sums[-1]
        spent, some = [self._constant] * (steps - first), []
        for table, layers, tokens, grows in self._parts:
            mean, prefix = (tokens + grows * steps) // decodes, table.prefix
            if mean + 1 >= len(prefix):
                table.grow(mean)
            if grows < decodes:
                some.append((prefix, layers, tokens, grows))
            else:
                known = prefix[mean - steps + first : mean + 1]
                spent = [ns + layers * (last - before) for ns, before, last in zip(spent, known, known[1:])]  # noqa: B905
        for step, ns in enumerate(spent, first):
            for prefix, layers, tokens, grows in some:
                mean = (tokens + grows * step) // decodes
                ns += layers * (prefix[mean + 1] - prefix[mean])  # noqa: PLW2901
            total += ns if ns > floor else floor
            sums.append(total)

    def ends_ns(self, steps: int) -> Sequence[int]:
        """``elapsed_ns`` of 0, 1, 2 ... ``steps`` steps, and perhaps of more."""
        if steps >= len(self._sums):
            self._add_up(steps)
        return self._sums

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        """Nanoseconds of each of the first ``steps`` steps, on one stage."""
        if self._partly:
            self.elapsed_ns(steps)
            sums = np.array(self._sums[: steps + 1], dtype=np.int64)
            return sums[1:] - sums[:-1]
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
