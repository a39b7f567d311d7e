"""What tables do not carry: datasheets and prices of the devices that can be fitted.

Rates are dense (no sparsity) vendor datasheet figures, as collected in the system files of NVIDIA aiconfigurator
(Apache-2.0, commit 095f58a), which also give the memory that NCCL takes. L2 and multiprocessors: vendor whitepapers.
"""

from __future__ import annotations

from typing import NamedTuple

from apexsim.fitting.power import power_model
from apexsim.specs.device import Datasheet, Price
from apexsim.specs.power import PowerModel

MIB = 1 << 20
_NCCL_BYTES = {1: 0, 2: 358612992, 4: 411041792, 8: 411041792}
_SHEET_SOURCE = "vendor datasheet and whitepaper; system files of NVIDIA aiconfigurator 095f58a"


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


def _price(usd_per_hour: float, source: str) -> Price:
    return Price(usd_per_hour=usd_per_hour, source=f"on demand, mid of published offers: {source}", date="2026-05")


def devices() -> dict[str, Facts]:
    """Facts by profile name."""
    return {
        "a100-sxm": Facts(
            "a100_sxm",
            _a100(),
            _price(1.8, "hyperscalers 1.50-3.00, specialised clouds 1.10-1.50 (mercatus-ai.com)"),
            power_model("a100-sxm"),
        ),
        "h100-sxm": Facts(
            "h100_sxm",
            _hopper(85899345920, 3.35e12),
            _price(
                3.0, "median 2.95 over 37 providers (aimultiple.com); specialised clouds 2.50-3.50 (mercatus-ai.com)"
            ),
            power_model("h100-sxm"),
        ),
        "h200-sxm": Facts(
            "h200_sxm",
            _hopper(151397597184, 4.8e12),
            _price(4.0, "specialised clouds 3.50-4.50 (mercatus-ai.com), 4.54 (Spheron, 2026-03-17)"),
            power_model("h200-sxm"),
        ),
    }
