"""Transfers over shared links: by hand, and what holds for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim.serving.clock import ARRIVAL, Clock
from apexsim.serving.links import NETWORKS, Fair, Share, Transfer, max_min
from apexsim.specs.topology import Link

SECOND = 1_000_000_000


def link(name: str, bytes_per_s: float, latency_s: float = 0.0) -> Link:
    return Link(name, "nic", bytes_per_s, latency_s, "made up")


class Ask(NamedTuple):
    """Bytes that are asked for at some time, over a path."""

    at_ns: int
    size: int
    path: tuple[Link, ...]


def sent(share: Share, asks: Sequence[Ask], rank: int = ARRIVAL) -> list[Transfer]:
    """The transfers as they arrived, in the order of asking; every one has, in an event of rank 0."""
    clock, arrived = Clock(), []
    network = NETWORKS[share](clock)
    transfers = [Transfer(number, 0, 1, ask.size) for number, ask in enumerate(asks)]
    for transfer, ask in zip(transfers, asks, strict=True):

        def send(_: object, transfer: Transfer = transfer, path: tuple[Link, ...] = ask.path) -> None:
            network.send(transfer, path, arrive)

        clock.at(ask.at_ns, rank, send)

    def arrive(transfer: Transfer) -> None:
        arrived.append(transfer)
        assert transfer.ended_ns == clock.now_ns
        if isinstance(network, Fair):
            check_rates(network)

    clock.run()
    assert sorted(transfer.job for transfer in arrived) == [*range(len(asks))]
    return transfers


def check_rates(network: Fair) -> None:
    """No link carries more than its rate."""
    carried: dict[Link, int] = defaultdict(int)
    for flow in network.flows:
        assert flow.bytes_per_s >= 1
        for each in flow.path:
            carried[each] += flow.bytes_per_s
    assert all(carried[each] <= each.bytes_per_s for each in carried)


def ends_ns(share: Share, asks: Sequence[Ask]) -> list[int | None]:
    return [transfer.ended_ns for transfer in sent(share, asks)]


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_fifo_transfers_follow_one_another() -> None:
    wire = (link("a", 1e9),)
    asks = [Ask(0, 3 * 10**9, wire), Ask(0, 10**9, wire), Ask(SECOND, 10**9, wire), Ask(7 * SECOND, 10**9, wire)]
    assert ends_ns("fifo", asks) == [3 * SECOND, 4 * SECOND, 5 * SECOND, 8 * SECOND]
    assert [transfer.began_ns for transfer in sent("fifo", asks)] == [0, 3 * SECOND, 4 * SECOND, 7 * SECOND]


def test_fifo_takes_a_quick_link_no_longer_than_its_own_rate_needs() -> None:
    """Two senders of 1 GB/s each fill a trunk of 2 GB/s; the third transfer waits for the first sender alone."""
    one, two, trunk = link("a", 1e9), link("b", 1e9), link("trunk", 2e9)
    asks = [Ask(0, 10**9, (one, trunk)), Ask(0, 10**9, (two, trunk)), Ask(0, 10**9, (one, trunk))]
    assert ends_ns("fifo", asks) == [SECOND, SECOND, 2 * SECOND]
    assert [transfer.began_ns for transfer in sent("fifo", asks)] == [0, 0, SECOND]


def test_fifo_does_not_hold_a_link_for_one_that_waits_elsewhere() -> None:
    slow, trunk = link("slow", 1e9), link("trunk", 2e9)
    asks = [Ask(0, 10**9, (slow, trunk)), Ask(0, 10**9, (slow, trunk)), Ask(SECOND // 2, 10**9, (trunk,))]
    assert ends_ns("fifo", asks) == [SECOND, 2 * SECOND, SECOND]


def test_fair_transfers_share() -> None:
    wire = (link("a", 1e9),)
    asks = [Ask(0, 3 * 10**9, wire), Ask(0, 10**9, wire)]
    assert ends_ns("fair", asks) == [4 * SECOND, 2 * SECOND]
    later = [Ask(0, 2 * 10**9, wire), Ask(SECOND, 10**9, wire)]
    assert ends_ns("fair", later) == [3 * SECOND, 3 * SECOND]


def test_latency_comes_on_top_and_holds_no_link() -> None:
    wire = (link("a", 1e9, 1e-3), link("b", 2e9, 2e-3))
    asks = [Ask(0, 10**9, wire), Ask(0, 10**9, wire)]
    assert ends_ns("fifo", asks) == [SECOND + 3_000_000, 2 * SECOND + 3_000_000]
    assert ends_ns("fair", asks) == [2 * SECOND + 3_000_000] * 2


@pytest.mark.parametrize("share", ["fifo", "fair"])
def test_a_transfer_takes_a_nanosecond_at_least(share: Share) -> None:
    """Whatever asked for it is then over: see the law in ``messages``."""
    fast = (link("a", 1e15),)
    asks = [Ask(5, 0, ()), Ask(5, 10**9, ()), Ask(5, 0, fast), Ask(5, 1, fast)]
    assert ends_ns(share, asks) == [6, 6, 6, 6]


def test_max_min_by_hand() -> None:
    """Three links of 10, 8 and 100: one transfer crosses the first two."""
    ten, eight, wide = link("ten", 10), link("eight", 8), link("wide", 100)
    assert max_min([(ten,), (ten, eight), (eight,), (eight,)]) == [8, 2, 2, 2]
    assert max_min([(ten,), (ten, eight), (eight,), (wide,)]) == [6, 4, 4, 100]
    assert max_min([(ten, wide)] * 3) == [3, 3, 3]
    assert max_min([]) == []


# -- what always holds -------------------------------------------------------------------------------------------------

LINKS = [link(name, rate, latency) for name, rate, latency in [("a", 7, 0), ("b", 10, 1e-9), ("c", 64, 0), ("d", 3, 0)]]
PATHS = st.lists(st.sampled_from(LINKS), min_size=1, max_size=3, unique=True).map(tuple)
ASKS = st.lists(st.builds(Ask, st.integers(0, 30 * SECOND), st.integers(1, 60), PATHS), max_size=12)


def latency_ns(path: Sequence[Link]) -> int:
    return sum(each.name == "b" for each in path)


@given(ASKS)
def test_fifo_links_carry_no_more_than_their_rate(asks: list[Ask]) -> None:
    """Of what is asked for after some time, no more has ended at another than fits in between; all begin and end."""
    transfers = sent("fifo", asks)
    for each in LINKS:
        here = [transfer for transfer, ask in zip(transfers, asks, strict=True) if each in ask.path]
        for asked_ns in {transfer.asked_ns for transfer in here}:
            for ended_ns in {transfer.ended_ns for transfer in here}:
                within = [t.size for t in here if t.asked_ns >= asked_ns and t.ended_ns <= ended_ns]
                assert sum(within) * SECOND <= each.bytes_per_s * max(0, ended_ns - asked_ns)
    for transfer in transfers:
        assert transfer.asked_ns <= transfer.began_ns < transfer.ended_ns


@given(ASKS)
def test_fifo_transfers_of_one_path_follow_one_another(asks: list[Ask]) -> None:
    """In the order of asking: each begins when the bytes before have left the first link."""
    asks = [ask._replace(path=(LINKS[0], LINKS[2])) for ask in sorted(asks)]
    free_ns = 0
    for transfer, ask in zip(sent("fifo", asks), asks, strict=True):
        assert transfer.began_ns == max(free_ns, ask.at_ns)
        free_ns = transfer.began_ns - (-ask.size * SECOND // 7)
        assert transfer.ended_ns == max(free_ns, ask.at_ns + 1)


@given(ASKS)
def test_fair_transfers_end_as_those_of_a_fluid(asks: list[Ask]) -> None:
    """Worked out again with fractions of bytes and plain loops; whole bytes a second cost a little."""
    asks = [widened(ask) for ask in asks]
    for ended, expected in zip(ends_ns("fair", asks), fluid(asks), strict=True):
        assert ended == pytest.approx(expected, rel=1e-5, abs=3)


def widened(ask: Ask) -> Ask:
    """A million times as much, over links a million times as wide."""
    return ask._replace(size=ask.size * 10**6, path=wide_path(ask.path))


def wide_path(path: Sequence[Link]) -> tuple[Link, ...]:
    return tuple(each._replace(bytes_per_s=each.bytes_per_s * 10**6) for each in path)


def fluid(asks: Sequence[Ask]) -> list[float]:
    """When each ends, in nanoseconds, by following the fluid from one change to the next."""
    left = {number: float(ask.size) for number, ask in enumerate(asks)}
    ends, now = dict.fromkeys(left, 0.0), 0.0
    while left:
        going = [number for number in left if asks[number].at_ns <= now + 1e-6]
        rates = dict(zip(going, water_filled([asks[number].path for number in going]), strict=True))
        next_ns = min([ask.at_ns for ask in asks if ask.at_ns > now + 1e-6], default=float("inf"))
        done_ns = min([now + left[number] / rates[number] * SECOND for number in going], default=float("inf"))
        then = min(next_ns, done_ns)
        for number in going:
            left[number] -= rates[number] * (then - now) / SECOND
            if left[number] <= 1e-3:
                ends[number] = max(then, asks[number].at_ns + 1) + latency_ns(asks[number].path)
                del left[number]
        now = then
    return [ends[number] for number in sorted(ends)]


def water_filled(paths: Sequence[Sequence[Link]]) -> list[float]:
    """Max-min rates by raising all together until a link is full, and then those that do not cross it."""
    rates, growing = [0.0] * len(paths), set(range(len(paths)))
    while growing:
        rooms = [
            (each.bytes_per_s - sum(rates[n] for n, path in enumerate(paths) if each in path)) / crossing
            for each in {each for n in growing for each in paths[n]}
            if (crossing := sum(each in paths[n] for n in growing))
        ]
        for n in growing:
            rates[n] += min(rooms)
        full = {
            each
            for path in paths
            for each in path
            if sum(rates[n] for n, other in enumerate(paths) if each in other) >= each.bytes_per_s * (1 - 1e-9)
        }
        growing = {n for n in growing if not full & set(paths[n])}
    return rates


@given(st.lists(PATHS, max_size=12))
def test_rates_are_max_min(paths: list[tuple[Link, ...]]) -> None:
    """No transfer could be given more but at the cost of one that has as little: each crosses a full link."""
    wide = [wide_path(path) for path in paths]
    assert max_min(wide) == pytest.approx(water_filled(wide), rel=1e-4)


@given(ASKS, st.sampled_from(["fifo", "fair"]))
def test_transfers_are_deterministic(asks: list[Ask], share: Share) -> None:
    """And it makes no difference to them that they are asked for as a step ends."""
    asks = [widened(ask) for ask in asks]
    assert ends_ns(share, asks) == [transfer.ended_ns for transfer in sent(share, asks, rank=3)]
