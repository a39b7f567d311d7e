"""What a replica asks of a cost model; `StepCost` answers from fitted kernels, a test may answer from a formula."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from apexsim.costs.steps import BatchStats


class StageTimes(Protocol):
    """Consecutive decode steps of one batch, every context growing by a token a step, for at least ``limit`` steps."""

    @property
    def limit(self) -> int: ...

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        """Nanoseconds on every stage of ``count`` steps from step ``first`` on."""


class RunTimes(StageTimes, Protocol):
    """The same on one stage, where they follow one another without a gap."""

    @property
    def first_ns(self) -> int:
        """Nanoseconds of the first step."""
        return self.elapsed_ns(1)

    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps: exactly the sum of theirs."""
        ...

    def ends_ns(self, steps: int) -> Sequence[int]:
        """``elapsed_ns`` of 0, 1, 2 ... ``steps`` steps, and perhaps of more."""
        return [self.elapsed_ns(count) for count in range(steps + 1)]

    def ended_before(self, time_ns: int, most: int) -> tuple[int, int]:
        """Of the first ``most`` steps, how many end less than ``time_ns`` after the first begins.

        And how long it takes until the next one ends.
        """
        count = bisect_left(range(1, most + 1), time_ns, key=self.elapsed_ns)
        return count, self.elapsed_ns(count + 1)

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        """Nanoseconds of each of them."""


class StepTimes(Protocol):
    """Nanoseconds of steps, on every stage of a pipeline."""

    @property
    def stages(self) -> int: ...

    def stage_ns(self, stats: BatchStats) -> tuple[int, ...]:
        """Nanoseconds of one step on each stage."""

    def decode_run(self, stats: BatchStats) -> StageTimes | None:
        """The run of decode steps that begins with this one, on one stage a ``RunTimes``.

        None where only single steps can be told.
        """
