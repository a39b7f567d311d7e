"""Fits of prefill and decode attention, one per KV dtype and head size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.forms import decode, prefill
from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware
from apexsim.fitting.cleaning import Mask, Rule, clean, faster_than, one_query_token, slower_than_kin
from apexsim.fitting.facts import lesser_kin
from apexsim.fitting.inside import InLayers
from apexsim.fitting.problems import Problem, random_fifth
from apexsim.fitting.served import head_shapes
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.units import dtype_bytes

SHAPE = ["batch", "q_len", "kv_len", "heads", "kv_heads", "window_size"]
NUMBERS = ["batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "latency_us"]
PREFILL_KNOTS = {
    "window": (1.0, 2.0),
    "group": (1.0, 4.0, 8.0),
    "heads_in_flight": (1.0, 8.0, 32.0, 128.0, 512.0, 4096.0),
    "chunk": (16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0),
}
# Finer ones for the head size that most models have.
COARSE_PREFILL_KNOTS = {
    "window": (1.0, 2.0),
    "group": (1.0, 8.0),
    "heads_in_flight": (1.0, 16.0, 128.0, 4096.0),
    "chunk": (16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0),
}
DECODE_KNOTS = {
    "window": (1.0, 2.0),
    "group": (1.0, 8.0),
    "pairs": (1.0, 8.0, 64.0, 512.0, 4096.0),
    "keys": (16.0, 128.0, 512.0, 2048.0, 8192.0, 32768.0, 131072.0),
}

# Timed layers: one head shape per model, chunks behind histories.
LAYER_PREFILL_KNOTS = {
    "window": (1.0,),
    "group": (1.0,),
    "heads_in_flight": (1.0,),
    "chunk": (2.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0, 2048.0),
}
LAYER_DECODE_KNOTS = {**DECODE_KNOTS, "window": (1.0,), "group": (1.0,)}
# Three models with all their decodes: how packed groups of heads fill a device shows in the correction of replays.
INSIDE_KNOTS = {
    "window": (1.0,),
    "group": (1.0,),
    "pairs": (8.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0),
    "keys": (16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0),
}
CAUSAL_SKIP = Coefficient("causal_skip", 0.9, 0.01, 1.0, "skip: share of the triangle behind a history left out")

DECODE_KERNEL = Rule(
    "decode kernel in a prefill table", lambda rows: ~rows["kernel_source"].str.endswith("decode").to_numpy()
)


class Heads(NamedTuple):
    """What is fitted apart: attention over a cache of ``kv_dtype`` with heads of ``head_dim``, on one device."""

    kv_dtype: str
    head_dim: int
    hw: Hardware

    @property
    def key(self) -> str:
        """Key of the fitted operator."""
        return f"{self.kv_dtype}_d{self.head_dim}"


def _rows(table: Path, heads: Heads) -> pd.DataFrame:
    """Rows of one KV dtype and head size, with ``seconds``; ``window`` is NaN for full attention."""
    frame = read_table(table, [*NUMBERS, "window_size"], ["kv_dtype", "kernel_source"])
    keep = (frame["kv_dtype"] == heads.kv_dtype) & (frame["head_dim"] == heads.head_dim)
    frame = frame[keep].reset_index(drop=True)
    frame["seconds"] = frame["latency_us"] * SECONDS_PER_US
    frame["keys"] = np.where(
        frame["window_size"] > 0, np.minimum(frame["kv_len"], frame["window_size"]), frame["kv_len"]
    )
    frame["history"] = frame["kv_len"] - frame["q_len"]
    return frame


def _source(table: Path, frame: pd.DataFrame) -> str:
    kernels = ", ".join(sorted(frame["kernel_source"].unique()))
    return f"{table.parent.name}/{table.name} ({table_version(table)}), {kernels}"


def _knots(knots: dict[str, tuple[float, ...]], frame: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """The knots, with one window knot where the table has no sliding windows."""
    return knots if (frame["window_size"] > 0).any() else {**knots, "window": (1.0,)}


def _served_heads(frame: pd.DataFrame) -> Mask:
    return np.array([pair in head_shapes() for pair in zip(frame["heads"], frame["kv_heads"], strict=True)])


def _by_window(rows: pd.DataFrame) -> list[tuple[float | None, Mask]]:
    """Every window of the rows (None: full attention) with the rows that have it."""
    windows = rows["window_size"].to_numpy()
    return [(float(w) if w > 0 else None, windows == w) for w in np.unique(windows)]


class _Prefill(NamedTuple):
    """The prefill form on rows of a table."""

    kv_bytes: float
    hw: Hardware

    def chunks(self, rows: pd.DataFrame) -> prefill.Chunks:
        return prefill.Chunks(rows["q_len"].to_numpy(), rows["history"].to_numpy(), rows["batch"].to_numpy())

    def heads(self, rows: pd.DataFrame, window: float | None) -> prefill.Heads:
        sizes = (rows["heads"].to_numpy(), rows["kv_heads"].to_numpy(), rows["head_dim"].to_numpy())
        return prefill.Heads(*sizes, window, self.kv_bytes)

    def predict(self, rows: pd.DataFrame, c: Coefficients) -> Array:
        out = np.empty(len(rows))
        for window, at in _by_window(rows):
            bound = prefill.bind(self.heads(rows[at], window), c, self.hw)
            out[at], _ = prefill.prefill_s(self.chunks(rows[at]), bound)
        return out

    def compute_floor(self, rows: pd.DataFrame) -> Array:
        """Causal pairs at peak FLOP/s; bytes may come from the cache in a replay."""
        out = np.empty(len(rows))
        for window, at in _by_window(rows):
            part = rows[at]
            pairs = prefill.causal_pairs(part["q_len"].to_numpy(), part["history"].to_numpy(), window)
            out[at] = 4 * part["batch"] * pairs * part["heads"] * part["head_dim"] / self.hw.flops_per_s
        return out

    def coordinates(self, rows: pd.DataFrame) -> Sequence[Array]:
        _, *others = prefill.residual_coordinates(self.chunks(rows), self.heads(rows, None))
        return np.where(rows["window_size"] > 0, 2.0, 1.0), *others


class _Decode(NamedTuple):
    """The decode form on rows of a table, caches hot as they were measured, or ``cold`` inside whole layers."""

    kv_bytes: float
    hw: Hardware
    cold: bool = False

    def shape(self, rows: pd.DataFrame) -> decode.DecodeShape:
        batch, keys, heads, kv_heads, head_dim = (
            rows[column].to_numpy() for column in ("batch", "keys", "heads", "kv_heads", "head_dim")
        )
        return decode.DecodeShape(batch, keys, heads, kv_heads, head_dim, self.kv_bytes)

    def predict(self, rows: pd.DataFrame, c: Coefficients) -> Array:
        return decode.decode_s(self.shape(rows), c, self.hw, cold=self.cold)

    def is_cold(self, rows: pd.DataFrame) -> Mask:
        """Rows too large for the cache to matter: over twice L2."""
        return np.asarray(decode.moved_bytes(self.shape(rows)) > 2 * self.hw.l2_bytes)

    def cold_floor(self, rows: pd.DataFrame) -> Array:
        size = decode.moved_bytes(self.shape(rows))
        return np.asarray(np.where(self.is_cold(rows), size / self.hw.bytes_per_s, 0.0))

    def coordinates(self, rows: pd.DataFrame) -> Sequence[Array]:
        _, *others = decode.residual_coordinates(self.shape(rows), False)
        return np.where(rows["window_size"] > 0, 2.0, 1.0), *others


def prefill_problem(table: Path, heads: Heads, causal_skip: float = 1.0) -> Problem:
    """Prefill attention from a table of whole prompts (no history); ``causal_skip`` comes from ``history``."""
    form = _Prefill(dtype_bytes(heads.kv_dtype), heads.hw)
    kin = [slower_than_kin(_rows(other, heads), SHAPE) for other in lesser_kin(table)]
    rules = [one_query_token("q_len"), DECODE_KERNEL, faster_than(form.compute_floor), *kin]
    frame, dropped = clean(_rows(table, heads), rules)
    served, full = _served_heads(frame), (frame["window_size"] == 0).to_numpy()
    everything, large = np.ones(len(frame), bool), (frame["q_len"] > 8192).to_numpy()
    return Problem(
        kind="prefill_attention",
        key=heads.key,
        form="prefill",
        source=_source(table, frame),
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=[*prefill.COEFFICIENTS, *(() if full.all() else (prefill.WINDOW_EFFICIENCY,))],
        coordinates=form.coordinates,
        knots=_knots(PREFILL_KNOTS if heads.head_dim == 128 else COARSE_PREFILL_KNOTS, frame),
        valid={"chunk": "q_len", "history": "history", "heads": "heads", "kv_heads": "kv_heads"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything, "random_served_full": served & full}),
            "largest": (large, {"largest": served & full}),
            "served_shapes": (served, {"served_shapes": full, "served_shapes_windowed": ~full}),
        },
        weight=np.ones(len(frame)),
        constants={"causal_skip": causal_skip},
        scan=("query_tile", tuple(float(t) for t in prefill.QUERY_TILES)),
    )


def decode_problem(table: Path, heads: Heads) -> Problem:
    """Decode attention from a table of equal-length batches."""
    form = _Decode(dtype_bytes(heads.kv_dtype), heads.hw)
    frame, dropped = clean(_rows(table, heads), [faster_than(form.cold_floor)])
    served, full = _served_heads(frame), (frame["window_size"] == 0).to_numpy()
    everything, cold = np.ones(len(frame), bool), form.is_cold(frame) & full
    size = (frame["keys"] * frame["batch"] * frame["kv_heads"]).to_numpy()
    return Problem(
        kind="decode_attention",
        key=heads.key,
        form="decode",
        source=_source(table, frame),
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=decode.COEFFICIENTS,
        coordinates=form.coordinates,
        knots=_knots(DECODE_KNOTS, frame),
        valid={"keys": "keys", "batch": "batch", "heads": "heads", "kv_heads": "kv_heads"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything, "random_served_cold": served & cold}),
            "largest": (size > size.max() / 8, {"largest": full}),
            "served_shapes": (served, {"served_shapes": full, "served_shapes_cold": cold}),
        },
        # Cold rows are what serving sees; the hot ones are there to tell the cache apart from the form.
        weight=np.where(cold, 1.0, 0.3),
        scan=("split_ungrouped", (1.0, 0.0)),
    )


def decodes_inside(problem: Problem, rows: pd.DataFrame, heads: Heads, source: str) -> Problem:
    """The fit of a table of decodes, corrected for what they take inside timed layers (``mixed.attention_rows``)."""
    form = _Decode(dtype_bytes(heads.kv_dtype), heads.hw, cold=True)
    inside = InLayers(_lone_decodes(rows, heads).assign(weight=1.0), form.predict, form.coordinates, INSIDE_KNOTS)
    return replace(problem, source=f"{problem.source}; {source}", refine=inside.refine)


def _lone_decodes(rows: pd.DataFrame, heads: Heads) -> pd.DataFrame:
    """Timed layers without a chunk, in the columns of a table of decodes."""
    decodes = rows[(rows["chunk"] == 0) & (rows["decodes"] > 0)].reset_index(drop=True)
    return decodes.assign(head_dim=float(heads.head_dim), window_size=0.0, batch=decodes["decodes"].astype(float))


def layer_problems(rows: pd.DataFrame, heads: Heads, source: str) -> Iterator[Problem]:
    """Prefill and decode attention from timed layers (``mixed.attention_rows``), each where it ran alone."""
    frame = rows.assign(head_dim=float(heads.head_dim), window_size=0.0)
    chunks = frame[(frame["chunk"] > 1) & (frame["decodes"] == 0)]
    chunks = chunks.assign(batch=1.0, q_len=chunks["chunk"], kv_len=chunks["chunk"] + chunks["history"])
    yield chunk_problem(chunks.reset_index(drop=True), heads, source)
    yield cold_decode_problem(_lone_decodes(rows, heads), heads, source)


def chunk_problem(rows: pd.DataFrame, heads: Heads, source: str) -> Problem:
    """Prefill attention from chunks that were timed behind histories, without sliding windows."""
    form = _Prefill(dtype_bytes(heads.kv_dtype), heads.hw)
    frame, dropped = clean(rows, [faster_than(form.compute_floor)])
    everything = np.ones(len(frame), bool)
    return Problem(
        kind="prefill_attention",
        key=heads.key,
        form="prefill",
        source=source,
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=[*prefill.COEFFICIENTS, CAUSAL_SKIP],
        coordinates=form.coordinates,
        knots=LAYER_PREFILL_KNOTS,
        valid={"chunk": "q_len", "history": "history", "heads": "heads", "kv_heads": "kv_heads"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything}),
            "largest": ((frame["kv_len"] > 4096).to_numpy(), {"largest": everything}),
        },
        weight=everything.astype(float),
        # No layer timed has a sliding window: its inner loop is taken to be as fast.
        constants={"window_efficiency": 1.0},
        scan=("query_tile", tuple(float(t) for t in prefill.QUERY_TILES)),
    )


def cold_decode_problem(rows: pd.DataFrame, heads: Heads, source: str) -> Problem:
    """Decode attention from batches whose keys and values were cold, without sliding windows."""
    form = _Decode(dtype_bytes(heads.kv_dtype), heads.hw, cold=True)
    frame, dropped = clean(rows, [faster_than(form.cold_floor)])
    everything, size = np.ones(len(frame), bool), (frame["keys"] * frame["batch"] * frame["kv_heads"]).to_numpy()
    return Problem(
        kind="decode_attention",
        key=heads.key,
        form="decode",
        source=source,
        frame=frame,
        dropped=dropped,
        predict=form.predict,
        coefficients=[c for c in decode.COEFFICIENTS if not c.name.startswith("l2_")],
        coordinates=form.coordinates,
        knots=LAYER_DECODE_KNOTS,
        valid={"keys": "keys", "batch": "batch", "heads": "heads", "kv_heads": "kv_heads"},
        holdouts={
            "random": (random_fifth(len(frame)), {"random": everything}),
            "largest": (size > size.max() / 8, {"largest": everything}),
        },
        weight=everything.astype(float),
        constants={"split_ungrouped": 1.0},
    )
