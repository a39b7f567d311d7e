"""Power coefficients from tables of kernels whose power was measured while they were replayed.

Only rows whose replay lasted ``MIN_REPLAY_S``: shorter ones are averaged with what lies between replays. Many rows are
at the limit, where the coefficients leave no trace; so bytes cost the same in every kind of kernel, and a prior holds
what rows do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.energy import smooth_least
from apexsim.costs.forms.hardware import Array
from apexsim.fitting.tables import SECONDS_PER_US, read_table
from apexsim.specs.device import Datasheet
from apexsim.specs.power import FitError
from apexsim.units import dtype_bytes

MIN_REPLAY_S = 1e-3
# The collector captures 6 copies of a matrix product in a graph, one of everything else.
GEMM_COPIES = 6
# Within this share of the limit that the driver reports, a row is at it.
AT_LIMIT = 0.97
# Labels of the tables: width of a weight, and the tensor cores it computes on.
_WEIGHTS = {"w4a16_mxfp4": ("mxfp4", "bf16"), "w4a8_mxfp4_mxfp8": ("mxfp4", "fp8"), "nvfp4": ("nvfp4", "nvfp4")} | {
    "int4_wo": ("int4_wo", "bf16"),
    "fp8_block": ("fp8_block", "fp8"),
}
# Where the fit starts, and how far (as a factor's logarithm) it may stray: shares of the limit, pJ/byte, pJ/FLOP.
_PRIOR = {"active": 0.5, "byte": 55.0, "bf16": 0.8, "fp8": 0.45, "nvfp4": 0.25}
_SPREAD = {"active": 1.0, "byte": 0.5, "bf16": 1.5, "fp8": 1.5, "nvfp4": 1.5}
# Weight of the prior beside the rows of one kind of kernel.
_PRIOR_WEIGHT = 0.03


class KernelFit(NamedTuple):
    """What the tables of a device say. ``j_per_flop``: by (kind, dtype), one for all attention."""

    limit_w: float
    idle_w: float
    active_w: dict[str, float]
    j_per_byte: float
    j_per_flop: dict[tuple[str, str], float]
    quality: dict[str, FitError]


def fit_tables(folder: Path, sheet: Datasheet) -> KernelFit | None:
    """Fit the ``__power`` tables in a device's folder; None where it has none."""
    frame = _rows(folder)
    if frame is None:
        return None
    limit_w = round(float(frame["power_w"][frame["power_w"] > AT_LIMIT * frame["power_limit_w"]].median()), 0)
    idle_w = round(float(frame["power_w"].quantile(0.001)), 0)
    frame = _clean(frame, sheet)
    kinds = list(dict.fromkeys(frame["kind"]))
    flops = list(dict.fromkeys(zip(frame["family"], frame["dtype"], strict=True)))
    names = ["active"] * len(kinds) + ["byte"] + [dtype for _, dtype in flops]
    start = np.array([_PRIOR[name] * (limit_w if name == "active" else 1) for name in names])
    spread = np.array([_SPREAD[name] for name in names])
    kind = frame["kind"].map({name: at for at, name in enumerate(kinds)}).to_numpy()
    flop = np.array([flops.index(pair) for pair in zip(frame["family"], frame["dtype"], strict=True)])
    bytes_per_s, flops_per_s = frame["bytes_per_s"].to_numpy() / 1e12, frame["flops_per_s"].to_numpy() / 1e12

    def predict(x: Array) -> Array:
        drawn = x[kind] + x[len(kinds)] * bytes_per_s + x[len(kinds) + 1 :][flop] * flops_per_s
        return smooth_least(drawn, np.full(len(drawn), limit_w))

    weight = 1 / frame.groupby("kind")["kind"].transform("size").to_numpy()
    found = _solve(predict, frame["power_w"].to_numpy(), (weight, start, spread))
    error = predict(found) / frame["power_w"].to_numpy() - 1
    each = [float(f"{value:.3g}") for value in found]
    per_flop = dict(zip(flops, (1e-12 * value for value in each[len(kinds) + 1 :]), strict=True))
    return KernelFit(
        limit_w=limit_w,
        idle_w=idle_w,
        active_w=dict(zip(kinds, each, strict=False)),
        j_per_byte=1e-12 * each[len(kinds)],
        j_per_flop={key: float(f"{value:.3g}") for key, value in per_flop.items()},
        quality={f"kernels_{name}": fit_error(error[kind == at]) for at, name in enumerate(kinds)},
    )


def fit_error(error: Array) -> FitError:
    """Mean size, mean and count of relative errors."""
    return FitError(round(float(np.abs(error).mean()), 4), round(float(error.mean()), 4), len(error))


def _solve(predict: Callable[[Array], Array], watts: Array, given: tuple[Array, Array, Array]) -> Array:
    """Least squares of log watts, every kind of kernel weighing one, with a log-normal prior on each coefficient."""
    from scipy.optimize import least_squares

    weight, start, spread = given
    root = np.sqrt(weight)

    def residuals(x: Array) -> Array:
        return np.concatenate([root * np.log(predict(np.exp(x)) / watts), _PRIOR_WEIGHT * (x - np.log(start)) / spread])

    return np.asarray(np.exp(least_squares(residuals, np.log(start)).x))


