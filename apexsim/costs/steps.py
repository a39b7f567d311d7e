"""StepCost: how long a step of a replica takes, in whole nanoseconds, from what little of the batch matters.

A stage's time is a sum of integers, each looked up: everything that costs by tokens, the LM head and sampling by
survivors, decode attention by batch size and mean context, every chunk's attention, and the host. Each part is rounded
once, when its table is filled, so single steps and runs of steps add up the same integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.lowering import Lowered, lower
from apexsim.costs.operators import Collective
from apexsim.costs.ranks import fullest, share
from apexsim.costs.runs import DecodeRow, DecodeRun, Guessed, OneStageRun, add_stages
from apexsim.costs.tables import OperatorTables, RowTable, tables_for
from apexsim.specs.engine import EngineProfile
from apexsim.specs.server import Server
from apexsim.units import to_ns


class BatchStats(NamedTuple):
    """Everything that a step's cost may see of its batch.

    ``decodes`` sequences compute exactly one token each and attend to ``context`` tokens in sum, the new ones included;
    ``window_contexts`` sums min(context, window) over them for every window of the model, ascending. ``chunks`` are
    (tokens, history) of every other sequence. ``survivors`` sequences need logits.

    Of decode steps to come, ``growing`` says how many sequences attend to a token more in every window at each, and
    ``regular`` for how many steps, this one included, that stays so. Neither matters to this step.
    """

    decodes: int
    context: int
    window_contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    survivors: int = 0

    growing: tuple[int, ...] = ()
    regular: int = 1

    def grown(self, steps: int) -> BatchStats:
        """The same decode batch some steps later, fewer than are ``regular`` where the model has windows."""
        decodes, context, windows, chunks, survivors, growing, regular = self
        if windows:
            windows = tuple([attended + steps * count for attended, count in zip(windows, growing, strict=True)])
            regular -= steps
        return BatchStats(decodes, context + steps * decodes, windows, chunks, survivors, growing, regular)


class StepCost:
    """Cost of the steps of a server. ``stages`` is the pipeline degree.

    Attention of a layer is one launch however many sequences a step holds: engines pack them into one kernel of
    variable lengths, behind one that writes the KV cache. (FlashAttention-3 in vLLM V1 takes chunks and decodes alike.)
    So of the launch that a chunk's fitted cost contains, chunks of a step pay one in all, and none beside decodes,
    whose cost contains it. A chunk alone costs what was fitted, and no chunk less than the roofline. Where the profile
    says that chunks and decodes share a launch (FlashAttention 2), such a step costs what the launch does instead.

    ``BatchStats`` are of the whole replica. With attention-data ranks a step takes what the fullest rank takes for its
    own part (see ``ranks``), and the experts for the tokens of all.
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
        self._ranks = lowered.attention_data
        self._added = self._plain and not any(self._shared) and self._ranks == 1
        counted = [stage.row_operators() for stage in lowered.stages]
        self._dense = RowTable(tables, [[each for each in ops if each[0].rows == "tokens"] for ops in counted])
        self._gathered = RowTable(tables, [[each for each in ops if each[0].rows == "all_tokens"] for ops in counted])
        self._heads = RowTable(tables, [[(op, 1) for op in lowered.stages[-1].head]])
        self._rows: dict[int, DecodeRow] = {}
        host = engine.host
        self._overlapped = host.overlapped
        self._host_step = to_ns(host.step_s)
        self._host_sequence = to_ns(host.per_sequence_s)
        self._exposed = to_ns(host.exposed_step_s)
        self._launched = [to_ns(host.launching_s(stage.launches, stage.expert_layers)) for stage in lowered.stages]
        self._nothing = [0] * len(lowered.stages)
        self._replays = host.replays

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
        decodes, context, _, chunks, survivors, _, _ = stats
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

    def decode_run(self, stats: BatchStats) -> DecodeRun | PlainRun | None:
        """The run of decode steps that begins with this one, every context growing by 1 a step; None for others."""
        if stats.chunks or not stats.decodes or stats.survivors != stats.decodes:
            return None
        row = self._rows.get(stats.decodes) or self._new_row(stats.decodes)
        if self._plain:
            mean = stats.context // stats.decodes
            left = self.max_context - mean + 1
            plain = PlainRun(row, self._plain_layers, mean, left if left > 1 else 1)
            if row.fixed[0] >= row.floor or plain.first_ns >= row.floor:
                return plain
        left = max(1, self.max_context - stats.context // stats.decodes + 1)
        attended, growing = self._sums(stats)
        limit = min(left, stats.regular) if self._windows else left
        kind = OneStageRun if self.stages == 1 else DecodeRun
        return kind(row, stats.decodes, attended, growing, limit)

    # -- parts ------------------------------------------------------------------------------------------------

    def _attended(self, stats: BatchStats) -> tuple[int, ...]:
        """Mean context of the decodes under each kind of attention, rounded down."""
        decodes = stats.decodes
        if not self._windows:
            return (stats.context // decodes,)
        windowed = [attended // decodes for attended in stats.window_contexts]
        return (stats.context // decodes, *windowed) if self._full else tuple(windowed)

    def _sums(self, stats: BatchStats) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Under each kind of attention: tokens attended to in sum, and how many decodes attend to one more each step.

        Nobody is known to grow where ``stats`` does not say.
        """
        if not self._windows:
            return (stats.context,), (stats.decodes,)
        growing = stats.growing or (0,) * len(self._windows)
        if not self._full:
            return stats.window_contexts, growing
        return (stats.context, *stats.window_contexts), (stats.decodes, *growing)

    def _mixed_ns(self, stats: BatchStats) -> tuple[int, ...]:
        """A step with chunks, or with sequences that need no logits."""
        ranks, chunks = self._ranks, fullest(stats.chunks, self._ranks)
        decodes, survivors = share(stats.decodes, ranks), share(stats.survivors, ranks)
        tokens = decodes + sum([chunk_tokens for chunk_tokens, _ in chunks])
        fixed, floors = self._fixed_ns(tokens, survivors, decodes + len(chunks), prompts=bool(chunks))
        if ranks > 1:
            self._add_gathered(fixed, stats.decodes + sum([chunk_tokens for chunk_tokens, _ in stats.chunks]))
        return add_stages(fixed, floors, self._layers, self._mixing_ns(stats))

    def _mixing_ns(self, stats: BatchStats) -> list[int]:
        """Nanoseconds of a layer of each kind of attention: its parts added up, or those of the launch they share."""
        decodes, chunks = stats.decodes, fullest(stats.chunks, self._ranks)
        spent = self._launches
        if decodes:
            row, means = self._rows.get(decodes) or self._new_row(decodes), self._attended(stats)
            spent = [table.at(mean) for table, mean in zip(row.tables, means, strict=True)]
        spent = [ns + sum([known[chunk] for chunk in chunks]) for ns, known in zip(spent, self._chunks, strict=True)]
        if decodes and chunks and any(self._shared):
            both = zip(spent, self._shared, means, strict=True)
            own = share(decodes, self._ranks)
            spent = [to_ns(launch(own, mean, chunks)) if launch else ns for ns, launch, mean in both]
        return spent

    def _plain_mixed_ns(self, stats: BatchStats) -> tuple[int]:
        """The same where one stage runs one kind of attention: plain sums, for speed."""
        decodes, context, _, chunks, survivors, _, _ = stats
        known = self._chunks[0]
        tokens = decodes
        attention = 0 if decodes else known.launch_ns
        for chunk in chunks:
            tokens += chunk[0]
            attention += known[chunk]
        if decodes:
            row = self._rows.get(decodes) or self._new_row(decodes)
            mean, prefix = context // decodes, row.prefix
            if mean + 1 >= len(prefix):
                row.tables[0].grow(mean)
            attention += prefix[mean + 1] - prefix[mean]
        device = self._dense[tokens][0] + self._heads[survivors][0] + self._plain_layers * attention
        if device < self._launched[0] and not self._replays(tokens, prompts=bool(chunks)):
            device = self._launched[0]
        host = self._host_step + self._host_sequence * (decodes + len(chunks))
        if not self._overlapped:
            return (device + host + self._exposed,)
        return ((device if device > host else host) + self._exposed,)

    def _fixed_ns(
        self, tokens: int, survivors: int, sequences: int, *, prompts: bool = False
    ) -> tuple[list[int], list[int]]:
        """Nanoseconds of every stage that do not depend on context, and the least that each takes with it.

        Of the tokens, survivors and sequences on one attention-data rank.
        """
        fixed = list(self._dense[tokens])
        fixed[-1] += self._heads[survivors][0]
        fixed[0] += self._exposed
        host = self._host_step + self._host_sequence * sequences
        floors = list(self._nothing if self._replays(tokens, prompts=prompts) else self._launched)
        if self._overlapped:
            floors[0] = max(floors[0], host) + self._exposed
            return fixed, floors
        fixed[0] += host
        floors[0] += host + self._exposed if floors[0] else 0
        return fixed, floors

    def _add_gathered(self, fixed: list[int], tokens: int) -> None:
        """Add what the tokens of all attention-data ranks take together."""
        for stage, ns in enumerate(self._gathered[tokens]):
            fixed[stage] += ns

    def _new_row(self, decodes: int) -> DecodeRow:
        own = share(decodes, self._ranks)
        fixed, floors = self._fixed_ns(own, own, own)
        if self._ranks > 1:
            self._add_gathered(fixed, decodes)
        tables = tuple(self.tables.decode(attention, own) for attention in self.attentions)
        row = self._rows[decodes] = DecodeRow(tuple(fixed), tuple(floors), self._layers, tables)
        return row


class PlainRun(Guessed):
    """The common case, quickly: one stage, one kind of attention that grows, no step faster than the host.

    Step k takes ``constant`` + ``layers`` x T(mean + k), so n steps n x ``constant`` + ``layers`` x (prefix[mean + n] -
    prefix[mean]). Runs of one ``kind`` (table, ``constant``, ``layers``) take the same time at the same mean context.
    """

    __slots__ = ("_base", "_constant", "_layers", "_prefix", "_table", "first_ns", "kind", "limit", "mean")

    def __init__(self, row: DecodeRow, layers: int, mean: int, limit: int) -> None:
        self.limit = limit
        self._constant = row.fixed[0]
        self._layers = layers
        self.mean = mean
        self._table = row.tables[0]
        self._prefix = row.prefix
        self.kind = row.kind
        if mean + 1 >= len(self._prefix):
            self._table.grow(mean)
        self._base = self._prefix[mean]
        self.first_ns = self._constant + layers * (self._prefix[mean + 1] - self._base)

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

    def elapsed_at(self, first: int, last: int) -> NDArray[np.int64]:
        """Nanoseconds from mean context 0 to every one from ``first`` to ``last``."""
        self._table.between(first, last)
        prefix = np.frombuffer(self._prefix[first : last + 1], dtype=np.int64)
        return np.arange(first, last + 1) * self._constant + self._layers * prefix


def build_step_cost(server: Server, *, prompts: Sequence[int] | NDArray[np.int64] = ()) -> StepCost:
    """The cost of a server's steps; what whole ``prompts`` of these lengths cost is worked out here already.

    Raises Unsupported where a cost is not known.
    """
    lowered, tables = lower(server), tables_for(server.device)
    for kind, key in fitted_operators(lowered):
        tables.costs.operator(kind, key)
    tables.trim()
    cost = StepCost(lowered, tables, server.engine, max_context=server.model.max_context)
    scheduler = server.scheduler
    cost.expect(np.unique(np.minimum(prompts, scheduler.max_chunk_tokens or scheduler.token_budget)).tolist())
    return cost


def unknown_collectives(server: Server) -> tuple[str, ...]:
    """Collectives that a server's steps need and its device's profile has no cost for, in words; mostly none."""
    lowered, device = lower(server), server.device
    rows = [op for stage in lowered.stages for op, _ in stage.row_operators()]
    rows += [op for stage in lowered.stages for op in stage.head]
    needed = [each for op in rows if isinstance(op, Collective) for each in (op, op.library)]
    missing = [op for op in needed if not tables_for(device).costs.knows(op.kind, op.key)]
    return tuple(dict.fromkeys(f"{device.name} has no {op.kind} over {op.group} devices" for op in missing))


def fitted_operators(lowered: Lowered) -> list[tuple[str, str]]:
    """(kind, key) of every fitted operator that steps will ask a device profile for, in order: which of two unknown
    ones is named must not hang on how strings hash."""
    rows = [op for stage in lowered.stages for op in (*(op for op, _ in stage.row_operators()), *stage.head)]
    wanted = {(op.kind, op.key) for op in [*rows, *(op.library for op in rows if isinstance(op, Collective))]}
    return sorted(wanted | {(kind, a.key) for a in lowered.attentions for kind in a.kinds})
