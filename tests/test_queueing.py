"""The event core against queueing theory: one seat makes a replica a single server with a FIFO queue."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from apexsim.columns import joined
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.workload import Requests
from apexsim.testing import KeptRun, LinearCost, check_run, made_up_deployment, made_up_memory

MEAN_TOKENS = 10_000
SERVICE_S = MEAN_TOKENS * 1e-6  # LinearCost below: 1 us a token and nothing else
BATCHES, PER_BATCH = 14, 45_000
ONE_SEAT = SchedulerDefaults(policy="chunked_prefill", max_num_batched_tokens=131_072, max_num_seqs=1)


def mean_wait_s(rng: np.random.Generator, prompts: NDArray[np.int64], utilisation: float) -> float:
    """Mean time in queue of one run: requests of one output token, service time = their prompt's tokens x 1 us."""
    gaps = rng.exponential(SERVICE_S / utilisation, len(prompts))
    requests = Requests(
        name="poisson", arrival_s=np.cumsum(gaps), prompt_tokens=prompts, output_tokens=np.ones_like(prompts)
    )
    cost = LinearCost(step_ns=0, token_ns=1_000, context_ns=0)
    run = KeptRun(made_up_deployment(ONE_SEAT), requests, cost=cost, memory=made_up_memory(9_000))
    run.go()
    check_run(run)
    rows = joined(run.rows.blocks(0))
    return float(np.mean(rows["scheduled_s"] - rows["arrival_s"]))


def fixed(rng: np.random.Generator) -> NDArray[np.int64]:
    return np.full(PER_BATCH, MEAN_TOKENS)


def exponential(rng: np.random.Generator) -> NDArray[np.int64]:
    return np.clip(np.rint(rng.exponential(MEAN_TOKENS, PER_BATCH)), 2, 131_000).astype(np.int64)


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
@pytest.mark.parametrize(("draw", "squared_cv"), [(fixed, 0.0), (exponential, 1.0)], ids=["M/D/1", "M/M/1"])
def test_waiting_time_is_pollaczek_khinchine(draw, squared_cv: float, utilisation: float) -> None:  # type: ignore[no-untyped-def]
    streams = np.random.SeedSequence(1962).spawn(BATCHES)
    waits = [mean_wait_s(rng, draw(rng), utilisation) for rng in map(np.random.default_rng, streams)]
    theory_s = utilisation / (1 - utilisation) * (1 + squared_cv) / 2 * SERVICE_S
    half_width = stats.t.ppf(0.975, BATCHES - 1) * np.std(waits, ddof=1) / math.sqrt(BATCHES) / theory_s
    assert half_width < 0.03
    assert np.mean(waits) == pytest.approx(theory_s, rel=0.03)
