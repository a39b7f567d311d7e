"""Power of a device: its coefficients, where each comes from, and what other clocks make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from apexsim.errors import Unsupported
from apexsim.specs.base import Spec

PowerEvidence = Literal["kernel", "serving", "scaled", "prior"]
Evidences = dict[str, PowerEvidence]

# Of the energy per byte this part is of the memory chips, which the clock of the multiprocessors does not touch.
MEMORY_PART = 0.7

# A thousand times what any accelerator of 2026 takes: beyond stands a mistake of unit.
MAX_W, MAX_J = 1e6, 1e-6
Joules = Annotated[float, Field(ge=0, le=MAX_J)]


class KernelPower(NamedTuple):
    """What a running kernel draws: ``active_w + j_per_byte bytes/t + j_per_flop FLOP/t``."""

    active_w: float
    j_per_byte: float
    j_per_flop: float


class OperatorPower(Spec):
    """Coefficients of one kind of operator that differ from those of any kernel; what is not given does not differ.

    ``evidence`` is that of each of them.
    """

    active_w: float | None = Field(None, ge=0, le=MAX_W)
    j_per_flop: dict[str, Joules] = Field(default_factory=dict)
    evidence: PowerEvidence

    def at(self, watts: Callable[[float], float], flops: float) -> OperatorPower:
        """The same with ``active_w`` put through ``watts`` and joules per FLOP times ``flops``."""
        active_w = None if self.active_w is None else watts(self.active_w)
        return self.model_copy(
            update={"active_w": active_w, "j_per_flop": {dtype: flops * j for dtype, j in self.j_per_flop.items()}}
        )


class ClockVariant(NamedTuple):
    """What nobody measured of a clock's power: shifts of the voltage curve, the share of ``active_w`` above idle that
    is the memory's, and the share of ``idle_w`` that is there."""

    voltage: float = 0.0
    knee_mhz: float = 0.0
    memory: float = 0.0
    idle: float = 1.0


# All that the data leave open; the spread of what they give is the interval that results carry.
CLOCK_VARIANTS = (
    ClockVariant(),
    ClockVariant(voltage=-0.1),
    ClockVariant(voltage=0.1),
    ClockVariant(knee_mhz=-300.0),
    ClockVariant(knee_mhz=300.0),
    ClockVariant(memory=0.7),
    ClockVariant(idle=0.7),
)


class ClockPower(Spec):
    """How clock and voltage go together: ``least_voltage`` (of that at ``nominal_mhz``) up to ``knee_mhz``, then
    linear. ``nominal_mhz`` is the highest clock, at which everything was measured."""

    nominal_mhz: float = Field(gt=0)
    knee_mhz: float = Field(gt=0)
    least_voltage: float = Field(gt=0, le=1)
    evidence: PowerEvidence
    source: str

    @model_validator(mode="after")
    def _knee_is_below(self) -> ClockPower:
        if self.knee_mhz >= self.nominal_mhz:
            raise ValueError(f"knee_mhz must be below nominal_mhz, {self.nominal_mhz:g}")
        return self

    def voltage(self, mhz: float, variant: ClockVariant = CLOCK_VARIANTS[0]) -> float:
        """Voltage at a clock over that at the nominal one."""
        knee_mhz, least = self.knee_mhz + variant.knee_mhz, self.least_voltage + variant.voltage
        above = max(0.0, mhz - knee_mhz) / (self.nominal_mhz - knee_mhz)
        return least + (1 - least) * above


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

    limit_w: float = Field(gt=0, le=MAX_W)
    idle_w: float = Field(ge=0, le=MAX_W)
    active_w: float = Field(ge=0, le=MAX_W)
    comm_w: float = Field(ge=0, le=MAX_W)
    gap_w: float = Field(ge=0, le=MAX_W)
    j_per_byte: float = Field(ge=0, le=MAX_J)
    j_per_flop: dict[str, Joules]
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

    def at(self, mhz: float, variant: ClockVariant = CLOCK_VARIANTS[0]) -> PowerModel:
        """Coefficients at another clock f, with the voltage v that goes with it; all relative to the nominal clock.

        What runs above idle, and gaps and collectives above it, go with f v^2, FLOPs with v^2, bytes with v^2 in the
        part that is not the memory's own. Raises Unsupported where the clock is not known or above the nominal one.
        """
        if self.clock is None or mhz > self.clock.nominal_mhz:
            known = f"up to {self.clock.nominal_mhz:g} MHz" if self.clock else "of none"
            raise Unsupported(f"power at {mhz:g} MHz is not known; {known}")
        squared = self.clock.voltage(mhz, variant) ** 2
        memory = MEMORY_PART + (1 - MEMORY_PART) * squared
        above = (1 - variant.memory) * mhz / self.clock.nominal_mhz * squared + variant.memory * memory
        idle_w = self.idle_w * variant.idle

        def slowed(watts: float) -> float:
            return min(watts, idle_w) + max(0.0, watts - idle_w) * above

        fields = ("active_w", "comm_w", "gap_w")
        return self.model_copy(
            update={
                **{name: slowed(getattr(self, name)) for name in fields},
                "j_per_byte": self.j_per_byte * memory,
                "j_per_flop": {dtype: joules * squared for dtype, joules in self.j_per_flop.items()},
                "operators": {kind: own.at(slowed, squared) for kind, own in self.operators.items()},
            }
        )


def _check_evidence(evidence: Evidences, fields: list[str], j_per_flop: dict[str, float]) -> None:
    wanted = [*fields, *(f"j_per_flop.{dtype}" for dtype in j_per_flop)]
    if missing := [name for name in wanted if name not in evidence]:
        raise ValueError(f"say the evidence of {', '.join(missing)}")
