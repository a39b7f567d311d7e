"""What a run's steps did, operator by operator: seconds, FLOPs and bytes, worked out after the run, vectorised.

The same operators that gave the steps their times are evaluated again: those that cost by tokens once per distinct
token count, attention step by step. A device that waits for another pipeline stage or has no batch is not working and
has no entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms.hardware import Array
from apexsim.costs.forms.prefill import WINDOW_EFFICIENCY
from apexsim.costs.mixing import Mixing
from apexsim.costs.operators import Collective, Experts, Gemm, RowOperator, Sampling
from apexsim.costs.ranks import OwnPart, share
from apexsim.costs.steps import BatchStats, StepCost
from apexsim.costs.tables import PrefixTable
from apexsim.costs.waiting import busy_share
from apexsim.units import NS_PER_S

Columns = Mapping[str, NDArray[np.int64]]
Mask = NDArray[np.bool_]
Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """One operator at several sizes: what one run of it takes and moves on one device, and where it ran how often.

    ``kind`` is that of a device profile, or ``host`` for time in which devices wait for the host. ``dtype`` is what it
    computes in; None for what computes nothing (collectives, waiting). ``outside`` marks sizes beyond the measured
    ones. Of every run: ``step`` (row in ``steps``; None where each row has one, in turn), ``at`` (which size; None
    where each size has one, in turn) and ``runs``, how often it ran over all devices (an array, or one for all).
    ``busy`` is the share of the seconds in which an average device works; else it waits for another one. ``spread`` is
    the relative standard deviation of the seconds (see ``OperatorCosts.spread``); none is known of waiting.
    """

    kind: str
    dtype: str | None
    seconds: Array
    flops: Array
    bytes_moved: Array
    step: Sizes | None
    at: Sizes | None
    runs: Array | float
    evidence: str
    outside: Any = False
    busy: Array | float = 1.0
    spread: float = 0.0

    def by_run(self, values: Array) -> Array:
        """Of every run, as often as it ran, what ``values`` say of its size."""
        return np.asarray((values if self.at is None else values[self.at]) * self.runs)

    def by_step(self, by_run: Array, steps: int) -> Array:
        """Sum of what ``by_run`` says of the runs in each of the ``steps`` rows."""
        return by_run if self.step is None else _floats(np.bincount(self.step, weights=by_run, minlength=steps))

    def total(self, values: Array) -> float:
        """Sum of ``values`` (one for each size) over all runs."""
        # Not np.dot: a threaded BLAS may add in another order from run to run.
        return float(self.by_run(values).sum())


def work_of(cost: StepCost, steps: Columns, chunks: Columns) -> Iterator[Work]:
    """Work through a run's rows.

    ``steps``: one row a step, or ``repeats`` decode steps of one batch, with ``decodes``, ``context`` and
    ``window_context_<window>`` of the first one, ``window_growing_<window>`` decodes for which that grows by one from
    step to step, ``chunk_tokens``, ``survivors``. ``chunks``: ``step`` (row in ``steps``), ``tokens``, ``history``.
    """
    lowered = cost.lowered
    own = OwnPart.of(steps, chunks, lowered.attention_data)
    first_s = yield from _rows(cost, steps, own)
    for attention in cost.attentions:
        layers = lowered.layers_of(attention)
        decode_s, chunk_s = _decode_s(cost, attention, steps), _chunk_s(cost, attention, chunks, own.launches)
        together = _together(cost, attention, (steps, chunks, own), (decode_s, chunk_s))
        decode_s, chunk_s = decode_s * together, chunk_s * together[chunks["step"]]
        yield from _decodes(cost, attention, steps, (decode_s, float(sum(layers) * lowered.stage_devices)))
        # A chunk runs on one attention-data rank alone.
        yield from _chunks(cost, attention, chunks, (chunk_s, float(sum(layers) * lowered.tensor)))
        first_s += layers[0] * (decode_s / np.maximum(steps["repeats"], 1) + _waited_s(chunk_s, chunks, own))
    yield _host(cost, _host_s(cost, steps, own, first_s), steps["repeats"])


def _rows(cost: StepCost, steps: Columns, own: OwnPart) -> Generator[Work, None, Array]:
    """Every operator that costs by rows; returns their seconds in each step on the first stage."""
    stages = cost.lowered.stages
    counts: Counter[RowOperator] = Counter()
    for stage in stages:
        for operator, count in [*stage.row_operators(), *((op, 1) for op in stage.head)]:
            counts[operator] += count
    first: Counter[RowOperator] = Counter()
    for operator, count in [*stages[0].row_operators(), *((op, 1) for op in stages[0].head)]:
        first[operator] += count
    first_s = np.zeros(len(steps["repeats"]))
    runs = _floats(steps["repeats"] * cost.lowered.stage_devices)
    for rows, fullest, of_all in _row_counts(steps, own):
        operators = [operator for operator in counts if operator.rows == rows]
        if not operators:
            continue
        span = int(fullest.max(initial=0)) + 1
        pairs, where = np.unique(of_all * span + fullest, return_inverse=True)
        ranks = 1 if rows == "all_tokens" else cost.lowered.attention_data
        sizes, mean = pairs % span, pairs // span / ranks
        for operator in operators:
            seconds = np.zeros(len(sizes))
            seconds[sizes > 0] = cost.tables.rows_s(operator, sizes[sizes > 0])
            yield from _operator(cost, operator, seconds, (sizes, mean, where, runs * counts[operator]))
            first_s += first[operator] * seconds[where]
    return first_s


def _row_counts(steps: Columns, own: OwnPart) -> tuple[tuple[str, NDArray[np.int64], NDArray[np.int64]], ...]:
    """What operators cost by: the rows on the rank that sets the time, and those on all ranks together."""
    tokens = steps["decodes"] + steps["chunk_tokens"]
    return (
        ("tokens", own.tokens, tokens),
        ("all_tokens", tokens, tokens),
        ("survivors", own.survivors, steps["survivors"]),
    )


def _operator(
    cost: StepCost, operator: RowOperator, seconds: Array, sized: tuple[Sizes, Array, Sizes, Array]
) -> Iterator[Work]:
    """One operator at its distinct sizes; an all-reduce is told apart by the kernel it uses.

    ``sized``: the sizes, those of an average rank, which of them each step has, and how often it runs there.
    """
    costs, (sizes, mean, where, runs) = cost.tables.costs, sized
    rows = sizes.astype(np.float64)
    some = rows > 0
    for kernel, mask in _kernels(operator, rows):
        at = some & mask
        step, which, often = _ran(at, where, runs)
        yield Work(
            kind=kernel.kind,
            dtype=_dtype_of(kernel),
            seconds=seconds[at],
            flops=operator.flops(mean[at]),
            bytes_moved=operator.bytes_moved(mean[at]),
            step=step,
            at=which,
            runs=often,
            evidence=_evidence(costs, kernel),
            spread=costs.spread(kernel.kind, kernel.key),
            outside=costs.extrapolated(kernel.kind, kernel.key, **kernel.sizes(rows[at])),
            busy=busy_share(kernel.layer, rows[at]) if isinstance(kernel, Experts) else 1.0,
        )


def _ran(some: Mask, where: Sizes, runs: Array) -> tuple[Sizes | None, Sizes, Array]:
    """``step``, ``at`` and ``runs`` of what runs at ``some`` of the sizes; ``where`` is the size of every row."""
    if some.all():
        return None, where, runs
    here = some[where]
    return np.flatnonzero(here), (np.cumsum(some) - 1)[where[here]], runs[here]


def _kernels(operator: RowOperator, rows: Array) -> list[tuple[RowOperator, Mask]]:
    """The fitted operators behind an operator and the sizes at which each answers."""
    if not isinstance(operator, Collective) or not operator.custom_max_bytes:
        return [(operator, np.ones(len(rows), dtype=bool))]
    payload = operator.bytes_per_row * rows
    own = payload <= operator.custom_max_bytes
    at_once = (payload > operator.largest_measured_at_once) & (payload <= operator.one_shot_max_bytes)
    measured = replace(operator, one_shot_max_bytes=0.0)
    return [(operator, at_once), (measured, own & ~at_once), (operator.library, ~own)]


def _evidence(costs: OperatorCosts, operator: RowOperator) -> str:
    """That of the device's profile; none holds searches for tokens, large one-shot messages or an engine's kernels."""
    match operator:
        case Sampling():
            unmeasured = operator.passes > 0
        case Collective():
            unmeasured = operator.one_shot_max_bytes > 0
        case Gemm():
            unmeasured = operator.reads_like is not None
        case Experts():
            unmeasured = operator.layer.kernel is not None
        case _:
            unmeasured = False
    return "estimated" if unmeasured else costs.evidence(operator.kind, operator.key)


def _attention_evidence(costs: OperatorCosts, kind: str, attention: Mixing) -> str:
    """That of the device's profile; sliding windows that it never saw are estimated."""
    unseen = attention.window is not None and kind == "prefill_attention"
    unseen = unseen and WINDOW_EFFICIENCY.name not in costs.operator(kind, attention.key).coefficients
    return "estimated" if unseen else costs.evidence(kind, attention.key)


