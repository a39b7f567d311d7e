"""The life of one candidate: lawful? starts? runs? keeps the SLO? It ends with a verdict and a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from apexsim.search.batches import batch_values
from apexsim.search.goodput import low_load
from apexsim.search.objective import read_figures
from apexsim.search.outcomes import Outcome, Verdict, attempt
from apexsim.search.probing import probe
from apexsim.search.question import Question
from apexsim.search.space import Candidate
from apexsim.search.trial import Trial
from apexsim.serving.simulator import simulate
from apexsim.specs.deployment import Deployment
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests


class Evaluate(Protocol):
    """Summary of one run, with ``batches`` beside it (see ``batches.py``); ``until_lost`` as in ``Run``."""

    def __call__(
        self, deployment: Deployment, requests: Requests, slo: SLO, seed: int, *, until_lost: bool = False
    ) -> Mapping[str, Any]: ...


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


def judge(
    candidate: Candidate, *, question: Question, evaluate: Evaluate, low_load_e2e_s: float | None = None
) -> Outcome:
    """Verdict on one candidate; never raises. ``low_load_e2e_s`` as in ``Trial``."""
    if candidate.reasons:
        return Outcome("unlawful", "; ".join(candidate.reasons))
    return attempt(lambda: _measured(candidate, question, evaluate, low_load_e2e_s))


def judge_at_low_load(candidate: Candidate, *, question: Question, evaluate: Evaluate) -> Outcome:
    """How long a lawful candidate takes at low load, as the figure ``low_load_e2e_s``; never raises."""
    run = partial(evaluate, question.space.deployment(candidate), slo=question.slo, seed=question.seed)
    return attempt(lambda: Outcome("ok", figures={"low_load_e2e_s": low_load(run, question.requests)}))


def _measured(candidate: Candidate, question: Question, evaluate: Evaluate, low_load_e2e_s: float | None) -> Outcome:
    objective, slo = question.objective, question.slo
    run = partial(evaluate, question.space.deployment(candidate), slo=slo, seed=question.seed)
    summary = run(question.requests)
    steady, figures = summary["steady"], read_figures(summary) | {"devices": float(candidate.devices)}
    if objective.probe:
        trial = Trial(run, question.supply, slo, candidate.devices, candidate.replicas, low_load_e2e_s)
        figures |= objective.probe(trial)
    verdict: Verdict = "ok" if objective.accepts(figures, steady["kind"], slo) else "misses_slo"
    reason = objective.explain(figures, steady, slo)
    return Outcome(verdict, reason, figures, window=steady["kind"], batches=summary["batches"])
