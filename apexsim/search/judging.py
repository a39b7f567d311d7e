"""The life of one candidate: lawful? fits in memory? runs? keeps the SLO? It ends with a verdict and a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apexsim.search.outcomes import Outcome, Verdict, attempt
from apexsim.search.question import Question
from apexsim.search.space import Candidate
from apexsim.serving.simulator import simulate
from apexsim.specs.deployment import Deployment
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests

Evaluate = Callable[[Deployment, Requests, SLO, int], Mapping[str, Any]]  # (..., seed) -> summary of one run


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate and its outcome."""

    candidate: Candidate
    outcome: Outcome


def run_deployment(deployment: Deployment, requests: Requests, slo: SLO, seed: int) -> Mapping[str, Any]:
    """Summary of one simulated run."""
    return simulate(deployment, requests, slo=slo, seed=seed).summary()


def judge(candidate: Candidate, *, question: Question, evaluate: Evaluate) -> Outcome:
    """Verdict on one candidate; never raises."""
    if candidate.reasons:
        return Outcome("unlawful", "; ".join(candidate.reasons))
    return attempt(lambda: _measured(candidate, question, evaluate))


def _measured(candidate: Candidate, question: Question, evaluate: Evaluate) -> Outcome:
    deployment, objective, slo = question.space.deployment(candidate), question.objective, question.slo

    def run(requests: Requests) -> Mapping[str, Any]:
        return evaluate(deployment, requests, slo, question.seed)

    figures = objective.measure(run, question.requests, slo, candidate.devices)
    verdict: Verdict = "ok" if objective.accepts(figures, slo) else "misses_slo"
    return Outcome(verdict, objective.explain(figures, slo), figures)
