"""The front door for Python: names in; a deployment, requests or the answer of a search out.

What does the work is imported when it is called for: this module comes with ``import apexsim``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# The room itself, an empty package, so that its import later on does not put it in the place of the function.
import apexsim.search  # noqa: F401
from apexsim.errors import BadInput

if TYPE_CHECKING:
    from apexsim.io.search_files import SearchFile
    from apexsim.search.outcomes import Progress
    from apexsim.search.study import Study
    from apexsim.specs.deployment import Deployment
    from apexsim.specs.workload import Requests


def deployment(source: Path | str | None = None, *, allow_plugins: bool = False, **choices: Any) -> Deployment:
    """A lawful deployment.

    ``choices`` are the keys of a deployment YAML (``DeploymentFile``): model, device, engine, tensor, pipeline,
    replicas, engine_options, ...; they outweigh those of the file ``source``. Code that a file names (``module:Name``)
    is imported only if ``allow_plugins``. Raises ``BadInput`` naming the file or key at fault, or every reason why the
    plan cannot be laid out.
    """
    from apexsim.io.deployments import deployment_from

    return deployment_from(source, choices, allow_plugins=allow_plugins)


def workload(
    name: Path | str,
    *,
    rate_per_s: float | None = None,
    concurrency: int | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Requests:
    """Requests of a workload: drawn, if ``name`` is one of ``apexsim list workloads`` or a workload YAML; else read
    from a parquet, CSV or JSONL file.

    ``rate_per_s`` rescales arrivals to that mean rate, ``concurrency`` keeps so many requests in flight instead, and
    ``requests`` is how many are drawn, or taken from the head of a file. Raises ``BadInput``.
    """
    from apexsim.io.requests import resolve_workload

    return resolve_workload(str(name), rate_per_s=rate_per_s, concurrency=concurrency, requests=requests, seed=seed)


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
    ``best.yaml`` and the journal from which ``resume`` goes on; one that has them already is refused without it.
    ``jobs`` and ``executor`` ("local" or "ray") change nothing in the answer but its timing. ``allow_plugins=True``
    lets a file name code to import (``module:Name``). Raises ``BadInput`` naming the file or key at fault.
    """
    from apexsim.atomic import make_folder
    from apexsim.io.search_files import STUDY_FILES, resolve_search, write_study
    from apexsim.search import study as studies
    from apexsim.search.executors import executor_named
    from apexsim.search.journal import journal_in

    if resume and out is None:
        raise BadInput("give --out, the folder of the search to go on with", where="--resume")
    allow_plugins = choices.pop("allow_plugins", False)
    file = _asked(source, choices, allow_plugins)
    question = resolve_search(file, source or "search", allow_plugins=allow_plugins)
    runner = executor_named(executor)
    if out is None:
        return studies.search(question, executor=runner, jobs=jobs, progress=progress)
    folder = make_folder(out, files=STUDY_FILES)
    with journal_in(folder, resume=resume, results=STUDY_FILES) as journal:
        study = studies.search(question, executor=runner, jobs=jobs, journal=journal, progress=progress)
        write_study(folder, study, file)
    return study


def _asked(source: Path | str | None, choices: dict[str, Any], allow_plugins: bool) -> SearchFile:
    """The search that a file, choices, or both describe."""
    from apexsim.io.deployments import check_named_code
    from apexsim.io.search_files import SearchFile, read_search
    from apexsim.io.words import outweighing
    from apexsim.specs.base import parse_spec

    written = {} if source is None else read_search(source).model_dump(exclude_unset=True)
    check_named_code(written, choices, source, allowed=allow_plugins)
    for key in ("model", "devices", "workload"):
        if key not in written | choices:
            raise BadInput("give a search file, or a model, devices and a workload", where=f"--{key}")
    where = source or "search"
    options = outweighing(written.get("engine_options", {}), choices.get("engine_options", {}), where)
    return parse_spec(SearchFile, {**written, **choices, "engine_options": options}, where)
