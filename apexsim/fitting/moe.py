"""Fit of fused expert layers, one per dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.forms import moe
from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array, Coefficients, Hardware
from apexsim.costs.forms.routing import touched_experts
from apexsim.fitting.cleaning import clean, faster_than, thin_shards
from apexsim.fitting.facts import BLACKWELL, HOPPER, Facts, hardware
from apexsim.fitting.problems import OwnShapes, Problem, random_fifth
from apexsim.fitting.routing import EXPONENTS, timed_devices
from apexsim.fitting.served import expert_shapes
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.units import dtype_bytes

NUMBERS = ["tokens", "hidden", "inter", "topk", "experts", "tp", "ep", "latency_us"]
KNOTS = {
    "sparsity": (4.0, 32.0),
    "ep": (1.0, 2.0, 8.0, 64.0),
    "matrix": (2.5e5, 2e6, 1e7, 1e8),
    "tokens": (1.0, 8.0, 32.0, 128.0, 512.0, 2048.0, 16384.0),
}
# Kernels are tuned for the experts of well-known models, and other ones run where they are whole on a device than where
# they are cut: every measured model has a correction of its own over expert / tensor degree and tokens.
SHAPE_KNOTS = {
    "split": (0.125, 1.0, 2.0, 8.0),
    "tokens": (1.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0),
}
# Serving routes by a power law: balanced rows, a third of all, hardly count in those.
BALANCED_WEIGHT = 0.2
# Shapes of plain (not gated) experts: two matrices instead of three. The tables of before vLLM 0.24, whose kernels go
# by this name, ran them with three: times per byte are those of their gated neighbours only so.
PLAIN = {(2688, 1856), (2048, 5120), (1024, 2688)}
ALWAYS_GATED = "fused_moe"
# (hidden, experts) of DeepSeek, whose router first picks 4 of 8 groups of experts.
GROUPED = (7168, 256)


class Kernel(NamedTuple):
    """One operator of the profile: its dtype, the table with its rows, what dtype and kernels are called there.

    ``folder`` holds the table, of this device or of its nearest kin. ``gpt_oss`` adds the rows of gpt-oss on one
    device from the only table that has them, counted ``GPT_OSS_WEIGHT`` times: there are 27 beside thousands.
    """

    dtype: str
    table: str
    label: str
    name: str
    folder: str
    gpt_oss: bool = False


GPT_OSS_TABLE = ("b200_sxm", "moe__power_trtllm.parquet")
GPT_OSS_WEIGHT = 20.0
# The same chip, hence the same Triton kernels.
KIN = {"rtx_4090": "l40s"}


def kernels_of(folder: str) -> tuple[Kernel, ...]:
    """Expert kernels to fit for the device whose tables lie in ``folder``: those that vLLM picks there."""

    def own(dtype: str, name: str, label: str | None = None) -> Kernel:
        return Kernel(dtype, "moe.parquet", label or dtype, name, folder)

    if folder == "a100_sxm":
        return _a100()
    int4 = own("int4_wo", "marlin")
    if folder in BLACKWELL:
        dense = [own(dtype, "flashinfer_trtllm") for dtype in ("bf16", "fp8")]
        grouped = [own(dtype, "monolithic") for dtype in ("fp8_block", "nvfp4")]
        mxfp4 = own("mxfp4", "mxfp4_mxfp8", "w4a8_mxfp4_mxfp8")._replace(gpt_oss=True)
        return (*dense, *grouped, int4, mxfp4)
    mxfp4 = own("mxfp4", "gptoss", "w4a16_mxfp4")
    if folder in HOPPER:
        return (own("bf16", "triton"), _hopper_fp8(), own("fp8_block", "fp8moe"), int4, mxfp4)
    if folder == "l40s":
        return (*(own(dtype, "triton") for dtype in ("bf16", "fp8", "fp8_block")), int4, mxfp4)
    return (*(own(dtype, "cutlass") for dtype in ("bf16", "fp8", "nvfp4")), int4, mxfp4)


def _a100() -> tuple[Kernel, ...]:
    """From the table of SGLang, which runs the Triton kernel of vLLM: that of vLLM has no balanced rows."""
    bf16 = Kernel("bf16", "moe__sglang.parquet", "bf16", "fused_moe_triton", "a100_sxm")
    return (bf16, bf16._replace(dtype="int4_wo", label="int4_wo", name="marlin"))


def _hopper_fp8() -> Kernel:
    """Experts with one scale a tensor.

    The rows of the newest tables come from a CUTLASS kernel that was not tuned (several times slower than reading its
    weights, faster at powers of two only); the Triton kernel of the older H200 table is what serving runs, and the
    H100, the same die, takes it by its peaks.
    """
    return Kernel("fp8", "moe__power.parquet", "fp8", "fused_moe", "h200_sxm")


def problems(device: Facts, kernels: Path) -> Iterator[Problem]:
    """The fits of a device, from the tables under ``kernels``."""
    for kernel in kernels_of(KIN.get(device.folder, device.folder)):
        if COMPUTE_DTYPE[kernel.dtype] not in device.datasheet.flops_per_s:
            continue
        hw = hardware(kernel.folder, kernel.dtype)
        yield problem(kernels / "datacenter", kernel, hw, own=kernel.folder == device.folder)


class _Experts(NamedTuple):
    """The form on rows of a table, weights hot as they were measured, or ``cold``."""

    weight_bytes: float
    hw: Hardware
    cold: bool = False

    def shape(self, rows: pd.DataFrame) -> moe.MoeShape:
        columns = ("tokens", "hidden", "shard", "topk", "experts", "ep", "matrices", "active", "local")
        return moe.MoeShape(*(rows[column].to_numpy(dtype=float) for column in columns))

    def predict(self, rows: pd.DataFrame, c: Coefficients) -> Array:
        return moe.moe_s(self.shape(rows), self.weight_bytes, c, self.hw, cold=self.cold)

    def compute_floor(self, rows: pd.DataFrame) -> Array:
        """FLOPs of the device at the peak."""
        s = self.shape(rows)
        return np.asarray(2 * s.local * s.matrices * s.hidden * s.inter / self.hw.flops_per_s)

    def coordinates(self, rows: pd.DataFrame) -> tuple[Array, ...]:
        return moe.residual_coordinates(self.shape(rows))


def problem(tables: Path, kernel: Kernel, hw: Hardware, *, own: bool = True) -> Problem:
    """The fit of one expert kernel from the folders of devices in ``tables``."""
    form = _Experts(dtype_bytes(kernel.dtype), hw)
    table = tables / kernel.folder / kernel.table
    frame, dropped = clean(_rows(tables, kernel), [thin_shards("shard"), faster_than(form.compute_floor)])
    source = f"{kernel.folder}/{table.name} ({table_version(table)}), kernels *{kernel.name}*"
    found = _problem(form, kernel.dtype, frame, source)
    shapes = _own_shapes(frame)
    return replace(found, dropped=dropped, shapes=shapes, evidence="fitted" if own else "estimated")


def measured_problem(rows: pd.DataFrame, dtype: str, hw: Hardware, source: str) -> Problem:
    """The fit of gated experts of one rank from ``rows`` whose weights were cold."""
    form = _Experts(dtype_bytes(dtype), hw, cold=True)
    frame = rows.assign(shard=rows["inter"] / rows["tp"], matrices=3.0, weight=1.0, local=rows["tokens"] * rows["topk"])
    frame, dropped = clean(frame.assign(active=_reached(frame)), [faster_than(form.compute_floor)])
    found = _problem(form, dtype, frame, source)
    kept = [c for c in found.coefficients if c.name != "cached_share"]
    return replace(found, dropped=dropped, coefficients=kept)


def _problem(form: _Experts, dtype: str, frame: pd.DataFrame, source: str) -> Problem:
    model = list(zip(frame["hidden"], frame["inter"], frame["topk"], frame["experts"], strict=True))
    served = np.array([tuple(int(x) for x in sizes) in expert_shapes() for sizes in model])
    everything = np.ones(len(frame), bool)
    return Problem(
        kind="moe",
        key=dtype,
        form="moe",
        source=source,
        frame=frame,
        dropped={},
        predict=form.predict,
        coefficients=moe.COEFFICIENTS,
        coordinates=form.coordinates,
        knots=_knots(frame),
        valid={"tokens": "tokens", "hidden": "hidden", "inter": "shard", "experts": "experts", "ep": "ep"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything, "random_served": served}),
            "largest": ((frame["tokens"] > 4096).to_numpy(), {"largest": everything}),
            "served_shapes": (served, {"served_shapes": everything}),
        },
        weight=frame["weight"].to_numpy(),
    )


def _reached(frame: pd.DataFrame) -> Array:
    """Distinct experts that the tokens of each row reach under its routing.

    A balanced table spreads tokens as evenly as they go; under a power law the figure is the mean over draws.
    """
    columns = (frame[name] for name in ("tokens", "experts", "topk", "routing"))
    return np.array(
        [
            float(touched_experts(tokens, int(experts), int(topk), EXPONENTS[routing]))
            for tokens, experts, topk, routing in zip(*columns, strict=True)
        ]
    )


def _own_shapes(frame: pd.DataFrame) -> OwnShapes:
    """The models whose experts a table holds, by name."""
    sizes = zip(frame["hidden"], frame["inter"], frame["topk"], frame["experts"], strict=True)
    return OwnShapes(
        names=np.array([moe.shape_name(*model) for model in sizes]),
        weight=(frame["weight"] * np.where(frame["power_law"] > 0, 1.0, BALANCED_WEIGHT)).to_numpy(),
        coordinates=moe.shape_coordinates((frame["ep"] / frame["tp"]).to_numpy(), frame["tokens"].to_numpy()),
        knots=SHAPE_KNOTS,
    )


def _rows(tables: Path, kernel: Kernel) -> pd.DataFrame:
    """Rows of a kernel with what the form wants to know of them."""
    frame = _rows_of(tables / kernel.folder / kernel.table, kernel.label, kernel.name)
    if kernel.gpt_oss:
        more = _rows_of(tables.joinpath(*GPT_OSS_TABLE), kernel.label, "")
        more = more[(more["hidden"] == 2880) & (more["ep"] == 1)].assign(weight=GPT_OSS_WEIGHT)
        frame = pd.concat([frame, more], ignore_index=True)
    plain = np.array([pair in PLAIN for pair in zip(frame["hidden"], frame["inter"], strict=True)])
    plain &= ~frame["kernel_source"].str.contains(ALWAYS_GATED, regex=False).to_numpy()
    frame["matrices"] = np.where(plain, 2.0, 3.0)
    frame["power_law"] = (frame["routing"] != "balanced").astype(float)
    return _routed(frame)


def _rows_of(table: Path, label: str, kernels: str) -> pd.DataFrame:
    frame = read_table(table, NUMBERS, ["dtype", "routing", "kernel_source"])
    keep = (frame["dtype"] == label) & frame["kernel_source"].str.contains(kernels, regex=False)
    frame = frame[keep].reset_index(drop=True)
    frame["seconds"] = frame["latency_us"] * SECONDS_PER_US
    return frame.assign(shard=frame["inter"] / frame["tp"], weight=1.0)


def _routed(frame: pd.DataFrame) -> pd.DataFrame:
    """Say how many experts and rows the device of every row had.

    Balanced rows of DeepSeek reach 4 of 8 groups of experts, the same ones for all synthetic tokens: half of the
    experts, on half of the devices (B200, fp8_block: 32 tokens take 0.83 ms on two devices as on one). Power-law rows
    reach them all, as tokens in serving do.
    """
    grouped = (frame["hidden"] == GROUPED[0]) & (frame["experts"] == GROUPED[1]) & (frame["power_law"] == 0)
    experts = np.where(grouped, GROUPED[1] // 2, frame["experts"])
    ranks = np.where(grouped, np.maximum(1, frame["ep"] // 2), frame["ep"])
    rows = np.column_stack([frame["tokens"], experts, frame["topk"], ranks])
    alphas = frame["routing"].map(EXPONENTS).to_numpy(dtype=float)
    load = timed_devices(rows, np.asarray(alphas))
    return frame.assign(active=load.active, local=load.rows)


def _knots(frame: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """The knots, without those of coordinates that the rows of a kernel never vary."""
    varies = {"ep": frame["ep"].nunique() > 1, "sparsity": (frame["experts"] / frame["topk"]).nunique() > 1}
    return {name: points if varies.get(name, True) else points[:1] for name, points in KNOTS.items()}
