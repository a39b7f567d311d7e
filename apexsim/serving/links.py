"""Transfers over shared links: when bytes that are asked for now have arrived.

``fifo``: transfers queue at every link in the order in which they come to it, as bytes buffered between two links do. A
link serves one at a time, at its rate; the next link is reached when it begins. A slow card does not hold up a wide
trunk. Example: 3 GB and then 1 GB over 1 GB/s end after 3 s and 4 s.

``fair``: all transfers of a link share its rate, as flows of a network do. Rates are max-min fair: none can rise but at
the cost of one that has no more. Example: 3 GB and 1 GB over 1 GB/s at once end after 4 s and 2 s.

Times are whole nanoseconds and amounts whole numbers, so that a run does not depend on the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Literal, Protocol

from simpy import Event

from apexsim.serving.clock import ARRIVAL, Alarm, Clock
from apexsim.specs.topology import Link
from apexsim.units import NS_PER_S, to_ns

Share = Literal["fifo", "fair"]
Path = Sequence[Link]
Then = Callable[["Transfer"], None]
"""What happens when a transfer has arrived: in an event of rank 0, at least 1 ns after it was asked for."""


class Transfer:
    """``size`` bytes of request ``job`` from replica ``sender`` to replica ``receiver``: one row of results.

    ``asked_ns``, ``began_ns`` and ``ended_ns`` are None until that happens; all three are written by the network.
    """

    __slots__ = ("asked_ns", "began_ns", "ended_ns", "job", "receiver", "sender", "size")

    def __init__(self, job: int, sender: int, receiver: int, size: int) -> None:
        self.job = job
        self.sender = sender
        self.receiver = receiver
        self.size = size
        self.asked_ns: int | None = None
        self.began_ns: int | None = None
        self.ended_ns: int | None = None

    def __repr__(self) -> str:
        return f"Transfer({self.job}: {self.sender} -> {self.receiver}, {self.size} bytes)"


class Network(Protocol):
    """Carries transfers, each over the links of its path at once, as a stream passes through them."""

    def send(self, transfer: Transfer, path: Path, then: Then) -> None:
        """Ask for a transfer now; ``then`` is called when it has arrived. An empty path takes 1 ns."""


class Queued:
    """A transfer between queues: its next link is ``at``, its last byte leaves those before at ``end_ns``."""

    __slots__ = ("at", "end_ns", "path", "then", "transfer")

    def __init__(self, transfer: Transfer, path: Path, then: Then) -> None:
        self.transfer = transfer
        self.path = path
        self.then = then
        self.at = 0
        self.end_ns = 0


class Fifo:
    """Transfers of a link one after another; an event each, and one more wherever one has to wait."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_ns: dict[Link, int] = {}

    def send(self, transfer: Transfer, path: Path, then: Then) -> None:
        """See ``Network``."""
        transfer.asked_ns = self._clock.now_ns
        self._pass(Queued(transfer, path, then))

    def _pass(self, queued: Queued, _: Event | None = None) -> None:
        """A transfer comes to its next link, and to those behind it as long as it need not wait."""
        now_ns, transfer, path = self._clock.now_ns, queued.transfer, queued.path
        began_ns = now_ns
        while queued.at < len(path) and began_ns == now_ns:
            link = path[queued.at]
            began_ns = max(now_ns, self._free_ns.get(link, 0))
            self._free_ns[link] = free_ns = began_ns + _ceil(transfer.size * NS_PER_S, bytes_per_s(link))
            queued.end_ns = max(queued.end_ns, free_ns)
            queued.at += 1
            if transfer.began_ns is None:
                transfer.began_ns = began_ns
        if queued.at < len(path):
            self._clock.at(began_ns, ARRIVAL, partial(self._pass, queued))
        else:
            _arrive(self._clock, transfer, queued.end_ns + latency_ns(path), queued.then)


