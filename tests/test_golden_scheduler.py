"""Step composition against golden step logs of vLLM 0.33's own scheduler and KV manager (no prefix caching)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from apexsim.costs.runs import DecodeRun
from apexsim.costs.steps import BatchStats
from apexsim.serving.batching import BatchPolicy, ChunkedPrefill, Ledger
from apexsim.serving.clock import ARRIVAL, Clock
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.recording import Recorder
from apexsim.serving.replica import Replica, ReplicaSettings
from apexsim.serving.request import Request
from apexsim.specs.engine import SchedulerDefaults

CASES = [
    1, 5, 8, 10, 13, 15, 16, 18, 20, 21, 23, 28, 30, 33, 35, 36, 40, 45, 46, 48, 50, 56, 58, 61, 68, 70, 71, 73, 85, 88,
    91, 95, 96,
]  # fmt: skip


class GoldenCost:
    """The duration that the logs were made with, in nanoseconds: 3000 us + 20 us a token + context // 100 us."""

    stages = 1

    def stage_ns(self, stats: BatchStats) -> tuple[int, ...]:
        chunk_tokens = sum(tokens for tokens, _ in stats.chunks)
        context = stats.context + sum(tokens + history for tokens, history in stats.chunks)
        return ((3000 + 20 * (stats.decodes + chunk_tokens) + context // 100) * 1000,)

    def decode_run(self, stats: BatchStats) -> DecodeRun | None:
        return None


@dataclass
class Spy(BatchPolicy):
    """A policy that lets another decide and writes down what it decided."""

    policy: ChunkedPrefill
    manager: BlockManager
    clock: Clock
    steps: list[dict[str, Any]] = field(default_factory=list)
    marches: bool = True

    def fill(self, ledger: Ledger, running: Sequence[Request], waiting: Iterable[Request]) -> None:
        if self.steps:
            self.steps[-1] |= {"free_blocks": self.manager.free, "running": len(running)}
        self.policy.fill(ledger, running, waiting)
        entries = [*((request, 1) for request in ledger.decodes), *ledger.chunks]
        if entries:
            self.steps.append({
                "start_us": self.clock.now_ns // 1000,
                "request_ids": [request.index for request, _ in entries],
                "scheduled_tokens": [tokens for _, tokens in entries],
                "computed_before": [request.computed for request, _ in entries],
                "preempted_ids": [request.index for request in ledger.preempted],
            })  # fmt: skip

    def repeats(self, ledger: Ledger, waiting: Sequence[Request]) -> bool:
        return self.policy.repeats(ledger, waiting)


def serve(case: pd.Series, rows: pd.DataFrame) -> tuple[list[Request], list[dict[str, Any]]]:
    """Run one case through a replica with the logged engine's settings."""
    clock = Clock()
    scheduler = SchedulerDefaults(
        policy="chunked_prefill",
        max_num_batched_tokens=int(case.max_num_batched_tokens),
        max_num_seqs=int(case.max_num_seqs),
        block_size=int(case.block_size),
        max_model_len=int(case.max_model_len),
    )
    size = int(case.block_size)
    manager = BlockManager(int(case.num_blocks) - 1, size, lambda tokens: -(-tokens // size))
    spy = Spy(ChunkedPrefill(scheduler), manager, clock)
    settings = ReplicaSettings(
        cost=GoldenCost(), scheduler=scheduler, policy=spy, windows=(), frontend_ns=0, exact_steps=True
    )
    replica = Replica(
        0, clock=clock, settings=settings, blocks=manager, recorder=Recorder(()), on_finish=lambda _: None
    )
    requests = [Request(i, int(row.prompt_tokens), int(row.output_tokens)) for i, row in enumerate(rows.itertuples())]
    for request, arrival_us in zip(requests, rows.arrival_us, strict=True):
        clock.at(int(arrival_us) * 1000, ARRIVAL, lambda _, request=request: replica.submit(request))
    clock.run()
    spy.steps[-1] |= {"free_blocks": manager.free, "running": len(replica.running)}
    return requests, spy.steps


def golden(data: Path, case: int) -> tuple[pd.Series, pd.DataFrame, pd.DataFrame]:
    folder = data / "vllm_scheduler"
    cases = pd.read_parquet(folder / "cases.parquet").set_index("case", drop=False)
    requests = pd.read_parquet(folder / "requests.parquet", filters=[("case", "==", case)])
    steps = pd.read_parquet(folder / "steps.parquet", filters=[("case", "==", case)])
    return cases.loc[case], requests.sort_values("request"), steps.sort_values("step")


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_engines(data: Path, case: int) -> None:
    settings, rows, expected = golden(data, case)
    requests, steps = serve(settings, rows)
    for number, (got, want) in enumerate(zip(steps, expected.itertuples(), strict=False)):
        for key in ("start_us", "request_ids", "scheduled_tokens", "computed_before", "preempted_ids", "free_blocks"):
            wanted = getattr(want, key)
            wanted = wanted.tolist() if isinstance(wanted, np.ndarray) else wanted
            assert got[key] == wanted, f"step {number}: {key}: {got} against {want}"
    assert len(steps) == len(expected)
    assert [r.first_token_ns // 1000 for r in requests] == rows.first_token_us.tolist()
    assert [r.last_token_ns // 1000 for r in requests] == rows.last_token_us.tolist()
    assert [r.preemptions for r in requests] == rows.preemptions.tolist()


def test_every_case_without_prefix_caching_is_covered(data: Path) -> None:
    cases = pd.read_parquet(data / "vllm_scheduler" / "cases.parquet")
    assert sorted(cases.case[~cases.prefix_caching]) == CASES
    assert (cases.preemptions[~cases.prefix_caching] > 0).sum() == 7
