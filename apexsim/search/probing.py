"""A run that asks one thing only: is the SLO kept, at a rate that lasts? It ends as soon as the answer is no."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apexsim.columns import joined
from apexsim.results import with_latencies
from apexsim.serving.request import Request
from apexsim.serving.request_rows import columns_of
from apexsim.serving.simulator import How, Run, no_cycle_collection, set_up
from apexsim.specs.deployment import Deployment
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests
from apexsim.units import to_ns

# Requests are looked at so many at a time: a column of figures is made of each lot.
LOT = 128
# Waits grow where those of the last tenth of requests are longer than those of the first by more than this share of
# the span of arrivals: the server is then slower than the requests come by about as much.
GROWTH = 0.02


def probe(deployment: Deployment, requests: Requests, slo: SLO) -> Mapping[str, Any]:
    """``slo.attainment`` and ``waits_grow`` of a run.

    The attainment is exact where it reaches the target; a run that is lost ends early, and then it is a share below the
    target that the requests seen so far allow.
    """
    engine, cost = set_up(deployment, requests)
    run = Run(deployment.as_run([engine.server]), requests, cost=cost, memory=engine.memory, how=How(slo=slo))
    response_ns = to_ns(engine.server.engine.host.response_s)
    run.watch = Watch(run.asked, slo, response_ns)
    with no_cycle_collection():
        run.go()
    columns = with_latencies(joined(run.rows.blocks(response_ns)), slo)
    attainment = float(columns["good"].mean())
    grows = attainment >= slo.target and waits_grow(columns["arrival_s"], columns["ttft_s"])
    return {"slo": {"attainment": attainment}, "waits_grow": grows}


class Watch:
    """Counts the misses of a run, and ends it when there are more than the target forgives."""

    def __init__(self, asked: int, slo: SLO, response_ns: int) -> None:
        self._asked = asked
        self._slo = slo
        self._response_ns = response_ns
        self._left: list[Request] = []
        self._missed = 0

    def __call__(self, request: Request) -> bool:
        """A request leaves: whether the run is lost. Its own figures may still be on their way, so they count next."""
        if len(self._left) == LOT:
            rows = with_latencies(columns_of(self._left, self._response_ns), self._slo)
            self._missed += int((~rows["good"]).sum())
            self._left.clear()
        self._left.append(request)
        return (self._asked - self._missed) / self._asked < self._slo.target


def waits_grow(arrival_s: NDArray[np.float64], ttft_s: NDArray[np.float64]) -> bool:
    """Whether first tokens come later and later: a queue that grows as long as requests come."""
    tenth = max(1, len(arrival_s) // 10)
    waits_s = [ttft_s[part][np.isfinite(ttft_s[part])] for part in (slice(tenth), slice(-tenth, None))]
    if not all(len(each) for each in waits_s):
        return False
    early_s, late_s = (float(np.median(each)) for each in waits_s)
    return late_s - early_s > GROWTH * float(arrival_s[-1] - arrival_s[0])
