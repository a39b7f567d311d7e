"""What a run's steps did, worked out after it: joules, FLOPs, bytes, and device seconds by operator and evidence.

The same operators that gave the steps their times are evaluated again, vectorised: those that cost by tokens once per
distinct token count, attention step by step. Power follows the profile's ``PowerModel``:

    P = smooth minimum(limit_w, active_w + j_per_byte bytes / t + j_per_flop FLOP / t)    kernels
    P = comm_w                                                                            collectives
    P = gap_w                                                   inside a step, waiting for the host

All figures are of all devices together; a device that waits for another pipeline stage or has no batch is not working
and is left to the idle power of whoever sums up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array
from apexsim.costs.forms.prefill import causal_pairs
from apexsim.costs.operators import Attention, Collective, Experts, Gemm, RowOperator
from apexsim.costs.steps import StepCost
from apexsim.specs.device import PowerModel
from apexsim.units import NS_PER_S

Columns = Mapping[str, NDArray[np.int64]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Accounting:
    """Totals over all devices. ``energy_j`` by operator; ``seconds`` of device time by (operator, evidence).

    Operators are the kinds of a device profile, and ``host``. Evidence is ``fitted``, ``estimated``, or
    ``extrapolated`` where a size lay outside what was measured.
    """

    energy_j: dict[str, float]
    flops: float
    bytes_moved: float
    seconds: dict[tuple[str, str], float]


@dataclass(frozen=True)
class _Work:
    """One operator at several sizes: what one run of it takes and moves on one device, and how often it ran in all."""

    seconds: Array
    flops: Array
    bytes_moved: Array
    runs: Array


class _Tally:
    """Sums up work."""

    def __init__(self, power: PowerModel) -> None:
        self._power = power
        self.energy_j: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.flops = 0.0
        self.bytes_moved = 0.0

    def add(self, kind: str, work: _Work, joules: Array, evidence: str, outside: Any = False) -> None:
        """``joules`` of one run at every size; ``outside`` marks sizes beyond the measured ones."""
        # Sums, not np.dot: a threaded BLAS may add in another order from run to run.
        self.energy_j[kind] += float((joules * work.runs).sum())
        self.flops += float((work.flops * work.runs).sum())
        self.bytes_moved += float((work.bytes_moved * work.runs).sum())
        spent = work.seconds * work.runs
        beyond = float(spent[np.broadcast_to(outside, spent.shape)].sum())
        for how, seconds in ((evidence, float(spent.sum()) - beyond), ("extrapolated", beyond)):
            if seconds > 0:
                self.seconds[kind, how] += seconds

    def kernel_j(self, work: _Work, dtype: str) -> Array:
        """Joules of one run of a kernel that computes in ``dtype``.

        The smooth minimum is (a^-8 + b^-8)^(-1/8): 8 % below the plain one where both are equal.
        """
        power = self._power
        per_flop = power.j_per_flop.get(COMPUTE_DTYPE.get(dtype, dtype), power.j_per_flop["bf16"])
        drawn = power.active_w * work.seconds + power.j_per_byte * work.bytes_moved + per_flop * work.flops
        most = power.limit_w * work.seconds
        low, high = np.minimum(drawn, most), np.maximum(drawn, most)
        share = np.divide(low, high, out=np.zeros_like(low), where=high > 0)
        fourth = (share * share) ** 2
        return np.asarray(low / np.sqrt(np.sqrt(np.sqrt(1 + fourth * fourth))))

    def joules(self, operator: RowOperator, work: _Work) -> Array:
        """Joules of one run of an operator."""
        if isinstance(operator, Collective):
            return self._power.comm_w * work.seconds
        dtype = operator.layer.dtype if isinstance(operator, Experts) else "bf16"
        return self.kernel_j(work, operator.dtype if isinstance(operator, Gemm) else dtype)


def account(cost: StepCost, steps: Columns, chunks: Columns) -> Accounting:
    """Work through a run's rows.

    ``steps``: one row a step, or ``repeats`` decode steps of one batch, with ``decodes``, ``context`` and
    ``window_context_<window>`` of the first one, ``chunk_tokens``, ``survivors``. ``chunks``: ``step`` (row in
    ``steps``), ``tokens``, ``history``.
    """
    tally = _Tally(cost.tables.costs.profile.power)
    first_s = _add_rows(tally, cost, steps)
    chunks_of_step = np.bincount(chunks["step"], minlength=len(first_s))
    launches = np.where(steps["decodes"] > 0, 0.0, 1.0 / np.maximum(chunks_of_step, 1))[chunks["step"]]
    for attention in cost.attentions:
        layers = cost.lowered.layers_of(attention)
        runs = float(sum(layers) * cost.lowered.tensor)
        first_s += layers[0] * _add_decodes(tally, cost, attention, steps, runs) / np.maximum(steps["repeats"], 1)
        chunk_s = _add_chunks(tally, cost, attention, chunks, (launches, runs))
        first_s += layers[0] * np.bincount(chunks["step"], weights=chunk_s, minlength=len(first_s))
    _add_host(tally, cost, _host_s(cost, steps["decodes"] + chunks_of_step, first_s), steps["repeats"])
    return Accounting(dict(tally.energy_j), tally.flops, tally.bytes_moved, dict(tally.seconds))


def _add_rows(tally: _Tally, cost: StepCost, steps: Columns) -> Array:
    """Add every operator that costs by rows; returns their seconds in each step on the first stage."""
    stages = cost.lowered.stages
    counts: Counter[RowOperator] = Counter()
    for stage in stages:
        for operator, count in [*stage.row_operators(), *((op, 1) for op in stage.head)]:
            counts[operator] += count
    first: Counter[RowOperator] = Counter()
    for operator, count in [*stages[0].row_operators(), *((op, 1) for op in stages[0].head)]:
        first[operator] += count
    first_s = np.zeros(len(steps["repeats"]))
    for rows, of_step in (("tokens", steps["decodes"] + steps["chunk_tokens"]), ("survivors", steps["survivors"])):
        sizes, where = np.unique(of_step, return_inverse=True)
        runs = np.bincount(where, weights=steps["repeats"], minlength=len(sizes)) * float(cost.lowered.tensor)
        for operator in (op for op in counts if op.rows == rows):
            seconds = np.zeros(len(sizes))
            seconds[sizes > 0] = cost.tables.rows_s(operator, sizes[sizes > 0])
            _add_operator(tally, cost, operator, seconds, (sizes, _floats(runs * counts[operator])))
            first_s += first[operator] * seconds[where]
    return first_s


def _add_operator(
    tally: _Tally, cost: StepCost, operator: RowOperator, seconds: Array, sized: tuple[NDArray[np.int64], Array]
) -> None:
    """Add one operator at its distinct sizes; an all-reduce is told apart by the kernel it uses."""
    costs, (sizes, runs) = cost.tables.costs, sized
    rows = sizes.astype(np.float64)
    some = rows > 0
    for kernel, mask in _kernels(operator, rows):
        at = some & mask
        work = _Work(seconds[at], operator.flops(rows[at]), operator.bytes_moved(rows[at]), runs[at])
        outside = costs.extrapolated(kernel.kind, kernel.key, **kernel.sizes(rows[at]))
        tally.add(kernel.kind, work, tally.joules(kernel, work), costs.evidence(kernel.kind, kernel.key), outside)


def _kernels(operator: RowOperator, rows: Array) -> list[tuple[RowOperator, Mask]]:
    """The fitted operators behind an operator and the sizes at which each answers."""
    if not isinstance(operator, Collective) or not operator.custom_max_bytes:
        return [(operator, np.ones(len(rows), dtype=bool))]
    own = operator.bytes_per_row * rows <= operator.custom_max_bytes
    return [(operator, own), (operator.library, ~own)]


def _add_decodes(tally: _Tally, cost: StepCost, attention: Attention, steps: Columns, runs: float) -> Array:
    """Add decode attention; returns the seconds of one layer in every row, all its repeats together."""
    shape, batch, repeats = attention.shape, steps["decodes"], steps["repeats"]
    attended = steps["context" if shape.window is None else f"window_context_{shape.window}"]
    growing = attended != batch * (shape.window or 0)
    mean = attended // np.maximum(batch, 1)
    seconds = np.zeros(len(batch))
    order = np.argsort(batch, kind="stable")
    sizes, starts, counts = np.unique(batch[order], return_index=True, return_counts=True)
    for size, start, count in zip(sizes.tolist(), starts, counts, strict=True):
        if size:
            at = order[start : start + count]
            ends = mean[at] + np.where(growing[at], repeats[at], 1)
            table = cost.tables.decode(attention, size)
            table.between(0, int(ends.max()))
            prefix = np.array(table.prefix, dtype=np.int64)
            seconds[at] = (prefix[ends] - prefix[mean[at]]) * np.where(growing[at], 1, repeats[at]) / NS_PER_S
    pairs = repeats * (attended + growing * batch * (repeats - 1) / 2)
    moved = attention.bytes_moved(_floats(batch * repeats), _floats(pairs))
    work = _Work(seconds, attention.flops(pairs), moved, np.full(len(batch), runs))
    sizes_now = {"keys": mean, "batch": batch, "heads": shape.heads, "kv_heads": shape.kv_heads}
    _add_attention(tally, cost, ("decode_attention", attention), work, sizes_now)
    return seconds


def _add_chunks(
    tally: _Tally, cost: StepCost, attention: Attention, chunks: Columns, counted: tuple[Array, float]
) -> Array:
    """Add chunk attention; returns the seconds of one layer for every chunk.

    ``counted`` is each chunk's part in the launch of its step's kernel (chunks share one, which is part of decode
    attention where there are decodes), and how often each chunk runs.
    """
    shape, tokens, history = attention.shape, chunks["tokens"], chunks["history"]
    launches, runs = counted
    fitted = cost.tables.costs.prefill_attention(shape)
    seconds = fitted.many(tokens, history, launch=False) + launches * fitted.launch_s
    keys = tokens + (history if shape.window is None else np.minimum(history, shape.window))
    pairs = causal_pairs(tokens, history, shape.window)
    moved = attention.bytes_moved(_floats(tokens), _floats(keys))
    work = _Work(seconds, attention.flops(pairs), moved, np.full(len(tokens), runs))
    sizes = {"chunk": tokens, "history": history, "heads": shape.heads, "kv_heads": shape.kv_heads}
    _add_attention(tally, cost, ("prefill_attention", attention), work, sizes)
    return seconds


def _add_attention(
    tally: _Tally, cost: StepCost, which: tuple[str, Attention], work: _Work, sizes: Mapping[str, object]
) -> None:
    if not len(work.seconds):
        return
    costs, (kind, attention) = cost.tables.costs, which
    outside = costs.extrapolated(kind, attention.key, **sizes)
    joules = tally.kernel_j(work, attention.shape.kv_dtype)
    tally.add(kind, work, joules, costs.evidence(kind, attention.key), outside)


def _host_s(cost: StepCost, sequences: NDArray[np.int64], first_s: Array) -> Array:
    """Seconds in which a step's first stage waits for the host, beyond its ``first_s`` of device time."""
    host = cost.engine.host
    busy_s = host.step_s + host.per_sequence_s * sequences
    waits_s = np.maximum(0.0, busy_s - first_s) if host.overlapped else busy_s
    return np.asarray(waits_s + host.exposed_step_s)


def _add_host(tally: _Tally, cost: StepCost, host_s: Array, repeats: NDArray[np.int64]) -> None:
    nothing = np.zeros_like(host_s)
    work = _Work(host_s, nothing, nothing, _floats(repeats) * cost.lowered.tensor)
    joules = cost.tables.costs.profile.power.gap_w * host_s
    tally.add("host", work, joules, "fitted" if cost.engine.evidence == "serving" else "estimated")


def _floats(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)
