"""Where requests go, by hand: stops that follow one another, what is carried between them, and what a policy may do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from test_two_pools import Case, keep

from apexsim.serving.audit import Audited
from apexsim.serving.faults import PolicyFault
from apexsim.serving.itinerary import Itineraries, Stop
from apexsim.serving.job import Job
from apexsim.serving.ledger import Ledger
from apexsim.serving.policies import BatchPolicy, ChunkedPrefill
from apexsim.serving.pools import PoolSetup, PoolsRun
from apexsim.serving.request import Request
from apexsim.serving.routing import RoundRobin
from apexsim.serving.traffic import Door
from apexsim.specs.engine import SchedulerDefaults
from apexsim.testing import made_up_memory

MS, US = 1_000_000, 1_000
PLAIN = Case(arrivals_ns=[0], lengths=[(100, 3)], step_ns=MS, link_ns=US, latency_ns=50 * US)
"""Steps of 1 ms, 1 us a token over the link after 50 us: 100 tokens take 150 us."""


def done(
    case: Case,
    itinerary: Itineraries | None = None,
    policy: Callable[[SchedulerDefaults], BatchPolicy] = ChunkedPrefill,
) -> tuple[PoolsRun, list[Job], list[Request]]:
    """A run of a case that is over, with all its jobs and the requests that have ended; ``policy`` is the decoders'."""
    settings = [case.settings(pool, exact_steps=False) for pool in (0, 1)]
    settings[1] = replace(settings[1], policy=Audited(policy(settings[1].scheduler)))
    memories = [made_up_memory(4_000), made_up_memory(case.blocks)]
    replicas = case.prefills, case.decodes
    pools = [PoolSetup(*made, RoundRobin()) for made in zip(replicas, settings, memories, strict=True)]
    door = Door(settings[0].scheduler, 1 << 20, memories[1])
    where = itinerary or case.itinerary
    run = PoolsRun(pools, case.requests(), door, itinerary=where, carrier=case.carrier())
    jobs, requests = keep(run.flow)
    run.go()
    return run, jobs, requests


@pytest.mark.parametrize("pulls", [False, True])
def test_a_request_with_two_stops(pulls: bool) -> None:
    run, (first, second), (request,) = done(replace(PLAIN, pulls=pulls))
    came_ns = MS + 1 + 150 * US
    assert (first.replica, first.scheduled_ns, first.first_token_ns, first.last_token_ns) == (0, 0, MS, MS)
    assert (second.replica, second.last_token_ns) == (1, came_ns + 2 * MS)
    assert second.scheduled_ns == (MS + 1 if pulls else came_ns)
    seen = request.replica, request.scheduled_ns, request.first_token_ns, request.last_token_ns
    assert seen == (0, 0, MS, came_ns + 2 * MS)
    gaps_ns, counts = run.recorder.inter_token_gaps()
    assert (gaps_ns.tolist(), counts.tolist()) == ([MS, MS + 1 + 150 * US], [1, 1])
    (transfer,) = run.flow.transfers
    assert (transfer.job, transfer.sender, transfer.receiver, transfer.size) == (0, 0, 1, 100)
    assert (transfer.asked_ns, transfer.began_ns, transfer.ended_ns) == (MS + 1, MS + 1, came_ns)
    assert run.replicas[0].block_ns == 7 * came_ns  # until they have been fetched


def test_one_token_needs_no_second_stop() -> None:
    run, jobs, requests = done(replace(PLAIN, lengths=[(100, 1)]))
    assert [request.last_token_ns for request in requests] == [MS]
    assert len(jobs) == 1
    assert not run.flow.transfers


def test_a_full_receiver_holds_up_the_sender() -> None:
    """Two requests of 7 blocks where 8 are: the second is fetched when the first has ended, and stays until then."""
    run, jobs, _ = done(replace(PLAIN, arrivals_ns=[0, 0], lengths=[(100, 3)] * 2, blocks=8, pulls=True))
    ended_ns = MS + 1 + 150 * US + 2 * MS
    assert [transfer.asked_ns for transfer in run.flow.transfers] == [MS + 1, ended_ns]
    assert [job.last_token_ns for job in jobs if job.stop] == [ended_ns, ended_ns + 150 * US + 2 * MS]
    assert run.replicas[0].block_ns == 7 * (MS + 1 + 150 * US) + 7 * (ended_ns + 150 * US)