def _dtype_of(operator: RowOperator) -> str | None:
    if isinstance(operator, Collective):
        return None
    if isinstance(operator, Experts):
        return operator.layer.dtype
    return operator.dtype if isinstance(operator, Gemm) else "bf16"


def _decode_s(cost: StepCost, attention: Mixing, steps: Columns) -> Array:
    """Seconds of decode attention of one layer in every row, all its repeats together."""
    batch = steps["decodes"]
    seconds = np.zeros(len(batch))
    order = np.argsort(batch, kind="stable")
    sizes, starts, counts = np.unique(batch[order], return_index=True, return_counts=True)
    for size, start, count in zip(sizes.tolist(), starts, counts, strict=True):
        if size:
            at = order[start : start + count]
            table = cost.tables.decode(attention, share(size, cost.lowered.attention_data))
            seconds[at] = _summed_ns(table, attention, {key: column[at] for key, column in steps.items()}) / NS_PER_S
    return seconds


def _summed_ns(table: PrefixTable, attention: Mixing, steps: Columns) -> Sizes:
    """Nanoseconds of decode attention in rows of one batch size, over all repeats of each."""
    batch, repeats, growing = steps["decodes"], steps["repeats"], _growing(attention, steps)
    mean = _mean(attention, steps)
    ends = mean + np.where(growing > 0, repeats, 1)
    table.between(0, int(ends.max()))
    prefix = np.array(table.prefix, dtype=np.int64)
    summed = (prefix[ends] - prefix[mean]) * np.where(growing > 0, 1, repeats)
    partly = np.flatnonzero((growing > 0) & (growing < batch) & (repeats > 1))
    if len(partly):  # the mean context moves by 0 or 1 a step: step by step
        lasts = np.cumsum(repeats[partly])
        firsts = lasts - repeats[partly]
        row = np.repeat(partly, repeats[partly])
        step = np.arange(lasts[-1]) - np.repeat(firsts, repeats[partly])
        means = (_attended(attention, steps)[row] + step * growing[row]) // batch[row]
        summed[partly] = np.add.reduceat(prefix[means + 1] - prefix[means], firsts)
    return np.asarray(summed)


