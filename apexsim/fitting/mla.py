"""Fits of latent attention from tables of whole modules: projections, attention, and what lies between the kernels.

    module = module_s + projections + attention x residual

The projections are the very products and element-wise kernels that a model is lowered to, at the costs already fitted
for the device; only ``module_s`` and the attention are fitted here. ``module_s`` (one for each dtype of the products)
is what the measured modules spend beyond those kernels: small kernels that engines fuse or leave out. It is additive,
the same to a few microseconds from 1 head to 128, hence no floor of launches that hides kernels; it stays in the
profile for the record, and serving pays for its own kernels instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms import mla, prefill
from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware
from apexsim.costs.forms.residual import LogGrid
from apexsim.costs.mla import projections
from apexsim.fitting.cleaning import Mask, Rule, clean, faster_than, one_query_token
from apexsim.fitting.fit import Knots, fit_coefficients, fit_residual
from apexsim.fitting.problems import SEED, Problem, random_fifth, solve, summary
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.specs.device import DeviceProfile, FittedOperator, HoldOut, ResidualGrid
from apexsim.specs.latent import FOUR_BIT, LatentAttention
from apexsim.units import dtype_bytes

# The model of the tables: DeepSeek-V3 (its config.json).
HIDDEN = 7168
SIZES = LatentAttention(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
# Heads of a device at the tensor degrees that serve DeepSeek and Kimi on 2 to 8 devices: kept out together.
SERVED_HEADS = (16, 32)
FIT_ROWS = 4000
# Share of a row that the attention may fall to where the rest explains more than the row: keeps logarithms finite.
LEAST_SHARE = 0.3
RESIDUAL_PASSES = 8
# Prompts up to this many tokens run FlashMLA's decode kernel where the cache is fp8 (Hopper; kernel_source of H100).
FLASHMLA_TOKENS, FLASHMLA_FOLDERS = 128, ("h100_sxm", "h200_sxm")
DECODE_KNOTS = {
    "heads": (1.0, 8.0, 16.0, 32.0, 64.0, 128.0),
    "batch": (1.0, 4.0, 16.0, 32.0, 64.0, 256.0, 1024.0),
    "keys": (16.0, 512.0, 2048.0, 8192.0, 131072.0),
}
PREFILL_KNOTS = {
    "window": (1.0,),
    "group": (1.0,),
    "heads_in_flight": (1.0, 8.0, 32.0, 128.0, 512.0, 4096.0),
    "chunk": (16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0),
}
# Measured decodes of next to no keys take longer with every doubling of the batch up to here, on every device; the
# attention kernel alone (TensorRT-LLM on Blackwell) does not, and no product does: what grows is beside them.
GROWING_BATCH = 64.0
DOUBLING = Coefficient("module_doubling_s", 2e-6, 0.01e-6, 8e-6, "growth outside attention per doubling of the batch")
# Where the decode kernel alone was measured (TensorRT-LLM's, which vLLM and SGLang run there too, in CUDA graphs), it
# says more than modules, which serve to judge projections and prompts. vLLM 0.14's tables of it show only launches.
KERNEL_FOLDERS = ("b200_sxm", "b300_sxm", "gb200", "gb300")
LAUNCH = Coefficient("launch_s", 8e-6, 1e-6, 20e-6, "t0: launch and drain")
HIDDEN_PASSES = Coefficient("hidden_passes", 2.0, 0.05, 12.0, "passes over hidden states: copies, quantising")
_FLASHMLA = Rule(
    f"a prompt of up to {FLASHMLA_TOKENS} tokens (decode kernel)",
    lambda rows: np.asarray(rows["q_len"] > FLASHMLA_TOKENS),
)


@dataclass(frozen=True, slots=True)
class _Modules:
    """Measured modules of one kind and KV dtype; ``rest_s`` are the seconds of each row's projections."""

    kind: str
    frame: pd.DataFrame
    rest_s: Array
    attention: Callable[[pd.DataFrame, Coefficients], Array]
    coordinates: Callable[[pd.DataFrame], Sequence[Array]]
    coefficients: Sequence[Coefficient]
    constants: Mapping[str, float]
    scan: tuple[str, Sequence[float]]
    knots: Knots

    def rest(self, c: Coefficients) -> Array:
        """Seconds of every row outside attention."""
        return self.rest_s + _module_s(self.frame, c)


