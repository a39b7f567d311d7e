"""A proof: measuring and serving by turns, so that the machine is the same for both.

After a first round of measuring, which says how fast the loads may be, the other rounds are cut into as many parts as
there are runs to serve, one before each. The fit that predicts is made of all of them, and uses nothing of the serving
but one host term, from one of the three loads. Fixed kernels are timed around everything, to show when the machine
changed its speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

import apexsim
from apexsim import catalog
from apexsim.atomic import make_folder
from apexsim.calibration import Group, calibrate
from apexsim.fitting.own import OwnTables, TooFewRows
from apexsim.fitting.pipeline import fit_measured
from apexsim.io.requests import resolve_workload
from apexsim.io.yaml_files import write_yaml
from apexsim.specs.workload import Requests
from apexsim.validation.cases import case_of
from apexsim.validation.loads import requests_of
from apexsim.validation.runs import MeasuredRun, read_runs
from kernels_profiling.clock import Clock
from kernels_profiling.engine import LiveEngine, check_servable
from kernels_profiling.live import EngineFlags, serve_metered, settings_for, warm_up_load, what_ran
from kernels_profiling.machine import device_name, rig_of
from kernels_profiling.measure import Wanted
from kernels_profiling.noise import TooNoisyError, check_quiet
from kernels_profiling.operators import CASES
from kernels_profiling.points import Rank, all_points
from kernels_profiling.records import check_folder, write_run
from kernels_profiling.serving_flags import ModelFlags
from kernels_profiling.session import Point, Session
from kernels_profiling.tables import ROUND, Tables
from kernels_profiling.timers import time_case
from kernels_profiling.transformer import check_memory, check_supported
from kernels_profiling.verdict import LATENCIES, STATISTICS, Figure, LoadVerdict, Verdict

# Loads as shares of what the simulator says the device can serve, and the one that host time is fitted on.
SHARES = {"light": 0.25, "middle": 0.45, "heavy": 0.65}
FITTED_ON = "middle"
# One load tells one term; the others of the engine profile stay as they are.
TERM = "step_s"
LEAST_REQUESTS = 8
# Tokens and keys of the kernels that show the speed of the machine, and seconds that each is timed.
ANCHOR_TOKENS, ANCHOR_KEYS, ANCHOR_S = 8, 128, 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is proved where: ``seconds`` a load, served ``repeats`` times; everything is kept in ``folder``."""

    folder: Path
    model: ModelFlags
    workload: str
    quick: bool
    repeats: int
    seconds: float


@dataclass
class Bench:
    """The engine, the loads by name, and of each the runs and the seconds of the fixed kernels around them."""

    engine: LiveEngine
    loads: Mapping[str, Requests]
    run_ids: dict[str, list[str]] = field(default_factory=dict)
    around_s: dict[str, list[float]] = field(default_factory=dict)


