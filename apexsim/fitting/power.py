"""Power coefficients of a device: from kernel tables, from measured runs, from a relative, or a prior.

What serving draws outside of experts and attention is fitted to measured runs of full servers where there are any
(H100, B200). Experts and attention take the watts of kernel tables (H200 for Hopper). A device that has neither keeps
the shares of a relative: a device that draws ``w`` of the limit of another draws ``w`` of it everywhere, and at its
peak rates bytes and FLOPs take the same share of the limit as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from apexsim import catalog
from apexsim.errors import BadInput, nearest
from apexsim.fitting.power_serving import fit_serving, served_runs
from apexsim.fitting.power_tables import KernelFit, fit_tables
from apexsim.fitting.tables import data_root
from apexsim.specs.device import DeviceProfile
from apexsim.specs.power import ClockPower, OperatorPower, PowerEvidence, PowerModel

_SERVED_SOURCE = (
    "serving: dense runs of ML.ENERGY 3.0 (vLLM 0.11.1), as steady states at the measured step time; operators, limit: "
    "power tables of aiconfigurator, replays of 1 ms and longer; comm: as idle"
)
_A100_SOURCE = (
    "active, j_per_byte: 40 decode points of Splitwise (arXiv 2311.18677) on A100; idle: DGX reading; "
    "j_per_flop: set so that large prompts reach the limit, as measured there"
)
_CLOCK_SOURCE = "assumed: no data vary the clock"
# Whose power tables stand for a device, and how far that reaches.
_TABLES: dict[str, tuple[str, PowerEvidence]] = {
    "h100-sxm": ("h200_sxm", "scaled"),
    "h200-sxm": ("h200_sxm", "kernel"),
    "b200-sxm": ("b200_sxm", "kernel"),
    "gb200": ("gb200", "kernel"),
}
# Devices without measured runs that have the die of one with them.
_SAME_DIE = {"h200-sxm": "h100-sxm", "gb200": "b200-sxm"}


class Kin(NamedTuple):
    """A device without figures: whose it takes, and its own watts, bytes/s and bf16 FLOP/s over those of its kin."""

    of: str
    watts: float
    bytes_per_s: float
    flops_per_s: float


_KIN = {
    "b300-sxm": Kin("b200-sxm", 1100 / 1000, 8.0 / 7.7, 1.0),
    "gb300": Kin("gb200", 1400 / 1200, 1.0, 1.0),
    "l40s": Kin("h100-sxm", 350 / 700, 0.864 / 3.35, 362 / 989),
    "rtx-pro-6000": Kin("h100-sxm", 600 / 700, 1.792 / 3.35, 504 / 989),
    "rtx-4090": Kin("h100-sxm", 450 / 700, 1.008 / 3.35, 165 / 989),
}
# TDP and idle watts, clocks up, and pJ/FLOP by dtype.
_HOPPER, _BLACKWELL = {"bf16": 1.0, "fp8": 0.6}, {"bf16": 0.8, "fp8": 0.5, "nvfp4": 0.25}
_PRIORS = {
    "h100-sxm": (700.0, 110.0, _HOPPER),
    "h200-sxm": (700.0, 126.0, _HOPPER),
    "b200-sxm": (1000.0, 242.0, _BLACKWELL),
    "gb200": (1200.0, 208.0, _BLACKWELL),
}
# Highest clock, and the one below which voltage stays at its least share.
_CLOCKS = {
    "a100-sxm": (1410.0, 900.0, 0.80),
    "h100-sxm": (1980.0, 1000.0, 0.70),
    "h200-sxm": (1980.0, 1000.0, 0.70),
    "b200-sxm": (1965.0, 1000.0, 0.72),
    "gb200": (1965.0, 1000.0, 0.72),
    "b300-sxm": (1965.0, 1000.0, 0.72),
    "gb300": (1965.0, 1000.0, 0.72),
    "l40s": (2520.0, 1260.0, 0.70),
    "rtx-pro-6000": (2600.0, 1300.0, 0.70),
    "rtx-4090": (2520.0, 1260.0, 0.70),
}


def power_model(name: str) -> PowerModel:
    """What is assumed of device ``name`` before anything is fitted: priors, and figures of others' measurements."""
    if name not in _CLOCKS:
        raise BadInput(f"its power is not known; {nearest(name, _CLOCKS)}", where="--device", got=name)
    if name in _KIN:
        power = scaled(power_model(_KIN[name].of), _KIN[name])
    else:
        power = prior(*_PRIORS[name]) if name in _PRIORS else _a100()
    nominal_mhz, knee_mhz, least = _CLOCKS[name]
    clock = ClockPower(
        nominal_mhz=nominal_mhz, knee_mhz=knee_mhz, least_voltage=least, evidence="prior", source=_CLOCK_SOURCE
    )
    return power.model_copy(update={"clock": clock})


