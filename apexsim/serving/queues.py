"""Queues of waiting requests: in the order of their arrival, or of a key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from sortedcontainers import SortedKeyList

from apexsim.serving.request import Request


class Queue(Protocol):
    """Requests that wait, in the order in which a policy is shown them; the first is at position 0."""

    def append(self, request: Request, /) -> None:
        """A request arrives."""

    def extend(self, requests: Iterable[Request], /) -> None:
        """Requests arrive, in this order."""

    def appendleft(self, request: Request, /) -> None:
        """A preempted request comes back, before all that have the same claim."""

    def take(self, request: Request, /) -> None:
        """Let a request go; ValueError if it does not wait."""

    def __getitem__(self, position: int, /) -> Request: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class Fifo(deque[Request]):
    """First come, first served; who was preempted is served before."""

    def take(self, request: Request) -> None:
        if self and self[0] is request:
            self.popleft()
        else:
            self.remove(request)


class Ordered:
    """By a key that never changes while a request waits; equal keys in the order of ``Request.index``.

    Every operation takes time in the logarithm of the length.
    """

    def __init__(self, key: Callable[[Request], Any]) -> None:
        self._requests = SortedKeyList(key=lambda request: (key(request), request.index))

    def append(self, request: Request) -> None:
        self._requests.add(request)

    appendleft = append

    def extend(self, requests: Iterable[Request]) -> None:
        self._requests.update(requests)

    def take(self, request: Request) -> None:
        self._requests.remove(request)

    def __getitem__(self, position: int) -> Request:
        found: Request = self._requests[position]
        return found

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)
