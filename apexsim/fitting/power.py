"""Power coefficients of the devices that can be fitted.

Three devices have figures of their own; the others keep their shares: a device that draws ``w`` of the limit of another
draws ``w`` of it everywhere (idle, active, collectives), and at its peak rates bytes and FLOPs take the same share of
the limit as there.
"""

from __future__ import annotations

from typing import NamedTuple

from apexsim.errors import BadInput, nearest
from apexsim.specs.power import PowerModel

_H100_SOURCE = (
    "P = active (1 - c) + bytes + FLOP terms, least squares on 51 dense serving runs of ML.ENERGY 3.0 "
    "(c: share of time in collectives); limit, idle: power tables of H200, nvidia-smi readings; comm_w: as idle"
)
_H200_SOURCE = (
    "limit, idle, active, j_per_byte: kernel power tables of aiconfigurator, replays of 1 ms and longer; "
    "j_per_flop: of H100, same die, because capped rows do not identify it"
)
_A100_SOURCE = (
    "active, j_per_byte: 40 decode points of Splitwise (arXiv 2311.18677) on A100; idle: DGX reading; "
    "j_per_flop: set so that large prompts reach the limit, as measured there"
)
_B200_SOURCE = (
    "limit, idle: kernel power tables of aiconfigurator; active, j_per_byte, j_per_flop: "
    "between what its kernel tables and 117 serving runs of ML.ENERGY 3.0 say"
)
_GB200_SOURCE = "limit, idle: kernel power tables of aiconfigurator; the rest: B200, the same die"


class _Kin(NamedTuple):
    """A device without figures: whose it takes, and its own watts, bytes/s and bf16 FLOP/s over those of its kin."""

    of: str
    watts: float
    bytes_per_s: float
    flops_per_s: float


_KIN = {
    "b300-sxm": _Kin("b200-sxm", 1100 / 1000, 8.0 / 7.7, 1.0),
    "gb300": _Kin("gb200", 1400 / 1200, 1.0, 1.0),
    "l40s": _Kin("h100-sxm", 350 / 700, 0.864 / 3.35, 362 / 989),
    "rtx-pro-6000": _Kin("h100-sxm", 600 / 700, 1.792 / 3.35, 504 / 989),
    "rtx-4090": _Kin("h100-sxm", 450 / 700, 1.008 / 3.35, 165 / 989),
}


def power_model(name: str) -> PowerModel:
    """Power coefficients of device ``name``, with their evidence."""
    own = {"a100-sxm": _a100, "h100-sxm": _h100, "h200-sxm": _h200, "b200-sxm": _b200, "gb200": _gb200}
    if name in own:
        return own[name]()
    if name not in _KIN:
        raise BadInput(f"its power is not known; {nearest(name, [*own, *_KIN])}", where="--device", got=name)
    kin = _KIN[name]
    return _scaled(own[kin.of](), kin)


def _scaled(power: PowerModel, kin: _Kin) -> PowerModel:
    """The coefficients of another device at the same shares of the limit."""
    watts = {key: getattr(power, key) * kin.watts for key in ("limit_w", "idle_w", "active_w", "comm_w", "gap_w")}
    return PowerModel(
        **watts,
        j_per_byte=power.j_per_byte * kin.watts / kin.bytes_per_s,
        j_per_flop={dtype: joules * kin.watts / kin.flops_per_s for dtype, joules in power.j_per_flop.items()},
        evidence=dict.fromkeys(power.evidence, "scaled"),
        source=f"{kin.of}, at the same shares of the limit",
    )


def _h100() -> PowerModel:
    return PowerModel(
        limit_w=695.0,
        idle_w=110.0,
        active_w=337.0,
        comm_w=110.0,
        gap_w=337.0,
        j_per_byte=52e-12,
        j_per_flop={"bf16": 1.54e-12, "fp8": 1.0e-12},
        evidence={
            "limit_w": "scaled",
            "idle_w": "prior",
            "active_w": "serving",
            "comm_w": "prior",
            "gap_w": "serving",
            "j_per_byte": "serving",
            "j_per_flop.bf16": "serving",
            "j_per_flop.fp8": "serving",
        },
        source=_H100_SOURCE,
    )


def _h200() -> PowerModel:
    return PowerModel(
        limit_w=693.0,
        idle_w=126.0,
        active_w=389.0,
        comm_w=126.0,
        gap_w=389.0,
        j_per_byte=56e-12,
        j_per_flop={"bf16": 1.54e-12, "fp8": 1.0e-12},
        evidence={
            "limit_w": "kernel",
            "idle_w": "kernel",
            "active_w": "kernel",
            "comm_w": "prior",
            "gap_w": "scaled",
            "j_per_byte": "kernel",
            "j_per_flop.bf16": "scaled",
            "j_per_flop.fp8": "scaled",
        },
        source=_H200_SOURCE,
    )


def _a100() -> PowerModel:
    return PowerModel(
        limit_w=400.0,
        idle_w=62.0,
        active_w=89.0,
        comm_w=89.0,
        gap_w=89.0,
        j_per_byte=163e-12,
        j_per_flop={"bf16": 1.2e-12},
        evidence={
            "limit_w": "serving",
            "idle_w": "prior",
            "active_w": "serving",
            "comm_w": "prior",
            "gap_w": "prior",
            "j_per_byte": "serving",
            "j_per_flop.bf16": "prior",
        },
        source=_A100_SOURCE,
    )


def _b200() -> PowerModel:
    return PowerModel(
        limit_w=985.0,
        idle_w=242.0,
        active_w=450.0,
        comm_w=300.0,
        gap_w=450.0,
        j_per_byte=70e-12,
        j_per_flop={"bf16": 1.1e-12, "fp8": 0.7e-12, "fp4": 0.28e-12},
        evidence=dict.fromkeys(("limit_w", "idle_w"), "kernel")
        | dict.fromkeys(("active_w", "comm_w", "gap_w", "j_per_byte"), "prior")
        | dict.fromkeys(("j_per_flop.bf16", "j_per_flop.fp8", "j_per_flop.fp4"), "prior"),
        source=_B200_SOURCE,
    )


def _gb200() -> PowerModel:
    shared = _b200()
    evidence = dict.fromkeys(shared.evidence, "scaled") | dict.fromkeys(("limit_w", "idle_w"), "kernel")
    return shared.model_copy(update={"limit_w": 1175.0, "idle_w": 208.0, "evidence": evidence, "source": _GB200_SOURCE})
