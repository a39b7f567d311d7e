"""What a simulation found: columns in, figures and DataFrames out.

Every time is in seconds and as the client sees it. A figure that does not exist (the TPOT of a run in which nobody
got two tokens, the energy of an injected cost model) is NaN in a table, None in a summary and null in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from apexsim.columns import Columns
from apexsim.errors import BadInput
from apexsim.metrics import held_ns
from apexsim.replicas import replica_figures
from apexsim.result_files import one_fault, open_folder, seal_folder, write_sealed
from apexsim.specs.deployment import Deployment
from apexsim.specs.server import Server
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Offered, Requests
from apexsim.steady import Steady, steady_part
from apexsim.summary import summarise
from apexsim.tables import Table, blocks, kept, read_table, write_table
from apexsim.uncertainty import LEVEL, Interval, interval, predictions
from apexsim.units import NS_PER_S
from apexsim.usage import PoolRecord, Usage

if TYPE_CHECKING:
    import pandas as pd

    from apexsim.costs.accounting import Accounting
    from apexsim.costs.memory import MemoryPlan

Gaps = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Run(TypedDict, total=False):
    """What ``serving`` hands over after a run; see ``SimulationResult.from_run``.

    ``deployment``: with the engines as they ran (``Deployment.as_run``). ``accounting`` (empty for an injected cost
    model), ``worked_s`` and ``memory``: by the name of the pool.
    """

    deployment: Deployment
    workload: Requests
    slo: SLO | None
    requests: Iterable[Columns]
    itl: Gaps
    steps: Table
    accounting: Mapping[str, Accounting]
    worked_s: Mapping[str, float]
    block_ns: Sequence[int]
    memory: Mapping[str, MemoryPlan]
    timing: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulationResult:
    """One run of one deployment on one workload, which offers ``offered`` in the long run; ``concurrency`` is the
    number of clients of a closed loop.

    ``request_columns``: one row a request (see ``requests``). ``step_columns``: one row a step, or a run of ``repeats``
    decode steps, with ``start_ns`` and ``end_ns``. ``gaps``: distinct times between two tokens of a request in
    nanoseconds, and how many tokens had each. ``of_pools``: what each pool had and did, by its name. ``block_ns``: for
    every replica, KV blocks in use, integrated over time. ``timing``: wall-clock figures, the only ones that differ
    between two equal runs.
    """

    deployment: Deployment
    workload_name: str
    offered: Offered
    concurrency: int | None
    slo: SLO | None
    request_columns: Table
    step_columns: Table
    gaps: Gaps
    of_pools: dict[str, PoolRecord]
    block_ns: tuple[int, ...]
    timing: dict[str, float]
    notes: tuple[str, ...]

    @classmethod
    def from_run(cls, **run: Unpack[Run]) -> SimulationResult:
        """Keep of a recorded run what the figures need; derived request columns are added here, block by block."""
        deployment, slo, accounting, workload = run["deployment"], run["slo"], run["accounting"], run["workload"]
        of_pools = {
            server.pool: PoolRecord.of(
                run["memory"][server.pool],
                server.context_limit,
                accounting.get(server.pool),
                run["worked_s"].get(server.pool, math.nan),
            )
            for server in deployment.servers()
        }
        return cls(
            deployment=deployment,
            workload_name=workload.name,
            offered=workload.offered,
            concurrency=workload.concurrency,
            slo=slo,
            request_columns=kept(with_latencies(rows, slo) for rows in run["requests"]),
            step_columns=run["steps"],
            gaps=run["itl"],
            of_pools=of_pools,
            block_ns=tuple(run["block_ns"]),
            timing=run["timing"],
            notes=(*run.get("notes", ()), *_deployment_notes(deployment)),
        )

    def __repr__(self) -> str:
        """What was run in a line: the figures are in ``summary()``."""
        done = f"{int(self.finished.sum()):,} of {len(self.finished):,} requests"
        return (
            f"<SimulationResult {self.workload_name}, {done} finished in {self.duration_s:.4g} s, {self.deployment!r}>"
        )

    # -- tables ------------------------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request: when it came, was scheduled, got its first and last token; what it asked for; its verdict.

        ``ttft_s`` first token - arrival, ``tpot_s`` (last - first) / (output tokens - 1), ``e2e_s`` last token -
        arrival, ``queue_s`` first scheduled - arrival, ``good`` whether it met every limit (no column without an SLO).
        """
        return _frame(self.request_columns)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a step or a run of ``repeats`` equal decode steps of a replica, in order of their end, in seconds."""
        columns = {key: values for key, values in self.step_columns.items() if key not in ("start_ns", "end_ns")}
        times = {key: self.step_columns[f"{key[:-2]}_ns"] / NS_PER_S for key in ("start_s", "end_s")}
        return _frame({**times, **columns})

    @cached_property
    def pools(self) -> pd.DataFrame:
        """One row a replica: what it served, the share of the run it worked, and how full its KV cache was."""
        import pandas as pd

        figures = replica_figures(self)
        rows = [
            {"pool": pool.name, "replica": replica, "devices": pool.plan.devices, **figures[replica]}
            for pool in self.deployment.pools
            for replica in self.deployment.replicas_of(pool.name)
        ]
        return pd.DataFrame(rows)

    def steps_of(self, replica: int) -> tuple[Columns, npt.NDArray[np.int64]]:
        """Step columns of one replica in order of their start, and the nanoseconds each is the latest one in flight."""
        mine = np.flatnonzero(self.step_columns["replica"] == replica)
        mine = mine[np.argsort(self.step_columns["start_ns"][mine], kind="stable")]
        steps = {key: values[mine] for key, values in self.step_columns.items()}
        # Asynchronous engines run a step on after the last token left; it is outside the duration.
        end_ns = np.maximum(steps["start_ns"], np.minimum(steps["end_ns"], round(self.end_s * NS_PER_S)))
        return steps, held_ns(steps["start_ns"], end_ns)

    # -- figures -----------------------------------------------------------------------------------------------------

    @cached_property
    def servers(self) -> tuple[Server, ...]:
        """What one replica of every pool was, as its engine ran."""
        return self.deployment.servers()

    @cached_property
    def usage(self) -> Usage:
        """What the devices of all pools did together."""
        return Usage.total([record.usage for record in self.of_pools.values()])

    @property
    def working_s(self) -> dict[str, float]:
        """Device seconds of work, by pool."""
        return {name: record.usage.working_s for name, record in self.of_pools.items()}

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Which requests got all their tokens."""
        return np.concatenate([status == "finished" for (status,) in blocks(self.request_columns, "status")])

    @cached_property
    def arrivals_s(self) -> tuple[float, float]:
        """When the first request came, and the last."""
        spans = [(float(at.min()), float(at.max())) for (at,) in blocks(self.request_columns, "arrival_s")]
        return min(first_s for first_s, _ in spans), max(last_s for _, last_s in spans)

    @cached_property
    def end_s(self) -> float:
        """When the last token became visible; the last arrival where nobody got a token."""
        seen = (last_s[np.isfinite(last_s)] for (last_s,) in blocks(self.request_columns, "last_token_s"))
        return max((float(part.max()) for part in seen if len(part)), default=self.arrivals_s[1])

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last visible token, gaps between arrivals included."""
        return self.end_s - self.arrivals_s[0]

    @cached_property
    def steady(self) -> Steady:
        """What a token costs and how many come a second once the system has filled: see ``apexsim.steady``."""
        return steady_part(self)

    def summary(self) -> dict[str, Any]:
        """Every figure of the run as nested plain data; ``apexsim.summary`` says what each means."""
        return summarise(self)

    def interval(self, figure: str, level: float = LEVEL) -> Interval | None:
        """Where a figure of the run lies at a level of confidence, and what that rests on: see ``uncertainty``.

        ``figure``: mean ``ttft_s``, ``tpot_s`` or ``e2e_s``, ``output_tokens_per_s``, ``energy_per_output_token_j``.
        None where the run has no such figure, or its operators' costs are not those of a profile.
        """
        return interval(self, predictions(self.summary()).get(figure), figure, level)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the result to a folder; every file atomically, ``result.json`` last, so that with it all are there.

        Equal runs write equal bytes, but for ``timing.json``.
        """
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / "result.json").unlink(missing_ok=True)
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}", where=target) from None
        gaps = dict(zip(("gap_ns", "tokens"), self.gaps, strict=True))
        for name, columns in (("requests", self.request_columns), ("steps", self.step_columns), ("gaps", gaps)):
            write_table(target / f"{name}.parquet", columns)
        write_sealed(target / "timing.json", self.timing)
        summary = self.summary()
        del summary["timing"]
        record = {
            "workload_name": self.workload_name,
            "offered": asdict(self.offered),
            "concurrency": self.concurrency,
            "slo": self.slo.model_dump() if self.slo else None,
            "pools": {name: asdict(pool) for name, pool in self.of_pools.items()},
            "block_ns": self.block_ns,
            "notes": self.notes,
            "summary": summary,
            "deployment": self.deployment.model_dump(mode="json"),
        }
        seal_folder(target, record)

    @classmethod
    @one_fault
    def load(cls, folder: Path | str) -> SimulationResult:
        """Read a folder that ``save`` wrote. Raises BadInput naming what is missing, damaged or of another version."""
        source = Path(folder)
        record, timing = open_folder(source)
        gaps = read_table(source / "gaps.parquet")
        return cls(
            deployment=Deployment.model_validate(record["deployment"]),
            workload_name=record["workload_name"],
            offered=Offered(**record["offered"]),
            concurrency=record["concurrency"],
            slo=SLO.model_validate(record["slo"]) if record["slo"] else None,
            request_columns=read_table(source / "requests.parquet"),
            step_columns=read_table(source / "steps.parquet"),
            gaps=(gaps["gap_ns"], gaps["tokens"]),
            of_pools={name: PoolRecord.read(pool) for name, pool in record["pools"].items()},
            block_ns=tuple(record["block_ns"]),
            timing=timing,
            notes=tuple(record["notes"]),
        )


