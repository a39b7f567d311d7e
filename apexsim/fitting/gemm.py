"""Fit of matrix products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.forms import gemm
from apexsim.costs.forms.hardware import Array, Coefficients, Hardware
from apexsim.fitting.cleaning import Rule, clean, faster_than, slower_than_larger
from apexsim.fitting.problems import Problem, random_fifth
from apexsim.fitting.served import gemm_shapes
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.units import dtype_bytes

KNOTS = {
    "n": (32.0, 512.0, 1536.0, 4096.0, 8192.0, 65536.0),
    "k": (32.0, 512.0, 1536.0, 4096.0, 8192.0, 65536.0),
    "m": (1.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1536.0, 4096.0, 32768.0),
}
# Kernels with own library choices per dtype: cuBLAS cuts k, the fp8 kernels do not but quantise activations.
EXTRA = {"bf16": (gemm.SPLIT,), "fp8": (gemm.QUANTISE,), "fp8_block": (gemm.QUANTISE,)}


def problem(table: Path, dtype: str, hw: Hardware) -> Problem:
    """The fit of products in ``dtype`` from a table of m, n, k, dtype, latency_us."""
    width = dtype_bytes(dtype)
    frame = read_table(table, ["m", "n", "k", "latency_us"], ["dtype"])
    frame = frame[frame["dtype"] == dtype].reset_index(drop=True)
    frame["seconds"] = frame["latency_us"] * SECONDS_PER_US

    def shape(rows: pd.DataFrame) -> gemm.GemmShape:
        return gemm.GemmShape(rows["m"].to_numpy(), rows["n"].to_numpy(), rows["k"].to_numpy(), width)

    def predict(rows: pd.DataFrame, c: Coefficients) -> Array:
        return gemm.gemm_s(shape(rows), c, hw, cold=False)

    def compute_floor(rows: pd.DataFrame) -> Array:
        return np.asarray(2 * rows["m"] * rows["n"] * rows["k"] / hw.flops_per_s)

    rules: list[Rule] = [faster_than(compute_floor)]
    if dtype != "fp8_block":
        rules.append(slower_than_larger(["n", "k"], "m"))
    frame, dropped = clean(frame, rules)
    served = np.array([pair in gemm_shapes() for pair in zip(frame["n"], frame["k"], strict=True)])
    serving = served & (frame["m"] <= 8192).to_numpy()
    large = (frame["m"] >= 4096).to_numpy()
    usual = (frame["n"] >= 512) & (frame["k"] >= 512) & (frame["n"] * frame["k"] < 4e8) & (frame["m"] <= 16384)
    ordinary = usual.to_numpy()
    return Problem(
        kind="gemm",
        key=dtype,
        form="gemm",
        source=f"{table.name} ({table_version(table)})",
        frame=frame,
        dropped=dropped,
        predict=predict,
        coefficients=[*gemm.COEFFICIENTS, *EXTRA[dtype]],
        coordinates=lambda rows: gemm.residual_coordinates(shape(rows)),
        knots=KNOTS,
        valid={"m": "m", "n": "n", "k": "k"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": ordinary}),
            "largest": (large, {"largest": served}),
            "served_shapes": (served, {"served_shapes": serving}),
        },
        weight=np.where(ordinary, 1.0, 0.15),
    )
