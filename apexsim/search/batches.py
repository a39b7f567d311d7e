"""A run in parts, so that two plans can be compared on the same requests: what differs by chance differs by part.

Latency: the 90th percentile of the end-to-end time in ``BATCHES`` parts of the requests, in order of arrival. Cost and
energy: parts of the time from the first arrival to the last, which is the same under every plan. The value of a part
with T of the mean T' tokens and spending S, where the whole spends R a token, is

    R + (S - R T) / T'

whose mean is R: what a part spends beyond its due. Only parts inside the steady window count; the others are None.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from apexsim.flows import flows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apexsim.results import SimulationResult

BATCHES = 20

Values = list[float | None]


def batch_values(result: SimulationResult) -> dict[str, Values]:
    """Values of a run's parts, by figure; a figure that cannot be cut has none."""
    return {"e2e_p90_s": _latencies(result), **_spendings(result)}


def _latencies(result: SimulationResult) -> Values:
    e2e_s = result.request_columns["e2e_s"]
    parts = [part[np.isfinite(part)] for part in np.array_split(e2e_s, BATCHES)]
    return [float(np.quantile(part, 0.9)) if len(part) else None for part in parts]


def _spendings(result: SimulationResult) -> dict[str, Values]:
    steady, arrival_s = result.steady, result.request_columns["arrival_s"]
    if steady.from_s is None or steady.to_s is None or steady.kind == "growing" or result.concurrency is not None:
        return {}
    edges = np.linspace(arrival_s.min(), arrival_s.max(), BATCHES + 1)
    inside = (edges[:-1] >= steady.from_s) & (edges[1:] <= steady.to_s)
    flows = flows_of(result, edges)
    microdollars = 1e6 * result.deployment.usd_per_s * np.diff(edges)
    return {
        "steady_usd_per_million_output_tokens": _beyond_due(microdollars, flows.tokens, inside),
        "steady_energy_per_output_token_j": _beyond_due(flows.joules, flows.tokens, inside),
    }


def _beyond_due(spent: NDArray[np.float64], tokens: NDArray[np.float64], inside: NDArray[np.bool_]) -> Values:
    total = float(tokens[inside].sum())
    if not total or not math.isfinite(float(spent[inside].sum())):
        return [None] * len(spent)
    due = float(spent[inside].sum()) / total
    values = due + (spent - due * tokens) / float(tokens[inside].mean())
    return [float(value) if counts else None for value, counts in zip(values, inside, strict=True)]
