"""Sweeps: a grid of simulations, one table of their summaries.

base:                       # the flags of ``apexsim simulate``
  model: llama-3.1-8b
  device: h100-sxm
  workload: chat
  slo: {ttft_s: 0.5, tpot_s: 0.05}
grid:                       # each key a path into base, each value the list it takes; all combinations are run
  tensor: [1, 2, 4]
  slo.tpot_s: [0.03, 0.05]
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from apexsim.atomic import atomic_path, make_folder
from apexsim.errors import BadInput
from apexsim.io.deployments import (
    DeploymentFile,
    beside,
    check_computes,
    check_lawful,
    check_named_code,
    resolve_deployment,
)
from apexsim.io.search_files import Traffic
from apexsim.io.yaml_files import load_spec
from apexsim.search.executors import choose_jobs, run_local
from apexsim.search.journal import fingerprint, identity, journal_in
from apexsim.search.outcomes import Outcome, Progress, attempt, settle
from apexsim.serving.named import check_all_due
from apexsim.serving.simulator import simulate
from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.deployment import Deployment
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Requests

TABLE = "sweep.parquet"
# Each point is a run of seconds and a row of a table.
MAX_POINTS = 100_000

# Parts of a summary that are no figure of the run: wall-clock times, and sentences.
_LEFT_OUT = ("timing", "notes")


class RunFile(DeploymentFile, Traffic):
    """One run by names: what ``base`` and a point of the grid amount to."""


class SweepFile(Spec):
    """A sweep as a person writes it."""

    base: dict[str, Any]
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]

    def points(self, where: object) -> tuple[dict[str, Any], ...]:
        """Every combination of the grid, the last key varying fastest; BadInput where there are too many."""
        count = math.prod(len(values) for values in self.grid.values())
        if count > MAX_POINTS:
            raise BadInput(f"has {count:,} points; give at most {MAX_POINTS:,}", where=where, key="grid")
        return tuple(dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))


@dataclass(frozen=True)
class Run:
    """One simulation to make: the point of the grid it stands for, and all it needs."""

    point: Mapping[str, Any]
    deployment: Deployment
    requests: Requests
    slo: SLO
    seed: int

    @cached_property
    def identity(self) -> str:
        """Hash of all that the outcome depends on."""
        return identity(
            {
                "deployment": self.deployment.model_dump(mode="json", exclude_defaults=True),
                "requests": fingerprint(self.requests),
                "slo": self.slo.model_dump(mode="json", exclude_defaults=True),
                "seed": self.seed,
            }
        )


def sweep(
    path: Path | str,
    *,
    out: Path | str,
    resume: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    allow_plugins: bool = False,
) -> pd.DataFrame:
    """Run every point of the grid in a sweep YAML; write ``sweep.parquet`` into the folder ``out`` and return it.

    A run that fails is a row with its error; one that misses its SLO has its figures and the verdict ``misses_slo``.
    Names and keys are all checked before the first run: ``BadInput`` names the file and the key. ``resume`` goes on
    from the journal in ``out``, and a folder that has one is refused without it; ``jobs`` changes nothing but the time.
    Code that a file names (``module:Name``) is imported only if ``allow_plugins``.
    """
    runs = tuple(read_runs(path, allow_plugins=allow_plugins))
    tasks = {run.identity: run for run in runs}
    jobs = choose_jobs(jobs, sum(len(run.requests) for run in runs))
    folder = make_folder(out, files=[TABLE])
    with journal_in(folder, resume=resume, results=(TABLE,)) as journal:
        outcomes = settle(tasks, simulated, executor=run_local, jobs=jobs, journal=journal, progress=progress)
        grid = pd.DataFrame({path: _column([run.point[path] for run in runs]) for path in runs[0].point})
        table = grid.join(pd.DataFrame([_row(outcomes[run.identity]) for run in runs]), how="right")
        with atomic_path(folder / TABLE) as scratch:
            table.to_parquet(scratch, index=False)
    return table


def read_runs(path: Path | str, *, allow_plugins: bool = False) -> Iterator[Run]:
    """The runs of a sweep YAML, in the order of its grid; files they name are looked for beside it first."""
    file = load_spec(SweepFile, path)
    # Points mostly share their workload, and drawing one again and again would take longer than simulating it.
    read = lru_cache(maxsize=None)(lambda *traffic: Traffic(**dict(traffic)).read())
    for point in file.points(path):
        run = parse_spec(RunFile, _at_point(file.base, point, path), path)
        check_named_code(run.model_dump(), {}, path, allowed=allow_plugins)
        run = run.model_copy(
            update={k: beside(getattr(run, k), path) for k in ("model", "device", "engine", "workload")}
        )
        traffic = run.model_dump(include=Traffic.model_fields.keys() - {"slo"})
        deployment, requests = resolve_deployment(run, path, allow_plugins=allow_plugins), read(*traffic.items())
        check_all_due(deployment, requests, run.slo)
        yield Run(point, deployment, requests, run.slo, run.seed)


def simulated(run: Run) -> Outcome:
    """Outcome of one run, its figures the summary flattened; never raises."""

    def work() -> Outcome:
        check_lawful(run.deployment, "plan")
        check_computes(run.deployment, "run")
        # Without limits there is no share of requests that keep them.
        limits = run.slo if run.slo.model_dump(exclude={"target"}, exclude_none=True) else None
        summary = simulate(run.deployment, run.requests, slo=limits, seed=run.seed).summary()
        figures = flatten({key: summary[key] for key in summary if key not in _LEFT_OUT})
        missed = _missed(run.slo, summary["slo"]["attainment"])
        return Outcome("misses_slo" if missed else "ok", missed, figures)

    return attempt(work)


def _missed(slo: SLO, attainment: float | None) -> str:
    """What a run misses of its SLO; empty where it keeps it, or has none."""
    return slo.missed(attainment or 0.0) if slo.limited else ""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data as one level, keys joined with dots: ``{"ttft_s": {"p50": 1}}`` is ``{"ttft_s.p50": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _at_point(base: Mapping[str, Any], point: Mapping[str, Any], where: object) -> dict[str, Any]:
    """``base`` with the values of the point at their paths."""
    data = dict(base)
    for path, value in point.items():
        *parents, leaf = path.split(".")
        inner = data
        for parent in parents:
            found = inner.get(parent, {})
            if not isinstance(found, Mapping):
                raise BadInput(f"{parent} holds no keys", where=where, key=f"grid.{path}", got=found)
            inner[parent] = dict(found)
            inner = inner[parent]
        inner[leaf] = value
    return data


def _row(outcome: Outcome) -> dict[str, Any]:
    return {"verdict": outcome.verdict, "error": outcome.reason, **outcome.figures}


def _column(values: list[Any]) -> list[Any]:
    """Values of a path as a table can hold them: as they are where they are of one kind, else as JSON text."""
    kinds = {float if type(value) is int and abs(value) < 2**63 else type(value) for value in values}
    plain = kinds - {type(None)} in ({str}, {bool}, {float}, set())
    return values if plain else [json.dumps(value) for value in values]