class Proof:
    """Measures, fits, serves and compares; ``tell`` hears what is being done, ``report`` the fraction done."""

    def __init__(
        self,
        plan: Plan,
        tell: Callable[[str], None],
        report: Callable[[float], None],
        *,
        clock: Clock | None = None,
    ) -> None:
        """Times are those of ``clock``, of the host where none is given."""
        self._plan, self._tell, self._report = plan, tell, report
        self._place, self._spec = plan.model.place(), plan.model.spec()
        self._burst = self._checked_burst()
        self._runs = make_folder(plan.folder / "runs")
        check_folder(self._runs, plan.model.model)
        self._rig = rig_of(self._place.device, clock)
        wanted = Wanted(model=[plan.model.model], tensor=[1], quick=plan.quick)
        kind = self._place.device.type
        self._session = Session(Tables(plan.folder / "tables"), self._rig, wanted.scale(kind).point_s)
        self._points = all_points(wanted.scale(kind), wanted.ranks(kind), 1)
        self._profile = plan.folder / "device-profile.yaml"
        self._anchors = self._anchor_cases()
        self._measuring: list[float] = []
        self._wall_s: dict[str, float] = {}

    def verdict(self, bounds: Mapping[str, float]) -> Verdict:
        """Do it all. ``bounds``: the largest errors of means that pass, by latency."""
        first = [point for point in self._points if point[1][ROUND] == 0]
        self._measure(first)
        bench = self._bench()
        turns = [name for repeat in range(self._plan.repeats) for name in _turned(list(bench.loads), repeat)]
        others = np.array_split(np.arange(len(first), len(self._points)), len(turns))
        for at, (name, mine) in enumerate(zip(turns, others, strict=True)):
            self._report(at / len(turns))
            self._measure([self._points[point] for point in mine])
            self._serve(bench, name)
        self._tell(self._session.summary(0))
        self._fit()
        return self._compared(bench, bounds)

    def _checked_burst(self) -> Requests:
        """Requests for all seats twice; BadInput now, rather than after measuring, where such could not be served."""
        check_supported(self._spec)
        seats = catalog.load("engine", EngineFlags().engine).scheduler.max_num_seqs
        burst = resolve_workload(self._plan.workload, rate_per_s=1.0, requests=2 * seats, seed=0).all_at_once()
        settings = settings_for(self._spec, burst, EngineFlags(), self._place)
        check_servable(settings, burst)
        check_memory(self._spec, settings.cache, self._place)
        return burst

    # -- measuring --------------------------------------------------------------------------------------------

    def _measure(self, points: list[Point]) -> None:
        """Measure some points, and how fast the machine is before and after."""
        if not points:
            return
        with self._noting("measuring"):
            self._measuring.append(self._anchor_s())
            self._session.run(points, lambda fraction: None, None)
            self._measuring.append(self._anchor_s())

    def _fit(self) -> None:
        """The device profile of all that is measured by now."""
        with self._noting("fitting"):
            check_quiet(self._session.tables)
            try:
                profile = fit_measured("proof", OwnTables(self._plan.folder / "tables"))
            except TooFewRows as error:
                if self._session.failed:
                    raise
                raise TooNoisyError(str(error)) from None
            write_yaml(self._profile, profile.model_dump(mode="json", exclude_defaults=True))

    def _anchor_cases(self) -> list[Any]:
        """Every product of a layer, and decode attention, of a few tokens."""
        rank = Rank(self._spec, 1)
        shapes = [{"m": ANCHOR_TOKENS, "n": n, "k": k, "dtype": "bf16"} for n, k in rank.products()]
        keys = {"batch": ANCHOR_TOKENS, "q_len": 1, "kv_len": ANCHOR_KEYS, "window_size": 0} | rank.shape
        return [*(CASES["gemm"](shape, self._rig) for shape in shapes), CASES["decode_attention"](keys, self._rig)]

    def _anchor_s(self) -> float:
        """Seconds of the fixed kernels now, interruptions included."""
        with torch.inference_mode():
            return sum(time_case(case, self._rig, ANCHOR_S).latency_mean_s for case in self._anchors)

    # -- serving ----------------------------------------------------------------------------------------------

    def _bench(self) -> Bench:
        """Fit what there is, take loads from it, start the engine."""
        self._fit()
        loads = self._loads()
        longest = max(loads.values(), key=lambda load: int((load.prompt_tokens + load.output_tokens).max()))
        settings = settings_for(self._spec, longest, EngineFlags(), self._place)
        check_servable(settings, longest)
        engine = LiveEngine(replace(settings, clock=self._rig.clock))
        engine.serve(warm_up_load(longest, engine.settings.scheduler))
        return Bench(engine, loads)

    def _loads(self) -> dict[str, Requests]:
        """Requests at rates that are shares of the simulated capacity: of all seats, always taken."""
        deployment = apexsim.deployment(
            model=self._plan.model.model, device=str(self._profile), engine=EngineFlags().engine
        )
        count = len(self._burst)
        last_s = float(np.max(apexsim.simulate(deployment, self._burst).request_columns["last_token_s"]))
        rates = {name: share * count / last_s for name, share in SHARES.items()}
        self._tell(f"simulated capacity: {count / last_s:.3g} requests/s")
        return {
            name: resolve_workload(
                self._plan.workload,
                rate_per_s=rate,
                requests=max(LEAST_REQUESTS, round(rate * self._plan.seconds)),
                seed=at,
            )
            for at, (name, rate) in enumerate(rates.items())
        }

    def _serve(self, bench: Bench, name: str) -> None:
        """Serve a load once."""
        with self._noting("serving"):
            before_s = self._anchor_s()
            served = serve_metered(bench.engine, bench.loads[name])
            around_s = fmean((before_s, self._anchor_s()))
        settings, flags = bench.engine.settings, EngineFlags()
        what = what_ran(self._runs, settings, self._plan.model, flags, str(self._profile))
        run_id = write_run(self._runs, served, what)
        bench.run_ids.setdefault(name, []).append(run_id)
        bench.around_s.setdefault(name, []).append(around_s)
        self._tell(f"served {name}: {run_id}")

    # -- comparing --------------------------------------------------------------------------------------------

    def _compared(self, bench: Bench, bounds: Mapping[str, float]) -> Verdict:
        """Fit the host term on one load, predict all, and put both beside each other."""
        runs = {run.row.run_id: run for run in read_runs(self._runs / "runs.csv")}
        served = {name: [runs[run_id] for run_id in ids] for name, ids in bench.run_ids.items()}
        step_s = self._host_term(served[FITTED_ON])
        at_rest = median(self._measuring)
        loads = [
            LoadVerdict(
                name=name,
                scored=name != FITTED_ON,
                rate_per_s=load.rate_per_s,
                requests=len(load),
                figures=_figures(served[name], step_s),
                slowness=tuple(seconds / at_rest for seconds in bench.around_s[name]),
            )
            for name, load in bench.loads.items()
        ]
        return Verdict(
            device=device_name(self._place.device),
            loads=loads,
            bounds=bounds,
            step_s=step_s,
            spread=(min(self._measuring) / at_rest, max(self._measuring) / at_rest),
            wall_s=dict(self._wall_s),
        )

    def _host_term(self, runs: list[MeasuredRun]) -> float:
        """Host seconds of a step, fitted on the repeats of one load; the engine profile with it is written."""
        begun = catalog.load("engine", EngineFlags().engine)
        fitted = calibrate(begun, [Group(FITTED_ON, tuple(runs))], terms=(TERM,), jobs=1)
        write_yaml(self._plan.folder / "engine.yaml", fitted.model_dump(mode="json", exclude_defaults=True))
        return fitted.host.step_s

    @contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        """Add the seconds of what is done inside to a part."""
        begun_s = time.monotonic()
        yield
        self._wall_s[part] = self._wall_s.get(part, 0.0) + time.monotonic() - begun_s


def _turned(names: list[str], repeat: int) -> list[str]:
    """The loads of a repeat: another one first in every repeat."""
    first = repeat % len(names)
    return names[first:] + names[:first]


def _figures(runs: list[MeasuredRun], step_s: float) -> tuple[Figure, ...]:
    """All repeats of a load beside what is simulated of it."""
    case = case_of(runs[0].row, {TERM: step_s})
    requests, _ = requests_of(runs[0], longest=case.deployment.colocated_server().context_limit, seed=0)
    summary = apexsim.simulate(case.deployment, requests).summary()
    return tuple(
        Figure(
            latency=latency,
            statistic=statistic,
            predicted_s=summary[f"{latency}_s"][statistic],
            repeats_s=tuple(float(run.cells[f"{latency}_{statistic}_s"]) for run in runs),
        )
        for latency in LATENCIES
        for statistic in STATISTICS
    )
