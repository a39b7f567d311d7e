"""What the forms need to know of a device, and how they name their coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from apexsim.specs.device import Datasheet

Array = npt.NDArray[np.float64]
Coefficients = Mapping[str, float]

# Tensor-core rate that each dtype computes at: weight-only formats compute in bf16.
COMPUTE_DTYPE = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "nvfp4": "nvfp4",
    "mxfp4": "bf16",
    "int4_wo": "bf16",
    "int8_wo": "bf16",
}


# Bounds of forms are those of GPU kernels. Where Python launches several kernels for one, on a CPU or to gather pages,
# times may be so many times longer and efficiencies lower.
SLOWER, LESS_EFFICIENT = 200.0, 0.02


class Hardware(NamedTuple):
    """Peaks of one device for one dtype: FLOP/s, HBM bytes/s, streaming multiprocessors, L2 bytes."""

    flops_per_s: float
    bytes_per_s: float
    sms: int
    l2_bytes: float

    @classmethod
    def of(cls, sheet: Datasheet, dtype: str) -> Hardware:
        """Peaks for operands of ``dtype``; KeyError when the device has no such tensor cores.

        Where there are 4-bit tensor cores, engines quantise the inputs of mxfp4 experts and multiply at the fp8 rate.
        """
        name = "fp8" if dtype == "mxfp4" and "nvfp4" in sheet.flops_per_s else COMPUTE_DTYPE[dtype]
        return cls(sheet.flops_per_s[name], sheet.memory_bytes_per_s, sheet.sms, float(sheet.l2_bytes))


class Coefficient(NamedTuple):
    """One fitted number of a form: where the fit starts and the physical bounds it must stay in."""

    name: str
    start: float
    low: float
    high: float
    meaning: str

    @property
    def loosened(self) -> Coefficient:
        """The same with bounds that hold for any device."""
        if self.name.endswith("_s"):
            return self._replace(high=self.high * SLOWER)
        if self.name.endswith("_efficiency") or self.name in ("cached_speed", "sm_bandwidth", "l2_ratio"):
            return self._replace(low=self.low * LESS_EFFICIENT)
        if self.name == "sharpness":
            return self._replace(start=1.1, low=1.0)  # bytes and FLOPs one after the other, as on a core
        if self.name.endswith("passes"):
            return self._replace(high=self.high * SLOWER)
        return self


def pnorm(terms: list[Any], sharpness: float) -> Any:
    """Smooth maximum (sum t^p)^(1/p) of positive arrays, scaled by the largest so that nothing overflows."""
    largest = terms[0]
    for term in terms[1:]:
        largest = np.maximum(largest, term)
    total = sum((term / largest) ** sharpness for term in terms)
    return largest * total ** (1.0 / sharpness)