def test_a_link_is_shared_in_turn_or_fairly() -> None:
    """Two prompts of 100 tokens that end at once: 50 us after 100 and 200 us, or both after 200."""
    both = replace(PLAIN, arrivals_ns=[0, 0], lengths=[(100, 3)] * 2, prefills=2)
    for share, ended_us in (("fifo", [150, 250]), ("fair", [250, 250])):
        run, _, _ = done(replace(both, share=share))
        assert [transfer.ended_ns for transfer in run.flow.transfers] == [MS + 1 + us * US for us in ended_us]


@pytest.mark.parametrize("pulls", [False, True])
def test_a_stop_waits_for_all_that_it_needs(pulls: bool) -> None:
    """Two stops at one replica with one seat, 1 ms each: the third begins after both, and fetches from both."""
    stops = Stop(("prefill",), carries=True), Stop(("prefill",), carries=True), Stop(("decode",), 1, needs=(0, 1))
    run, jobs, (request,) = done(replace(PLAIN, pulls=pulls, seats=1), lambda _: stops)
    assert [job.last_token_ns for job in jobs[:2]] == [MS, 2 * MS]
    assert [transfer.asked_ns for transfer in run.flow.transfers] == [2 * MS + 1] * 2
    came_ns = 2 * MS + 1 + 250 * US
    assert [transfer.ended_ns for transfer in run.flow.transfers] == [came_ns - 100 * US, came_ns]
    assert (request.first_token_ns, request.last_token_ns) == (MS, came_ns + 2 * MS)


def test_what_several_stops_need_is_kept_until_all_have_it() -> None:
    """Two samples of one prompt, at a replica each: the second transfer waits for the first."""
    stops = Stop(("prefill",), carries=True), Stop(("decode",), 1, needs=(0,)), Stop(("decode",), 1, needs=(0,))
    run, jobs, (request,) = done(replace(PLAIN, decodes=2), lambda _: stops)
    came_ns = [MS + 1 + 150 * US, MS + 1 + 250 * US]
    assert [transfer.ended_ns for transfer in run.flow.transfers] == came_ns
    assert [(job.replica, job.last_token_ns) for job in jobs[1:]] == [
        (1, came_ns[0] + 2 * MS),
        (2, came_ns[1] + 2 * MS),
    ]
    assert request.last_token_ns == came_ns[1] + 2 * MS
    assert run.replicas[0].block_ns == 7 * came_ns[1]


def test_a_stop_may_need_another_and_nothing_of_it() -> None:
    stops = Stop(("prefill",)), Stop(pool=1, needs=(0,))
    run, jobs, (request,) = done(PLAIN, lambda _: stops)
    assert not run.flow.transfers
    assert [job.scheduled_ns for job in jobs] == [0, MS + 1]
    assert (request.first_token_ns, request.last_token_ns) == (MS, MS + 1 + 3 * MS)


# -- policies ----------------------------------------------------------------------------------------------------------


class Admits(ChunkedPrefill):
    """Admits whoever comes."""

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        for job in waiting:
            ledger.admit(job, ledger.wants(job))


class FetchesTwice(ChunkedPrefill):
    """Seats jobs twice."""

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        for job in [*waiting, *waiting]:
            ledger.fetch(job)


class Fetches(ChunkedPrefill):
    """Fetches for whoever waits."""

    def fill(self, ledger: Ledger, running: Sequence[Job], waiting: Iterable[Job]) -> None:
        for job in waiting:
            ledger.fetch(job)


@pytest.mark.parametrize(
    ("policy", "pulls", "broke"),
    [
        (Admits, True, "admitted a request whose KV entries are to be fetched"),
        (FetchesTwice, True, "seated a request twice"),
        (Fetches, False, "fetched for a request that has nothing to fetch"),
    ],
)
def test_what_a_policy_may_not_do(policy: type[BatchPolicy], pulls: bool, broke: str) -> None:
    with pytest.raises(PolicyFault, match=broke):
        done(replace(PLAIN, pulls=pulls), policy=policy)
