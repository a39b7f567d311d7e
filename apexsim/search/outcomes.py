"""Outcomes: what became of each run of a search or sweep, worked out over an executor and kept in a journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

from apexsim.errors import InfeasiblePlan
from apexsim.search.executors import LOST, Executor
from apexsim.search.journal import Journal

T = TypeVar("T")

Verdict = Literal["ok", "misses_slo", "failed", "infeasible", "unlawful"]
Figures = dict[str, float | None]
Progress = Callable[[int, int], None]  # (runs settled, all runs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict, the reason for it in words, and the figures of the run; they are empty where there was none."""

    verdict: Verdict
    reason: str = ""
    figures: Figures = field(default_factory=dict)


def attempt(work: Callable[[], Outcome]) -> Outcome:
    """The outcome of ``work``. Whatever goes wrong in one run is that run's outcome and stops no other."""
    try:
        return work()
    except InfeasiblePlan as error:
        return Outcome("infeasible", str(error))
    except Exception as error:
        return Outcome("failed", " ".join(f"{type(error).__name__}: {error}".split()))


def settle(
    tasks: Mapping[str, T],
    work: Callable[[T], Outcome],
    *,
    executor: Executor,
    jobs: int,
    journal: Journal | None,
    progress: Progress | None,
) -> dict[str, Outcome]:
    """The outcome of every task, by its identity: from the journal where it is there, else worked out and added.

    What failed before is tried again.
    """
    known = journal.known if journal else {}
    recalled = {key: _recalled(known[key]) for key in tasks if key in known}
    outcomes = {key: outcome for key, outcome in recalled.items() if outcome and outcome.verdict != "failed"}
    todo = [key for key in tasks if key not in outcomes]
    for number, result in executor(work, [tasks[key] for key in todo], jobs):
        outcomes[todo[number]] = outcome = result or Outcome("failed", LOST)
        if journal:
            journal.append(todo[number], asdict(outcome))
        if progress:
            progress(len(outcomes), len(tasks))
    return outcomes


def _recalled(entry: Mapping[str, Any]) -> Outcome | None:
    """The outcome that an entry of a journal holds; None where it holds none that this version knows."""
    if entry.get("verdict") not in get_args(Verdict) or entry.keys() - Outcome.__dataclass_fields__.keys():
        return None
    return Outcome(**entry)
