"""The life of one candidate: lawful? starts? runs? keeps the SLO? It ends with a verdict and a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from apexsim.search.batches import batch_values
from apexsim.search.objective import read_figures
from apexsim.search.outcomes import Figures, Outcome, Verdict, attempt
from apexsim.search.probing import probe
from apexsim.search.question import Question
from apexsim.search.space import Candidate
from apexsim.search.trial import Scouted, Trial
from apexsim.serving.simulator import simulate
from apexsim.specs.deployment import Deployment
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests


class Evaluate(Protocol):
    """Summary of one run, with ``batches`` beside it (see ``batches.py``); ``until_lost`` as in ``Run``."""

    def __call__(
        self, deployment: Deployment, requests: Requests, slo: SLO, seed: int, *, until_lost: bool = False
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Field:
    """What a first look at all candidates found, by their names."""

    looks: Mapping[str, Figures]

    @property
    def e2e_s(self) -> float | None:
        """The largest median end-to-end time at low load; None where no candidate ran."""
        return self._most("low_load_e2e_s")

    @property
    def best_per_s(self) -> float | None:
        """The highest rate per device that short probes let pass; None where there is none."""
        return self._most("brief_per_device_per_s")

    def of(self, candidate: Candidate) -> Scouted:
        """What the trial of a candidate is to know of it."""
        own = self.looks.get(candidate.name, {})
        return Scouted(self.e2e_s, self.best_per_s, own.get("brief_per_device_per_s"))

    def _most(self, figure: str) -> float | None:
        values = [figures.get(figure) for figures in self.looks.values()]
        return max((value for value in values if value is not None), default=None)


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate and its outcome."""

    candidate: Candidate
    outcome: Outcome


def run_deployment(
    deployment: Deployment, requests: Requests, slo: SLO, seed: int, *, until_lost: bool = False
) -> Mapping[str, Any]:
    """Summary of one simulated run."""
    if until_lost:
        return probe(deployment, requests, slo)
    result = simulate(deployment, requests, slo=slo, seed=seed)
    return result.summary() | {"batches": batch_values(result)}


def judge(candidate: Candidate, *, question: Question, evaluate: Evaluate, field: Field | None = None) -> Outcome:
    """Verdict on one candidate; never raises. ``field``: what the first look at all of them found."""
    if candidate.reasons:
        return Outcome("unlawful", "; ".join(candidate.reasons))
    return attempt(lambda: _measured(candidate, question, evaluate, field))


def look_at(candidate: Candidate, *, question: Question, evaluate: Evaluate) -> Outcome:
    """The figures of a first look at a lawful candidate; never raises."""
    look = question.objective.scout
    assert look is not None
    return attempt(lambda: Outcome("ok", figures=look(_trial(candidate, question, evaluate))))


def _trial(candidate: Candidate, question: Question, evaluate: Evaluate, field: Field | None = None) -> Trial:
    run = partial(evaluate, question.space.deployment(candidate), slo=question.slo, seed=question.seed)
    scouted = field.of(candidate) if field else None
    return Trial(run, question.supply, question.slo, candidate.devices, candidate.replicas, scouted)


def _measured(candidate: Candidate, question: Question, evaluate: Evaluate, field: Field | None) -> Outcome:
    objective, slo = question.objective, question.slo
    trial = _trial(candidate, question, evaluate, field)
    summary = trial.run(question.requests)
    steady, figures = summary["steady"], read_figures(summary) | {"devices": float(candidate.devices)}
    if objective.probe:
        figures |= objective.probe(trial)
    verdict: Verdict = "ok" if objective.accepts(figures, steady["kind"], slo) else "misses_slo"
    reason = objective.explain(figures, steady, slo)
    return Outcome(verdict, reason, figures, window=objective.window_of(steady), batches=summary["batches"])
