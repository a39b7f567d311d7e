"""A run of measurements: points that are not in the tables yet, one after another, each a row whatever comes of it."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from kernels_profiling import collectives, launches
from kernels_profiling.machine import described, device_name, driver_of, raise_peaks
from kernels_profiling.operators import CASES
from kernels_profiling.power import Drawn
from kernels_profiling.rig import Rig, UnsupportedHereError
from kernels_profiling.sustained import held
from kernels_profiling.tables import Tables, key_of
from kernels_profiling.timers import hold, time_case

Point = tuple[str, dict[str, Any]]
# A replay shorter than this says little about power; on a GPU one point in so many is held that long.
POWER_S, POWER_EVERY = 1.0, 8


class Session:
    """Measures points on a device into a folder of tables."""

    def __init__(self, tables: Tables, rig: Rig, point_s: float) -> None:
        self.tables, self._rig, self._point_s = tables, rig, point_s
        self._device = described(tables.folder, rig)
        self._outcomes: Counter[str] = Counter()
        self._same = {
            "device": device_name(rig.device),
            "driver": driver_of(rig),
            "backend": "kernels_profiling",
            "table_version": f"torch {torch.__version__}",
            "date": datetime.now(UTC).date().isoformat(),
            "idle_power_w": self._device.idle_power_w,
        }

    def run(self, points: Sequence[Point], report: Callable[[float], None], budget_s: float | None) -> int:
        """Measure the points that are missing; returns how many the budget left out."""
        done = {name: self.tables.done(name) for name in {name for name, _ in points}}
        missing = [(name, point) for name, point in points if key_of(name, point) not in done[name]]
        single = [(name, point) for name, point in missing if name != "collective"]
        begun, count = time.monotonic(), 0
        try:
            for name, point in single:
                if budget_s is not None and time.monotonic() - begun >= budget_s:
                    break
                self._keep(name, point, self._outcome(name, point, count))
                count += 1
                report(count / len(missing))
            if count == len(single):
                self._collectives([point for name, point in missing if name == "collective"])
                count = len(missing)
        finally:
            self.tables.flush()
        self.tables.merge()
        raise_peaks(self.tables)
        return len(missing) - count

    @property
    def failed(self) -> int:
        """Points that could not be measured so far."""
        return self._outcomes["failed"]

    def summary(self, left: int) -> str:
        """One line on what became of the points."""
        said = (
            ", ".join(f"{count} {status}" for status, count in sorted(self._outcomes.items())) or "nothing to measure"
        )
        end = f"; {left} left: run again to go on" if left else ""
        return f"{self.tables.folder}: {said}{end}"

    def _keep(self, name: str, point: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        self._outcomes[outcome["status"]] += 1
        self.tables.add(name, {**point, **self._same, **outcome})

    def _collectives(self, points: Sequence[Mapping[str, Any]]) -> None:
        """All collectives at once: their ranks are processes that take seconds to start."""
        for point, outcome in zip(
            points, collectives.measured(points, self._rig.device) if points else (), strict=True
        ):
            self._keep("collective", point, outcome)

    def _outcome(self, name: str, point: Mapping[str, Any], number: int) -> dict[str, Any]:
        """What a row says beside its sizes: measured, failed or unsupported."""
        try:
            with torch.inference_mode():
                return {"status": "ok", **self._measured(name, point, number)}
        except UnsupportedHereError as error:
            return {"status": "unsupported", "error": str(error)}
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # torch: no memory, no such function
            _recover(self._rig.device)
            return {"status": "failed", "error": " ".join(str(error).split())[:300] or type(error).__name__}

    def _measured(self, name: str, point: Mapping[str, Any], number: int) -> dict[str, Any]:
        if name == "launch":
            return launches.measured(point, self._rig, self._point_s)
        if name == "sustained":
            return held(point, self._rig, self._point_s)
        case = CASES[name](point, self._rig)
        timing = time_case(case, self._rig, self._point_s)
        meter, drawn = self._rig.meter, Drawn()
        if meter and number % POWER_EVERY == 0:
            _, drawn = hold(case, self._rig, POWER_S, meter)
        clock = drawn.sm_clock_mhz or (meter.sm_clock_mhz() if meter else None)
        about = {"kernel_source": case.kernel_source, "buffers": case.buffers, "rotated_bytes": case.rotated_bytes}
        return {**timing._asdict(), **about, "power_w": drawn.power_w, "sm_clock_mhz": clock}


def _recover(device: torch.device) -> None:
    """Give memory back after a failure, so that the next point starts clean."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
