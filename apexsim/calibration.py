"""Calibration: host terms of an engine profile and the passes of its sampler, fitted on measured runs.

The profiles of devices are never touched.

TPOT (or ITL) and TTFT of a run move almost linearly with the terms, so a few Gauss-Newton steps on
log(predicted / measured) find the terms: simulate the drawn rows, simulate them again with each term a little larger,
solve a bounded, robust linear least-squares problem, repeat. What each (model, device) group says of the result is
shown by leaving it out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from apexsim import catalog
from apexsim.errors import BadInput
from apexsim.io.engines import with_engine_options
from apexsim.search.executors import available_cores, run_local
from apexsim.specs.engine import CalibratedTerm, CalibrationReport, EngineProfile, LeftOut
from apexsim.validation.cases import kind_of
from apexsim.validation.replay import OK, batch_itl_s, mean_itl_s, replay
from apexsim.validation.runs import MeasuredRun

Floats = npt.NDArray[np.float64]
Progress = Callable[[float], None]
Predictions = list[tuple[float, float]]
Terms = dict[str, float]

# By how much a term is raised to see what it does (seconds; passes over the logits): far above the clock's nanosecond,
# small beside a step.
STEPS = {
    "step_s": 3e-4,
    "per_sequence_s": 1e-5,
    "exposed_step_s": 3e-4,
    "frontend_per_request_s": 5e-4,
    "response_s": 3e-3,
    "launch_s": 3e-6,
    "expert_launch_s": 1e-4,
    "expert_choice_s": 3e-6,
    "top_p_passes": 50.0,
}
ROUNDS = 2
# An error of TTFT counts less than one of TPOT: repeats of one run differ twice as much in it (3.1 against 1.6 %).
TTFT_WEIGHT = 0.5
# Beyond this (log) error the pull of a row stays constant: it is a fault of the row or of a kernel, not host time.
ROBUST = 0.1
# Effects of the terms as unit columns: a smaller least singular value means that two of them cannot be told apart.
LEAST_APART = 0.02
# What a fit begins with is believed to within so many of the ``STEPS``, and a group's errors to within ROBUST: terms
# that the rows hardly see stay near where they began.
BELIEF = 15.0
# A term that moves no row by this share when raised by its step is not seen by the rows.
LEAST_EFFECT = 1e-3
REWEIGHTINGS = 10
CHUNK = 8


class Group(NamedTuple):
    """Rows of one model on one device, the unit that is left out."""

    name: str
    runs: tuple[MeasuredRun, ...]


def calibrate(
    profile: EngineProfile,
    groups: Sequence[Group],
    *,
    terms: Sequence[str] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> EngineProfile:
    """The profile with its terms (default: all that the rows can see) fitted on ``groups`` of ``drawn_groups``.

    Its ``calibration`` says how good they are. Raises BadInput where there is no row or where the rows cannot tell two
    terms apart.
    """
    if not groups:
        raise BadInput("there is no clean row that this engine profile answers for", where="runs", got=profile.name)
    fit = _Fit(terms_of(profile), groups, jobs=jobs or available_cores(), progress=progress)
    # Without overlap every step pays both terms of a step: one of them says it all.
    fit.choose(terms, [term for term in STEPS if profile.host.overlapped or term != "exposed_step_s"])
    found = fit.solve()
    fitted = with_engine_options(profile, {term: found[term] for term in fit.terms}, "calibration")
    return fitted.model_copy(update={"calibration": fit.report(found), "evidence": "serving"})


def terms_of(profile: EngineProfile) -> Terms:
    """What a calibration begins with, by name: the terms of a profile as they were before any calibration."""
    known = {**profile.host.model_dump(), **profile.sampler.model_dump()}
    fitted = profile.calibration.terms if profile.calibration else {}
    return {term: fitted[term].began if term in fitted else known[term] for term in STEPS}


def drawn_groups(runs: Sequence[MeasuredRun], profile: EngineProfile, most: int, seed: int) -> list[Group]:
    """Clean rows of the profile by model and device, at most ``most`` of each, drawn by ``seed`` and its name."""
    found: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        if _clean(run, profile.name):
            found.setdefault(f"{run.row.model} on {run.row.device}", []).append(run)
    groups = []
    for name in sorted(found):
        rows = found[name]
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        kept = np.sort(random.permutation(len(rows))[:most])
        groups.append(Group(name, tuple(rows[at] for at in kept)))
    return groups


def _clean(run: MeasuredRun, profile: str) -> bool:
    """Whether a row may calibrate the profile: not excluded, its engine version known, one rank, kernels measured.

    Those of hybrid models are estimates, whose error host terms would take in.
    """
    row = run.row
    if row.exclude or row.attention_data not in (None, 1) or kind_of(row.model) == "hybrid":
        return False
    try:
        choice = catalog.engine_for(row.engine, row.engine_version)
    except BadInput:
        return False
    return choice.profile == profile


class _Fit:
    """Rows, what was measured of them, and the terms on their way to the optimum."""

    def __init__(self, start: Terms, groups: Sequence[Group], *, jobs: int, progress: Progress | None) -> None:
        self._start = start
        self._groups = groups
        self._runs = [run for group in groups for run in group.runs]
        self._of = np.repeat(np.arange(len(groups)), [len(group.runs) for group in groups])
        self._measured = np.array([_measured(run) for run in self._runs])
        self._weights = np.where(np.isfinite(self._measured), [1.0, TTFT_WEIGHT], 0.0)
        self._everywhere = np.ones(len(self._runs), dtype=bool)
        self._jobs = jobs
        self._progress = progress
        self._done = 0
        self._before = self._slopes = np.empty(0)
        self.terms: tuple[str, ...] = ()

    def choose(self, terms: Sequence[str] | None, usual: Sequence[str]) -> None:
        """Settle which terms are fitted; refuse a set that these rows cannot separate."""
        wanted = tuple(terms or usual)
        for term in wanted:
            if term not in STEPS:
                raise BadInput(f"no such term; there is: {', '.join(STEPS)}", where="--terms", got=term)
        self.terms = wanted
        self._before = self._errors(self._start)
        if not np.isfinite(self._before).any():
            raise BadInput("none of the rows can be simulated; apexsim validate says why", where="runs")
        effects = self._effects(self._start, self._before)
        seen = np.abs(effects * self._spans()).max(axis=(0, 1)) > LEAST_EFFECT
        if terms and not seen.all():
            unseen = [term for term, sees in zip(wanted, seen, strict=True) if not sees]
            raise BadInput("no row is moved by it; leave it out", where="--terms", got=", ".join(unseen))
        self.terms = tuple(term for term, sees in zip(wanted, seen, strict=True) if sees)
        if np.isfinite(self._before).sum() <= len(self.terms):
            said = f"{len(self.terms)} terms need more figures than that; name fewer, or give more rows"
            raise BadInput(said, where="runs", got=f"{np.isfinite(self._before).sum()} figures")
        self._slopes = effects[:, :, seen]
        self._refuse_alike(self._slopes)

    def solve(self) -> Terms:
        """The terms with the least robust error."""
        found = self._moved(self._start, self._before, self._slopes, self._everywhere)
        for _ in range(ROUNDS - 1):
            errors = self._errors(found)
            self._slopes = self._effects(found, errors)
            found = self._moved(found, errors, self._slopes, self._everywhere)
        return found

    def report(self, found: Terms) -> CalibrationReport:
        """What was fitted on what, and the error of every group under terms fitted without it."""
        errors = self._errors(found)
        left_out = {}
        for at, group in enumerate(self._groups):
            others = self._of != at
            if others.any():
                without = self._moved(found, errors, self._slopes, others)
                left_out[group.name] = _left_out(self._errors(without, self._of == at)[self._of == at])
        return CalibrationReport(
            rows=int(np.isfinite(self._before).any(axis=1).sum()),
            terms=self._calibrated(found, errors),
            before=_left_out(self._before),
            fitted=_left_out(errors),
            left_out=left_out,
        )

    # -- parts ------------------------------------------------------------------------------------------------

    def _errors(self, terms: Terms, only: npt.NDArray[np.bool_] | None = None) -> Floats:
        """log(predicted / measured) of TPOT and TTFT, one row a run; NaN where either is missing."""
        chosen = self._everywhere if only is None else only
        found = np.full((len(self._runs), 2), np.nan)
        found[chosen] = self._predict(terms, np.flatnonzero(chosen))
        errors = np.asarray(np.log(found / self._measured))
        if self._before.size and (lost := int((np.isfinite(self._before) & ~np.isfinite(errors))[chosen].sum())):
            raise BadInput(
                "simulated before, and not again: a worker was lost; start over", where="runs", got=f"{lost} figures"
            )
        return errors

    def _predict(self, terms: Terms, rows: npt.NDArray[np.int64]) -> Floats:
        tasks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        work = partial(_predict_all, terms=terms)
        found: dict[int, Predictions] = {}
        for number, predicted in run_local(work, [[self._runs[at] for at in task] for task in tasks], self._jobs):
            found[number] = predicted or [(np.nan, np.nan)] * len(tasks[number])
        self._done += 1
        if self._progress:
            self._progress(min(1.0, self._done / self._simulations))
        return np.array([pair for number in range(len(tasks)) for pair in found[number]])

    @property
    def _simulations(self) -> int:
        """How often all rows are simulated, about: once to choose terms, in every round, and once a group left out."""
        return ROUNDS * (1 + len(STEPS)) + 2

    def _calibrated(self, found: Terms, errors: Floats) -> dict[str, CalibratedTerm]:
        """Every fitted term with its standard error, from the curvature of the weighted squares."""
        weights = self._robust(errors, self._everywhere)
        scaled = self._slopes.reshape(-1, len(self.terms)) * weights.reshape(-1, 1)
        left = np.nan_to_num(errors).reshape(-1) * weights.reshape(-1)
        degrees = max(1, int((weights > 0).sum()) - len(self.terms))
        spread = np.sqrt(np.diag(np.linalg.pinv(scaled.T @ scaled) * float(left @ left) / degrees))
        return {
            term: CalibratedTerm(began=self._start[term], value=found[term], standard_error=_rounded(float(error)))
            for term, error in zip(self.terms, spread, strict=True)
        }

    def _effects(self, terms: Terms, errors: Floats) -> Floats:
        """d log(predicted) / d term, (runs, 2, terms); 0 where a row has no prediction."""
        columns = []
        for term in self.terms:
            raised = {**terms, term: terms[term] + STEPS[term]}
            columns.append(np.nan_to_num((self._errors(raised) - errors) / STEPS[term]))
        return np.stack(columns, axis=-1)

    def _spans(self) -> Floats:
        return np.array([STEPS[term] for term in self.terms])

    def _robust(self, errors: Floats, rows: npt.NDArray[np.bool_]) -> Floats:
        """Square roots of the weights of (run, latency): Huber's, every group counting alike."""
        size = np.abs(errors)
        huber = np.where(size > ROBUST, ROBUST / np.maximum(size, ROBUST), 1.0)
        per_group = np.array([len(group.runs) for group in self._groups], dtype=float)[self._of]
        weights = np.sqrt(np.nan_to_num(huber)) * self._weights / np.sqrt(per_group)[:, None]
        return np.asarray(np.where(np.isfinite(errors) & rows[:, None], weights, 0.0))

    def _moved(self, terms: Terms, errors: Floats, effects: Floats, rows: npt.NDArray[np.bool_]) -> Terms:
        """One bounded Gauss-Newton step on ``rows``: no term falls below zero."""
        from scipy.optimize import lsq_linear

        now = np.array([terms[term] for term in self.terms])
        begun = np.array([self._start[term] for term in self.terms])
        at, spans, believed = now.copy(), self._spans(), ROBUST / BELIEF
        for _ in range(REWEIGHTINGS):
            expected = errors + effects @ (at - now)
            weights = self._robust(expected, rows).reshape(-1)
            matrix = effects.reshape(-1, len(self.terms)) * weights[:, None] * spans
            target = -np.nan_to_num(errors).reshape(-1) * weights
            matrix = np.vstack([matrix, believed * np.eye(len(self.terms))])
            target = np.concatenate([target, believed * (begun - now) / spans])
            step = lsq_linear(matrix, target, bounds=(-now / spans - 1e-12, np.inf)).x * spans
            at = np.maximum(0.0, now + step)
        return terms | {term: _rounded(float(x)) for term, x in zip(self.terms, at, strict=True)}

    def _refuse_alike(self, effects: Floats) -> None:
        """Refuse terms of which some mixture moves all rows together hardly at all: only their sum is known."""
        columns = (effects * self._robust(np.zeros_like(self._measured), self._everywhere)[:, :, None]).reshape(
            -1, len(self.terms)
        )
        columns = columns / np.linalg.norm(columns, axis=0)
        _, sizes, mixtures = np.linalg.svd(columns, full_matrices=False)
        if sizes[-1] < LEAST_APART:
            worst = np.argsort(-np.abs(mixtures[-1]))[:2]
            first, second = (self.terms[at] for at in sorted(worst.tolist()))
            said = f"the rows cannot tell {first} from {second}; name the terms to fit without one of them"
            raise BadInput(said, where="--terms", got=", ".join(self.terms))


