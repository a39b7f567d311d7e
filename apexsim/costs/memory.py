"""What fits on a device: weights, activations, what the engine and its collectives take, and KV blocks in the rest."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

from apexsim.costs.lowering import Block, Lowered, lower
from apexsim.costs.operators import ACTIVATION_BYTES, LOGIT_BYTES, Elementwise, Experts, RowOperator
from apexsim.errors import InfeasiblePlan
from apexsim.specs.engine import EngineProfile
from apexsim.specs.memory import ShareOf
from apexsim.specs.server import Server
from apexsim.units import format_bytes

# Standard errors to either side that hold 95 % of a normal distribution.
TWO_SIDED_95 = 1.96


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one device of the pipeline stage that holds the fewest KV blocks, and the blocks of a replica.

    A block keeps ``block_size`` tokens for one unit of layers. ``groups`` are (units, window): layers that attend to
    everything take ``units`` blocks for every ``block_size`` tokens of a sequence; windowed ones stop growing once they
    hold the window and one block more (the one being filled while the oldest still counts). With one kind of layers
    there is one unit, and a block is a block. ``fixed_blocks`` is what the recurrent layers' state of a sequence takes,
    however long it is. With ``ranks`` attention-data ranks a sequence lies on one of them, whole; ``blocks`` are those
    of all. ``kv_error_bytes`` is the standard error of ``kv_bytes``: 0 where a server told its blocks, None where
    nothing says how sure the engine's terms are. ``replica_weights_bytes`` and ``replica_kv_bytes`` are of all devices.
    """

    weights_bytes: float
    activation_bytes: float
    reserve_bytes: float
    communication_bytes: float
    kv_bytes: float
    block_size: int
    blocks: int
    groups: tuple[tuple[int, int | None], ...] = ((1, None),)
    fixed_blocks: int = 0
    ranks: int = 1
    kv_error_bytes: float | None = None
    replica_weights_bytes: float = 0.0
    replica_kv_bytes: float = 0.0

    @property
    def rank_blocks(self) -> int:
        """Blocks that one sequence may take: those of an attention-data rank."""
        return self.blocks // self.ranks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` cached tokens holds."""
        size = self.block_size
        wanted = -(-tokens // size)
        if not wanted:
            return 0
        if len(self.groups) == 1 and self.groups[0][1] is None:
            return wanted + self.fixed_blocks
        total = self.fixed_blocks
        for units, window in self.groups:
            total += units * (wanted if window is None else min(wanted, -(-window // size) + 1))
        return total

    @property
    def steady(self) -> bool:
        """Whether every ``block_size`` tokens of a sequence take as many blocks: no sliding windows, no states."""
        return not self.fixed_blocks and all(window is None for _, window in self.groups)

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence that the cache holds alone; None where all layers are windowed and no length is too much."""
        size = self.block_size
        windows = [window for _, window in self.groups if window is not None]
        if len(windows) == len(self.groups) and self.blocks_for(max(windows) + 2 * size) <= self.rank_blocks:
            return None
        most = self.rank_blocks
        return size * (bisect_right(range(most + 1), most, key=lambda n: self.blocks_for(n * size)) - 1)

    def holds(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits alone."""
        return self.max_tokens is None or tokens <= self.max_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache of a replica holds, of sequences as long as they can be.

        Where all layers are windowed, those of sequences that hold nothing but their windows.
        """
        longest = self.max_tokens
        if longest is not None:
            return self.ranks * longest
        return self.blocks // sum(units for units, _ in self.groups) * self.block_size

    def concurrency_at(self, tokens: int) -> float:
        """Requests of so many tokens that a replica holds at once."""
        return self.ranks * self.rank_blocks / self.blocks_for(tokens)

    def figures(self, max_model_len: int) -> dict[str, Any]:
        """What a summary says of a replica under this context limit, and of a device of its fullest stage.

        ``kv_tokens_range``: where the tokens lie at 95 %; None where that is not known.
        """
        per_device = ("weights_bytes", "activation_bytes", "reserve_bytes", "communication_bytes", "kv_bytes")
        return {
            "weights_bytes": self.replica_weights_bytes,
            "kv_bytes": self.replica_kv_bytes,
            "kv_tokens": self.kv_tokens,
            "kv_tokens_range": self._range(),
            "max_model_len": max_model_len,
            "max_concurrency_at_context": self.concurrency_at(max_model_len),
            "device": {name: getattr(self, name) for name in per_device},
        }

    def _range(self) -> list[int] | None:
        if self.kv_error_bytes is None or not self.kv_bytes:
            return None
        share = TWO_SIDED_95 * self.kv_error_bytes / self.kv_bytes
        return [round(self.kv_tokens * max(0.0, 1 - share)), round(self.kv_tokens * (1 + share))]


def plan_memory(server: Server) -> MemoryPlan:
    """Divide a server's device memory; raises InfeasiblePlan saying which bytes do not fit.

    What is left for the KV cache follows the engine (see ``MemoryDefaults``), stage by stage; the stage with the fewest
    blocks decides, as in vLLM.
    """
    lowered = lower(server)
    layout = _kv_blocks(server, lowered)
    plans = [_stage_plan(server, lowered, stage, layout) for stage in range(len(lowered.stages))]
    tightest = min(plans, key=lambda plan: plan.blocks)
    devices = server.plan.stage_devices
    return replace(
        tightest,
        replica_weights_bytes=devices * sum(plan.weights_bytes for plan in plans),
        replica_kv_bytes=devices * tightest.rank_blocks * sum(layout.block_bytes),
    )


def _stage_plan(server: Server, lowered: Lowered, stage: int, layout: _Layout) -> MemoryPlan:
    budget = _budget(server, lowered, stage)
    memory, block_bytes = server.engine.memory, layout.block_bytes[stage]
    size, ranks = server.scheduler.block_size, server.plan.attention_data
    where = f" (pipeline stage {stage + 1} of {server.plan.pipeline})" if server.plan.pipeline > 1 else ""
    kv_bytes, error_bytes = budget.kv_bytes, budget.kv_error_bytes(server.engine)
    blocks = memory.kv_blocks
    if blocks is not None:
        kv_bytes, error_bytes = blocks // ranks * block_bytes, 0.0
    elif kv_bytes <= 0:
        raise InfeasiblePlan([budget.shortage() + where])
    blocks = blocks or ranks * int(kv_bytes // block_bytes)
    parts = (budget.weights, budget.activations, budget.reserve, budget.collectives, kv_bytes)
    plan = MemoryPlan(*parts, size, blocks, layout.groups, layout.fixed, ranks, error_bytes)
    if plan.rank_blocks < plan.blocks_for(size):
        left = f"{format_bytes(kv_bytes)} left of the {format_bytes(budget.offered)} a device offers ({budget.offer})"
        raise InfeasiblePlan(
            [f"{left} hold {plan.rank_blocks} KV blocks of {format_bytes(block_bytes)}: too few{where}"]
        )
    return plan


@dataclass(frozen=True, slots=True)
class _Budget:
    """Bytes of a device and of what an engine puts on it: see ``MemoryDefaults``."""

    memory_bytes: int
    share: float
    share_of: ShareOf
    weights: float
    activations: float
    reserve: float
    collectives: float

    @property
    def offered(self) -> float:
        """Bytes that the parts and the KV cache come out of."""
        if self.share_of == "started":
            return self.share * (self.memory_bytes - self.reserve - self.collectives)
        return self.memory_bytes * (self.share if self.share_of == "total" else 1.0)

    @property
    def offer(self) -> str:
        """How ``offered`` comes about, in words."""
        if self.share_of == "started":
            free = self.memory_bytes - self.reserve - self.collectives
            return f"{format_bytes(free)} free before weights are loaded x {self.share:.3g}"
        share = f" x {self.share:.3g}" if self.share_of == "total" else ""
        return f"{format_bytes(self.memory_bytes)}{share}"

    @property
    def parts(self) -> dict[str, float]:
        """What comes out of ``offered`` before the KV cache."""
        if self.share_of == "started":
            return {"weights": self.weights}
        named = {"weights": self.weights, "activations": self.activations, "engine reserve": self.reserve}
        return {**named, "collective buffers": self.collectives}

    @property
    def kv_bytes(self) -> float:
        """What is left for the KV cache; negative where the parts alone are too much."""
        return (self.share if self.share_of == "loaded" else 1.0) * (self.offered - sum(self.parts.values()))

    def kv_error_bytes(self, engine: EngineProfile) -> float | None:
        """Standard error of ``kv_bytes``: that of the bytes kept, as far as they take from it."""
        if engine.memory_evidence is None:
            return None
        outside = self.reserve + self.collectives
        kept = outside if self.share_of == "started" else outside + self.activations
        return engine.memory_evidence.kept_error * kept * (1.0 if self.share_of == "total" else self.share)

    def shortage(self) -> str:
        """Which bytes do not fit: the weights alone, or all that must be there before any KV cache."""
        room = f"exceed the {format_bytes(self.offered)} a device offers ({self.offer})"
        if self.weights > self.offered:
            return f"weights of {format_bytes(self.weights)} {room}"
        named = [f"{what} of {format_bytes(size)}" for what, size in self.parts.items() if size]
        return f"{', '.join(named)} {room} and leave nothing for the KV cache"


def _budget(server: Server, lowered: Lowered, stage: int) -> _Budget:
    sheet, engine = server.device.datasheet, server.engine
    memory = engine.memory
    return _Budget(
        memory_bytes=sheet.memory_bytes,
        share=memory.share_on(sheet.memory_bytes),
        share_of=memory.share_of,
        weights=weights_bytes(server, lowered, stage),
        activations=activation_bytes(server, lowered, stage),
        reserve=float(memory.reserve_bytes + (memory.graph_bytes if engine.host.cuda_graphs else 0)),
        collectives=float(memory.communicators * _nccl_bytes(sheet.nccl_bytes, server.plan.devices)),
    )


def needed_bytes(server: Server) -> tuple[float, dict[str, float]]:
    """What a device of the fullest stage offers, and what must be there before any KV cache, by name."""
    lowered = lower(server)
    budgets = [_budget(server, lowered, stage) for stage in range(len(lowered.stages))]
    fullest = min(budgets, key=lambda budget: budget.kv_bytes)
    return fullest.offered, fullest.parts


def weights_bytes(server: Server, lowered: Lowered, stage: int) -> float:
    """Weights on one device of a stage, as the engine loads them.

    Embeddings on the first stage and the LM head on the last, split by vocabulary; tied ones are one matrix where both
    are the same stage. Norms, biases and routers are counted whole on every rank.
    """
    model, here = server.model, lowered.stages[stage]
    total = sum(count * _block_bytes(server, block) for block, count in here.blocks)
    first, last = stage == 0, stage == len(lowered.stages) - 1
    if first:
        total += model.embedding_params * ACTIVATION_BYTES / server.plan.tensor
    if last:
        total += model.norm_params * ACTIVATION_BYTES
        tied = model.tied_embeddings and first
        total += 0.0 if tied else sum(op.weight_bytes for op in here.head)
    return total


def _block_bytes(server: Server, block: Block) -> float:
    model = server.model
    small = model.small_params(block.kind) - (model.router_params if block.kind.moe else 0)
    return sum(_loaded_bytes(server, op) for op in block.rows) + small * ACTIVATION_BYTES


def _loaded_bytes(server: Server, op: RowOperator) -> float:
    """Weights of an operator, with what the engine rounds the sizes of its experts up to."""
    if not isinstance(op, Experts):
        return op.weight_bytes
    sheet, layer = server.device.datasheet, op.layer
    return op.weight_bytes * server.engine.padding_factor(layer.dtype, sheet, hidden=layer.hidden, inter=layer.inter)


def activation_bytes(server: Server, lowered: Lowered, stage: int) -> float:
    """Peak of a full step, which an engine finds by running one before it sizes its cache.

    It is the larger of two moments: inside the layers, and where the last stage samples.

    In the layers every token holds its hidden state and its residual. Beside them stands the widest pair of tensors
    alive together inside a block. That is QKV and the attention output, gate/up and its activation, or the buffers of
    the experts. These have one row per visited expert; gate/up and output share one buffer, as in vLLM's fused experts.

    When the last stage samples, every token still holds its hidden state. Every sequence holds the copies of its logits
    that the engine makes.

    Tokens and sequences are those of an attention-data rank; its experts meet the tokens of all ranks.
    """
    model, scheduler, ranks = server.model, server.scheduler, lowered.attention_data
    budget, seats = scheduler.token_budget // ranks, scheduler.max_num_seqs // ranks
    here = lowered.stages[stage]
    width = 2 * model.hidden + max(_widest(block, ranks) for block, _ in here.blocks)
    copies = server.engine.memory.sampler_logit_copies if here.head else 0.0
    sampling = copies * min(seats, budget) * model.vocab * LOGIT_BYTES
    return max(ACTIVATION_BYTES * budget * width, ACTIVATION_BYTES * budget * model.hidden + sampling)


def _widest(block: Block, ranks: int) -> int:
    """Elements per token of the widest tensors of a block that live together, on one of ``ranks`` data ranks."""
    widths = [block.attention.widest if block.attention else 0]
    for op in block.rows:
        if isinstance(op, Elementwise) and op.name.endswith("activation"):
            widths.append(round(op.bytes_per_row / ACTIVATION_BYTES))
        if isinstance(op, Experts):
            layer = op.layer
            shared = max((2 if layer.gated else 1) * layer.inter, layer.hidden)
            gathered = layer.hidden if ranks > 1 else 0
            widths.append(ranks * (gathered + layer.topk * (shared + layer.inter)))
    return max(widths)


def _nccl_bytes(by_group: dict[int, int], devices: int) -> int:
    """Buffers of the collective library for a group: those of the largest listed group that is not larger."""
    smaller = [group for group in by_group if group <= devices]
    return by_group[max(smaller)] if smaller else 0


@dataclass(frozen=True, slots=True)
class _Layout:
    """``groups`` and ``fixed`` blocks of a sequence (see ``MemoryPlan``), and the bytes of a block on every stage."""

    groups: tuple[tuple[int, int | None], ...]
    fixed: int
    block_bytes: tuple[float, ...]


def _kv_blocks(server: Server, lowered: Lowered) -> _Layout:
    """How sequences take blocks, and what a block takes of each stage's devices.

    A unit is the largest number of layers that divides every group. Where a stage holds an uneven share of the groups,
    its fullest group sets the bytes. States are counted in whole blocks, as many as the stage with most of them needs.
    """
    model, tensor = server.model, server.plan.tensor
    unit = math.gcd(*(group.layers for group in model.kv_groups))
    units = {group.window: group.layers // unit for group in model.kv_groups}
    groups = tuple((count, window) for window, count in units.items())
    stages = [stage.layers for stage in lowered.stages]
    cached = [_block_bytes_of(server, units, (layers, tensor)) for layers in stages]
    states = [model.state_bytes_of(layers, tensor) for layers in stages]
    fixed = max(math.ceil(state / block) for state, block in zip(states, cached, strict=True) if block)
    # A stage that caches nothing at all has room for any number of blocks: one byte each.
    sizes = tuple(max(c, s / max(fixed, 1), 1.0) for c, s in zip(cached, states, strict=True))
    return _Layout(groups, fixed, sizes)


def _block_bytes_of(server: Server, units: dict[int | None, int], where: tuple[range, int]) -> float:
    """Bytes of keys and values of a block on a rank of the given layers; 0 where none of them is attention."""
    layers, tensor = where
    here = server.model.kv_groups_of(layers)
    each = [group.bytes_per_token(server.kv_cache, tensor) / units[group.window] for group in here]
    return max(each, default=0.0) * server.scheduler.block_size