def _frame(columns: Table) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(dict(columns))


def with_latencies(columns: Columns, slo: SLO | None) -> Columns:
    """The request columns with the latencies that follow from them, and ``good`` under an SLO."""
    arrival, first, last = (columns[key] for key in ("arrival_s", "first_token_s", "last_token_s"))
    gaps = (columns["output_tokens"] - 1).astype(np.float64)
    gaps[gaps == 0] = math.nan
    latencies = {
        "ttft_s": first - arrival,
        "tpot_s": (last - first) / gaps,
        "e2e_s": last - arrival,
        "queue_s": columns["scheduled_s"] - arrival,
    }
    return {**columns, **latencies, **({"good": _good(columns["status"], latencies, slo)} if slo else {})}


def _good(status: npt.NDArray[Any], latencies: Columns, slo: SLO) -> npt.NDArray[np.bool_]:
    good: npt.NDArray[np.bool_] = status == "finished"
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        limit = getattr(slo, key)
        if limit is not None:
            # A request of one token has no TPOT to miss.
            good = good & ((latencies[key] <= limit) | np.isnan(latencies[key]))
    return good


def _deployment_notes(deployment: Deployment) -> tuple[str, ...]:
    """What a reader of the figures must know about where they come from."""
    cluster, notes, billed = deployment.cluster, list[str](), deployment.billed_devices
    if idle := billed - deployment.devices_used:
        notes.append(f"{idle} of {billed} devices stand idle; their power and price count (bill: {deployment.bill})")
    if left := cluster.devices - billed:
        notes.append(
            f"{left} of {cluster.devices} devices are not billed, neither price nor power (bill: {deployment.bill})"
        )
    devices = {group.device.name: group.device for group in cluster.groups if deployment.billed(group)}
    for device in devices.values():
        assumed = [name for name, evidence in device.power.evidence.items() if evidence in ("scaled", "prior")]
        if assumed:
            notes.append(f"energy is estimated: {', '.join(assumed)} of {device.name} were not measured on it")
        if device.clock_mhz is not None:
            notes.append(f"times and power at {device.clock_mhz:g} MHz are extrapolated from the highest clock")
    if deployment.model.moe:
        rest = "benchmarks with random tokens choose fewer" if deployment.prompts == "text" else "text chooses more"
        notes.append(f"experts are chosen as {deployment.prompts.replace('_', ' ')} chooses them; {rest} (--prompts)")
    for server in deployment.servers():
        if server.sampling == "top_p" and not server.engine.sampler.top_p_passes:
            notes.append(f"top_p costs what greedy does: {server.engine.name} has no top_p_passes")
    for name, device in devices.items():
        price = device.price
        notes.append(f"price of {name}: {price.usd_per_hour:g} USD/hour ({price.source}, {price.date})")
    return tuple(dict.fromkeys(notes))
