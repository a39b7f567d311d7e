"""Simulate measured runs: figures of one, and a table of many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from apexsim.errors import ApexsimError, BadInput, InfeasiblePlan, Unsupported
from apexsim.results import SimulationResult
from apexsim.search.executors import LOST, available_cores, run_local
from apexsim.serving.simulator import simulate
from apexsim.specs.server import Load
from apexsim.validation.cases import case_of, kind_of, version_known
from apexsim.validation.loads import requests_of
from apexsim.validation.runs import MEASURED, MeasuredRun, RunRow
from apexsim.validation.served import request_errors
from apexsim.validation.steady import steady_figures

if TYPE_CHECKING:
    import pandas as pd

OK = "ok"
# Rows of one device and model that a process takes at a time: enough to share the tables of their operators.
_CHUNK = 24

Figures = dict[str, float | None]
Itl = Literal["predicted", "measured"]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Replayed:
    """What became of a run: ``status`` is ``ok`` or why there are no figures."""

    status: str
    figures: Figures
    notes: tuple[str, ...] = ()


def run_rows(
    runs: Sequence[MeasuredRun],
    *,
    itl: Itl = "predicted",
    seed: int = 0,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Simulate every run: one row a run, in the order given.

    Columns: every input column as it was written, then ``set``, ``model_kind``, ``version_known``, ``assumed``, the
    ``predicted_`` figures (NaN where there are none) and ``status``. ``itl="measured"`` rescales the step times of
    saturated runs to their measured inter-token latency before power is worked out. ``jobs`` changes nothing but time.
    """
    import pandas as pd

    chunks = _chunks(runs)
    replayed: dict[int, Replayed] = {}
    work = partial(_replay_all, itl=itl, seed=seed)
    for number, results in run_local(work, [[runs[at] for at in chunk] for chunk in chunks], jobs or available_cores()):
        lost = [Replayed(LOST, {})] * len(chunks[number])
        replayed |= dict(zip(chunks[number], results or lost, strict=True))
        if progress:
            progress(len(replayed) / len(runs))
    table = pd.DataFrame([_record(run, replayed[at]) for at, run in enumerate(runs)])
    return table[[name for name in table if name != "status"] + ["status"]]


def replay(
    run: MeasuredRun, *, itl: Itl = "predicted", seed: int = 0, engine_options: Mapping[str, float] | None = None
) -> Replayed:
    """Simulate one run as it was run; whatever stands in the way becomes its status.

    ``engine_options`` outweigh the engine profile, and are outweighed by what the row says of its engine.
    """
    try:
        case = case_of(run.row, engine_options or {})
        deployment, server = case.deployment, case.deployment.colocated_server()
        requests, notes = requests_of(run, longest=server.context_limit, seed=seed)
        if run.row.max_num_batched_tokens is None:
            deployment = deployment.as_run(deployment.servers(Load.of(requests)))
        if run.row.workload == "saturated":
            measured_s = mean_itl_s(run.row) if itl == "measured" else None
            figures = steady_figures(deployment, requests, measured_itl_s=measured_s)
        else:
            result = simulate(deployment, requests)
            figures = {**_figures(result), **request_errors(run, result)}
    except Exception as error:  # one run that fails must not end the others
        return Replayed(_status(error), {})
    return Replayed(OK, figures, (*case.notes, *notes))


def mean_itl_s(row: RunRow) -> float | None:
    """Mean time between tokens that a full server was measured at: as given, or its batch over its tokens a second.

    The median where neither is known; it misses the steps that prompts make longer.
    """
    return row.itl_mean_s or batch_itl_s(row.mean_batch, row.output_tokens_per_s) or row.itl_p50_s


def batch_itl_s(mean_batch: float | None, tokens_per_s: float | None) -> float | None:
    """Mean time between tokens of a sequence from how many there are, by Little's law; None where either is unknown."""
    return mean_batch / tokens_per_s if mean_batch and tokens_per_s else None


def _replay_all(runs: Sequence[MeasuredRun], *, itl: Itl, seed: int) -> list[Replayed]:
    return [replay(run, itl=itl, seed=seed) for run in runs]


def _status(error: Exception) -> str:
    """Why a run has no figures, in one line: the sort of obstacle, then the obstacle."""
    sorts = {InfeasiblePlan: "infeasible", Unsupported: "unsupported", BadInput: "unknown", ApexsimError: "refused"}
    sort = next((name for kind, name in sorts.items() if isinstance(error, kind)), f"failed: {type(error).__name__}")
    return " ".join(f"{sort}: {error}".split())


def _figures(result: SimulationResult) -> Figures:
    """The predicted figures of a whole run; raises ``Unsupported`` where requests went unserved."""
    summary = result.summary()
    counts = summary["requests"]
    if counts["finished"] < counts["total"]:
        reasons = sorted({str(reason) for reason in result.request_columns["reason"] if reason})
        unserved = f"{counts['total'] - counts['finished']} of {counts['total']} requests were not served"
        raise Unsupported("; ".join([unserved, *reasons[:1]]))
    return {
        "ttft_mean_s": summary["ttft_s"]["mean"],
        "tpot_mean_s": summary["tpot_s"]["mean"],
        "itl_mean_s": summary["itl_s"]["mean"],
        "itl_p50_s": summary["itl_s"]["p50"],
        "e2e_mean_s": summary["e2e_s"]["mean"],
        "output_tokens_per_s": summary["throughput"]["output_tokens_per_s"],
        "power_w": summary["energy"]["mean_power_w"],
        "energy_per_output_token_j": summary["energy"]["per_output_token_j"],
        "estimated_share": result.usage.estimated_share,
    }


def _chunks(runs: Sequence[MeasuredRun]) -> list[list[int]]:
    """Positions of runs, few at a time, those of one device, model and dtype together."""
    order = sorted(range(len(runs)), key=lambda at: _alike(runs[at]))
    chunks: list[list[int]] = []
    for at in order:
        if chunks and len(chunks[-1]) < _CHUNK and _alike(runs[chunks[-1][0]])[:3] == _alike(runs[at])[:3]:
            chunks[-1].append(at)
        else:
            chunks.append([at])
    return chunks


def _alike(run: MeasuredRun) -> tuple[str, str, str, str, int]:
    row = run.row
    return row.device, row.model, row.weight_dtype or "", row.engine, row.tensor or 0


def _record(run: MeasuredRun, replayed: Replayed) -> dict[str, Any]:
    """A row of the table: the input as it was written, then what was found."""
    predicted = {f"predicted_{name}": replayed.figures.get(name) for name in (*MEASURED, *_more(replayed))}
    return {
        **run.cells,
        "set": run.set_name,
        "model_kind": kind_of(run.row.model),
        "version_known": version_known(run.row),
        "assumed": "; ".join(replayed.notes),
        **predicted,
        "status": replayed.status,
    }


def _more(replayed: Replayed) -> list[str]:
    """Figures beyond those that runs.csv may hold."""
    return [name for name in replayed.figures if name not in MEASURED]
