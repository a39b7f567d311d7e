"""Power and clocks of an NVIDIA GPU while kernels are replayed, from NVML. Without NVML nothing is known: None."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SAMPLE_S = 0.02


class Drawn(NamedTuple):
    """Mean watts and the median clock of the multiprocessors (MHz) over a while; None where it is not known."""

    power_w: float | None = None
    sm_clock_mhz: float | None = None


class Meter:
    """NVML of one device; ``of`` gives None where the library or the device is missing."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def of(cls, index: int) -> Meter | None:
        """The meter of CUDA device ``index``, if NVML answers."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
        except Exception:  # no library, no driver, no permission: NVML has errors of its own for each
            return None

    def driver(self) -> str:
        """Version of the driver."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def sm_clock_mhz(self) -> float:
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def power_w(self) -> float:
        """Watts now, as the driver averages them."""
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3

    def during(self, work: Callable[[], None]) -> Drawn:
        """Watts and clock while ``work`` runs: by the energy counter, or from samples where there is none."""
        samples: list[tuple[float, float]] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_S):
                samples.append((self.power_w(), self.sm_clock_mhz()))

        watcher = threading.Thread(target=watch, daemon=True)
        start, before_j = time.monotonic(), self._energy_j()
        watcher.start()
        try:
            work()
        finally:
            over.set()
            watcher.join()
        seconds, after_j = time.monotonic() - start, self._energy_j()
        watts, clocks = zip(*samples, strict=True) if samples else ((), ())
        mean_w = sum(watts) / len(watts) if watts else None
        if before_j is not None and after_j is not None:
            mean_w = (after_j - before_j) / seconds
        return Drawn(mean_w, sorted(clocks)[len(clocks) // 2] if clocks else None)

    def _energy_j(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None
