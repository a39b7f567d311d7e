"""Whole runs on a measured device and on the profile that leaving it out gives: how far served figures are off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from apexsim import catalog
from apexsim.errors import ApexsimError
from apexsim.fitting.transfer import left_out
from apexsim.io.deployments import deployment_from
from apexsim.serving.simulator import simulate
from apexsim.specs.device import DeviceProfile
from apexsim.specs.workload import Requests

# Model and tensor degree: dense and small, dense and spread, experts. Weights and cache in bf16.
DEPLOYMENTS = (("llama-3.1-8b", 1), ("llama-3.1-70b", 4), ("qwen3-30b-a3b", 2))
CLIENTS, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 96, 1024, 128


class RunError(NamedTuple):
    """Relative errors of a run's mean TPOT, mean TTFT and joules per output token on a device left out.

    ``status`` is ``ok``, or why the run has no figures (then the errors are None).
    """

    device: str
    deployment: str
    tpot: float | None
    ttft: float | None
    joules: float | None
    status: str


def run_errors(measured: Sequence[DeviceProfile], *, whole_generation: bool = False) -> Iterator[RunError]:
    """Errors on every deployment of every measured device, left out with the others of its generation if asked."""
    for device, guess in left_out(measured, whole_generation=whole_generation):
        for model, tensor in DEPLOYMENTS:
            yield _run_error(device, guess, model, tensor)


def _run_error(device: DeviceProfile, guess: DeviceProfile, model: str, tensor: int) -> RunError:
    label = f"{model} on {tensor}"
    try:
        true, guessed = (_figures(profile, model, tensor) for profile in (device, guess))
    except ApexsimError as error:
        return RunError(device.name, label, None, None, None, str(error))
    tpot, ttft, joules = (b / a - 1 for a, b in zip(true, guessed, strict=True))
    return RunError(device.name, label, tpot, ttft, joules, "ok")


def _figures(profile: DeviceProfile, model: str, tensor: int) -> tuple[float, float, float]:
    """Mean TPOT and TTFT in seconds, joules per output token."""
    any_device = catalog.names("device")[0]
    deployment = deployment_from(None, {"model": model, "device": any_device, "tensor": tensor})
    cluster = deployment.cluster.regrouped(device=profile)
    requests = Requests(
        name="closed loop",
        prompt_tokens=np.full(REQUESTS, PROMPT_TOKENS),
        output_tokens=np.full(REQUESTS, OUTPUT_TOKENS),
        concurrency=CLIENTS,
    )
    summary = simulate(deployment.model_copy(update={"cluster": cluster}), requests).summary()
    return summary["tpot_s"]["mean"], summary["ttft_s"]["mean"], summary["energy"]["per_output_token_j"]
