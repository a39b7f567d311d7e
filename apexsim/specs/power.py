"""Power of a device: its coefficients, where each comes from, and what other clocks make of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from apexsim.specs.base import Spec

PowerEvidence = Literal["kernel", "serving", "scaled", "prior"]
Evidences = dict[str, PowerEvidence]

# Of the energy per byte this part is of the memory chips, which the clock of the multiprocessors does not touch.
MEMORY_PART = 0.7


class KernelPower(NamedTuple):
    """What a running kernel draws: ``active_w + j_per_byte bytes/t + j_per_flop FLOP/t``."""

    active_w: float
    j_per_byte: float
    j_per_flop: float


class OperatorPower(Spec):
    """Coefficients of one kind of operator that differ from those of any kernel; what is not given does not differ.

    ``evidence`` is that of each of them.
    """

    active_w: float | None = Field(None, ge=0)
    j_per_flop: dict[str, float] = Field(default_factory=dict)
    evidence: PowerEvidence


class ClockPower(Spec):
    """How clock and voltage go together: ``least_voltage`` (of that at ``nominal_mhz``) up to ``knee_mhz``, then
    linear. ``nominal_mhz`` is the highest clock, at which everything was measured."""

    nominal_mhz: float = Field(gt=0)
    knee_mhz: float = Field(gt=0)
    least_voltage: float = Field(gt=0, le=1)
    evidence: PowerEvidence
    source: str

    def voltage(self, mhz: float) -> float:
        """Voltage at a clock over that at the nominal one."""
        above = max(0.0, mhz - self.knee_mhz) / (self.nominal_mhz - self.knee_mhz)
        return self.least_voltage + (1 - self.least_voltage) * above


class FitError(NamedTuple):
    """Relative error of watts: mean of its size, mean with sign, rows. One line in YAML."""

    mean: float
    bias: float
    rows: int


class PowerModel(Spec):
    """Power of one device while a step runs.

    ``P = active_w + j_per_byte * bytes/t + j_per_flop[dtype] * FLOP/t`` for kernels (``operators`` has the kinds that
    differ), ``comm_w`` during collectives, ``gap_w`` while the host leaves the device waiting inside a step, and
    ``idle_w`` while a replica has nothing to do; a whole step stays below ``limit_w``. ``evidence`` says of each
    coefficient where it comes from: ``kernel`` tables of power, ``serving`` runs, ``scaled`` from another device, or a
    ``prior``. ``quality`` is the error of watts by what was scored.
    """

    limit_w: float = Field(gt=0)
    idle_w: float = Field(ge=0)
    active_w: float = Field(ge=0)
    comm_w: float = Field(ge=0)
    gap_w: float = Field(ge=0)
    j_per_byte: float = Field(ge=0)
    j_per_flop: dict[str, float]
    operators: dict[str, OperatorPower] = Field(default_factory=dict)
    clock: ClockPower | None = None
    evidence: Evidences
    quality: dict[str, FitError] = Field(default_factory=dict)
    source: str

    @model_validator(mode="after")
    def _every_coefficient_has_evidence(self) -> PowerModel:
        fields = ["limit_w", "idle_w", "active_w", "comm_w", "gap_w", "j_per_byte"]
        _check_evidence(self.evidence, fields, self.j_per_flop)
        return self

    def of(self, kind: str, dtype: str) -> KernelPower:
        """Coefficients of a kind of operator that computes in ``dtype`` (as bf16 where that is not known)."""
        own = self.operators.get(kind)
        shared = self.j_per_flop.get(dtype, self.j_per_flop["bf16"])
        if own is None:
            return KernelPower(self.active_w, self.j_per_byte, shared)
        active_w = self.active_w if own.active_w is None else own.active_w
        return KernelPower(active_w, self.j_per_byte, own.j_per_flop.get(dtype, shared))


def _check_evidence(evidence: Evidences, fields: list[str], j_per_flop: dict[str, float]) -> None:
    wanted = [*fields, *(f"j_per_flop.{dtype}" for dtype in j_per_flop)]
    if missing := [name for name in wanted if name not in evidence]:
        raise ValueError(f"say the evidence of {', '.join(missing)}")
