"""StepCost: how long a step of a replica takes, in whole nanoseconds, from what little of the batch matters.

A stage's time is a sum of integers, each looked up: everything that costs by tokens, the LM head and sampling by
survivors, decode attention by batch size and mean context, every chunk's attention, and the host. Each part is rounded
once, when its table is filled, so single steps and runs of steps add up the same integers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.lowering import Lowered, lower
from apexsim.costs.operators import Collective
from apexsim.costs.tables import OperatorTables, PrefixTable, RowTable, tables_for
from apexsim.specs.deployment import Deployment, Pool
from apexsim.specs.engine import EngineProfile
from apexsim.units import to_ns

Nanoseconds = Sequence[int]
Layers = tuple[tuple[int, ...], ...]


class BatchStats(NamedTuple):
    """Everything that a step's cost may see of its batch.

    ``decodes`` sequences compute exactly one token each and attend to ``context`` tokens in sum, the new ones included;
    ``window_contexts`` sums min(context, window) over them for every window of the model, ascending. ``chunks`` are
    (tokens, history) of every other sequence. ``survivors`` sequences need logits.
    """

    decodes: int
    context: int
    window_contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    survivors: int = 0

    def grown(self, steps: int) -> BatchStats:
        """The same decode batch some steps of a ``DecodeRun`` later: inside a run windows are all open or all full."""
        decodes, context, windows, chunks, survivors = self
        more = steps * decodes
        if windows:
            windows = tuple([attended + more if attended == context else attended for attended in windows])
        return BatchStats(decodes, context + more, windows, chunks, survivors)


class _Row:
    """What a decode batch of one size costs whatever its context: looked up once per batch size.

    ``fixed`` nanoseconds per stage; stage 0 never takes less than ``floor``, the host time that overlaps with it. One
    of ``tables`` for each kind of attention answers for decode attention of one layer; ``layers`` counts the layers of
    that kind, stage by stage.
    """

    __slots__ = ("fixed", "floor", "layers", "prefix", "tables")

    def __init__(self, fixed: Nanoseconds, floor: int, layers: Layers, tables: tuple[PrefixTable, ...]) -> None:
        self.fixed = fixed
        self.floor = floor
        self.layers = layers
        self.tables = tables
        self.prefix = tables[0].prefix

    def stage_ns(self, means: Sequence[int]) -> tuple[int, ...]:
        """Nanoseconds of every stage at these mean contexts, one per kind of attention."""
        spent = [table.at(mean) for table, mean in zip(self.tables, means)]  # noqa: B905 - a hot path
        return _stage_ns(self.fixed, self.floor, self.layers, spent)


def _stage_ns(fixed: Nanoseconds, floor: int, layers: Layers, spent: Sequence[int]) -> tuple[int, ...]:
    """Fixed nanoseconds plus those of each kind of attention in every layer; stage 0 takes at least ``floor``."""
    stages = list(fixed)
    for counts, ns in zip(layers, spent):  # noqa: B905 - a hot path
        for stage, count in enumerate(counts):
            stages[stage] += count * ns
    stages[0] = max(stages[0], floor)
    return tuple(stages)


class StepCost:
    """Cost of the steps of one pool's replicas. ``stages`` is the pipeline degree.

    Attention of a layer is one launch however many sequences a step holds: engines pack them into one kernel of
    variable lengths, behind one that writes the KV cache. (FlashAttention-3 in vLLM V1 takes chunks and decodes alike.)
    So of the launch that a chunk's fitted cost contains, chunks of a step pay one in all, and none beside decodes,
    whose cost contains it. A chunk alone costs what was fitted, and no chunk less than the roofline. Where the profile
    says that chunks and decodes share a launch (FlashAttention 2), such a step costs what the launch does instead.
    """

    def __init__(self, lowered: Lowered, tables: OperatorTables, engine: EngineProfile, *, max_context: int) -> None:
        """``max_context`` (tokens) bounds how far a run of decode steps looks ahead."""
        self.lowered = lowered
        self.tables = tables
        self.engine = engine
        self.stages = len(lowered.stages)
        self.max_context = max_context
        self.attentions = lowered.attentions
        self._windows = tuple(a.window for a in self.attentions if a.window is not None)
        self._full = len(self._windows) < len(self.attentions)
        self._layers = tuple(lowered.layers_of(attention) for attention in self.attentions)
        self._plain = self.stages == 1 and self._full and not self._windows
        self._plain_layers = self._layers[0][0]
        self._chunks = tuple(tables.chunks(attention) for attention in self.attentions)
        self._launches = [known.launch_ns for known in self._chunks]
        self._shared = tuple(tables.shared_launch(attention) for attention in self.attentions)
        self._added = self._plain and not any(self._shared)
        self._dense = RowTable(tables, [stage.row_operators() for stage in lowered.stages])
        self._heads = RowTable(tables, [[(op, 1) for op in lowered.stages[-1].head]])
        self._rows: dict[int, _Row] = {}
        host = engine.host
        self._overlapped = host.overlapped
        self._host_step = to_ns(host.step_s)
        self._host_sequence = to_ns(host.per_sequence_s)
        self._exposed = to_ns(host.serial_s(len(lowered.stages[0].layers)))

    def expect(self, prompts: Iterable[int]) -> None:
        """Work out beforehand what prompts of these lengths cost, each computed in one step behind no history."""
        for tokens in prompts:
            self._dense[tokens]
            for known in self._chunks:
                known[tokens, 0]

    def stage_ns(self, stats: BatchStats) -> tuple[int, ...]:
        """Nanoseconds of a step on each pipeline stage.

        Host time belongs to the first stage, a hand-over to its sender, LM head and sampling to the last.
        """
        decodes, context, _, chunks, survivors = stats
        if chunks or survivors != decodes:
            return self._plain_mixed_ns(stats) if self._added else self._mixed_ns(stats)
        row = self._rows.get(decodes) or self._new_row(decodes)
        if not self._plain:
            return row.stage_ns(self._attended(stats))
        mean, prefix = context // decodes, row.prefix
        if mean + 1 >= len(prefix):
            row.tables[0].grow(mean)
        spent = row.fixed[0] + self._plain_layers * (prefix[mean + 1] - prefix[mean])
        return (spent if spent > row.floor else row.floor,)

    def decode_run(self, stats: BatchStats) -> DecodeRun | None:
        """The run of decode steps that begins with this one, every context growing by 1 a step; None for others."""
        if stats.chunks or not stats.decodes or stats.survivors != stats.decodes:
            return None
        row = self._rows.get(stats.decodes) or self._new_row(stats.decodes)
        if self._plain:
            mean = stats.context // stats.decodes
            plain = PlainRun(row, self._plain_layers, mean, max(1, self.max_context - mean + 1))
            if row.fixed[0] >= row.floor or plain.elapsed_ns(1) >= row.floor:
                return plain
        moving, limit = self._regime(stats)
        return DecodeRun(row, self._attended(stats), moving, limit)

    # -- parts ------------------------------------------------------------------------------------------------

    def _attended(self, stats: BatchStats) -> tuple[int, ...]:
        """Mean context of the decodes under each kind of attention, rounded down."""
        decodes = stats.decodes
        if not self._windows:
            return (stats.context // decodes,)
        windowed = [attended // decodes for attended in stats.window_contexts]
        return (stats.context // decodes, *windowed) if self._full else tuple(windowed)

    def _regime(self, stats: BatchStats) -> tuple[tuple[bool, ...], int]:
        """Which kinds of attention grow as a decode batch goes on, and for how many steps that stays so.

        A window is full (every context at or beyond it) or open (none beyond it, known from equal sums). An open one
        fills no sooner than a sequence that holds all of the batch's context but 1 token of every other would. In
        between, or where all contexts just reach the window, the next step is a matter of its own: limit 1.
        """
        decodes, context = stats.decodes, stats.context
        limit = max(1, self.max_context - context // decodes + 1)
        if not self._windows:
            return (True,), limit
        moving = [True] if self._full else []
        longest = context - decodes + 1
        for window, attended in zip(self._windows, stats.window_contexts, strict=True):
            full, is_open = attended == decodes * window, attended == context
            moving.append(is_open and not full)
            if full == is_open:
                limit = 1
            elif is_open:
                limit = max(1, min(limit, window - longest + 1))
        return tuple(moving), limit

    def _mixed_ns(self, stats: BatchStats) -> tuple[int, ...]:
        """A step with chunks, or with sequences that need no logits."""
        decodes, _, _, chunks, survivors = stats
        tokens = decodes + sum([chunk_tokens for chunk_tokens, _ in chunks])
        fixed, floor = self._fixed_ns(tokens, survivors, decodes + len(chunks))
        return _stage_ns(fixed, floor, self._layers, self._mixing_ns(stats))

    def _mixing_ns(self, stats: BatchStats) -> list[int]:
        """Nanoseconds of a layer of each kind of attention: its parts added up, or those of the launch they share."""
        decodes, chunks = stats.decodes, stats.chunks
        spent = self._launches
        if decodes:
            row, means = self._rows.get(decodes) or self._new_row(decodes), self._attended(stats)
            spent = [table.at(mean) for table, mean in zip(row.tables, means, strict=True)]
        spent = [ns + sum([known[chunk] for chunk in chunks]) for ns, known in zip(spent, self._chunks, strict=True)]
        if decodes and chunks and any(self._shared):
            both = zip(spent, self._shared, means, strict=True)
            spent = [to_ns(launch(decodes, mean, chunks)) if launch else ns for ns, launch, mean in both]
        return spent

    def _plain_mixed_ns(self, stats: BatchStats) -> tuple[int]:
        """The same where one stage runs one kind of attention: plain sums, for speed."""
        decodes, context, _, chunks, survivors = stats
        known = self._chunks[0]
        tokens = decodes
        attention = 0 if decodes else known.launch_ns
        for chunk in chunks:
            tokens += chunk[0]
            attention += known[chunk]
        if decodes:
            row = self._rows.get(decodes) or self._new_row(decodes)
            attention += row.tables[0].at(context // decodes)
        device = self._dense[tokens][0] + self._heads[survivors][0] + self._plain_layers * attention
        host = self._host_step + self._host_sequence * (decodes + len(chunks))
        if not self._overlapped:
            return (device + host + self._exposed,)
        return ((device if device > host else host) + self._exposed,)

    def _fixed_ns(self, tokens: int, survivors: int, sequences: int) -> tuple[list[int], int]:
        """Nanoseconds of every stage that do not depend on context, and the floor of stage 0."""
        fixed = list(self._dense[tokens])
        fixed[-1] += self._heads[survivors][0]
        fixed[0] += self._exposed
        host = self._host_step + self._host_sequence * sequences
        if self._overlapped:
            return fixed, host + self._exposed
        fixed[0] += host
        return fixed, 0

    def _new_row(self, decodes: int) -> _Row:
        fixed, floor = self._fixed_ns(decodes, decodes, decodes)
        tables = tuple(self.tables.decode(attention, decodes) for attention in self.attentions)
        row = self._rows[decodes] = _Row(tuple(fixed), floor, self._layers, tables)
        return row


class DecodeRun:
    """Consecutive steps of one decode batch: every context grows by one token a step.

    ``limit`` (>= 1) is the number of steps for which that growth is regular. On one stage ``elapsed_ns`` is the exact
    sum of ``stage_ns`` of the steps, in closed form: integer prefix sums, and, where the host overlaps with the device,
    the device time (which never falls with context) crosses the host time at most once: steps before that take the host
    time, later ones the device time.
    """

    __slots__ = ("_below", "_constant", "_floor", "_growing", "_means", "_moving", "_row", "limit")

    def __init__(self, row: _Row, means: tuple[int, ...], moving: tuple[bool, ...], limit: int) -> None:
        """Per kind of attention: its mean context now, and whether that grows from step to step."""
        self.limit = limit
        self._row = row
        self._means = means
        self._moving = moving
        # Stage 0: nanoseconds of every step, and (layers, table, mean context) of the attention that grows.
        self._constant = row.fixed[0]
        self._growing: list[tuple[int, PrefixTable, int]] = []
        for table, layers, mean, moves in zip(row.tables, row.layers, means, moving):  # noqa: B905 - a hot path
            if moves:
                self._growing.append((layers[0], table, mean))
            else:
                self._constant += layers[0] * table.at(mean)
        self._floor = row.floor if row.floor and self._device_ns(0, 1) < row.floor else 0
        self._below = 1  # with a floor: steps known to take less device than host time

    def stage_ns(self, step: int) -> tuple[int, ...]:
        """Nanoseconds of step 0, 1, ... of the run on each stage."""
        return self._row.stage_ns([mean + step * moves for mean, moves in zip(self._means, self._moving, strict=True)])

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        """``stage_ns`` of ``count`` steps from step ``first`` on, computed together."""
        total = np.tile(np.array(self._row.fixed, dtype=np.int64), (count, 1))
        row = self._row
        for table, layers, mean, moves in zip(row.tables, row.layers, self._means, self._moving, strict=True):
            if moves:
                table.between(mean + first, mean + first + count)
                prefix = np.frombuffer(table.prefix[mean + first : mean + first + count + 1], dtype=np.int64)
                total += np.multiply.outer(prefix[1:] - prefix[:-1], np.array(layers, dtype=np.int64))
            else:
                total += table.at(mean) * np.array(layers, dtype=np.int64)
        np.maximum(total[:, 0], self._row.floor, out=total[:, 0])
        rows: list[list[int]] = total.tolist()
        return rows

    def elapsed_ns(self, steps: int) -> int:
        """Nanoseconds of the first ``steps`` steps one after another, on one stage."""
        if not self._floor:
            total = steps * self._constant
            for layers, table, mean in self._growing:
                total += layers * table.between(mean, mean + steps)
            return total
        below = self._steps_below_floor(steps)
        return below * self._floor + self._device_ns(below, steps)

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        """Nanoseconds of each of the first ``steps`` steps, on one stage."""
        spent = np.full(steps, self._constant) if not self._growing else np.int64(self._constant)
        for layers, table, mean in self._growing:
            table.between(mean, mean + steps)
            prefix = np.frombuffer(table.prefix[mean : mean + steps + 1], dtype=np.int64)
            spent = spent + layers * (prefix[1:] - prefix[:-1])
        return np.maximum(spent, self._floor) if self._floor else np.asarray(spent)

    def _device_ns(self, start: int, end: int) -> int:
        """Device nanoseconds of steps ``start`` ... ``end - 1``."""
        total = (end - start) * self._constant
        for layers, table, mean in self._growing:
            total += layers * table.between(mean + start, mean + end)
        return total

    def _steps_below_floor(self, steps: int) -> int:
        """How many of the first ``steps`` steps take less device than host time."""

        def device_ns(step: int) -> int:
            return self._device_ns(step, step + 1)

        if self._below < steps and device_ns(self._below) < self._floor:
            self._below = bisect_left(range(steps), self._floor, lo=self._below + 1, key=device_ns)
        return min(self._below, steps)


class PlainRun(DecodeRun):
    """The common case, quickly: one stage, one kind of attention that grows, no step faster than the host.

    Step k takes ``constant`` + ``layers`` x T(mean + k), so n steps n x ``constant`` + ``layers`` x (prefix[mean + n] -
    prefix[mean]).
    """

    __slots__ = ("_base", "_layers", "_prefix", "_table", "mean")

    def __init__(self, row: _Row, layers: int, mean: int, limit: int) -> None:
        self.limit = limit
        self._constant = row.fixed[0]
        self._layers = layers
        self.mean = mean
        self._table = row.tables[0]
        self._prefix = row.prefix
        if mean >= len(self._prefix):
            self._table.grow(mean)
        self._base = self._prefix[mean]

    def stage_ns(self, step: int) -> tuple[int, ...]:
        return (self._constant + self._layers * self._table.at(self.mean + step),)

    def elapsed_ns(self, steps: int) -> int:
        try:
            return steps * self._constant + self._layers * (self._prefix[self.mean + steps] - self._base)
        except IndexError:
            self._table.grow(self.mean + steps)
            return self.elapsed_ns(steps)

    def stages_ns(self, first: int, count: int) -> list[list[int]]:
        return [[ns] for ns in self.durations_between(self.mean + first, self.mean + first + count).tolist()]

    def durations_ns(self, steps: int) -> NDArray[np.int64]:
        return self.durations_between(self.mean, self.mean + steps)

    def durations_between(self, first: int, last: int) -> NDArray[np.int64]:
        """Nanoseconds of the steps at mean contexts ``first`` ... ``last`` - 1."""
        self._table.between(first, last)
        prefix = np.frombuffer(self._prefix[first : last + 1], dtype=np.int64)
        return self._constant + self._layers * (prefix[1:] - prefix[:-1])

    @property
    def kind(self) -> tuple[int, int, int]:
        """Runs of one kind take the same time at the same mean context."""
        return id(self._table), self._constant, self._layers


def build_step_cost(deployment: Deployment, pool: Pool, *, prompts: Sequence[int] | NDArray[np.int64] = ()) -> StepCost:
    """The cost of a pool's steps; what whole ``prompts`` of these lengths cost is worked out here already.

    Raises InfeasiblePlan for an unlawful plan, Unsupported where a cost is not known.
    """
    lowered, tables = lower(deployment, pool), tables_for(deployment.cluster.device)
    for kind, key in fitted_operators(lowered):
        tables.costs.operator(kind, key)
    tables.trim()
    cost = StepCost(lowered, tables, deployment.engine, max_context=deployment.model.max_context)
    cost.expect(np.unique(np.minimum(prompts, deployment.scheduler.token_budget)).tolist())
    return cost


def fitted_operators(lowered: Lowered) -> set[tuple[str, str]]:
    """(kind, key) of every fitted operator that steps will ask a device profile for."""
    rows = [op for stage in lowered.stages for op in (*(op for op, _ in stage.row_operators()), *stage.head)]
    wanted = {(op.kind, op.key) for op in [*rows, *(op.library for op in rows if isinstance(op, Collective))]}
    return wanted | {(kind, a.key) for a in lowered.attentions for kind in a.kinds}