def fit_power(profile: DeviceProfile, root: str | Path | None = None) -> PowerModel:
    """Power of a device whose operators are fitted, from the reference data under ``root``.

    Relatives are read from the shipped profiles, so those are to be fitted first.
    """
    data, name, start = data_root(root), profile.name, power_model(profile.name)
    if name in _KIN:
        kin = _KIN[name]
        return scaled(catalog.load("device", kin.of).power, kin).model_copy(update={"clock": start.clock})
    if name not in _TABLES:
        return start
    folder, evidence = _TABLES[name]
    sheet = profile.datasheet if evidence == "kernel" else catalog.load("device", _die_of(name)).datasheet
    tables = fit_tables(data / "kernels" / "datacenter" / folder, sheet)
    if tables is None:
        raise BadInput("no power tables there", where=data / "kernels" / "datacenter" / folder)
    if name in _SAME_DIE:
        served = catalog.load("device", _SAME_DIE[name]).power
        evidences = dict.fromkeys(served.evidence, "scaled")
        start = served.model_copy(update={"clock": start.clock, "evidence": evidences, "quality": {}})
        return _with_tables(start, tables, evidence).model_copy(
            update={"source": f"{_SAME_DIE[name]}, the same die; limit, idle, operators: its own power tables"}
        )
    start = _with_tables(start, tables, evidence)
    return fit_serving(start, served_runs(profile, data)).model_copy(update={"source": _SERVED_SOURCE})


def _die_of(name: str) -> str:
    """The device with power tables that has the same die."""
    return next(other for other, served in _SAME_DIE.items() if served == name)


def _with_tables(power: PowerModel, tables: KernelFit, evidence: PowerEvidence) -> PowerModel:
    """``power`` with what kernel tables identify. Idle power is a device's own, not that of another with its die."""
    own = {"idle_w": tables.idle_w, "comm_w": tables.idle_w} if evidence == "kernel" else {}
    operators = {}
    for kind in (kind for kind in tables.active_w if kind != "gemm"):
        family = "attention" if kind.endswith("attention") else kind
        per_flop = {dtype: value for (of, dtype), value in tables.j_per_flop.items() if of == family}
        operators[kind] = OperatorPower(active_w=tables.active_w[kind], j_per_flop=per_flop, evidence=evidence)
    known: dict[str, PowerEvidence] = dict.fromkeys(("limit_w", *(["idle_w"] if own else [])), evidence)
    if power.evidence["j_per_byte"] == "prior":
        own["j_per_byte"], known["j_per_byte"] = tables.j_per_byte, evidence
    update = {"limit_w": tables.limit_w, **own, "operators": operators}
    return power.model_copy(
        update={**update, "evidence": {**power.evidence, **known}, "quality": {**power.quality, **tables.quality}}
    )


def scaled(power: PowerModel, kin: Kin) -> PowerModel:
    """The coefficients of another device at the same shares of the limit."""
    fields = ("limit_w", "idle_w", "active_w", "comm_w", "gap_w")
    return power.model_copy(
        update={
            **{key: _round(getattr(power, key) * kin.watts) for key in fields},
            "j_per_byte": _round(power.j_per_byte * kin.watts / kin.bytes_per_s),
            "j_per_flop": _per_flop(power.j_per_flop, kin),
            "operators": {kind: _scaled_operator(own, kin) for kind, own in power.operators.items()},
            "evidence": dict.fromkeys(power.evidence, "scaled"),
            "quality": {},
            "source": f"{kin.of}, at the same shares of the limit",
        }
    )


def _scaled_operator(own: OperatorPower, kin: Kin) -> OperatorPower:
    active_w = None if own.active_w is None else _round(own.active_w * kin.watts)
    return OperatorPower(active_w=active_w, j_per_flop=_per_flop(own.j_per_flop, kin), evidence="scaled")


def _per_flop(j_per_flop: dict[str, float], kin: Kin) -> dict[str, float]:
    return {dtype: _round(joules * kin.watts / kin.flops_per_s) for dtype, joules in j_per_flop.items()}


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def prior(tdp_w: float, idle_w: float, picojoules: dict[str, float]) -> PowerModel:
    """Half of the limit for running at all, 55 pJ/byte (HBM3), and what a FLOP of large products takes."""
    per_flop = {dtype: 1e-12 * value for dtype, value in picojoules.items()}
    fields = ("limit_w", "idle_w", "active_w", "comm_w", "gap_w", "j_per_byte")
    return PowerModel(
        limit_w=0.99 * tdp_w,
        idle_w=idle_w,
        active_w=0.5 * tdp_w,
        comm_w=idle_w,
        gap_w=0.5 * tdp_w,
        j_per_byte=55e-12,
        j_per_flop=per_flop,
        evidence=dict.fromkeys((*fields, *(f"j_per_flop.{dtype}" for dtype in per_flop)), "prior"),
        source="prior",
    )


def _a100() -> PowerModel:
    served = ("limit_w", "active_w", "j_per_byte")
    return PowerModel(
        limit_w=400.0,
        idle_w=62.0,
        active_w=89.0,
        comm_w=89.0,
        gap_w=89.0,
        j_per_byte=163e-12,
        j_per_flop={"bf16": 1.2e-12},
        evidence=dict.fromkeys(("idle_w", "comm_w", "gap_w", "j_per_flop.bf16"), "prior")
        | dict.fromkeys(served, "serving"),
        source=_A100_SOURCE,
    )
