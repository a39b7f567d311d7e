"""The front door of a search: names in, a ``Study`` out, and its files where a folder is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apexsim.atomic import make_folder
from apexsim.errors import BadInput
from apexsim.io.search_files import SearchFile, read_search, resolve_search, write_study
from apexsim.search import study as studies
from apexsim.search.executors import executor_named
from apexsim.search.journal import Journal
from apexsim.search.outcomes import Progress
from apexsim.search.study import Study
from apexsim.specs.base import parse_spec


def search(
    source: Path | str | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    jobs: int | None = None,
    executor: str = "local",
    progress: Progress | None = None,
    **choices: Any,
) -> Study:
    """Find the best deployment.

    ``choices`` are the keys of a search YAML (``SearchFile``): model, devices, workload, slo, objective, ...; they
    outweigh those of the file ``source``. ``out`` is a folder that gets ``study.json``, ``plans.parquet``,
    ``best.yaml`` and the journal from which ``resume`` goes on. ``jobs`` and ``executor`` ("local" or "ray") change
    nothing in the answer but its timing. Raises ``BadInput`` naming the file or key at fault.
    """
    if resume and out is None:
        raise BadInput("give --out, the folder of the search to go on with", where="--resume")
    file = _asked(source, choices)
    question, runner = resolve_search(file, source or "search"), executor_named(executor)
    folder = None if out is None else make_folder(out)
    journal = None if folder is None else Journal(folder / "journal.jsonl", resume=resume)
    study = studies.search(question, executor=runner, jobs=jobs, journal=journal, progress=progress)
    if folder is not None:
        write_study(folder, study, file)
    return study


def _asked(source: Path | str | None, choices: dict[str, Any]) -> SearchFile:
    """The search that a file, choices, or both describe."""
    written = {} if source is None else read_search(source).model_dump(exclude_unset=True)
    for key in ("model", "devices", "workload"):
        if key not in written | choices:
            raise BadInput("give a search file, or a model, devices and a workload", where=f"--{key}")
    options = {**written.get("engine_options", {}), **choices.get("engine_options", {})}
    return parse_spec(SearchFile, {**written, **choices, "engine_options": options}, source or "search")
