"""What a device is: its datasheet where it is known, else peaks that are measured here; and the rig on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from apexsim.errors import BadInput
from apexsim.fitting import facts
from apexsim.fitting.own import DEVICE_FILE, MeasuredDevice
from apexsim.io.yaml_files import load_spec, write_yaml
from apexsim.specs.device import Datasheet, Price
from apexsim.units import dtype_bytes
from kernels_profiling.clock import Clock, seconds_since
from kernels_profiling.power import Meter
from kernels_profiling.rig import Rig
from kernels_profiling.tables import Tables

# Profiles by the name that the driver gives the device.
KNOWN = {
    "NVIDIA A100-SXM4-80GB": "a100-sxm",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H200": "h200-sxm",
    "NVIDIA B200": "b200-sxm",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000",
}
# Assumed where nothing says better: watts of a core, USD of a core-hour, W and USD/h of an unknown GPU.
CORE_W, CORE_USD = 10.0, 0.04
GPU_W, GPU_USD = 350.0, 2.0
NO_CACHE_FOUND = 32 << 20
PEAK_S = 1.0


def torch_device(kind: str) -> torch.device:
    """The device to measure; BadInput where torch has none of that kind."""
    if kind not in ("cpu", "cuda"):
        raise BadInput("use cuda or cpu", where="--device", got=kind)
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput("torch finds no CUDA device; use cpu, or a torch built for CUDA", where="--device", got=kind)
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def set_threads(device: torch.device, threads: int | None) -> None:
    """Let torch use so many threads where the device is a CPU; one by default.

    On cores that others use too, threads wait for each other at the end of every kernel, and times double at random.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise BadInput(f"give 1 to {cores}, the cores there are", where="--threads", got=threads)
    if device.type == "cpu":
        torch.set_num_threads(threads or 1)


def meter_of(device: torch.device) -> Meter | None:
    """NVML of a CUDA device; a CPU has no meter."""
    return Meter.of(device.index or 0) if device.type == "cuda" else None


def rig_of(device: torch.device, clock: Clock | None = None) -> Rig:
    """The device ready to be measured, by the host's clock where none is given."""
    return Rig(device, cache_bytes(device), meter_of(device), clock=clock)


def described(folder: Path, rig: Rig) -> MeasuredDevice:
    """The ``device.yaml`` of a folder: read where it is there (BadInput if of another device), else measured."""
    path = folder / DEVICE_FILE
    if not path.exists():
        found = _describe(rig)
        write_yaml(path, found.model_dump(mode="json", exclude_defaults=True))
        return found
    found = load_spec(MeasuredDevice, path)
    name, threads = device_name(rig.device), _threads(rig.device)
    if (found.device, found.threads) != (name, threads):
        would_do = f"this is {name} with {threads or 'no'} threads; give another --out, or the --threads of then"
        raise BadInput(would_do, where=path, key="device", got=f"{found.device}, {found.threads} threads")
    return found


def raise_peaks(tables: Tables) -> None:
    """Raise measured peaks to the best rates in the tables: an idle moment after a busy one is no broken roofline."""
    path = tables.folder / DEVICE_FILE
    found = load_spec(MeasuredDevice, path)
    frame = tables.read("gemm")
    if found.profile is not None or frame is None:
        return
    frame = frame[frame["status"] == "ok"]
    sheet, rates = found.datasheet, dict(found.datasheet.flops_per_s)
    for dtype, rows in frame.groupby("dtype"):
        best = (2 * rows["m"] * rows["n"] * rows["k"] / rows["latency_p10_s"]).max()
        rates[str(dtype)] = max(rates.get(str(dtype), 0.0), _rounded(best))
    width = frame["dtype"].map(dtype_bytes)
    moved = (width * frame["n"] * frame["k"] / frame["latency_p10_s"]).max()
    fastest = max(sheet.memory_bytes_per_s, _rounded(moved))
    sheet = sheet.model_copy(update={"flops_per_s": rates, "memory_bytes_per_s": fastest})
    write_yaml(path, found.model_copy(update={"datasheet": sheet}).model_dump(mode="json", exclude_defaults=True))


def device_name(device: torch.device) -> str:
    """The name that the driver, or the kernel, gives the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def driver_of(rig: Rig) -> str:
    """Version of the driver of a GPU, or of the kernel."""
    return rig.meter.driver() if rig.meter else f"{platform.system()} {platform.release()}"


def memory_bytes(device: torch.device) -> int:
    """Size of all its memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache_bytes() or NO_CACHE_FOUND


