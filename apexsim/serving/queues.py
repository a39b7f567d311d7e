"""Queues of waiting jobs: in the order of their arrival, or of a key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from sortedcontainers import SortedKeyList

from apexsim.serving.job import Job


class Queue(Protocol):
    """Jobs that wait, in the order in which a policy is shown them; the first is at position 0."""

    def append(self, job: Job, /) -> None:
        """A job arrives."""

    def extend(self, jobs: Iterable[Job], /) -> None:
        """Jobs arrive, in this order."""

    def appendleft(self, job: Job, /) -> None:
        """A preempted job comes back, before all that have the same claim."""

    def take(self, job: Job, /) -> None:
        """Let a job go; ValueError if it does not wait."""

    def __getitem__(self, position: int, /) -> Job: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Job]: ...


class Fifo(deque[Job]):
    """First come, first served; who was preempted is served before."""

    take = deque.remove  # quick where the first goes, as is usual


class Ordered:
    """By a key that never changes while a job waits; equal keys in the order of ``Job.index``.

    Every operation takes time in the logarithm of the length.
    """

    def __init__(self, key: Callable[[Job], Any]) -> None:
        self._requests = SortedKeyList(key=lambda job: (key(job), job.index))

    def append(self, job: Job) -> None:
        self._requests.add(job)

    appendleft = append

    def extend(self, jobs: Iterable[Job]) -> None:
        self._requests.update(jobs)

    def take(self, job: Job) -> None:
        self._requests.remove(job)

    def __getitem__(self, position: int) -> Job:
        found: Job = self._requests[position]
        return found

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._requests)
