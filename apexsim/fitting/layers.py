"""A fit of products judged by whole layers that another laboratory timed (vllm_layers): sizes off the fitted grid.

Errors of single products cancel in a layer, so the sum over its four products is what counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.forms import gemm
from apexsim.costs.forms.hardware import Coefficients, Hardware
from apexsim.costs.forms.residual import LogGrid
from apexsim.fitting.gaps import launch_gap_s
from apexsim.fitting.problems import summary
from apexsim.fitting.tables import SECONDS_PER_US, read_table
from apexsim.fitting.timed_models import DENSE, Widths
from apexsim.specs.device import HoldOut, ResidualGrid

# Folders of the layers timed on a device, by the folder of its other tables.
TIMED = {"rtx_pro_6000_server": "RTXPRO6000", "rtx_4090": "RTX4090"}


def product_rows(layers: Path) -> pd.DataFrame:
    """Every bf16 product of the layers in the folder ``layers``: ``model``, ``layer``, m, n, k, ``seconds``.

    CUDA time, and the gap between a kernel and the next.
    """
    found, gap_s = [], launch_gap_s(layers.parents[1])
    for model, layer in DENSE.items():
        table = layers / model / "dense.parquet"
        if table.is_file():
            frame = read_table(table, ["tp", "tokens", "time_us_per_call"], ["layer"])
            for name, (n, k) in layer.products(frame["tp"].to_numpy(dtype=float)).items():
                rows = frame.assign(model=model, m=frame["tokens"].astype(float), n=n, k=k)[frame["layer"] == name]
                found.append(rows.assign(seconds=rows["time_us_per_call"] * SECONDS_PER_US + gap_s))
    return pd.concat(found, ignore_index=True)


def head_rows(layers: Path) -> pd.DataFrame:
    """The LM heads timed beside them, in the same columns: the widest products there are."""
    found, gap_s = [], launch_gap_s(layers.parents[1])
    for model, layer in DENSE.items():
        table = layers / model / "per_sequence.parquet"
        if table.is_file():
            frame = read_table(table, ["tp", "sequences", "time_us_per_call"], ["layer"])
            frame = frame[frame["layer"] == "lm_head"]
            shape = {"m": frame["sequences"].astype(float), "n": layer.vocab / frame["tp"]}
            rows = frame.assign(model=model, **shape, k=float(layer.hidden))
            found.append(rows.assign(seconds=rows["time_us_per_call"] * SECONDS_PER_US + gap_s))
    return pd.concat(found, ignore_index=True)


def layer_sums(layers: Path, c: Coefficients, grid: ResidualGrid, hw: Hardware) -> dict[str, HoldOut]:
    """Errors of bf16 products on the layers in the folder ``layers``: of single ones, and of the sums of a layer."""
    single, summed, residual = [], [], LogGrid.of(grid)
    for model, layer in DENSE.items():
        table = layers / model / "dense.parquet"
        if not table.is_file():
            continue
        frame = read_table(table, ["tp", "tokens", "time_us_per_call"], ["layer"])
        measured = frame.pivot_table(index=["tp", "tokens"], columns="layer", values="time_us_per_call")
        predicted = _products_s(measured, layer, (c, residual, hw)) / SECONDS_PER_US
        measured = measured[list(predicted.columns)] + launch_gap_s(layers.parents[1]) / SECONDS_PER_US
        single.append(np.abs(np.asarray(predicted / measured) - 1).ravel())
        summed.append(np.abs(np.asarray(predicted.sum(axis=1) / measured.sum(axis=1)) - 1))
    return {
        "products_of_vllm_layers": summary(np.concatenate(single)),
        "sum_of_vllm_layers": summary(np.concatenate(summed)),
    }


def _products_s(measured: pd.DataFrame, layer: Widths, fit: tuple[Coefficients, LogGrid, Hardware]) -> pd.DataFrame:
    c, residual, hw = fit
    tp, tokens = (measured.index.get_level_values(name).to_numpy(dtype=float) for name in ("tp", "tokens"))
    seconds = {}
    for name, (n, k) in layer.products(tp).items():
        shape = gemm.shape(tokens, n, k, "bf16")
        factor = np.exp(residual.log_factor(*gemm.residual_coordinates(shape)))
        seconds[name] = np.maximum(gemm.gemm_s(shape, c, hw) * factor, gemm.roofline_s(shape, hw))
    return pd.DataFrame(seconds, index=measured.index)
