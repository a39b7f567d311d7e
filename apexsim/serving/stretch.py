"""Macro-stepping: many steps as one event, with the same outcome as one by one.

While nobody arrives, finishes or runs short of blocks, what each step end leads to is known beforehand: the requests in
flight get their token, and everybody who decodes is composed again. Such ends are *silent*: nothing outside the replica
can tell when they happen. A stretch plans how many silent ends follow, the replica sleeps through them, and they are
applied when the next end that matters comes. An arrival cuts the stretch at the step in flight, which is why nothing is
applied beforehand::

    in flight   [b0]──────┐ silent    ┌ silent           ┌ next_end: the silent ends applied, then an ordinary one
    ends               end(1)      end(2)   ...  end(silent)    end(silent + 1)
                                      ^ an arrival here leaves one silent end; next_end becomes end(2)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from apexsim.serving.batch import Batch
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.request import Request


class StepEnd(NamedTuple):
    """``left`` got their last token at ``end_ns``. ``composed`` are those whose last token has been sampled since the
    stretch began: they are scheduled no more, and some of them may be among the left."""

    end_ns: int
    left: Sequence[Request]
    composed: Sequence[Request] = ()


class Stretch(ABC):
    """A number of silent step ends to come."""

    silent: int
    next_end_ns: int
    """The first step end that is not silent."""

    @abstractmethod
    def end_ns(self, count: int) -> int:
        """When the ``count``-th step end from now on happens, counted from 1."""

    @abstractmethod
    def passed(self, now_ns: int) -> int:
        """How many silent ends lie before ``now_ns``; one at that very time has not happened."""

    @abstractmethod
    def conclude(
        self, in_flight: deque[Batch], stage_free: list[int], recorder: Recorder, blocks: BlockManager
    ) -> StepEnd:
        """Apply the silent ends and the one that is not: requests, blocks, records and the batches in flight after."""

    def cut(self, now_ns: int) -> bool:
        """Keep only the silent ends before ``now_ns``. True if any were dropped."""
        passed = self.passed(now_ns)
        if passed == self.silent:
            return False
        self.silent, self.next_end_ns = passed, self.end_ns(passed + 1)
        return True
