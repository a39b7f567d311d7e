"""What no table of the device itself measures: element-wise kernels, and clocks under sustained load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

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


# Devices with tables of both kinds, and whose factors the others take: same die, or same chip under another limit.
CLOCK_OF = {
    "h100_sxm": "h200_sxm",
    "h200_sxm": "h200_sxm",
    "b200_sxm": "b200_sxm",
    "b300_sxm": "b200_sxm",
    "gb200": "gb200",
    "gb300": "gb200",
}
# On Blackwell these stay below the power limit in the long replays (1 to 14 % of rows of 512 and more at the limit,
# bf16: 37 to 44 %), and those of nvfp4 are as fast as short ones (medians 0.96 to 1.05).
COOL = ("nvfp4", "fp8_block", "mxfp4")


def sustained_clock(kernels: Path, device: str) -> SustainedClock:
    """How much slower products run when replayed for a second than in the short bursts of the other tables.

    Measured on H200, B200 and GB200 (bf16; median over products of usual size, by rows), where the long replays draw
    the power limit. The two tables were measured with different engine versions, whose products differ by under 4 %
    (medians) where no clock is at stake (up to 128 rows). Other devices have no such pair: no slow-down is assumed.

    Attention is not slowed down: its long replays are no slower than the short ones at any size on H200 (0.76 to 0.95
    of them), and by at most 5 % on B200. TensorRT-LLM's are, by 1.1 to 1.7, but already where no clock is at stake:
    those are other kernels, and not a matter of clocks.
    """
    if device not in CLOCK_OF:
        return SustainedClock(evidence="estimated", source="no long replays of this device: no slow-down assumed")
    folder = kernels / "datacenter" / CLOCK_OF[device]
    burst, long = folder / "gemm.parquet", folder / "gemm__power.parquet"
    pairs = _pairs(burst, long)
    ratio, rows = (pairs["latency_us_y"] / pairs["latency_us_x"]).to_numpy(), pairs["m"].to_numpy()
    factors = [float(np.median(ratio[(rows > knot / 1.3) & (rows < knot * 1.3)])) for knot in CLOCK_KNOTS]
    return SustainedClock(
        tokens=CLOCK_KNOTS,
        factors=tuple(max(1.0, round(factor, 3)) for factor in factors),
        unaffected=() if device in ("h100_sxm", "h200_sxm") else COOL,
        evidence="fitted" if device == CLOCK_OF[device] else "estimated",
        source=f"{folder.name}: {long.name} ({table_version(long)}) over {burst.name} ({table_version(burst)}), bf16",
    )


def _pairs(burst: Path, long: Path) -> pd.DataFrame:
    """Products of usual size in bf16 that both tables hold."""
    sizes = ["m", "n", "k"]
    first, second = (read_table(table, [*sizes, "latency_us"], ["dtype"]) for table in (burst, long))
    pairs = first[first["dtype"] == "bf16"].merge(second[second["dtype"] == "bf16"], on=sizes)
    return pairs[(pairs["n"] >= 1024) & (pairs["k"] >= 1024) & (pairs["n"] * pairs["k"] < 4e8)]
