"""What a replica asks of a cost model; `StepCost` answers from fitted kernels, a test may answer from a formula."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from apexsim.costs.steps import BatchStats


class RunTimes(Protocol):
    """Consecutive decode steps of one batch, every context growing by a token a step, for at least ``limit`` steps."""

    @property
    def limit(self) -> int: ...

    @property
    def first_ns(self) -> int:
        """Nanoseconds of the first step on one stage."""
        return self.elapsed_ns(1)

    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps on one stage: exactly the sum of theirs."""
        ...

    def ended_before(self, time_ns: int, most: int) -> tuple[int, int]:
        """Of the first ``most`` steps on one stage, how many end less than ``time_ns`` after the first begins.

        And how long it takes until the next one ends.
        """
        count = bisect_left(range(1, most + 1), time_ns, key=self.elapsed_ns)
        return count, self.elapsed_ns(count + 1)

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        """Nanoseconds of each of them."""

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        """Nanoseconds on every stage of ``count`` steps from step ``first`` on."""


class StepTimes(Protocol):
    """Nanoseconds of steps, on every stage of a pipeline."""

    @property
    def stages(self) -> int: ...

    def stage_ns(self, stats: BatchStats) -> tuple[int, ...]:
        """Nanoseconds of one step on each stage."""

    def decode_run(self, stats: BatchStats) -> RunTimes | None:
        """The run of decode steps that begins with this one; None where only single steps can be told."""