def _cpu_cache_bytes() -> int | None:
    """The largest cache that Linux lists for the first core; None where it lists none."""
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[:-1].isdigit() and text[-1] in units]
    return max(sizes, default=None)


def _threads(device: torch.device) -> int | None:
    return torch.get_num_threads() if device.type == "cpu" else None


def _describe(rig: Rig) -> MeasuredDevice:
    name = device_name(rig.device)
    profile = KNOWN.get(name)
    known = facts.devices()[profile] if profile else None
    # Before anything else runs, which would leave the device warm and at high clocks.
    idle_w = rig.meter.during(lambda: time.sleep(PEAK_S)).power_w if rig.meter else None
    sheet = known.datasheet if known else _measured_sheet(rig)
    return MeasuredDevice(
        device=name,
        kind="cuda" if rig.device.type == "cuda" else "cpu",
        profile=profile,
        threads=_threads(rig.device),
        datasheet=sheet,
        price=known.price if known else _assumed_price(rig.device),
        idle_power_w=idle_w,
        driver=driver_of(rig),
        library=f"torch {torch.__version__}",
        date=datetime.now(UTC).date().isoformat(),
    )


def _assumed_price(device: torch.device) -> Price:
    usd = GPU_USD if device.type == "cuda" else CORE_USD * torch.get_num_threads()
    return Price(usd_per_hour=usd, source="assumed", date=datetime.now(UTC).date().isoformat())


def _measured_sheet(rig: Rig) -> Datasheet:
    """A datasheet for a device that is not listed: peaks as reached here, what cannot be measured assumed."""
    cuda = rig.device.type == "cuda"
    properties = torch.cuda.get_device_properties(rig.device) if cuda else None
    bytes_per_s = peak_bytes_per_s(rig)
    cache = "as the system says" if cuda or _cpu_cache_bytes() else "not known, 32 MiB taken"
    return Datasheet(
        memory_bytes=memory_bytes(rig.device),
        memory_bytes_per_s=_rounded(bytes_per_s),
        flops_per_s={
            "bf16": _rounded(peak_flops_per_s(rig, torch.bfloat16)),
            "fp32": _rounded(peak_flops_per_s(rig, torch.float32)),
        },
        l2_bytes=rig.cache_bytes,
        sms=properties.multi_processor_count if properties else torch.get_num_threads(),
        tdp_w=GPU_W if cuda else CORE_W * torch.get_num_threads(),
        intra_node_bytes_per_s=_rounded(bytes_per_s),
        inter_node_bytes_per_s=1.25e9,
        pcie_bytes_per_s=_rounded(bytes_per_s),
        nccl_bytes={1: 0, 2: 0, 4: 0, 8: 0},
        source=(
            f"measured by kernels_profiling with torch {torch.__version__}: the best of repeated products, and of "
            f"reads and copies, on {device_name(rig.device)}; last cache {cache}; watts, links and price assumed"
        ),
    )


def peak_flops_per_s(rig: Rig, dtype: torch.dtype) -> float:
    """The best rate of a large square product."""
    size = 8192 if rig.device.type == "cuda" else 1024
    a, b = (rig.hot(dtype, (size, size)) for _ in range(2))
    return 2 * size**3 / _best_s(lambda: a @ b.t(), rig)


def peak_bytes_per_s(rig: Rig) -> float:
    """The best rate at which memory beyond the cache is read by a product or a sum, or copied."""
    (x, *_) = rig.cold(torch.bfloat16, (4096, max(4096, rig.cache_bytes // 4096)))
    one, target = rig.hot(torch.bfloat16, (1, x.shape[1])), torch.empty_like(x)
    read = min(
        _best_s(lambda: torch.nn.functional.linear(one, x), rig), _best_s(lambda: x.view(torch.float32).sum(), rig)
    )
    return max(x.nbytes / read, 2 * x.nbytes / _best_s(lambda: target.copy_(x), rig))


def _best_s(work: Callable[[], object], rig: Rig) -> float:
    """The least seconds of a call among those of half a second or so."""
    best, clock = float("inf"), rig.clock
    begun_ns = clock.now_ns()
    while seconds_since(clock, begun_ns) < PEAK_S:
        start_ns = clock.now_ns()
        work()
        if rig.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, seconds_since(clock, start_ns))
    return best


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
