"""A search: every candidate is judged by simulation, and all of them are ranked."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pandas as pd

from apexsim.search.executors import Executor, choose_jobs, run_local
from apexsim.search.journal import Journal
from apexsim.search.judging import Evaluate, Row, judge, run_deployment
from apexsim.search.objective import FIGURES, Objective
from apexsim.search.outcomes import Progress, settle
from apexsim.search.pareto import pareto_front
from apexsim.search.question import Question
from apexsim.search.space import Candidate
from apexsim.specs.deployment import Deployment

RANK_OF_VERDICT = {"ok": 0, "misses_slo": 1, "failed": 2, "infeasible": 3, "unlawful": 4}
FRONT_AXES = ("e2e_p90_s", "usd_per_million_output_tokens", "energy_per_output_token_j")  # less is better


@dataclass(frozen=True)
class Study:
    """The answer to a question: every candidate a row, best first.

    Plans that keep the SLO come first, by the objective; then those that miss it, by attainment; then those that did
    not run. Ties go to fewer devices, then to the name. Only ``timing`` may differ between two equal searches.
    """

    question: Question
    rows: tuple[Row, ...]
    timing: Mapping[str, float] = field(default_factory=dict)

    @property
    def winner(self) -> Row | None:
        """The first row; None when no plan keeps the SLO."""
        return self.rows[0] if self.rows[0].outcome.verdict == "ok" else None

    @property
    def best(self) -> Deployment | None:
        """The winning deployment; None when no plan keeps the SLO."""
        return self.question.space.deployment(self.winner.candidate) if self.winner else None

    @property
    def table(self) -> pd.DataFrame:
        """Every candidate a row, in order of rank; a figure is NaN where the plan did not run."""
        table = pd.DataFrame(self.records)
        return table.astype(dict.fromkeys(["objective_value", *self._figure_names], "float64"))

    @property
    def front(self) -> pd.DataFrame:
        """The rows that keep the SLO and that no other such row beats in latency, cost and energy at once."""
        return self.table[self.table["front"]].reset_index(drop=True)

    @cached_property
    def records(self) -> tuple[dict[str, Any], ...]:
        """The table as plain data; a figure is None where the plan did not run."""
        on_front = _on_front(self.rows)
        return tuple(
            {"rank": rank, **self._layout(row.candidate), **self._result(row), "front": rank - 1 in on_front}
            | {name: row.outcome.figures.get(name) for name in self._figure_names}
            for rank, row in enumerate(self.rows, 1)
        )

    @cached_property
    def _figure_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*FIGURES, *(name for row in self.rows for name in row.outcome.figures)]))

    def _layout(self, candidate: Candidate) -> dict[str, Any]:
        plan = candidate.plan
        return {
            "plan": candidate.name,
            "tensor": plan.tensor,
            "attention_data": plan.attention_data,
            "pipeline": plan.pipeline,
            "expert": plan.expert,
            "replicas": candidate.replicas,
            "devices_used": candidate.devices,
            "devices_idle": self.question.space.base.cluster.devices - candidate.devices,
        }

    def _result(self, row: Row) -> dict[str, Any]:
        value = self.question.objective.value(row.outcome.figures)
        return {"verdict": row.outcome.verdict, "reason": row.outcome.reason, "objective_value": value}


def search(
    question: Question,
    *,
    executor: Executor = run_local,
    jobs: int | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
    evaluate: Evaluate = run_deployment,
) -> Study:
    """Judge every candidate and rank them all; an infeasible plan or one that fails never stops the search.

    ``jobs`` defaults to the cores at hand, and to one where there is little to simulate. Outcomes that ``journal``
    holds are not worked out again; new ones are added to it.
    """
    started_s = time.perf_counter()
    candidates = {question.key(candidate): candidate for candidate in question.space.candidates()}
    jobs = choose_jobs(jobs, len(candidates) * len(question.requests) * question.objective.runs)
    work = partial(judge, question=question, evaluate=evaluate)
    outcomes = settle(candidates, work, executor=executor, jobs=jobs, journal=journal, progress=progress)
    rows = [Row(candidate, outcomes[key]) for key, candidate in candidates.items()]
    timing = {"wall_s": time.perf_counter() - started_s, "jobs": jobs}
    return Study(question, rank(rows, question.objective), timing)


def rank(rows: Iterable[Row], objective: Objective) -> tuple[Row, ...]:
    """Rows in the order that ``Study`` promises."""

    def key(row: Row) -> tuple[int, float, int, str]:
        verdict, figures = row.outcome.verdict, row.outcome.figures
        missed = verdict == "misses_slo"
        value = figures.get("attainment") if missed else objective.value(figures)
        sign = -1 if missed or objective.highest else 1
        score = math.inf if value is None else sign * value
        return RANK_OF_VERDICT[verdict], score, row.candidate.devices, row.candidate.name

    return tuple(sorted(rows, key=key))


def _on_front(rows: tuple[Row, ...]) -> frozenset[int]:
    """Indices of the rows on the Pareto front of those that keep the SLO and know every axis."""
    points = {}
    for index, row in enumerate(rows):
        axes = [row.outcome.figures.get(axis) for axis in FRONT_AXES]
        if row.outcome.verdict == "ok" and None not in axes:
            points[index] = tuple(axis for axis in axes if axis is not None)
    return frozenset(index for index, best in zip(points, pareto_front(list(points.values())), strict=True) if best)
