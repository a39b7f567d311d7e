"""Fit of fused expert layers, one per dtype (and kernel, where the engine picks it by expert parallelism)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.fitted import ROUTING_ALPHA
from apexsim.costs.forms import moe
from apexsim.costs.forms.hardware import Array, Coefficients, Hardware
from apexsim.fitting.cleaning import clean, faster_than, thin_shards
from apexsim.fitting.problems import Problem, random_fifth
from apexsim.fitting.served import expert_shapes
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.specs.device import Evidence
from apexsim.units import dtype_bytes

NUMBERS = ["tokens", "hidden", "inter", "topk", "experts", "tp", "ep", "latency_us"]
KNOTS = {
    "routing": (1.0, 2.0),
    "sparsity": (4.0, 32.0),
    "ep": (1.0, 8.0, 64.0),
    "matrix": (2.5e5, 2e6, 1e7, 1e8),
    "tokens": (1.0, 8.0, 32.0, 128.0, 512.0, 1536.0, 4096.0, 16384.0),
}
# The A100 kernels are tuned for some widths of some models only and twice as slow beside them; only finer knots see
# that. The gpt-oss kernel has two models of one width.
OWN_KNOTS: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("a100_sxm", "bf16"): {
        "sparsity": (4.0, 8.0, 16.0, 32.0),
        "ep": (1.0, 2.0, 8.0, 64.0),
        "matrix": (2.5e5, 1e6, 2e6, 4e6, 7e6, 1.3e7, 3e7, 5e7, 1e8),
    },
    **{
        (folder, "mxfp4"): {"sparsity": (8.0, 32.0), "ep": (1.0, 2.0, 8.0, 64.0), "matrix": (2.5e5, 1e6, 8.3e6)}
        for folder in ("h100_sxm", "h200_sxm")
    },
}
# Shapes of plain (not gated) experts in the tables: two matrices instead of three.
PLAIN = {(2688, 1856), (2048, 5120), (1024, 2688)}
# Group-limited routing of these shapes reaches 4 of 8 groups in the synthetic rows on one device: half the experts.
GROUPED = (7168, 256)


class Kernel(NamedTuple):
    """One operator of the profile: its key, dtype, table, what its kernels are called there, whose table it is."""

    key: str
    dtype: str
    table: str
    name: str
    folder: str


def kernels_of(folder: str) -> tuple[Kernel, ...]:
    """Expert kernels to fit for the device whose tables lie in ``folder``.

    Block-scaled experts run Triton on one rank and CUTLASS over several. The fp8 rows of the newest tables come from a
    CUTLASS kernel that was not tuned (several times slower than reading its weights, faster at powers of two only);
    the Triton kernel of the older H200 table is what serving runs, and the H100, the same die, takes it by its peaks.
    """
    if folder.startswith("a100"):
        return (Kernel("bf16", "bf16", "moe.parquet", "vllm_fused_moe", folder),)
    return (
        Kernel("bf16", "bf16", "moe.parquet", "triton", folder),
        Kernel("fp8", "fp8", "moe__power.parquet", "vllm_fused_moe", "h200_sxm"),
        Kernel("fp8_block", "fp8_block", "moe.parquet", "triton", folder),
        Kernel("fp8_block_ep", "fp8_block", "moe.parquet", "cutlass", folder),
        Kernel("mxfp4", "mxfp4", "moe.parquet", "gptoss", folder),
    )


class _Experts(NamedTuple):
    """The form on rows of a table."""

    weight_bytes: float
    hw: Hardware

    def shape(self, rows: pd.DataFrame) -> moe.MoeShape:
        columns = ("tokens", "hidden", "shard", "topk", "experts", "ep", "matrices", "touched", "power_law")
        return moe.MoeShape(*(rows[column].to_numpy(dtype=float) for column in columns))

    def predict(self, rows: pd.DataFrame, c: Coefficients) -> Array:
        return moe.moe_s(self.shape(rows), self.weight_bytes, c, self.hw)

    def compute_floor(self, rows: pd.DataFrame) -> Array:
        """FLOPs of an average device at the peak."""
        s = self.shape(rows)
        return np.asarray(2 * s.tokens * s.topk / s.ep * s.matrices * s.hidden * s.inter / self.hw.flops_per_s)

    def coordinates(self, rows: pd.DataFrame) -> tuple[Array, ...]:
        return moe.residual_coordinates(self.shape(rows))


def problem(table: Path, kernel: Kernel, hw: Hardware, evidence: Evidence = "fitted") -> Problem:
    """The fit of one expert kernel; the mxfp4 of our dtypes is ``w4a16_mxfp4`` in the tables."""
    form = _Experts(dtype_bytes(kernel.dtype), hw)
    frame, dropped = clean(
        _rows(table, kernel.dtype, kernel.name), [thin_shards("shard"), faster_than(form.compute_floor)]
    )
    model = list(zip(frame["hidden"], frame["inter"], frame["topk"], frame["experts"], strict=True))
    served = np.array([tuple(int(x) for x in sizes) in expert_shapes() for sizes in model])
    everything = np.ones(len(frame), bool)
    return Problem(
        kind="moe",
        key=kernel.key,
        form="moe",
        source=f"{kernel.folder}/{table.name} ({table_version(table)}), kernels *{kernel.name}*",
        evidence=evidence,
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=moe.COEFFICIENTS,
        coordinates=form.coordinates,
        knots=_knots(frame, kernel),
        valid={"tokens": "tokens", "hidden": "hidden", "inter": "shard", "experts": "experts", "ep": "ep"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything, "random_served": served}),
            "largest": ((frame["tokens"] > 4096).to_numpy(), {"largest": everything}),
            "served_shapes": (served, {"served_shapes": everything}),
        },
        weight=everything.astype(float),
    )


def _rows(table: Path, dtype: str, kernels: str) -> pd.DataFrame:
    frame = read_table(table, NUMBERS, ["dtype", "routing", "kernel_source"])
    label = "w4a16_mxfp4" if dtype == "mxfp4" else dtype
    keep = (frame["dtype"] == label) & frame["kernel_source"].str.contains(kernels, regex=False)
    frame = frame[keep].reset_index(drop=True)
    frame["seconds"] = frame["latency_us"] * SECONDS_PER_US
    frame["shard"] = frame["inter"] / frame["tp"]
    plain = [pair in PLAIN for pair in zip(frame["hidden"], frame["inter"], strict=True)]
    frame["matrices"] = np.where(plain, 2.0, 3.0)
    frame["power_law"] = (frame["routing"] != "balanced").astype(float)
    frame["touched"] = _touched(frame)
    grouped = (frame["hidden"] == GROUPED[0]) & (frame["experts"] == GROUPED[1]) & (frame["ep"] == 1)
    frame.loc[grouped, "touched"] = np.minimum(frame.loc[grouped, "touched"], GROUPED[1] / 2)
    return frame


def _touched(frame: pd.DataFrame) -> Array:
    """Distinct experts that the tokens of every row reach."""
    out = np.empty(len(frame))
    settings = list(zip(frame["experts"], frame["topk"], frame["routing"], strict=True))
    for experts, topk, routing in set(settings):
        at = np.array([setting == (experts, topk, routing) for setting in settings])
        tokens = frame["tokens"].to_numpy()[at]
        out[at] = moe.touched_experts(tokens, int(experts), int(topk), ROUTING_ALPHA[routing])
    return out


def _knots(frame: pd.DataFrame, kernel: Kernel) -> dict[str, tuple[float, ...]]:
    """The knots of a kernel, without those of coordinates that its rows never vary."""
    varies = {"ep": frame["ep"].nunique() > 1, "routing": frame["power_law"].nunique() > 1}
    varies["sparsity"] = (frame["experts"] / frame["topk"]).nunique() > 1
    knots = KNOTS | OWN_KNOTS.get((kernel.folder, kernel.key), {})
    return {name: points if varies.get(name, True) else points[:1] for name, points in knots.items()}
