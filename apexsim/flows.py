"""What happened in a run between moments: tokens, requests and joules, added up a block of rows at a time.

A request's tokens are spread evenly from its first to its last one, its prompt from when it was scheduled to its first
token, a row of steps evenly over its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apexsim.metrics import spread_until
from apexsim.quantiles import Floats
from apexsim.tables import blocks
from apexsim.units import NS_PER_S

if TYPE_CHECKING:
    from apexsim.results import SimulationResult


@dataclass(frozen=True)
class Flows:
    """What happened between the ``edges`` (seconds on the run's clock) of batches of equal length, one value a batch.

    Tokens made, prompt tokens worked off, tokens and number of requests that came, joules of the billed devices.
    """

    edges: Floats
    tokens: Floats
    prompt_tokens: Floats
    offered_tokens: Floats
    arrived: Floats
    joules: Floats

    @property
    def window_s(self) -> float:
        return float(self.edges[-1] - self.edges[0])

    @property
    def batch_s(self) -> float:
        return self.window_s / len(self.tokens)


def flows_of(result: SimulationResult, edges: Floats) -> Flows:
    """What happened between ``edges``, ascending, in seconds on the run's clock."""
    made, worked, came, owed = np.zeros((4, len(edges)))
    columns = "arrival_s", "scheduled_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens", "status"
    for arrival, *times, prompts, outputs, status in blocks(result.request_columns, *columns):
        done = status == "finished"
        scheduled, first, last = (each[done] for each in times)
        made += spread_until((first, last), outputs[done] - 1, edges)
        made += spread_until((first, first), np.ones(len(first)), edges)
        worked += spread_until((scheduled, first), prompts[done], edges)
        # The last arrival ends the window and lies outside: what stands at other moments has no request just come
        # either.
        inside = arrival < edges[-1]
        comes = (arrival[inside],) * 2
        came += spread_until(comes, np.ones(len(comes[0])), edges)
        owed += spread_until(comes, outputs[inside], edges)
    return Flows(edges, np.diff(made), np.diff(worked), np.diff(owed), np.diff(came), _joules(result, edges))


def _joules(result: SimulationResult, edges: Floats) -> Floats:
    """Joules of the billed devices between ``edges``; NaN where the energy of steps is not known."""
    if "energy_j" not in result.step_columns:
        return np.full(len(edges) - 1, math.nan)
    drawn_j, worked_s = np.zeros(len(edges)), {pool: np.zeros(len(edges)) for pool in result.of_pools}
    columns = "start_ns", "end_ns", "replica", "energy_j", "working_s"
    for start_ns, end_ns, replica, joules, working_s in blocks(result.step_columns, *columns):
        # Asynchronous engines run a step on after the last token left: it counts, at the end.
        start_s, end_s = (np.minimum(times_ns / NS_PER_S, result.end_s) for times_ns in (start_ns, end_ns))
        drawn_j += spread_until((start_s, end_s), joules, edges)
        for pool in worked_s:
            of_pool = result.deployment.replicas_of(pool)
            mine = (replica >= of_pool.start) & (replica < of_pool.stop)
            worked_s[pool] += spread_until((start_s[mine], end_s[mine]), working_s[mine], edges)
    idle_j = result.deployment.idle_j(np.diff(edges), {pool: np.diff(until) for pool, until in worked_s.items()})
    return np.diff(drawn_j) + idle_j