def _mean(attention: Mixing, steps: Columns) -> Sizes:
    """Mean context of the first step of every row."""
    return np.asarray(_attended(attention, steps) // np.maximum(steps["decodes"], 1))


def _growing(attention: Mixing, steps: Columns) -> Sizes:
    """How many decodes of every row attend to a token more from step to step."""
    return steps["decodes" if attention.window is None else f"window_growing_{attention.window}"]


def _attended(attention: Mixing, steps: Columns) -> Sizes:
    """Keys that the decodes of the first step of every row attend to, in sum."""
    return steps["context" if attention.window is None else f"window_context_{attention.window}"]


def _chunk_s(cost: StepCost, attention: Mixing, chunks: Columns, launches: Array) -> Array:
    """Seconds of attention of one layer for every chunk.

    ``launches`` is its part in the launch of its step's kernel (chunks share one, which is part of decode attention
    where there are decodes).
    """
    fitted = attention.chunk_cost(cost.tables.costs)
    return fitted.many(chunks["tokens"], chunks["history"], launch=False) + launches * fitted.launch_s


def _waited_s(chunk_s: Array, chunks: Columns, own: OwnPart) -> Array:
    """Seconds of the chunks of every step on its fullest rank."""
    return _floats(np.bincount(chunks["step"], np.where(own.rank == 0, chunk_s, 0.0), len(own.tokens)))


def _together(
    cost: StepCost, attention: Mixing, rows: tuple[Columns, Columns, OwnPart], apart_s: tuple[Array, Array]
) -> Array:
    """By what the seconds of chunks and decodes of every step are multiplied where they share a launch; else 1."""
    (steps, chunks, own), (decode_s, chunk_s) = rows, apart_s
    launch, factors = cost.tables.shared_launch(attention), np.ones(len(decode_s))
    if launch is None or not len(chunk_s):
        return factors
    mean, apart = _mean(attention, steps), decode_s + _waited_s(chunk_s, chunks, own)
    fullest: dict[int, list[tuple[int, int]]] = {}
    for at in np.flatnonzero((own.rank == 0) & (steps["decodes"][chunks["step"]] > 0)).tolist():
        chunk = int(chunks["tokens"][at]), int(chunks["history"][at])
        fullest.setdefault(int(chunks["step"][at]), []).append(chunk)
    for step, found in fullest.items():
        factors[step] = launch(int(own.decodes[step]), int(mean[step]), found) / apart[step]
    return factors


def _decodes(cost: StepCost, attention: Mixing, steps: Columns, counted: tuple[Array, float]) -> Iterator[Work]:
    """Decode attention; ``counted`` are the seconds of one layer in every row, and how often each runs."""
    (seconds, runs), batch, repeats = counted, steps["decodes"], steps["repeats"]
    ranks, attended = cost.lowered.attention_data, _attended(attention, steps)
    mean, growing = _mean(attention, steps), _growing(attention, steps)
    pairs = repeats * (attended + growing * (repeats - 1) / 2)
    done = attention.decode_work(_floats(batch * repeats) / ranks, _floats(pairs) / ranks)
    sizes = {"keys": mean, "batch": share(batch, ranks)}
    yield from _attention(cost, (attention.kinds[0], attention), (None, seconds, *done, runs), sizes)


def _chunks(cost: StepCost, attention: Mixing, chunks: Columns, counted: tuple[Array, float]) -> Iterator[Work]:
    """Chunk attention; ``counted`` are the seconds of one layer for every chunk, and how often each runs."""
    (seconds, runs), tokens, history = counted, chunks["tokens"], chunks["history"]
    done = attention.chunk_work(_floats(tokens), _floats(history))
    sizes = {"chunk": tokens, "history": history}
    yield from _attention(cost, (attention.kinds[1], attention), (chunks["step"], seconds, *done, runs), sizes)


def _attention(
    cost: StepCost,
    which: tuple[str, Mixing],
    figures: tuple[Sizes | None, Array, Array, Array, float],
    sizes: Mapping[str, object],
) -> Iterator[Work]:
    """``figures``: step, seconds, FLOPs and bytes of every run, and how often each ran."""
    costs, (kind, attention), (step, seconds, flops, moved, runs) = cost.tables.costs, which, figures
    if len(seconds):
        yield Work(
            kind=kind,
            dtype=attention.dtype,
            seconds=seconds,
            flops=flops,
            bytes_moved=moved,
            step=step,
            at=None,
            runs=runs,
            evidence=_attention_evidence(costs, kind, attention),
            spread=costs.spread(kind, attention.key),
            outside=costs.extrapolated(kind, attention.key, **sizes, **attention.sizes()),
        )


def _host_s(cost: StepCost, steps: Columns, own: OwnPart, first_s: Array) -> Array:
    """Seconds in which a step's first stage waits for the host, beyond its ``first_s`` of device time."""
    host = cost.engine.host
    busy_s = _floats(host.step_s + host.per_sequence_s * own.sequences)
    after_s = host.exposed_step_s + (0.0 if host.overlapped else busy_s)
    floor_s = np.maximum(_launching_s(cost, steps, own), busy_s if host.overlapped else 0.0)
    waits_s = np.maximum(0.0, floor_s - first_s)
    for row in np.flatnonzero(_may_cross(steps, floor_s, first_s)):
        repeats = int(steps["repeats"][row])
        run = cost.decode_run(_stats(cost, steps, int(row)))
        if run is not None:
            spent_ns = sum(stages[0] for stages in run.stages_ns(0, repeats))
            other_s = np.broadcast_to(after_s, first_s.shape)[row] + first_s[row]
            waits_s[row] = max(0.0, spent_ns / NS_PER_S / repeats - other_s)
    return np.asarray(waits_s + after_s)


def _launching_s(cost: StepCost, steps: Columns, own: OwnPart) -> Array:
    """Seconds that the host takes to launch the kernels of a step's first stage; 0 where a CUDA graph replays them."""
    host, tokens = cost.engine.host, own.tokens
    replayed = (steps["chunk_tokens"] == 0) | (tokens <= host.graph_tokens)
    stage = cost.lowered.stages[0]
    launching_s = host.launching_s(stage.launches, stage.expert_layers)
    return np.where(replayed & host.cuda_graphs, 0.0, launching_s)


def _may_cross(steps: Columns, busy_s: Array, first_s: Array) -> Mask:
    """Rows of repeated steps of which some may take the device longer than the host and others not.

    A step's device time grows from the first to the last by no larger a share than the context does.
    """
    repeats = steps["repeats"]
    share = repeats * steps["decodes"] / np.maximum(steps["context"], 1)
    return np.asarray((repeats > 1) & (np.abs(busy_s - first_s) <= first_s * share))


def _stats(cost: StepCost, steps: Columns, row: int) -> BatchStats:
    """The first step of a row of decode steps."""
    windows = sorted({mixing.window for mixing in cost.attentions if mixing.window is not None})
    decodes = int(steps["decodes"][row])
    attended, growing = (
        tuple(int(steps[f"window_{what}_{window}"][row]) for window in windows) for what in ("context", "growing")
    )
    repeats = int(steps["repeats"][row])
    return BatchStats(decodes, int(steps["context"][row]), attended, (), decodes, growing, repeats)


def _host(cost: StepCost, host_s: Array, repeats: NDArray[np.int64]) -> Work:
    nothing = np.zeros_like(host_s)
    runs = _floats(repeats) * cost.lowered.stage_devices
    evidence = "fitted" if cost.engine.evidence == "serving" else "estimated"
    return Work("host", None, host_s, nothing, nothing, None, None, runs, evidence)


def _floats(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)
