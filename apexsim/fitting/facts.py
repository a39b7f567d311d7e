"""What tables do not carry: datasheets and prices of the devices that can be fitted.

Rates are dense (no sparsity) vendor datasheet figures, as collected in the system files of NVIDIA aiconfigurator
(Apache-2.0, commit 095f58a), which also give the memory that NCCL takes. L2 and multiprocessors: vendor whitepapers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from apexsim.costs.forms.hardware import Hardware
from apexsim.fitting.power import power_model
from apexsim.specs.device import Datasheet, Evidence, Price
from apexsim.specs.power import PowerModel

MIB = 1 << 20
GIB = 1 << 30
_NCCL_BYTES = {1: 0, 2: 358612992, 4: 411041792, 8: 411041792}
# NCCL opens a channel or two over PCIe where it opens tens over NVLink, each with its buffers. In logs of servers on
# such boards all that lies outside PyTorch's tensors is 0.2 GiB on 16 ranks, of which some 0.15 GiB is there on one.
_PCIE_NCCL_BYTES = {1: 0, 2: 16 * MIB}
_SHEET_SOURCE = "vendor datasheet and whitepaper; system files of NVIDIA aiconfigurator 095f58a"


class Facts(NamedTuple):
    """Everything about a device that no kernel table says; ``folder`` is its name among the tables."""

    folder: str
    datasheet: Datasheet
    price: Price
    power: PowerModel


class _Chip(NamedTuple):
    """A device in the units of datasheets: TB/s, dense TFLOP/s by dtype, MiB, W; and GiB that a process sees."""

    memory_gib: float
    tb_per_s: float
    tflops: dict[str, float]
    l2_mib: int
    sms: int
    tdp_w: float


class _Links(NamedTuple):
    """GB/s of one device, one way: to devices of its node, to other nodes, to its host."""

    node: float
    network: float
    host: float


# Memory is what CUDA tells a process, as in PyTorch's and vLLM's messages: 0.4 to 0.7 GiB less than nvidia-smi shows
# (H100 79.65, H200 140.4, B200 179.06), and less than is on the board. B300, GB200 and GB300: nvidia-smi's less 0.7.
_CHIPS = {
    "a100-sxm": _Chip(79.1, 2.039, {"bf16": 312}, 40, 108, 400),
    "h100-sxm": _Chip(79.1, 3.35, {"bf16": 989, "fp8": 1978}, 50, 132, 700),
    "h200-sxm": _Chip(139.8, 4.8, {"bf16": 989, "fp8": 1978}, 50, 132, 700),
    "b200-sxm": _Chip(178.35, 7.7, {"bf16": 2250, "fp8": 4500, "nvfp4": 9000}, 126, 148, 1000),
    "b300-sxm": _Chip(267.9, 7.75, {"bf16": 2250, "fp8": 4500, "nvfp4": 14000}, 126, 148, 1100),
    "gb200": _Chip(184.3, 8.0, {"bf16": 2500, "fp8": 5000, "nvfp4": 10000}, 126, 148, 1200),
    "gb300": _Chip(276.8, 8.0, {"bf16": 2500, "fp8": 5000, "nvfp4": 15000}, 126, 148, 1400),
    "l40s": _Chip(44.4, 0.864, {"bf16": 362.05, "fp8": 733}, 96, 142, 350),
    "rtx-pro-6000": _Chip(94.97, 1.792, {"bf16": 467.8, "fp8": 935.6, "nvfp4": 1871.2}, 128, 188, 600),
    "rtx-4090": _Chip(23.55, 1.008, {"bf16": 165, "fp8": 330}, 72, 128, 450),
}
_PCIE_ONLY = ("l40s", "rtx-pro-6000", "rtx-4090")
# Trays of GB200 and GB300 reach the other nodes of their rack over NVLink. Consumer boards: a 400 Gb/s card assumed.
_LINKS = {
    "a100-sxm": _Links(300, 25, 32),
    "h100-sxm": _Links(450, 50, 64),
    "h200-sxm": _Links(450, 50, 64),
    "b200-sxm": _Links(900, 100, 128),
    "b300-sxm": _Links(900, 100, 128),
    "gb200": _Links(900, 900, 64),
    "gb300": _Links(900, 900, 64),
    "l40s": _Links(32, 50, 32),
    "rtx-pro-6000": _Links(64, 50, 64),
    "rtx-4090": _Links(32, 50, 32),
}
_OFFERS = "on demand, mid of published offers"
# (USD per GPU-hour, where from). Estimates: the premium of H200 over H100 for more memory on the same chip; the mean
# ratio of bandwidth and bf16 FLOPs to the L40S.
_PRICES = {
    "a100-sxm": (1.8, f"{_OFFERS}: hyperscalers 1.50-3.00, specialised clouds 1.10-1.50 (mercatus-ai.com)"),
    "h100-sxm": (
        3.0,
        f"{_OFFERS}: median 2.95 over 37 providers (aimultiple.com); specialised clouds 2.50-3.50 (mercatus-ai.com)",
    ),
    "h200-sxm": (4.0, f"{_OFFERS}: specialised clouds 3.50-4.50 (mercatus-ai.com), 4.54 (Spheron, 2026-03-17)"),
    "b200-sxm": (5.5, f"{_OFFERS}: 4.50-6.00 (Lyceum, 2026-03-11), 6.03 (Spheron)"),
    "b300-sxm": (7.3, "estimated: B200 with the premium of H200 over H100"),
    "gb200": (4.54, "on demand, half of a superchip of two at 9.08 (Spheron)"),
    "gb300": (6.0, "estimated: GB200 with the premium of H200 over H100"),
    "l40s": (1.1, f"{_OFFERS}: major clouds 0.80-1.50 (alloclabs, 2026-02)"),
    "rtx-pro-6000": (1.8, "estimated: L40S by bandwidth and FLOPs"),
    "rtx-4090": (0.9, "estimated: L40S by bandwidth and FLOPs"),
}
_PRICE_DATE = "2026-05"
# Folders of the tables of devices with kernels of one kind.
HOPPER = ("h100_sxm", "h200_sxm")
BLACKWELL = ("b200_sxm", "b300_sxm", "gb200", "gb300")
# Devices without tables of products and attention whose layers, in bf16 with heads of 128, were timed whole.
LAYERS_ONLY = ("rtx_4090",)
_FOLDERS = {"rtx-pro-6000": "rtx_pro_6000_server"}
# A device without tables of its own takes those of another. The L40S has the same chip, but products and prompts of it
# run at two thirds of a peak that a GeForce reaches nine tenths of, as the RTX PRO 6000 does.
KIN = {"rtx_4090": "rtx_pro_6000_server"}


def tables_of(device: Facts) -> tuple[str, Evidence]:
    """Folder whose tables of products and attention serve a device, and what its fits are then worth."""
    return (KIN[device.folder], "estimated") if device.folder in KIN else (device.folder, "fitted")


def lesser_kin(table: Path) -> list[Path]:
    """The same table of a device that can only be slower, against which to hold the rows of ``table``; or none.

    The GB200 table holds products and prompts of long kernels that take 1.3 to 1.7 times as long as on a B200, and
    longer than in GB200's own replays of a second: 11 to 47 % of the bf16 products of 4096 rows and more.
    """
    other = table.parent.parent / "b200_sxm" / table.name
    return [other] if table.parent.name == "gb200" and other.is_file() else []


def hardware(folder: str, dtype: str) -> Hardware:
    """Peaks of the device whose tables lie in ``folder``."""
    return Hardware.of(next(_datasheet(name) for name in _CHIPS if _folder(name) == folder), dtype)


def devices() -> dict[str, Facts]:
    """Facts by profile name."""
    return {name: _facts(name) for name in _CHIPS}


def _facts(name: str) -> Facts:
    usd_per_hour, source = _PRICES[name]
    price = Price(usd_per_hour=usd_per_hour, source=source, date=_PRICE_DATE)
    return Facts(_folder(name), _datasheet(name), price, power_model(name))


def _folder(name: str) -> str:
    return _FOLDERS.get(name, name.replace("-", "_"))


def _datasheet(name: str) -> Datasheet:
    chip, links = _CHIPS[name], _LINKS[name]
    return Datasheet(
        memory_bytes=round(chip.memory_gib * GIB),
        memory_bytes_per_s=_si(chip.tb_per_s, 1e12),
        flops_per_s={dtype: _si(tflops, 1e12) for dtype, tflops in chip.tflops.items()},
        l2_bytes=chip.l2_mib * MIB,
        sms=chip.sms,
        tdp_w=chip.tdp_w,
        intra_node_bytes_per_s=_si(links.node, 1e9),
        inter_node_bytes_per_s=_si(links.network, 1e9),
        pcie_bytes_per_s=_si(links.host, 1e9),
        nccl_bytes=_PCIE_NCCL_BYTES if name in _PCIE_ONLY else _NCCL_BYTES,
        source=_SHEET_SOURCE,
    )


def _si(value: float, unit: float) -> float:
    """A figure in its base unit, without the last bits that the product of two decimals leaves."""
    return float(f"{value * unit:.10g}")
