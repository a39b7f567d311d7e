"""Power coefficients from measured runs of full servers: power and time per token over batch sizes.

Every run is worked through as a steady state of the simulator, its steps as slow as they were measured; the
coefficients are those that give the measured watts. Only dense models are fitted: whatever experts draw beyond other
kernels comes from kernel tables, so that runs of mixtures are a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apexsim import catalog
from apexsim.costs.energy import limited
from apexsim.costs.forms.hardware import Array
from apexsim.costs.steady import SteadyLoad, SteadyState, steady_state
from apexsim.costs.steps import build_step_cost
from apexsim.errors import ApexsimError, BadInput
from apexsim.fitting.power_tables import fit_error
from apexsim.specs.device import DeviceProfile
from apexsim.specs.power import PowerModel
from apexsim.validation.cases import case_of
from apexsim.validation.loads import prompt_tokens_of
from apexsim.validation.runs import RunRow, read_runs

RUNS = Path("ground_truth", "energy_h100_b200", "runs.csv")
# Tasks of text alone; the tokens of images and videos are not published.
TASKS = ("gpqa", "lm-arena-chat", "sourcegraph-fim")
FITTED = ("active_w", "j_per_byte", "j_per_flop.bf16", "j_per_flop.fp8")
# The runs of one model count as one observation with this error (of log watts); a coefficient is known beforehand to
# within this factor (its logarithm), the FLOPs of the small tiles of decoding less well.
ERROR = 0.1
SPREAD = {"active_w": 0.5, "j_per_byte": 0.5, "j_per_flop.bf16": 1.0, "j_per_flop.fp8": 1.0}


class ServedRun(NamedTuple):
    """A measured run: its model's name and kind, its steady state, and what was measured on one device."""

    model: str
    kind: str
    state: SteadyState
    devices: int
    step_s: float
    power_w: float

    def predicted_w(self, power: PowerModel, *, step_s: float | None = None) -> float:
        """Watts of one device at the measured time of a step, or another."""
        taken_s = step_s or self.step_s
        spent = limited(power, self.state.work, self.state.rows, taken_s / self.state.step_s).by_work_j
        return sum(spent) / (self.devices * self.state.steps * taken_s)


def served_runs(profile: DeviceProfile, root: Path) -> list[ServedRun]:
    """The text runs of a device whose model is known, worked through with the times of ``profile``."""
    path = root / RUNS
    rows = [run.row for run in read_runs(path)] if path.is_file() else []
    mine = [row for row in rows if row.device == profile.name and row.task in TASKS]
    found = [run for row in mine if (run := _served(row, profile)) is not None]
    if mine and not any(run.kind == "dense" for run in found):
        raise BadInput(f"no dense run of {profile.name} can be worked through", where=path)
    return found


def _served(row: RunRow, profile: DeviceProfile) -> ServedRun | None:
    """None where the simulator does not know the model or its plan."""
    # A device that is fitted for the first time is not in the catalog yet; another holds its place.
    known = row if row.device in catalog.names("device") else row.model_copy(update={"device": "h100-sxm"})
    try:
        deployment = case_of(known).deployment
        cluster = deployment.cluster.regrouped(device=profile)
        deployment = deployment.model_copy(update={"cluster": cluster})
        cost = build_step_cost(deployment.colocated_server())
    except ApexsimError:
        return None
    assert row.mean_batch, "runs of full servers have it"
    assert row.output_tokens, "runs of full servers have it"
    assert row.output_tokens_per_s, "runs of full servers have it"
    assert row.power_w, "runs of the energy set have it"
    load = SteadyLoad(row.mean_batch, prompt_tokens_of(row), row.output_tokens)
    devices = deployment.devices_used
    kind = deployment.model.kind
    step_s, watts = row.mean_batch / row.output_tokens_per_s, row.power_w / devices
    return ServedRun(row.model, kind, steady_state(cost, load), devices, step_s, watts)


def fit_serving(start: PowerModel, runs: Sequence[ServedRun]) -> PowerModel:
    """``start`` with ``FITTED`` replaced by what fits the dense runs, their errors and those of leaving a model out.

    Without dense runs it stays as it is.
    """
    dense = [run for run in runs if run.kind == "dense"]
    if not dense:
        return start
    fitted = _fit(start, dense)
    left_out: list[float] = []
    for model in sorted({run.model for run in dense}):
        others = _fit(start, [run for run in dense if run.model != model])
        left_out += errors(others, [run for run in dense if run.model == model]).tolist()
    quality = {"serving_dense": fit_error(errors(fitted, dense)), "leave_model_out": fit_error(np.array(left_out))}
    if mixtures := [run for run in runs if run.kind == "moe"]:
        quality["serving_moe"] = fit_error(errors(fitted, mixtures))
    return fitted.model_copy(update={"quality": {**start.quality, **quality}})


def errors(power: PowerModel, runs: Sequence[ServedRun]) -> Array:
    """Relative errors of watts, which are those of joules a token, with the measured time of a step."""
    return np.array([run.predicted_w(power) / run.power_w - 1 for run in runs])


def _fit(start: PowerModel, runs: Sequence[ServedRun]) -> PowerModel:
    """Least squares of log watts with a log-normal prior around ``start``; host gaps are as active as kernels."""
    from scipy.optimize import least_squares

    counts = {model: sum(run.model == model for run in runs) for model in {run.model for run in runs}}
    weight = np.array([1 / (ERROR * np.sqrt(counts[run.model])) for run in runs])
    first = np.array([_value(start, name) for name in FITTED])
    spread = np.array([SPREAD[name] for name in FITTED])

    def residuals(x: Array) -> Array:
        watts = 1 + errors(_with(start, first * np.exp(x)), runs)
        return np.concatenate([weight * np.log(watts), x / spread])

    found = least_squares(residuals, np.zeros(len(FITTED)), bounds=(-3 * spread, 3 * spread), xtol=1e-4, ftol=1e-4)
    return _with(start, np.array([float(f"{value:.3g}") for value in first * np.exp(found.x)]))


def _value(power: PowerModel, name: str) -> float:
    field, _, dtype = name.partition(".")
    value = getattr(power, field)
    return float(value[dtype] if dtype else value)


def _with(power: PowerModel, values: Array) -> PowerModel:
    """``power`` with the fitted coefficients replaced."""
    active_w, j_per_byte, bf16, fp8 = values.tolist()
    return power.model_copy(
        update={
            "active_w": active_w,
            "gap_w": active_w,
            "j_per_byte": j_per_byte,
            "j_per_flop": {**power.j_per_flop, "bf16": bf16, "fp8": fp8},
            "evidence": {**power.evidence, **dict.fromkeys((*FITTED, "gap_w"), "serving")},
        }
    )
