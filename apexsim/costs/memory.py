"""What fits on a device: weights, activations, what the engine and its collectives take, and KV blocks in the rest."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from apexsim.costs.lowering import Block, Lowered, lower
from apexsim.costs.operators import ACTIVATION_BYTES, LOGIT_BYTES, Elementwise, Experts
from apexsim.errors import InfeasiblePlan
from apexsim.specs.deployment import Deployment, Pool
from apexsim.units import format_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one device of the pipeline stage that holds the fewest KV blocks, and the blocks of a replica.

    A block keeps ``block_size`` tokens for one unit of layers. ``groups`` are (units, window): layers that attend to
    everything take ``units`` blocks for every ``block_size`` tokens of a sequence; windowed ones stop growing once they
    hold the window and one block more (the one being filled while the oldest still counts). With one kind of layers
    there is one unit, and a block is a block. ``fixed_blocks`` is what the recurrent layers' state of a sequence takes,
    however long it is. With ``ranks`` attention-data ranks a sequence lies on one of them, whole; ``blocks`` are those
    of all.
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


def plan_memory(deployment: Deployment, pool: Pool) -> MemoryPlan:
    """Divide device memory for a pool's replica; raises InfeasiblePlan saying which bytes do not fit.

    KV cache = memory x gpu_memory_utilization - weights - activations - engine reserve - buffers of the collectives,
    stage by stage; the stage with the fewest blocks decides, as in vLLM.
    """
    lowered = lower(deployment, pool)
    plans = [_stage_plan(deployment, pool, lowered, stage) for stage in range(len(lowered.stages))]
    return min(plans, key=lambda plan: plan.blocks)


def _stage_plan(deployment: Deployment, pool: Pool, lowered: Lowered, stage: int) -> MemoryPlan:
    sheet, memory = deployment.cluster.device.datasheet, deployment.engine.memory
    weights = weights_bytes(deployment, pool, lowered, stage)
    activations = activation_bytes(deployment, lowered, stage)
    reserve, nccl = float(memory.reserve_bytes), float(_nccl_bytes(sheet.nccl_bytes, pool.plan.devices))
    offered = sheet.memory_bytes * memory.gpu_memory_utilization
    offer = f"{format_bytes(sheet.memory_bytes)} x {memory.gpu_memory_utilization:g}"
    where = f" (pipeline stage {stage + 1} of {pool.plan.pipeline})" if pool.plan.pipeline > 1 else ""
    kv_bytes = offered - weights - activations - reserve - nccl
    if kv_bytes <= 0:
        parts = {"weights": weights, "activations": activations, "engine reserve": reserve, "collective buffers": nccl}
        raise InfeasiblePlan([_shortage(parts, offered, offer) + where])
    layout = _kv_blocks(deployment, pool, lowered)
    block_bytes = layout.block_bytes[stage]
    size, ranks = deployment.scheduler.block_size, pool.plan.attention_data
    blocks = memory.kv_blocks or ranks * int(kv_bytes // block_bytes)
    plan = MemoryPlan(weights, activations, reserve, nccl, kv_bytes, size, blocks, layout.groups, layout.fixed, ranks)
    if plan.rank_blocks < plan.blocks_for(size):
        left = f"{format_bytes(kv_bytes)} left of the {format_bytes(offered)} a device offers ({offer})"
        raise InfeasiblePlan(
            [f"{left} hold {plan.rank_blocks} KV blocks of {format_bytes(block_bytes)}: too few{where}"]
        )
    return plan


def _shortage(parts: dict[str, float], offered: float, offer: str) -> str:
    """Which bytes do not fit: the weights alone, or all that must be there before any KV cache."""
    room = f"exceed the {format_bytes(offered)} a device offers ({offer})"
    if parts["weights"] > offered:
        return f"weights of {format_bytes(parts['weights'])} {room}"
    named = [f"{what} of {format_bytes(size)}" for what, size in parts.items() if size]
    return f"{', '.join(named)} {room} and leave nothing for the KV cache"


def weights_bytes(deployment: Deployment, pool: Pool, lowered: Lowered, stage: int) -> float:
    """Weights on one device of a stage.

    Embeddings on the first stage and the LM head on the last, split by vocabulary; tied ones are one matrix where both
    are the same stage. Norms, biases and routers are counted whole on every rank.
    """
    model, here = deployment.model, lowered.stages[stage]
    total = sum(count * _block_bytes(deployment, block) for block, count in here.blocks)
    first, last = stage == 0, stage == len(lowered.stages) - 1
    if first:
        total += model.embedding_params * ACTIVATION_BYTES / pool.plan.tensor
    if last:
        total += model.norm_params * ACTIVATION_BYTES
        tied = model.tied_embeddings and first
        total += 0.0 if tied else sum(op.weight_bytes for op in here.head)
    return total


def _block_bytes(deployment: Deployment, block: Block) -> float:
    model = deployment.model
    small = model.small_params(block.kind) - (model.router_params if block.kind.moe else 0)
    return sum(op.weight_bytes for op in block.rows) + small * ACTIVATION_BYTES


def activation_bytes(deployment: Deployment, lowered: Lowered, stage: int) -> float:
    """Peak of a full step, which an engine finds by running one before it sizes its cache.

    Every token holds its hidden state and residual, and the widest pair of tensors alive together inside a block: QKV
    and the attention output, gate/up and its activation, or the expert buffers (one row per visited expert; gate/up
    and output share one buffer, as in vLLM's fused experts). The last stage adds fp32 logits of every sequence. Tokens
    and sequences are those of an attention-data rank; its experts meet the tokens of all ranks.
    """
    model, scheduler, ranks = deployment.model, deployment.scheduler, lowered.attention_data
    budget, seats = scheduler.token_budget // ranks, scheduler.max_num_seqs // ranks
    width = 2 * model.hidden + max(_widest(block, ranks) for block, _ in lowered.stages[stage].blocks)
    logits = min(seats, budget) * model.vocab * LOGIT_BYTES if lowered.stages[stage].head else 0.0
    return ACTIVATION_BYTES * budget * width + logits


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


def _kv_blocks(deployment: Deployment, pool: Pool, lowered: Lowered) -> _Layout:
    """How sequences take blocks, and what a block takes of each stage's devices.

    A unit is the largest number of layers that divides every group. Where a stage holds an uneven share of the groups,
    its fullest group sets the bytes. States are counted in whole blocks, as many as the stage with most of them needs.
    """
    model, tensor = deployment.model, pool.plan.tensor
    unit = math.gcd(*(group.layers for group in model.kv_groups))
    units = {group.window: group.layers // unit for group in model.kv_groups}
    groups = tuple((count, window) for window, count in units.items())
    stages = [stage.layers for stage in lowered.stages]
    cached = [_block_bytes_of(deployment, units, (layers, tensor)) for layers in stages]
    states = [model.state_bytes_of(layers, tensor) for layers in stages]
    fixed = max(math.ceil(state / block) for state, block in zip(states, cached, strict=True) if block)
    # A stage that caches nothing at all has room for any number of blocks: one byte each.
    sizes = tuple(max(c, s / max(fixed, 1), 1.0) for c, s in zip(cached, states, strict=True))
    return _Layout(groups, fixed, sizes)


def _block_bytes_of(deployment: Deployment, units: dict[int | None, int], where: tuple[range, int]) -> float:
    """Bytes of keys and values of a block on a rank of the given layers; 0 where none of them is attention."""
    layers, tensor = where
    here = deployment.model.kv_groups_of(layers)
    each = [group.bytes_per_token(deployment.kv_cache, tensor) / units[group.window] for group in here]
    return max(each, default=0.0) * deployment.scheduler.block_size
