"""What a replica asks of a cost model; `StepCost` answers from fitted kernels, a test may answer from a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from apexsim.costs.steps import BatchStats


class RunTimes(Protocol):
    """Consecutive decode steps of one batch, every context growing by a token a step, for at least ``limit`` steps."""

    @property
    def limit(self) -> int: ...

    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps on one stage: exactly the sum of theirs."""

    def weighted_ns(self, weights: Sequence[int], total: int) -> int:
        """Sum of ``weights[k]`` x ``elapsed_ns(k)``; ``total`` is that of the weights."""

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
