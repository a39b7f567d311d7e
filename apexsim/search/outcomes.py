"""Outcomes: what became of each run of a search or sweep, worked out over an executor and kept in a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from apexsim.errors import InfeasiblePlan
from apexsim.search.executors import LOST, Executor
from apexsim.search.journal import Journal, warn

T = TypeVar("T")

Verdict = Literal["ok", "misses_slo", "failed", "infeasible", "unlawful"]
Figures = dict[str, float | None]
# What a journal holds of an outcome.
RECORDED = {"verdict", "reason", "figures", "window", "batches"}
Progress = Callable[[int, int], None]  # (runs settled, all runs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict, the reason for it in words, and the figures of the run; they are empty where there was none.

    ``window``: the kind of the run's steady part (see ``Steady``), for the objective's own figure where it is one of
    that part; empty where there is none.
    ``batches``: figures over parts of the run, for ties (see ``batches.py``).
    ``passing``: what it failed of may be gone next time (a lost process, memory, a disk), so it is never remembered.
    """

    verdict: Verdict
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    window: str = ""
    batches: dict[str, list[float | None]] = field(default_factory=dict)
    passing: bool = False


def attempt(work: Callable[[], Outcome]) -> Outcome:
    """The outcome of ``work``. Whatever goes wrong in one run is that run's outcome and stops no other."""
    try:
        return work()
    except InfeasiblePlan as error:
        return Outcome("infeasible", str(error))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("failed", reason, passing=isinstance(error, MemoryError | OSError))


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

    Failures too: the same task fails again in the same way. Those that are ``passing`` are not added, so that they are
    tried again.
    """
    outcomes = _recalled(journal, tasks) if journal else {}
    todo = [key for key in tasks if key not in outcomes]
    for number, result in executor(work, [tasks[key] for key in todo], jobs):
        outcomes[todo[number]] = outcome = result or Outcome("failed", LOST, passing=True)
        if journal and not outcome.passing:
            journal.append(todo[number], {name: getattr(outcome, name) for name in RECORDED})
        if progress:
            progress(len(outcomes), len(tasks))
    return outcomes


def _recalled(journal: Journal, tasks: Iterable[str]) -> dict[str, Outcome]:
    """The outcomes of tasks that a journal knows; a warning names those that this version does not understand."""
    found, faults = {}, []
    for key in tasks:
        if known := journal.known.get(key):
            if known.outcome.keys() == RECORDED and known.outcome["verdict"] in get_args(Verdict):
                found[key] = Outcome(**known.outcome)
            else:
                faults.append(f"line {known.line} does not count: its outcome is none of this version's")
    warn(journal.path, faults)
    return found
