"""The one place that turns a workload's name or path into requests."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from apexsim import catalog
from apexsim.errors import BadInput, nearest
from apexsim.io.request_files import FORMATS, formats, open_requests
from apexsim.specs.laws import MAX_CONCURRENCY, ClosedLoop, PoissonArrivals, RenewalArrivals
from apexsim.specs.supply import Supply
from apexsim.specs.workload import MAX_REQUESTS, Requests, Workload, check_count, check_rate

_Wanted = PoissonArrivals | ClosedLoop


def resolve_workload(
    name_or_path: str | os.PathLike[str],
    *,
    rate_per_s: float | None = None,
    concurrency: int | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Requests:
    """The requests of ``resolve_supply``, for whoever needs no more of them."""
    return resolve_supply(
        name_or_path, rate_per_s=rate_per_s, concurrency=concurrency, requests=requests, seed=seed
    ).requests


def resolve_supply(
    name_or_path: str | os.PathLike[str],
    *,
    rate_per_s: float | None = None,
    concurrency: int | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Supply:
    """Requests of a shipped workload (by name), a workload YAML or a request file (by path).

    ``rate_per_s`` or ``concurrency``, not both, replaces the workload's own arrivals. A rate stretches the time of a
    trace, of the ``requests`` first rows where those are asked for. Where there is no time to stretch (no arrival
    times, all at once, closed loop) Poisson arrivals are drawn from ``seed``, and a note says so.
    Raises BadInput in one line naming the flag, or the file, column and row.
    """
    if requests is not None:
        check_count(requests, "--requests", most=MAX_REQUESTS)
    check_count(seed, "--seed", least=0)
    wanted = _wanted_arrivals(rate_per_s, concurrency)
    found = _find(os.fspath(name_or_path), lengths_will_do=wanted is not None)
    if isinstance(found, Workload):
        return _drawn(found, wanted, requests, seed)
    return Supply(requests=_replay(found, wanted, requests, seed))


def _wanted_arrivals(rate_per_s: float | None, concurrency: int | None) -> _Wanted | None:
    """The arrivals that the flags ask for; ``None`` for the workload's own."""
    if rate_per_s is not None and concurrency is not None:
        raise BadInput("give one of them: each sets the arrivals", where="--rate-per-s --concurrency")
    if rate_per_s is not None:
        check_rate(rate_per_s, "--rate-per-s")
        return PoissonArrivals(rate_per_s=rate_per_s)
    if concurrency is not None:
        check_count(concurrency, "--concurrency", most=MAX_CONCURRENCY)
        return ClosedLoop(concurrency=concurrency)
    return None


def _find(text: str, *, lengths_will_do: bool) -> Workload | Requests:
    known = catalog.names("workload")
    path = Path(text)
    if text in known or path.suffix in (".yaml", ".yml"):
        return catalog.load("workload", text)
    if path.suffix in FORMATS or os.sep in text or (text and os.path.exists(path)):
        return open_requests(path, lengths_will_do=lengths_will_do)
    would_do = f"unknown workload; {nearest(text, known)} The path of a request file ({formats()}) would do as well"
    raise BadInput(would_do, where="--workload", got=text)


def _drawn(workload: Workload, wanted: _Wanted | None, requests: int | None, seed: int) -> Supply:
    """Requests drawn by a generator; a rate keeps its law of arrivals where it has one."""
    own = workload.arrivals
    notes: tuple[str, ...] = ()
    if isinstance(wanted, PoissonArrivals) and isinstance(own, RenewalArrivals):
        workload = workload.model_copy(update={"arrivals": own.model_copy(update={"rate_per_s": wanted.rate_per_s})})
    elif wanted is not None:
        workload = workload.model_copy(update={"arrivals": wanted})
        notes = (f"arrivals of {workload.name} ({own.kind}) replaced: {wanted!r}",)
    rows = replace(workload.sample(requests, seed=seed), notes=notes)
    return Supply(requests=rows, law=workload, seed=seed, fixed=requests is not None)


def _replay(rows: Requests, wanted: _Wanted | None, requests: int | None, seed: int) -> Requests:
    """Rows of a file, their arrivals replaced or stretched."""
    rows = rows if requests is None else rows.head(requests)
    if isinstance(wanted, ClosedLoop):
        return rows.closed_loop(wanted.concurrency)
    if isinstance(wanted, PoissonArrivals):
        return rows.at_rate(wanted.rate_per_s) if rows.span_s else rows.arriving(wanted, seed=seed)
    return rows
