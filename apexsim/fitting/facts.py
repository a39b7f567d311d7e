"""What tables do not carry: datasheets, prices and power coefficients of the devices that can be fitted.

Rates are dense (no sparsity) vendor datasheet figures, as collected in the system files of NVIDIA aiconfigurator
(Apache-2.0, commit 095f58a), which also give the memory that NCCL takes. L2 and multiprocessors: vendor whitepapers.
"""

from __future__ import annotations

from typing import NamedTuple

from apexsim.specs.device import Datasheet, PowerModel, Price

MIB = 1 << 20
_NCCL_BYTES = {1: 0, 2: 358612992, 4: 411041792, 8: 411041792}
_SHEET_SOURCE = "vendor datasheet and whitepaper; system files of NVIDIA aiconfigurator 095f58a"
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


class Facts(NamedTuple):
    """Everything about a device that no kernel table says; ``folder`` is its name among the tables."""

    folder: str
    datasheet: Datasheet
    price: Price
    power: PowerModel


def _hopper(memory_bytes: int, memory_bytes_per_s: float) -> Datasheet:
    return Datasheet(
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        flops_per_s={"bf16": 989e12, "fp8": 1978e12},
        l2_bytes=50 * MIB,
        sms=132,
        tdp_w=700.0,
        intra_node_bytes_per_s=450e9,
        inter_node_bytes_per_s=50e9,
        pcie_bytes_per_s=64e9,
        nccl_bytes=_NCCL_BYTES,
        source=_SHEET_SOURCE,
    )


def _a100() -> Datasheet:
    return Datasheet(
        memory_bytes=85899345920,
        memory_bytes_per_s=2.039e12,
        flops_per_s={"bf16": 312e12},
        l2_bytes=40 * MIB,
        sms=108,
        tdp_w=400.0,
        intra_node_bytes_per_s=300e9,
        inter_node_bytes_per_s=25e9,
        pcie_bytes_per_s=32e9,
        nccl_bytes=_NCCL_BYTES,
        source=_SHEET_SOURCE,
    )


def _h100_power() -> PowerModel:
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


def _h200_power() -> PowerModel:
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


def _a100_power() -> PowerModel:
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


def _price(usd_per_hour: float, source: str) -> Price:
    return Price(usd_per_hour=usd_per_hour, source=f"on demand, mid of published offers: {source}", date="2026-05")


def devices() -> dict[str, Facts]:
    """Facts by profile name."""
    return {
        "a100-sxm": Facts(
            "a100_sxm",
            _a100(),
            _price(1.8, "hyperscalers 1.50-3.00, specialised clouds 1.10-1.50 (mercatus-ai.com)"),
            _a100_power(),
        ),
        "h100-sxm": Facts(
            "h100_sxm",
            _hopper(85899345920, 3.35e12),
            _price(
                3.0, "median 2.95 over 37 providers (aimultiple.com); specialised clouds 2.50-3.50 (mercatus-ai.com)"
            ),
            _h100_power(),
        ),
        "h200-sxm": Facts(
            "h200_sxm",
            _hopper(151397597184, 4.8e12),
            _price(4.0, "specialised clouds 3.50-4.50 (mercatus-ai.com), 4.54 (Spheron, 2026-03-17)"),
            _h200_power(),
        ),
    }