def operators(profile: DeviceProfile, kernels: Path, folder: str) -> dict[str, dict[str, FittedOperator]]:
    """Latent attention of a device by kind and KV dtype; ``profile`` holds its products. Nothing without tables."""
    found: dict[str, dict[str, FittedOperator]] = {}
    tables = kernels / "datacenter" / folder
    decodes, prompts = tables / "mla_generation_module.parquet", tables / "mla_context_module.parquet"
    if not decodes.is_file() or not prompts.is_file():
        return found
    costs = OperatorCosts(profile, sustained=False)
    for kv_dtype in ("bf16", "fp8"):
        for table, read in ((decodes, _decode_modules), (prompts, _prefill_modules)):
            rows, dropped = _rows(table, kv_dtype, costs)
            if read is _prefill_modules and kv_dtype == "fp8" and folder in FLASHMLA_FOLDERS:
                rows, short = clean(rows, [_FLASHMLA])
                dropped |= short
            if len(rows):
                modules, more = read(rows, kv_dtype, costs)
                found.setdefault(modules.kind, {})[kv_dtype] = _solve(modules, table, dropped | more)
        if folder in KERNEL_FOLDERS and kv_dtype in found.get("mla_decode", {}):
            of_modules = found["mla_decode"][kv_dtype].quality
            kernel = solve(_kernel_problem(tables / "mla_generation_kernel.parquet", kv_dtype, costs))
            quality = kernel.quality | {f"module_{name}": scored for name, scored in of_modules.items()}
            found["mla_decode"][kv_dtype] = kernel.model_copy(update={"quality": quality})
    return found


def _rows(table: Path, kv_dtype: str, costs: OperatorCosts) -> tuple[pd.DataFrame, dict[str, int]]:
    """Modules that compute prompts in bf16, on products that the device has costs for; one row a size.

    Not those in four bits: no checkpoint has such projections (``specs.latent.FOUR_BIT``).
    """
    sizes = ["heads", "batch", "q_len", "kv_len"]
    frame = read_table(table, [*sizes, "latency_us"], ["dtype", "kv_dtype", "gemm_dtype"])
    frame = frame[(frame["kv_dtype"] == kv_dtype) & (frame["dtype"] == "bf16")]
    known = frame["gemm_dtype"].isin(set(costs.profile.operators["gemm"]) - set(FOUR_BIT))
    dropped = {"products that no checkpoint has, or without a cost": int((~known).sum())} if not known.all() else {}
    frame = frame[known].groupby(["gemm_dtype", *sizes])["latency_us"].median().reset_index()
    frame["seconds"] = frame["latency_us"] * SECONDS_PER_US
    return frame, dropped


def _kernel_problem(table: Path, kv_dtype: str, costs: OperatorCosts) -> Problem:
    """Latent decodes from a table of the attention kernel alone: no modules, no projections."""
    hw = Hardware.of(costs.profile.datasheet, kv_dtype)
    frame = read_table(table, ["heads", "batch", "kv_len", "latency_us"], ["kv_dtype"])
    frame = frame[frame["kv_dtype"] == kv_dtype]
    rows = frame.groupby(["heads", "batch", "kv_len"])["latency_us"].median().reset_index()
    rows["seconds"] = rows["latency_us"] * SECONDS_PER_US
    shapes = _Decodes(kv_dtype, hw)
    rows, dropped = clean(rows, [faster_than(shapes.cold_floor)])
    everything, size = np.ones(len(rows), dtype=bool), (rows["batch"] * rows["kv_len"]).to_numpy()
    served = rows["heads"].isin(SERVED_HEADS).to_numpy()
    return Problem(
        kind="mla_decode",
        key=kv_dtype,
        form="mla_decode",
        source=f"{table.name} ({table_version(table)})",
        frame=rows,
        dropped=dropped,
        predict=shapes.predict,
        coefficients=[*mla.COEFFICIENTS, LAUNCH],
        coordinates=shapes.coordinates,
        knots=DECODE_KNOTS,
        valid={"heads": "heads", "batch": "batch", "keys": "kv_len"},
        holdouts={
            "random": (random_fifth(len(rows)), {"random": everything}),
            "largest": (size > size.max() / 8, {"largest": everything}),
            "served_shapes": (served, {"served_shapes": everything}),
        },
        weight=everything.astype(float),
        scan=("head_tile", mla.HEAD_TILES),
    )


@dataclass(frozen=True, slots=True)
class _Decodes:
    """The decode form on rows of a table, caches hot as they were measured."""

    kv_dtype: str
    hw: Hardware

    def shape(self, rows: pd.DataFrame) -> mla.LatentBatch:
        batch, keys, heads = (rows[column].to_numpy(dtype=float) for column in ("batch", "kv_len", "heads"))
        width = dtype_bytes(self.kv_dtype)
        return mla.LatentBatch(batch, keys, heads, SIZES.kv_lora_rank, SIZES.qk_rope_head_dim, width)

    def predict(self, rows: pd.DataFrame, c: Coefficients) -> Array:
        return mla.decode_s(self.shape(rows), c, self.hw, cold=False)

    def cold_floor(self, rows: pd.DataFrame) -> Array:
        size = mla.moved_bytes(self.shape(rows))
        return np.asarray(np.where(size > 2 * self.hw.l2_bytes, size / self.hw.bytes_per_s, 0.0))

    def coordinates(self, rows: pd.DataFrame) -> Sequence[Array]:
        return mla.residual_coordinates(self.shape(rows))