class Moving:
    """A transfer on its way through a fair network: ``left`` of it, in 1e-9 bytes, at ``bytes_per_s``."""

    __slots__ = ("alarm", "bytes_per_s", "left", "path", "then", "transfer")

    def __init__(self, transfer: Transfer, path: Path, then: Then) -> None:
        self.transfer = transfer
        self.path = path
        self.then = then
        self.left = transfer.size * NS_PER_S
        self.bytes_per_s = 0
        self.alarm: Alarm | None = None


class Fair:
    """Transfers of a link share its rate; whenever one begins or ends, the rates of all are set anew."""

    def __init__(self, clock: Clock) -> None:
        self.flows: dict[Moving, None] = {}  # in the order of asking
        self._clock = clock
        self._since_ns = 0  # when ``left`` of all of them was right

    def send(self, transfer: Transfer, path: Path, then: Then) -> None:
        """See ``Network``."""
        transfer.asked_ns = transfer.began_ns = now_ns = self._clock.now_ns
        if not path or not transfer.size:
            _arrive(self._clock, transfer, now_ns + latency_ns(path), then)
            return
        self._pass(now_ns)
        self.flows[Moving(transfer, path, then)] = None
        self._share(now_ns)

    def _end(self, flow: Moving, _: Event) -> None:
        now_ns = self._clock.now_ns
        self._pass(now_ns)
        del self.flows[flow]
        self._share(now_ns)
        later_ns = latency_ns(flow.path)
        if later_ns:
            _arrive(self._clock, flow.transfer, now_ns + later_ns, flow.then)
        else:
            flow.transfer.ended_ns = now_ns
            flow.then(flow.transfer)

    def _pass(self, now_ns: int) -> None:
        """Bytes have moved at the rates set last."""
        for flow in self.flows:
            flow.left -= flow.bytes_per_s * (now_ns - self._since_ns)
        self._since_ns = now_ns

    def _share(self, now_ns: int) -> None:
        """Set the rates, and anew the alarms of flows whose rate changes; who has all its bytes keeps its own."""
        for flow, rate in zip(self.flows, max_min([flow.path for flow in self.flows]), strict=True):
            if flow.left > 0 and rate != flow.bytes_per_s:
                if flow.alarm is not None:
                    flow.alarm.silence()
                end_ns = now_ns + _ceil(flow.left, rate)
                flow.alarm = self._clock.at(end_ns, ARRIVAL, partial(self._end, flow))
            flow.bytes_per_s = rate


def max_min(paths: Sequence[Path]) -> list[int]:
    """Bytes a second of transfers over these paths, none of them empty: max-min fair, rounded down, at least 1.

    Again and again, the transfers of the link that has the least for each share what it has, and are done.
    """
    users: dict[Link, set[int]] = {}
    for number, path in enumerate(paths):
        for link in path:
            users.setdefault(link, set()).add(number)
    spare, rates = {link: bytes_per_s(link) for link in users}, [0] * len(paths)
    while users:
        tightest = min(users, key=lambda link: spare[link] // len(users[link]))
        rate = max(1, spare[tightest] // len(users[tightest]))
        for number in [*users[tightest]]:
            rates[number] = rate
            for link in paths[number]:
                spare[link] -= rate
                users[link].discard(number)
        users = {link: numbers for link, numbers in users.items() if numbers}
    return rates


NETWORKS: dict[Share, type[Fifo] | type[Fair]] = {"fifo": Fifo, "fair": Fair}
"""How links are shared, by name."""


def bytes_per_s(link: Link) -> int:
    """The rate of a link as a whole number."""
    return ceil(link.bytes_per_s)


def latency_ns(path: Path) -> int:
    """Nanoseconds of all links of a path together, beside those of the bytes."""
    return sum(to_ns(link.latency_s) for link in path)


def _arrive(clock: Clock, transfer: Transfer, end_ns: int, then: Then) -> None:
    """Let a transfer arrive at ``end_ns``, at least 1 ns from now."""

    def arrived(_: Event) -> None:
        transfer.ended_ns = clock.now_ns
        then(transfer)

    clock.at(max(end_ns, clock.now_ns + 1), ARRIVAL, arrived)


def _ceil(amount: int, rate: int) -> int:
    return -(-amount // rate)
