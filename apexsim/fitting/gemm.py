"""Fit of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.forms import gemm
from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array, Coefficients, Hardware
from apexsim.fitting.cleaning import clean, faster_than, slower_than_kin, slower_than_larger
from apexsim.fitting.facts import BLACKWELL, HOPPER, LAYERS_ONLY, Facts, hardware, lesser_kin, tables_of
from apexsim.fitting.inside import InLayers
from apexsim.fitting.layers import TIMED, head_rows, layer_sums, product_rows
from apexsim.fitting.problems import Judge, Problem, fit_all_rows, random_fifth
from apexsim.fitting.served import gemm_shapes
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version

KNOTS = {
    "n": (64.0, 512.0, 2048.0, 5120.0, 8192.0, 65536.0),
    "k": (64.0, 512.0, 2048.0, 8192.0, 65536.0),
    "m": (1.0, 16.0, 64.0, 192.0, 512.0, 1536.0, 4096.0, 32768.0),
}
# Weight-only products are carried to most devices: a coarse correction will do.
COARSE_KNOTS = {
    "n": (512.0, 3072.0, 16384.0),
    "k": (512.0, 3072.0, 16384.0),
    "m": (1.0, 16.0, 64.0, 128.0, 256.0, 1024.0, 8192.0),
}
# Kernels with own library choices per dtype: cuBLAS cuts k, the fp8 kernels do not but quantise activations.
EXTRA = {
    "fp32": (gemm.SPLIT,),
    "bf16": (gemm.SPLIT,),
    "fp8": (gemm.QUANTISE,),
    "fp8_block": (gemm.QUANTISE,),
    "nvfp4": (gemm.QUANTISE,),
    "int4_wo": (gemm.SPLIT,),
    "int8_wo": (gemm.SPLIT,),
}
# Devices whose products in nvfp4 were timed with vLLM 0.22, too: those of CUTLASS, which it ran until then, take a
# tenth longer at up to 128 rows than those of 0.24 (medians of 7,548 products of usual size on B200).
CUTLASS_NVFP4 = ("b200_sxm", "gb200")
# What the few widths of timed layers can tell, and the tokens of their steps.
REFITTED = ("launch_s", "compute_efficiency", "memory_efficiency", "sm_bandwidth", "wave_s", "wave_odds", "throttle")
# The widest product of a layer that was timed, and a width between it and that of a whole LM head.
HEAD_KNOTS = (51200.0, 65536.0)
LAYER_KNOTS = (1.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 1024.0, 2048.0)


class _Products(NamedTuple):
    """The form on rows of a table, weights hot as they were measured, or ``cold`` in layers that were timed whole."""

    dtype: str
    hw: Hardware
    cold: bool = False

    def shape(self, rows: pd.DataFrame) -> gemm.GemmShape:
        return gemm.shape(rows["m"].to_numpy(), rows["n"].to_numpy(), rows["k"].to_numpy(), self.dtype)

    def predict(self, rows: pd.DataFrame, c: Coefficients) -> Array:
        return gemm.gemm_s(self.shape(rows), c, self.hw, cold=self.cold)

    def compute_floor(self, rows: pd.DataFrame) -> Array:
        """FLOPs at the peak; bytes may come from the cache in a replay."""
        return np.asarray(2 * rows["m"] * rows["n"] * rows["k"] / self.hw.flops_per_s)

    def coordinates(self, rows: pd.DataFrame) -> tuple[Array, Array, Array]:
        return gemm.residual_coordinates(self.shape(rows))


class Table(NamedTuple):
    """Products of one dtype and the table with their times, of the device itself or of another one."""

    dtype: str
    folder: str
    name: str = "gemm"


def tables_for(folder: str) -> Iterator[Table]:
    """Products to fit for the device whose tables lie in ``folder``.

    Weights of 4 and 8 bits that are multiplied in bf16 were measured on A100 and H200; others take them by their peaks
    from whichever has the same kind of tensor-core instruction.
    """
    newer = folder in (*HOPPER, *BLACKWELL)
    if folder == "a100_sxm":
        yield Table("bf16", folder, "gemm__sglang")
    else:
        yield from (Table(dtype, folder) for dtype in ("bf16", "fp8"))
        yield Table("fp8_block", folder, "gemm__fp8_block_trtllm")
    if folder in (*BLACKWELL, "rtx_pro_6000_server"):
        yield Table("nvfp4", folder, "gemm__power" if folder in CUTLASS_NVFP4 else "gemm")
    weight_only = ("h200_sxm", "gemm__int4_int8_wo_trtllm") if newer else ("a100_sxm", "gemm__trtllm")
    yield from (Table(dtype, *weight_only) for dtype in ("int4_wo", "int8_wo"))


def problems(device: Facts, kernels: Path) -> Iterator[Problem]:
    """Products of every dtype of a device."""
    folder, evidence = tables_of(device)
    for table in tables_for(folder):
        if COMPUTE_DTYPE[table.dtype] not in device.datasheet.flops_per_s:
            continue
        found = problem(kernels / "datacenter" / table.folder / f"{table.name}.parquet", table.dtype)
        judge = _layer_judge(device, kernels) if table.dtype == "bf16" else None
        if table.dtype == "bf16" and device.folder in LAYERS_ONLY:
            yield replace(layer_problem(device, kernels, found), judge=judge)
            continue
        if judge:
            found = in_layers(device, kernels, found)
        yield replace(found, evidence=evidence if table.folder == folder else "estimated", judge=judge)


def _layer_judge(device: Facts, kernels: Path) -> Judge | None:
    """Scores of a bf16 fit on whole layers, where some were timed on the device."""
    if device.folder not in TIMED:
        return None
    layers, hw = kernels / "vllm_layers" / TIMED[device.folder], Hardware.of(device.datasheet, "bf16")
    return lambda c, grid: layer_sums(layers, c, grid, hw)


def in_layers(device: Facts, kernels: Path, found: Problem) -> Problem:
    """The fit of a table, corrected for what products of the device take inside layers, by their tokens.

    LM heads, wider than all others, have a correction of their own. Fewer of them were timed: as a kind of product they
    count as much as any other.
    """
    folder = TIMED[device.folder]
    form = _Products("bf16", Hardware.of(device.datasheet, "bf16"), cold=True)
    layers = kernels / "vllm_layers" / folder
    products, heads = product_rows(layers), head_rows(layers)
    share = len(products) / products["layer"].nunique() / len(heads)
    rows = pd.concat([products.assign(weight=1.0), heads.assign(weight=share)], ignore_index=True)
    knots = {"n": HEAD_KNOTS, "k": (2048.0,), "m": LAYER_KNOTS}
    inside = InLayers(rows, form.predict, form.coordinates, knots)
    return replace(found, source=f"{found.source}; vllm_layers/{folder} (vLLM 0.19)", refine=inside.refine)


def layer_problem(device: Facts, kernels: Path, kin: Problem) -> Problem:
    """The fit of bf16 products from timed layers, started from that of ``kin``, the nearest chip with a table.

    Few widths were timed, at all numbers of tokens: rates and waves are found anew, what tells widths apart is kept
    from the kin, and the correction depends on the tokens alone.
    """
    folder = TIMED[device.folder]
    form = _Products("bf16", Hardware.of(device.datasheet, "bf16"), cold=True)
    frame, dropped = clean(product_rows(kernels / "vllm_layers" / folder), [faster_than(form.compute_floor)])
    kept, _ = fit_all_rows(kin)
    everything, unseen = np.ones(len(frame), bool), frame["layer"].isin(("gate_up_proj", "o_proj")).to_numpy()
    return replace(
        kin,
        source=f"vllm_layers/{folder} (vLLM 0.19); the rest of the form from {kin.source}",
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=[c for c in gemm.COEFFICIENTS if c.name in REFITTED],
        constants=kept,
        knots={"n": (1.0,), "k": (1.0,), "m": LAYER_KNOTS},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything}),
            "largest": ((frame["m"] >= 1024).to_numpy(), {"largest": everything}),
            "served_shapes": (unseen, {"served_shapes": everything}),
        },
        weight=np.ones(len(frame)),
    )


def measured_problem(rows: pd.DataFrame, dtype: str, hw: Hardware, source: str, *, tiled: bool = True) -> Problem:
    """The fit of products in ``dtype`` from ``rows`` of m, n, k, seconds whose weights were cold.

    Those of a CPU are not ``tiled``.
    """
    form = _Products(dtype, hw, cold=True)
    cleaned = clean(rows, [faster_than(form.compute_floor)])
    found = _problem(form, *cleaned, source)
    if not tiled:
        fitted = [c for c in found.coefficients if c.name in gemm.OF_UNTILED]
        return replace(found, coefficients=fitted, constants={gemm.UNTILED: 1.0})
    return replace(found, coefficients=[c for c in found.coefficients if c.name != "l2_hit_share"])


def problem(table: Path, dtype: str) -> Problem:
    """The fit of products in ``dtype`` from a table of m, n, k, dtype, latency_us in the folder of a device."""
    form = _Products(dtype, hardware(table.parent.name, dtype))
    # The steps between tiles of the fp8_block kernels are real, not hiccups.
    hiccups = [] if dtype == "fp8_block" else [slower_than_larger(["n", "k"], "m")]
    kin = [slower_than_kin(_rows(other, dtype), ["m", "n", "k"]) for other in lesser_kin(table)]
    frame, dropped = clean(_rows(table, dtype), [faster_than(form.compute_floor), *hiccups, *kin])
    return _problem(form, frame, dropped, f"{table.parent.name}/{table.name} ({table_version(table)})")


def _problem(form: _Products, frame: pd.DataFrame, dropped: dict[str, int], source: str) -> Problem:
    served = np.array([pair in gemm_shapes() for pair in zip(frame["n"], frame["k"], strict=True)])
    usual = (frame["n"] >= 512) & (frame["k"] >= 512) & (frame["n"] * frame["k"] < 4e8) & (frame["m"] <= 16384)
    ordinary = usual.to_numpy()
    return Problem(
        kind="gemm",
        key=form.dtype,
        form="gemm",
        source=source,
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=[*gemm.COEFFICIENTS, *EXTRA[form.dtype]],
        coordinates=form.coordinates,
        knots=COARSE_KNOTS if form.dtype.endswith("_wo") else KNOTS,
        valid={"m": "m", "n": "n", "k": "k"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": ordinary}),
            "largest": ((frame["m"] >= 4096).to_numpy(), {"largest": served}),
            "served_shapes": (served, {"served_shapes": (frame["m"] <= 8192).to_numpy()}),
        },
        weight=np.where(ordinary, 1.0, 0.15),
    )


def _rows(table: Path, dtype: str) -> pd.DataFrame:
    frame = read_table(table, ["m", "n", "k", "latency_us"], ["dtype"])
    frame = frame[frame["dtype"] == dtype].reset_index(drop=True)
    frame["seconds"] = frame["latency_us"] * SECONDS_PER_US
    return frame
