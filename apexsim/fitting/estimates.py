"""What no table of the device itself measures: element-wise kernels, and clocks under sustained load."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apexsim.fitting.facts import Facts
from apexsim.fitting.problems import Operators
from apexsim.fitting.tables import read_table, table_version
from apexsim.specs.device import FittedOperator, SustainedClock

# Rows of a product at which the slow-down is stored.
CLOCK_KNOTS = (128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


def operators(device: Facts, kernels: Path) -> Operators:
    """Element-wise kernels: launch inside a CUDA graph and three quarters of the HBM peak, on every device."""
    kernel = FittedOperator(
        form="elementwise",
        coefficients={"launch_s": 1.6e-6, "memory_efficiency": 0.75},
        evidence="estimated",
        source="form of the norm and rope rows of vllm_layers; constants that reproduce served runs",
    )
    return {"elementwise": {"any": kernel}}


def sustained_clock(kernels: Path, device: str) -> SustainedClock:
    """How much slower products run when replayed for a second than in the short bursts of the other tables.

    Measured on H200 (median over products of usual size, by rows), where the long replays draw the power limit; the
    H100 is the same die under the same limit and takes the same factors. The two tables were measured with different
    engine versions, whose products differ by under 4 % (medians) where no clock is at stake (up to 128 rows). An
    A100 has no such pair of tables: no slow-down is assumed.
    """
    if device.startswith("a100"):
        return SustainedClock(evidence="estimated", source="no long replays of this device: no slow-down assumed")
    folder = kernels / "datacenter" / "h200_sxm"
    burst, long = folder / "gemm.parquet", folder / "gemm__power.parquet"
    sizes = ["m", "n", "k"]
    first = read_table(burst, [*sizes, "latency_us"], ["dtype"])
    second = read_table(long, [*sizes, "latency_us"], ["dtype"])
    pairs = first[first["dtype"] == "bf16"].merge(second[second["dtype"] == "bf16"], on=sizes)
    pairs = pairs[(pairs["n"] >= 1024) & (pairs["k"] >= 1024) & (pairs["n"] * pairs["k"] < 4e8)]
    ratio = (pairs["latency_us_y"] / pairs["latency_us_x"]).to_numpy()
    rows = pairs["m"].to_numpy()
    factors = [float(np.median(ratio[(rows > knot / 1.3) & (rows < knot * 1.3)])) for knot in CLOCK_KNOTS]
    return SustainedClock(
        tokens=CLOCK_KNOTS,
        factors=tuple(max(1.0, round(factor, 3)) for factor in factors),
        evidence="fitted" if device.startswith("h200") else "estimated",
        source=f"h200_sxm: {long.name} ({table_version(long)}) over {burst.name} ({table_version(burst)}), bf16",
    )
