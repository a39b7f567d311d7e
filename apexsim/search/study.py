"""A search: every candidate is judged by simulation, and all of them are ranked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from html import escape
from typing import Any

import pandas as pd

from apexsim.costs.starting import Started, start
from apexsim.errors import InfeasiblePlan
from apexsim.search.executors import Executor, choose_jobs, run_local
from apexsim.search.journal import Journal
from apexsim.search.judging import Evaluate, Field, Row, judge, look_at, run_deployment
from apexsim.search.objective import FIGURES
from apexsim.search.outcomes import Outcome, Progress, settle
from apexsim.search.pareto import pareto_front
from apexsim.search.question import Question
from apexsim.search.space import Candidate
from apexsim.search.ties import Decision, decide, leaders, may_be_best, rank
from apexsim.specs.deployment import Deployment
from apexsim.specs.server import Load
from apexsim.specs.slo import SLO

FRONT_AXES = (  # less is better
    "e2e_p90_s",
    "steady_usd_per_million_output_tokens",
    "steady_energy_per_output_token_j",
)
# As many requests a search draws by itself where windows are too short. More take minutes: people may ask for them.
MOST_DRAWN = 16_384
# A backlog that grows over so many requests is taken at its word.
SURE_TO_GROW = 4_096
# An attainment that is lower than the target by more is not looked at again on more requests.
BY_FAR = 0.1

Work = Callable[[Candidate], Outcome]
Settled = Callable[[Work, Mapping[str, Candidate]], dict[str, Outcome]]


@dataclass(frozen=True)
class Study:
    """The answer to a question: every candidate a row, best first.

    Plans that keep the SLO (and keep up, where the objective asks it) come first, by the objective; those that tie with
    the best lead, in the order of what breaks ties (see ``ties.py``). Then come those that miss it, by attainment; then
    those that did not run. Only ``timing`` may differ between two equal searches. ``asked``: how many requests there
    were before the search drew more, so that windows became long enough.
    """

    question: Question
    rows: tuple[Row, ...]
    asked: int
    timing: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The answer in a line, without reasons: those are in ``headline``."""
        base, tied = self.question.space.base, len(self.leaders)
        asked = (
            f"{base.model.name} on {base.cluster.devices}x{base.cluster.device.name} by {self.question.objective.name}"
        )
        if self.winner is None:
            return f"<Study {asked}: none of {len(self.rows)} plans keeps the SLO>"
        ties = f", {tied} plans tie" if tied > 1 else ""
        return f"<Study {asked}: {self.decision}{ties}, first {self.winner.candidate.name}>"

    def _repr_html_(self) -> str:
        """The headline over the table, for notebooks."""
        return f"<p>{escape(self.headline)}</p>{self.table.to_html(index=False, max_cols=12, na_rep='-')}"

    @cached_property
    def headline(self) -> str:
        """The answer in a sentence: the best plan, how sure that is, and what it is better than."""
        from apexsim.search.headline import headline

        return headline(self)

    @cached_property
    def leaders(self) -> tuple[Row, ...]:
        """The best plan and those that tie with it."""
        return leaders(self.rows, self.question.objective)

    @cached_property
    def decision(self) -> Decision:
        """What may be said of the first row."""
        return decide(self.rows, self.question.objective)

    @property
    def winner(self) -> Row | None:
        """The first row; None when no plan keeps the SLO."""
        return self.rows[0] if self.rows[0].outcome.verdict == "ok" else None

    @property
    def best(self) -> Deployment | None:
        """The winning deployment; None when no plan keeps the SLO."""
        return self.question.space.deployment(self.winner.candidate) if self.winner else None

    @cached_property
    def started(self) -> Started | None:
        """The best deployment as its engine starts, with what it must be told to.

        None when no plan qualifies, and where an evaluation of one's own chose one that does not start.
        """
        if self.best is None:
            return None
        try:
            return start(self.best.colocated_server(Load.of(self.question.requests)))
        except InfeasiblePlan:
            return None

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
            "devices_billed": self.question.space.deployment(candidate).billed_devices,
        }

    def _result(self, row: Row) -> dict[str, Any]:
        value = self.question.objective.value(row.outcome.figures)
        return {
            "verdict": row.outcome.verdict,
            "reason": row.outcome.reason,
            "window": row.outcome.window or None,
            "objective_value": value,
            "leads": any(row is leader for leader in self.leaders),
        }


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
    holds are not worked out again; new ones are added to it. Where a contender's steady window is too short to rank it,
    and requests are drawn and their number was not asked for, all plans that may win are judged again on more of them.
    """
    started_s, asked = time.perf_counter(), len(question.requests)

    def settled(work: Work, tasks: Mapping[str, Candidate]) -> dict[str, Outcome]:
        runs = choose_jobs(jobs, len(tasks) * len(question.requests) * question.objective.runs)
        return settle(tasks, work, executor=executor, jobs=runs, journal=journal, progress=progress)

    rows = _judged(question, question.space.candidates(), evaluate, settled)
    while (least := wanted_requests(rows, question)) > len(question.requests):
        question = question.on(least)
        near = [row.candidate for row in rows if within_reach(row, question.slo)]
        again = {row.candidate: row for row in _judged(question, near, evaluate, settled)}
        rows = [again.get(row.candidate, row) for row in rows]
    timing = {"wall_s": time.perf_counter() - started_s}
    return Study(question, rank(rows, question.objective), asked, timing)


def wanted_requests(rows: Iterable[Row], question: Question) -> int:
    """How many requests would make the windows of all contenders long enough, as far as a search draws by itself.

    A plan that cannot be best, whatever its sampling error, is no contender: its window may stay short. A backlog that
    grows may do so by chance while the run is short: that is looked at again, too.
    """
    now = len(question.requests)
    rows = tuple(rows)
    unsure = [row.outcome for row in rows if _unsure(row, question) and may_be_best(row, rows, question.objective)]
    if not (unsure and question.objective.window and question.supply.grows):
        return now
    wanted = [question.objective.wanted_requests(outcome.figures) or 0 for outcome in unsure]
    return max(now, min(MOST_DRAWN, max(2 * now, *map(math.ceil, wanted))))


def _unsure(row: Row, question: Question) -> bool:
    attainment = row.outcome.figures.get("attainment")
    if attainment is None or attainment < question.slo.target:
        return False
    growing = row.outcome.window == "growing" and len(question.requests) < SURE_TO_GROW
    return growing or row.outcome.window == "short"


def within_reach(row: Row, slo: SLO) -> bool:
    """Whether more requests may yet show that a plan keeps the SLO: one that missed it by far is not run again."""
    attainment = row.outcome.figures.get("attainment")
    return attainment is not None and attainment >= slo.target - BY_FAR


def _judged(question: Question, candidates: Iterable[Candidate], evaluate: Evaluate, settled: Settled) -> list[Row]:
    """Every candidate and its outcome."""
    looked = _looked_at(question, candidates, evaluate, settled) if question.objective.scout else None
    seen = {"e2e_s": looked.e2e_s, "best_per_s": looked.best_per_s} if looked else {}
    tasks = {question.key(candidate, **seen): candidate for candidate in candidates}
    found = settled(partial(judge, question=question, evaluate=evaluate, field=looked), tasks)
    return [Row(candidate, found[key]) for key, candidate in tasks.items()]


def _looked_at(question: Question, candidates: Iterable[Candidate], evaluate: Evaluate, settled: Settled) -> Field:
    """A first look at every candidate that can be laid out."""
    able = {question.key(each, run="first look"): each for each in candidates if not each.reasons}
    found = settled(partial(look_at, question=question, evaluate=evaluate), able)
    return Field({candidate.name: found[key].figures for key, candidate in able.items()})


def _on_front(rows: tuple[Row, ...]) -> frozenset[int]:
    """Indices of the rows on the Pareto front of those that keep the SLO and know every axis."""
    points = {}
    for index, row in enumerate(rows):
        axes = [row.outcome.figures.get(axis) for axis in FRONT_AXES]
        if row.outcome.verdict == "ok" and None not in axes:
            points[index] = tuple(axis for axis in axes if axis is not None)
    return frozenset(index for index, best in zip(points, pareto_front(list(points.values())), strict=True) if best)