def _clean(frame: pd.DataFrame, sheet: Datasheet) -> pd.DataFrame:
    """Rows that were replayed for long enough and keep within the peaks of the device."""
    peaks = frame["dtype"].map({"bf16": 1.0, "fp8": 2.0, "nvfp4": 4.0}) * sheet.flops_per_s["bf16"]
    keep = (frame["replay_s"] >= MIN_REPLAY_S) & (frame["bytes_per_s"] <= sheet.memory_bytes_per_s)
    return frame[keep & (frame["flops_per_s"] <= peaks)].reset_index(drop=True)


def _rows(folder: Path) -> pd.DataFrame | None:
    """Every table as rates: kind, family, dtype, replay_s, bytes_per_s, flops_per_s, power_w, power_limit_w."""
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        "gemm": _products,
        "context_attention": _prompts,
        "generation_attention": _decodes,
        "moe": _experts,
    }
    found = [
        reader(path) for table, reader in readers.items() for path in sorted(folder.glob(f"{table}__power*.parquet"))
    ]
    return pd.concat(found, ignore_index=True) if found else None


def _table(path: Path, numbers: list[str], labels: list[str]) -> tuple[pd.DataFrame, Array]:
    """A table, and its seconds."""
    frame = read_table(path, [*numbers, "latency_us", "power_w", "power_limit_w"], labels)
    return frame, frame["latency_us"].to_numpy() * SECONDS_PER_US


def _rates(kind: str, frame: pd.DataFrame, seconds: Array, done: tuple[Array, Array, Array]) -> pd.DataFrame:
    """``done``: FLOPs, bytes, and tensor cores of every row."""
    flops, moved, dtype = done
    return pd.DataFrame({
        "kind": kind,
        "family": "attention" if kind.endswith("attention") else kind,
        "dtype": dtype,
        "replay_s": seconds * (GEMM_COPIES if kind == "gemm" else 1),
        "bytes_per_s": moved / seconds,
        "flops_per_s": flops / seconds,
        "power_w": frame["power_w"],
        "power_limit_w": frame["power_limit_w"],
    })  # fmt: skip


def _widths(frame: pd.DataFrame) -> tuple[Array, Array]:
    """Bytes of a weight and its tensor cores, row by row."""
    known = {label: _WEIGHTS.get(label, (label, label)) for label in frame["dtype"].unique()}
    widths = frame["dtype"].map({label: dtype_bytes(width) for label, (width, _) in known.items()})
    cores = frame["dtype"].map({label: cores for label, (_, cores) in known.items()})
    return widths.to_numpy(dtype=float), cores.to_numpy()


def _products(path: Path) -> pd.DataFrame:
    frame, seconds = _table(path, ["m", "n", "k"], ["dtype"])
    m, n, k = (frame[name].to_numpy() for name in ("m", "n", "k"))
    width, cores = _widths(frame)
    return _rates("gemm", frame, seconds, (2 * m * n * k, width * n * k + 2 * m * (n + k), cores))


def _experts(path: Path) -> pd.DataFrame:
    numbers = ["tokens", "hidden", "inter", "topk", "experts", "tp", "ep"]
    frame, seconds = _table(path, numbers, ["dtype"])
    tokens, hidden, inter, topk, experts, tp, ep = (frame[name].to_numpy() for name in numbers)
    width, cores = _widths(frame)
    expert = 3 * hidden * inter / tp
    visits = tokens * topk / ep
    touched = experts / ep * (1 - (1 - topk / experts) ** tokens)
    moved = width * expert * touched + 4 * visits * (hidden + inter / tp)
    return _rates("moe", frame, seconds, (2 * expert * visits, moved, cores))


_ATTENTION = ["batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "window_size"]


def _prompts(path: Path) -> pd.DataFrame:
    frame, seconds = _table(path, _ATTENTION, ["dtype", "kv_dtype"])
    queries, window = frame["q_len"].to_numpy(), frame["window_size"].to_numpy()
    open_ = np.where(window > 0, np.minimum(queries, window), queries)
    pairs = open_ * (open_ + 1) / 2 + (queries - open_) * open_ + queries * np.maximum(frame["kv_len"] - queries, 0)
    return _attention("prefill_attention", frame, seconds, (pairs, frame["kv_len"].to_numpy()))


def _decodes(path: Path) -> pd.DataFrame:
    frame, seconds = _table(path, _ATTENTION, ["dtype", "kv_dtype"])
    window = frame["window_size"].to_numpy()
    keys = np.where(window > 0, np.minimum(frame["kv_len"], window), frame["kv_len"])
    return _attention("decode_attention", frame, seconds, (keys, keys))


def _attention(kind: str, frame: pd.DataFrame, seconds: Array, attended: tuple[Array, Array]) -> pd.DataFrame:
    """``attended``: query-key pairs and keys of one sequence and head."""
    pairs, keys = attended
    batch, queries, heads = (frame[name].to_numpy() for name in ("batch", "q_len", "heads"))
    size, width = frame["head_dim"].to_numpy(), frame["kv_dtype"].map(dtype_bytes).to_numpy()
    moved = batch * size * (4 * heads * queries + 2 * frame["kv_heads"].to_numpy() * width * keys)
    return _rates(kind, frame, seconds, (4 * batch * heads * size * pairs, moved, frame["dtype"].to_numpy()))