def _decode_modules(rows: pd.DataFrame, kv_dtype: str, costs: OperatorCosts) -> tuple[_Modules, dict[str, int]]:
    hw = Hardware.of(costs.profile.datasheet, kv_dtype if kv_dtype in costs.profile.datasheet.flops_per_s else "bf16")

    shapes = _Decodes(kv_dtype, hw)
    frame, dropped = clean(rows, [faster_than(shapes.cold_floor)])
    modules = _Modules(
        kind="mla_decode",
        frame=frame,
        rest_s=_projections_s(frame, costs),
        attention=shapes.predict,
        coordinates=shapes.coordinates,
        coefficients=[*mla.COEFFICIENTS, DOUBLING],
        constants={"launch_s": costs.operator("decode_attention", "bf16_d128").coefficients["launch_s"]},
        scan=("head_tile", mla.HEAD_TILES),
        knots=DECODE_KNOTS,
    )
    return modules, dropped


def _prefill_modules(rows: pd.DataFrame, kv_dtype: str, costs: OperatorCosts) -> tuple[_Modules, dict[str, int]]:
    hw, width = Hardware.of(costs.profile.datasheet, "bf16"), dtype_bytes(kv_dtype)
    size = (SIZES.qk_head_dim + SIZES.v_head_dim) / 2

    def chunks(part: pd.DataFrame) -> prefill.Chunks:
        return prefill.Chunks(part["q_len"].to_numpy(), np.zeros(len(part)), part["batch"].to_numpy())

    def heads(part: pd.DataFrame) -> prefill.Heads:
        return prefill.Heads(part["heads"].to_numpy(), part["heads"].to_numpy(), size, None, width)

    def attention(part: pd.DataFrame, c: Coefficients) -> Array:
        seconds, _ = prefill.prefill_s(chunks(part), prefill.bind(heads(part), c, hw))
        copied = 2.0 * HIDDEN * part["batch"].to_numpy() * part["q_len"].to_numpy()
        return np.asarray(seconds + c["hidden_passes"] * copied / hw.bytes_per_s)

    def compute_floor(part: pd.DataFrame) -> Array:
        pairs = prefill.causal_pairs(part["q_len"].to_numpy(), 0.0, None)
        return np.asarray(4 * size * part["batch"] * part["heads"] * pairs / hw.flops_per_s)

    frame, dropped = clean(rows, [one_query_token("q_len"), faster_than(compute_floor)])
    launch_s = costs.operator("prefill_attention", "bf16_d128").coefficients["launch_s"]
    modules = _Modules(
        kind="mla_prefill",
        frame=frame,
        rest_s=_projections_s(frame, costs),
        attention=attention,
        coordinates=lambda part: prefill.residual_coordinates(chunks(part), heads(part)),
        coefficients=[*(c for c in prefill.COEFFICIENTS if c.name != "launch_s"), HIDDEN_PASSES],
        constants={"launch_s": launch_s, "causal_skip": 1.0},
        scan=("query_tile", tuple(float(tile) for tile in prefill.QUERY_TILES)),
        knots=PREFILL_KNOTS,
    )
    return modules, dropped


def _projections_s(frame: pd.DataFrame, costs: OperatorCosts) -> Array:
    """Seconds of the projections of every row."""
    out = np.empty(len(frame))
    dtypes, heads = frame["gemm_dtype"].to_numpy(), frame["heads"].to_numpy()
    tokens = (frame["batch"] * frame["q_len"]).to_numpy(dtype=float)
    for dtype, count in sorted(set(zip(dtypes.tolist(), heads.tolist(), strict=True))):
        at = (dtypes == dtype) & (heads == count)
        before, after = projections(SIZES, (HIDDEN, int(count)), dtype, indexed=False)
        out[at] = sum(op.seconds(costs, tokens[at]) for op in [*before, *after])
    return out


def _module(dtype: str) -> str:
    return f"module_{dtype}_s"


def _module_s(frame: pd.DataFrame, c: Coefficients) -> Array:
    """Seconds of every module outside projections and attention."""
    fixed = np.array([c[_module(dtype)] for dtype in frame["gemm_dtype"]])
    doublings = np.log2(np.minimum(frame["batch"].to_numpy(), GROWING_BATCH))
    return np.asarray(fixed + c.get(DOUBLING.name, 0.0) * doublings)


