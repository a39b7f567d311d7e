"""One row a request, written when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from apexsim.columns import Columns, Rows, joined
from apexsim.serving.request import Request
from apexsim.units import NS_PER_S

_NAMES = (
    "request", "replica", "arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "prompt_tokens",
    "output_tokens", "preemptions", "verdict",
)  # fmt: skip
_STATUS = ("finished", "unfinished", "rejected")
_FINISHED, _UNFINISHED, _REJECTED = range(3)
_NEVER = -1  # stands for None among packed whole numbers, of which none is negative
_LOT_ROWS = 1 << 12


class RequestRows:
    """Rows of requests in the order of the workload, whatever the order in which they end.

    ``rejected`` counts requests that were refused, by the reason. A row's ``verdict`` is the number of its status, or
    that of its reason behind those.
    """

    def __init__(self) -> None:
        self._rows = Rows(_NAMES)
        self._lot: list[tuple[Request, int]] = []
        self._numbers: dict[str, int] = {}
        self.rejected: Counter[str] = Counter()

    def finish(self, requests: Iterable[Request]) -> None:
        """The last tokens of these requests exist."""
        for request in requests:
            self._add(request, _FINISHED)

    def leave(self, request: Request) -> None:
        """The run is over, and a request has not ended."""
        self._add(request, _UNFINISHED)

    def reject(self, request: Request, reason: str) -> None:
        """A request is refused service."""
        self.rejected[reason] += 1
        self._add(request, _REJECTED + self._numbers.setdefault(reason, len(self._numbers)))

    def _add(self, request: Request, verdict: int) -> None:
        # Looked at many at a time: one by one, between steps of the clock, they take markedly longer.
        self._lot.append((request, verdict))
        if len(self._lot) >= _LOT_ROWS:
            self._put()

    def _put(self) -> None:
        if self._lot:
            self._rows.put(np.array([_row(*ended) for ended in self._lot], dtype=np.int64))
            self._lot = []

    def blocks(self, response_ns: int) -> Iterator[Columns]:
        """Columns of seconds as the client sees them, so many rows at a time; NaN where a thing never happened.

        ``response_ns`` is the time from a token to the client.
        """
        self._put()
        reasons = np.array(["", "", *self._numbers], dtype=object)
        for rows in self._rows.blocks():
            yield _seen(rows, response_ns, reasons)


def _row(request: Request, verdict: int) -> tuple[int, ...]:
    replica, scheduled_ns, last_ns = request.replica, request.scheduled_ns, request.last_token_ns
    first_ns = request.first_token_ns
    return (
        request.index,
        _NEVER if replica is None else replica,
        request.arrival_ns,
        _NEVER if scheduled_ns is None else scheduled_ns,
        _NEVER if first_ns is None else first_ns,
        _NEVER if last_ns is None else last_ns,
        request.prompt_tokens,
        request.output_tokens,
        request.preemptions,
        verdict,
    )


def columns_of(requests: Iterable[Request], response_ns: int) -> Columns:
    """The rows of these requests as ``RequestRows.blocks`` gives them, in their order; none was refused."""
    rows = RequestRows()
    for request in requests:
        if request.finished:
            rows.finish((request,))
        else:
            rows.leave(request)
    return joined(rows.blocks(response_ns))


def _seen(rows: Columns, response_ns: int, reasons: NDArray[np.object_]) -> Columns:
    verdict, replica = rows["verdict"], rows["replica"]
    return {
        "request": rows["request"],
        "replica": np.where(replica == _NEVER, np.nan, replica),
        "arrival_s": rows["arrival_ns"] / NS_PER_S,
        "scheduled_s": _seconds(rows["scheduled_ns"], 0),
        "first_token_s": _seconds(rows["first_token_ns"], response_ns),
        "last_token_s": _seconds(rows["last_token_ns"], response_ns),
        "prompt_tokens": rows["prompt_tokens"],
        "output_tokens": rows["output_tokens"],
        "preemptions": rows["preemptions"],
        "status": np.array(_STATUS, dtype=object)[np.minimum(verdict, _REJECTED)],
        "reason": reasons[verdict],
    }


def _seconds(times_ns: NDArray[np.int64], later_ns: int) -> NDArray[np.float64]:
    return np.where(times_ns == _NEVER, np.nan, (times_ns + later_ns) / NS_PER_S)