def _measured(run: MeasuredRun) -> tuple[float, float]:
    """TPOT (where a row has none, its mean ITL) and TTFT; NaN where not known or excluded."""
    row = run.row
    token_s = row.tpot_mean_s or (mean_itl_s(row) if row.workload == "saturated" else row.itl_mean_s) or np.nan
    return token_s, np.nan if row.exclude_ttft or not row.ttft_mean_s else row.ttft_mean_s


def _predict_all(runs: Sequence[MeasuredRun], *, terms: Mapping[str, float]) -> Predictions:
    return [_predict_one(run, terms) for run in runs]


def _predict_one(run: MeasuredRun, terms: Mapping[str, float]) -> tuple[float, float]:
    replayed = replay(run, engine_options=terms)
    if replayed.status != OK:
        return np.nan, np.nan
    figures = replayed.figures
    token_s = figures["tpot_mean_s"] if run.row.tpot_mean_s else figures["itl_mean_s"]
    if run.row.workload == "saturated" and not run.row.itl_mean_s:
        token_s = batch_itl_s(figures["mean_batch"], figures["output_tokens_per_s"])
    values = (token_s, figures.get("ttft_mean_s"))
    return tuple(np.nan if value is None else value for value in values)  # type: ignore[return-value]


def _left_out(errors: Floats) -> LeftOut:
    """Mean size and mean of the relative errors of TPOT and TTFT, in percent."""
    percent = 100 * (np.exp(errors) - 1)
    with np.errstate(invalid="ignore"):
        size = [float(np.nanmean(np.abs(column))) if np.isfinite(column).any() else None for column in percent.T]
        bias = [float(np.nanmean(column)) if np.isfinite(column).any() else None for column in percent.T]
    tidy = [None if value is None else round(value, 1) for value in (*size, *bias)]
    return LeftOut(tpot_mape=tidy[0], ttft_mape=tidy[1], tpot_bias=tidy[2], ttft_bias=tidy[3])


def _rounded(value: float) -> float:
    """Three significant digits, more are not known; less than a nanosecond, which no clock here tells, is nothing."""
    return float(f"{value:.3g}") if abs(value) >= 1e-9 else 0.0
