"""A device profile from tables of our own measuring: the forms and fits of every other source, cold as measured.

Weights and caches took turns while they were timed, so that nothing of them was left in the last cache; what is not
measured is taken from the shipped profile of the same hardware, if there is one, and marked ``estimated``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from apexsim import catalog
from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array, Coefficient, Coefficients, Hardware
from apexsim.costs.forms.small import ELEMENTWISE, SAMPLING, sampling_s
from apexsim.fitting import gemm, links, moe
from apexsim.fitting.attention import Heads, chunk_problem, cold_decode_problem
from apexsim.fitting.few import fitted_to_rows, loosened
from apexsim.fitting.fit import fit_coefficients
from apexsim.fitting.links import Curve
from apexsim.fitting.mixed import shared_launch
from apexsim.fitting.own import ONE_LAUNCH, OwnTables, TooFewRows
from apexsim.fitting.power import prior
from apexsim.fitting.problems import Operators, Problem, summary
from apexsim.fitting.small import memory_bound
from apexsim.specs.device import FittedOperator, SustainedClock
from apexsim.specs.power import PowerModel

SHAPE = ["batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "window_size"]
EXPERTS = ["tokens", "hidden", "inter", "topk", "experts", "tp", "ep"]
# Fewer rows tell nothing apart.
LEAST_ROWS = 8
# pJ a FLOP, assumed: of a core of 10 W at 200 GFLOP/s, of which half is drawn anyway; of a GPU about that of H100.
PICOJOULES = {"cpu": {"bf16": 25.0}, "cuda": {"bf16": 1.0}}
# Content and size of the products whose slow-down under load counts.
CONTENT, LEAST_TOKENS = "normal", 128


def problems(own: OwnTables) -> Iterator[Problem]:
    """The fits of products, attention and experts, each from its table."""
    for problem in (*_products(own), *_attention(own), *_experts(own)):
        if len(problem.frame) < LEAST_ROWS:
            would_do = f"measure it again: {LEAST_ROWS} rows within the roofline are the least that can be fitted"
            raise TooFewRows(would_do, where=own.folder, key=f"{problem.kind} {problem.key}", got=len(problem.frame))
        yield fitted_to_rows(problem, loose=_loose(own, problem.frame))


def operators(own: OwnTables) -> Operators:
    """The small operators, and collectives where ranks were measured."""
    return {name: found for name, found in _small(own).items() if found} | _collectives(own) | _mixed(own)


def borrowed(own: OwnTables, found: Operators) -> Operators:
    """Operators that were not measured, of the shipped profile of the same hardware."""
    if own.device.profile is None:
        return {}
    shipped = catalog.load("device", own.device.profile)
    # A correction of one of these is a ratio to what was measured with it, whatever its keys.
    whole = {"elementwise"}.intersection(found)
    if len(own.rows("mixed_attention", ["chunk"])):
        whole.add("mixed_attention")
    taken: Operators = {}
    for kind, by_key in shipped.operators.items():
        for key, operator in by_key.items():
            if key not in found.get(kind, {}) and kind not in whole:
                source = f"not measured here: as in {shipped.name}: {operator.source}"
                taken.setdefault(kind, {})[key] = operator.model_copy(
                    update={"evidence": "estimated", "source": source}
                )
    return taken


def sustained(own: OwnTables) -> SustainedClock:
    """How much slower large products run after seconds of replays than at first; no slow-down where none was held."""
    rows = own.rows("sustained", ["size_0", "size_1", "size_2", "burst_latency_s"], ["operator", "content"])
    keep = (rows["operator"] == "gemm") & (rows["content"] == CONTENT) & (rows["size_0"] >= LEAST_TOKENS)
    rows = rows[keep]
    if own.device.kind == "cpu" or rows.empty:
        return SustainedClock(evidence="estimated", source="no long replays of this device: no slow-down assumed")
    factors = (rows["seconds"] / rows["burst_latency_s"]).groupby(rows["size_0"]).median()
    return SustainedClock(
        tokens=tuple(float(size) for size in factors.index),
        factors=tuple(max(1.0, round(float(factor), 3)) for factor in factors),
        evidence="fitted",
        source=own.source(rows),
    )


def power(own: OwnTables) -> PowerModel:
    """Power of the shipped profile of the same hardware with the idle watts measured here; else assumed shares."""
    device = own.device
    if device.profile is None:
        idle_w = device.idle_power_w or 0.4 * device.datasheet.tdp_w
        return prior(device.datasheet.tdp_w, idle_w, PICOJOULES[device.kind])
    shipped = catalog.load("device", device.profile).power
    if device.idle_power_w is None:
        return shipped
    evidence = {**shipped.evidence, "idle_w": "kernel", "comm_w": "kernel"}
    watts = float(f"{device.idle_power_w:.3g}")
    return shipped.model_copy(update={"idle_w": watts, "comm_w": watts, "evidence": evidence})


def _loose(own: OwnTables, frame: pd.DataFrame) -> bool:
    """Whether bounds of GPU kernels do not hold: on a CPU, and where pages are gathered before the kernel."""
    return own.device.kind == "cpu" or bool(frame["kernel_source"].str.contains("gathered").any())


def _products(own: OwnTables) -> Iterator[Problem]:
    rows = own.rows("gemm", ["m", "n", "k"], ["dtype"])
    for dtype, part in rows.groupby("dtype"):
        if COMPUTE_DTYPE[str(dtype)] in own.device.datasheet.flops_per_s:
            hw, tiled = _hardware(own, str(dtype)), own.device.kind != "cpu"
            yield gemm.measured_problem(_alone(part), str(dtype), hw, own.source(part), tiled=tiled)


def _attention(own: OwnTables) -> Iterator[Problem]:
    for name, build in (("prefill_attention", chunk_problem), ("decode_attention", cold_decode_problem)):
        rows = own.rows(name, SHAPE, ["kv_dtype"])
        rows = rows.assign(history=rows["kv_len"] - rows["q_len"], keys=rows["kv_len"])
        for (kv_dtype, head_dim), part in rows.groupby(["kv_dtype", "head_dim"]):
            heads = Heads(str(kv_dtype), int(float(str(head_dim))), _hardware(own, str(kv_dtype)))
            yield build(_alone(part), heads, own.source(part))


def _experts(own: OwnTables) -> Iterator[Problem]:
    rows = own.rows("moe", EXPERTS, ["routing", "dtype"])
    for dtype, part in rows.groupby("dtype"):
        yield moe.measured_problem(_alone(part), str(dtype), _hardware(own, str(dtype)), own.source(part))


def _alone(part: pd.DataFrame) -> pd.DataFrame:
    return part.reset_index(drop=True)


def _hardware(own: OwnTables, dtype: str) -> Hardware:
    return Hardware.of(own.device.datasheet, dtype)


def _small(own: OwnTables) -> Operators:
    rows = own.rows("elementwise", ["bytes"], ["kind"])
    found: Operators = {"elementwise": {}, "sampling": {}}
    if len(rows):
        _check_rows(own, "elementwise", rows, ELEMENTWISE)
        kinds = {str(kind): part for kind, part in rows.groupby("kind") if len(part) >= len(ELEMENTWISE)}
        found["elementwise"] = {key: _elementwise(own, part) for key, part in {"any": rows, **kinds}.items()}
    rows = own.rows("sampling", ["sequences", "vocab"], ["method"])
    rows = rows[rows["method"] == "greedy"]
    if len(rows):
        _check_rows(own, "sampling", rows, SAMPLING)
        found["sampling"] = {"any": _sampling(own, rows)}
    return found


def _check_rows(own: OwnTables, name: str, rows: pd.DataFrame, coefficients: Sequence[Coefficient]) -> None:
    """Raise TooFewRows where there are fewer rows than coefficients to tell apart."""
    if len(rows) < len(coefficients):
        would_do = f"measure it again: {len(coefficients)} rows are the least that can be fitted"
        raise TooFewRows(would_do, where=own.folder, key=name, got=len(rows))


def _elementwise(own: OwnTables, rows: pd.DataFrame) -> FittedOperator:
    moved, seconds = rows["bytes"].to_numpy(), rows["seconds"].to_numpy()
    coefficients = loosened(ELEMENTWISE) if _small_is_loose(own) else ELEMENTWISE
    return memory_bound(moved, seconds, _hardware(own, "bf16"), own.source(rows), coefficients)


def _small_is_loose(own: OwnTables) -> bool:
    return own.device.kind == "cpu"


def _sampling(own: OwnTables, rows: pd.DataFrame) -> FittedOperator:
    sequences, vocab, seconds = (rows[name].to_numpy() for name in ("sequences", "vocab", "seconds"))
    hw = _hardware(own, "bf16")

    def predict(c: Coefficients) -> Array:
        return sampling_s(sequences, vocab, c, hw)

    coefficients: Sequence[Coefficient] = loosened(SAMPLING)
    c = fit_coefficients(predict, seconds, np.ones(len(rows)), coefficients, {})
    return FittedOperator(
        form="sampling",
        coefficients=c,
        valid={"sequences": (float(sequences.min()), float(sequences.max()))},
        evidence="fitted",
        source=own.source(rows),
        rows_used=len(rows),
        quality={"in_sample": summary(np.abs(predict(c) / seconds - 1))},
    )


def _mixed(own: OwnTables) -> Operators:
    """Chunks and decodes in one launch, where they were launched so; else the parts of a step add up."""
    rows = own.rows("mixed_attention", ["chunk", "history", "decodes", "keys", "heads", "kv_heads", "head_dim"])
    rows = rows[rows["kernel_source"].astype(str).str.endswith(ONE_LAUNCH)].reset_index(drop=True)
    if len(rows) < LEAST_ROWS:
        return {}
    return {"mixed_attention": {"any": shared_launch(rows, _hardware(own, "bf16"), own.source(rows))}}


def _collectives(own: OwnTables) -> Operators:
    rows = own.rows("collective", ["num_gpus", "bytes"], ["collective"])
    found: Operators = {}
    for (collective, group), part in rows.groupby(["collective", "num_gpus"]):
        points = sorted(zip(part["bytes"], part["seconds"], strict=True))
        if len(points) >= 3:
            key = "p2p" if collective == "send_recv" else f"nccl_{int(float(str(group)))}"
            curve = Curve(str(collective), key, points, own.source(part))
            found.setdefault(curve.kind, {})[curve.key] = links.operator(curve)
    return found