def _solve(modules: _Modules, table: Path, dropped: dict[str, int]) -> FittedOperator:
    """Fit on all rows, and again without each hold-out to score it."""
    frame = modules.frame
    everything = np.ones(len(frame), dtype=bool)
    size = (frame["batch"] * frame["kv_len"]).to_numpy()
    large = size > size.max() / 8 if modules.kind == "mla_decode" else (frame["q_len"] > 8192).to_numpy()
    served = frame["heads"].isin(SERVED_HEADS).to_numpy()
    start = _choose(modules)
    quality: dict[str, HoldOut] = {}
    for name, test in {"random": random_fifth(len(frame)), "largest": large, "served_shapes": served}.items():
        if not test.any() or test.all():
            continue
        c, grid = _fit(modules, ~test, start)
        quality[name] = summary(_errors(modules, c, grid)[test])
    c, grid = _fit(modules, everything, start)
    columns = {"heads": "heads", "batch": "batch", "keys": "kv_len"}
    if modules.kind == "mla_prefill":
        columns = {"heads": "heads", "chunk": "q_len"}
    return FittedOperator(
        form=modules.kind,
        coefficients=c,
        residual=grid,
        valid={name: (float(frame[column].min()), float(frame[column].max())) for name, column in columns.items()},
        evidence="fitted",
        source=f"{table.name} ({table_version(table)})",
        rows_used=len(frame),
        rows_dropped=dropped,
        quality=quality,
    )


def _choose(modules: _Modules) -> dict[str, float]:
    """The scanned constant with the least mean error, beside the fixed ones."""
    name, values = modules.scan
    everything, losses = np.ones(len(modules.frame), dtype=bool), []
    for value in values:
        c = _fit_form(modules, everything, {**modules.constants, name: value}, FIT_ROWS // 4)
        error = np.abs(np.log((modules.rest(c) + modules.attention(modules.frame, c)) / modules.frame["seconds"]))
        losses.append(float(np.mean(np.minimum(error, 0.5))))
    return {**modules.constants, name: values[int(np.argmin(losses))]}


def _fit_form(modules: _Modules, train: Mask, start: Coefficients, most_rows: int) -> dict[str, float]:
    rows = np.flatnonzero(train)
    rows = np.sort(np.random.default_rng(SEED).choice(rows, min(most_rows, len(rows)), replace=False))
    part = modules.frame.iloc[rows]
    beside = [
        Coefficient(_module(dtype), 40e-6, 1e-6, 200e-6, "kernels of the measured module beyond those lowered")
        for dtype in sorted(modules.frame["gemm_dtype"].unique())
    ]

    def predict(c: Coefficients) -> Array:
        return np.asarray(modules.rest_s[rows] + _module_s(part, c) + modules.attention(part, c))

    seconds = part["seconds"].to_numpy()
    return fit_coefficients(predict, seconds, np.ones(len(rows)), [*modules.coefficients, *beside], start)


def _fit(modules: _Modules, train: Mask, start: Coefficients) -> tuple[dict[str, float], ResidualGrid]:
    """Coefficients, then the residual of the attention: what each row leaves, weighted by attention's share of it.

    The residual is fitted in passes, each on what the ones before left: where attention is a small part of a module its
    rows weigh little, and one pass would be held back by the smoothness asked of the grid.
    """
    c = _fit_form(modules, train, start, FIT_ROWS)
    part, attention, rest = modules.frame[train], modules.attention(modules.frame, c)[train], modules.rest(c)[train]
    coordinates, found = modules.coordinates(part), None
    for _ in range(RESIDUAL_PASSES):
        left = np.maximum(part["seconds"].to_numpy() - rest, LEAST_SHARE * attention)
        share = attention / (attention + rest)
        more = fit_residual(np.log(left / attention), share**2, coordinates, modules.knots)
        attention = attention * np.exp(LogGrid.of(more).log_factor(*coordinates))
        found = more if found is None else _added(found, more)
    assert found is not None, "there is at least one pass"
    return c, found


def _added(first: ResidualGrid, second: ResidualGrid) -> ResidualGrid:
    """Two corrections on the same knots, one after the other."""
    total = np.asarray(first.percent) + np.asarray(second.percent)
    return ResidualGrid(axes=first.axes, percent=tuple(tuple(row) for row in total.tolist()))


def _errors(modules: _Modules, c: Coefficients, grid: ResidualGrid) -> Array:
    factor = np.exp(LogGrid.of(grid).log_factor(*modules.coordinates(modules.frame)))
    predicted = modules.rest(c) + modules.attention(modules.frame, c) * factor
    return np.asarray(np.abs(predicted / modules.frame["seconds"].to_numpy() - 1))
