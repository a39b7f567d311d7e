"""From a model and a plan to operators: one graph per kind of block, and what each pipeline stage runs of it.

Tensor parallelism follows Megatron-LM (arXiv 1909.08053): QKV and gate/up split by columns, output and down
projections by rows, an all-reduce after each; embedding and LM head split by vocabulary. KV heads are repeated where
there are more ranks than heads. A graph describes one block; a stage counts its blocks, so cost is flat in depth.
On which nodes the groups of ranks lie says ``specs/placement.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from apexsim.costs.experts import dispatches, moe_of, routed_part
from apexsim.costs.fitted import AttentionShape
from apexsim.costs.mixing import Mixing
from apexsim.costs.mla import LatentMixing, latent_copies, projections
from apexsim.costs.operators import (
    ACTIVATION_BYTES,
    Attention,
    Collective,
    CollectiveKind,
    Elementwise,
    Experts,
    Gemm,
    RowOperator,
    Sampling,
)
from apexsim.costs.recurrent import StateUpdate
from apexsim.errors import InfeasiblePlan
from apexsim.specs.deployment import Deployment
from apexsim.specs.placement import Spans, pool_spans
from apexsim.specs.plan import Pool

if TYPE_CHECKING:
    from apexsim.specs.layers import LayerKind

Operator = RowOperator | Mixing
FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of a kind, as one rank runs it. ``attention`` is what mixes its tokens; None where nothing does.

    ``graph`` is a networkx DiGraph whose nodes are operator names carrying an ``operator``; edges are data flow.
    """

    kind: LayerKind
    graph: Any
    attention: Mixing | None
    rows: tuple[RowOperator, ...]


@dataclass(frozen=True, slots=True)
class StageLayers:
    """What one pipeline stage runs in a step: ``layers``, as (block, how many); ``once`` per step over all tokens
    (embedding, last norm, send); ``head`` over the survivors (LM head, sampling), on the last stage."""

    layers: range
    blocks: tuple[tuple[Block, int], ...]
    once: tuple[RowOperator, ...]
    head: tuple[RowOperator, ...]

    def row_operators(self) -> list[tuple[RowOperator, int]]:
        """Every operator that costs by tokens of the step, with the times it runs."""
        return [(op, count) for block, count in self.blocks for op in block.rows] + [(op, 1) for op in self.once]

    @property
    def launches(self) -> int:
        """Kernels that an engine launches in a step that no CUDA graph replays, those of experts apart."""
        mixing = sum(count * block.attention.launches for block, count in self.blocks if block.attention)
        rows = sum(count * op.launches for op, count in self.row_operators())
        return mixing + rows + sum(op.launches for op in self.head)

    @property
    def expert_layers(self) -> int:
        return sum(count for op, count in self.row_operators() if isinstance(op, Experts))


@dataclass(frozen=True, slots=True)
class Lowered:
    """A model on a plan: the distinct blocks, and the pipeline stages made of them.

    A stage runs on ``attention_data`` ranks of ``tensor`` devices each.
    """

    tensor: int
    attention_data: int
    blocks: tuple[Block, ...]
    stages: tuple[StageLayers, ...]

    @property
    def stage_devices(self) -> int:
        """Devices of one stage, all of which run its operators."""
        return self.tensor * self.attention_data

    @property
    def attentions(self) -> tuple[Mixing, ...]:
        """Kinds of attention of the model, recurrent states among them: full first, then by window."""
        found = dict.fromkeys(block.attention for block in self.blocks if block.attention is not None)
        return tuple(sorted(found, key=lambda attention: attention.window or 0))

    def layers_of(self, attention: Mixing) -> tuple[int, ...]:
        """Layers that run this kind of attention, stage by stage."""
        return tuple(sum(n for block, n in stage.blocks if block.attention == attention) for stage in self.stages)


def lower(deployment: Deployment, pool: Pool) -> Lowered:
    """Lower a deployment's model onto a pool's plan; raises InfeasiblePlan where it cannot be laid out."""
    model, plan, cluster = deployment.model, pool.plan, deployment.cluster
    if reasons := plan.lawful(model, cluster):
        raise InfeasiblePlan(reasons)
    if pool.devices > cluster.devices:
        raise InfeasiblePlan([f"the replicas use {pool.devices} devices, the cluster has {cluster.devices}"])
    spans = _spans(deployment, pool)
    if spans.tensor > math.ceil(plan.tensor / cluster.devices_per_node):
        free = f"{pool.replicas} replicas leave no node with room for {plan.tensor} tensor ranks"
        raise InfeasiblePlan([f"{free}; give fewer replicas, or another tensor degree"])
    blocks = {kind.one: _block(deployment, pool, kind.one) for kind in model.layer_kinds}
    stages = []
    for index, layers in enumerate(split_layers(model.layers, plan.pipeline)):
        counted = tuple((blocks[kind.one], kind.count) for kind in model.kinds_of(layers))
        last = index == plan.pipeline - 1
        end = (_last_norm(deployment),) if last else (_hand_over(deployment, across_nodes=spans.hand_overs[index]),)
        once = (*(_entry(deployment, pool) if index == 0 else ()), *end)
        stages.append(StageLayers(layers, counted, once, _head(deployment, pool) if last else ()))
    return Lowered(plan.tensor, plan.attention_data, tuple(blocks.values()), tuple(stages))


def split_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Layers of each stage, as even as can be: the first stages take the remainder."""
    base, extra = divmod(layers, stages)
    starts = [stage * base + min(stage, extra) for stage in range(stages + 1)]
    return tuple(range(start, end) for start, end in pairwise(starts))


def _entry(deployment: Deployment, pool: Pool) -> tuple[RowOperator, ...]:
    """Token embedding: a lookup in this rank's part of the vocabulary, summed over ranks."""
    width = ACTIVATION_BYTES * deployment.model.hidden
    return (Elementwise("embedding", 2 * width), *_all_reduce(deployment, pool, "embedding_all_reduce"))


def _spans(deployment: Deployment, pool: Pool) -> Spans:
    """The nodes that the groups of the pool's worst-placed replica lie on."""
    cluster = deployment.cluster
    return pool_spans(pool, cluster.devices_per_node, cluster.nodes)


def _last_norm(deployment: Deployment) -> Elementwise:
    return Elementwise("last_norm", 4 * ACTIVATION_BYTES * deployment.model.hidden)


def _hand_over(deployment: Deployment, *, across_nodes: bool) -> Collective:
    """Activations to the next stage, in the sender's time."""
    kind: CollectiveKind = "send_recv_across_nodes" if across_nodes else "send_recv"
    return Collective("send", kind, 2, ACTIVATION_BYTES * deployment.model.hidden)


def _head(deployment: Deployment, pool: Pool) -> tuple[RowOperator, ...]:
    """LM head (bf16 whatever the weights are), the logits gathered over ranks, sampling on every rank alike."""
    model, tensor = deployment.model, pool.plan.tensor
    lm_head = Gemm("lm_head", math.ceil(model.vocab / tensor), model.hidden, "bf16", rows="survivors")
    passes = deployment.engine.sampler.top_p_passes if deployment.sampling == "top_p" else 0.0
    sampling = Sampling("sampling", model.vocab, passes)
    if tensor == 1:
        return (lm_head, sampling)
    width, nodes = ACTIVATION_BYTES * model.vocab, _spans(deployment, pool).tensor
    gathered = Collective("logits_all_gather", "all_gather", tensor, width, rows="survivors", nodes=nodes)
    return (lm_head, gathered, sampling)


def _all_reduce(
    deployment: Deployment, pool: Pool, name: str, *, row_bytes: float | None = None
) -> tuple[RowOperator, ...]:
    """The all-reduce that ends a row-split product, or of ``row_bytes`` a token; nothing on one rank."""
    if pool.plan.tensor == 1:
        return ()
    communication, nodes = deployment.engine.communication, _spans(deployment, pool).tensor
    width = row_bytes or ACTIVATION_BYTES * deployment.model.hidden
    plain = Collective(name, "all_reduce", pool.plan.tensor, width, nodes=nodes)
    if not (communication.custom_all_reduce and _own_kernel(deployment, pool)):
        return (plain,)
    custom, at_once = communication.custom_all_reduce_max_bytes, communication.one_shot_bytes(width)
    return (replace(plain, custom_max_bytes=custom, one_shot_max_bytes=at_once),)


def _own_kernel(deployment: Deployment, pool: Pool) -> bool:
    """Whether an engine's own all-reduce runs: in one node, on a device that has its times.

    Such kernels read the memory of other devices, which those on consumer boards and on other nodes do not allow.
    """
    known = deployment.cluster.device.operators.get("all_reduce", {})
    return f"custom_{pool.plan.tensor}" in known and _spans(deployment, pool).tensor == 1


def _block(deployment: Deployment, pool: Pool, kind: LayerKind) -> Block:
    """One layer: a chain of operators; the residual stream joins its norms, and experts fork from it."""
    import networkx as nx

    attention, before, after = _mixer_part(deployment, pool, kind)
    beside = deployment.model.parallel and bool(before)
    norm = [_entry_of(deployment, pool, "ffn")] if kind.ffn and not beside else []
    flat: list[Operator] = [*before, *([attention] if attention else []), *after, *norm]
    graph = nx.DiGraph(window=kind.window, moe=kind.moe)
    _chain(graph, flat)
    ffn = _ffn_part(deployment, pool, kind)
    for branch in ffn:
        _chain(graph, [before[0] if beside else flat[-1], *branch])
    ends = [branch[-1].name for branch in ffn]
    closing = _closing(deployment, pool, kind, len(ffn))
    for operator in closing:
        graph.add_node(operator.name, operator=operator)
        graph.add_edges_from((end, operator.name) for end in ends)
        ends = [operator.name]
    if beside:
        closing.append(_sum("add_parallel", deployment))
        graph.add_node("add_parallel", operator=closing[-1])
        graph.add_edges_from((end, "add_parallel") for end in (*ends, flat[-1].name))
    if before and norm:
        graph.add_edge(before[0].name, norm[0].name, residual=True)
    rows = [*before, *after, *norm, *(op for branch in ffn for op in branch), *closing]
    return Block(kind, graph, attention, tuple(rows))


def _chain(graph: Any, operators: list[Operator]) -> None:
    for operator in operators:
        graph.add_node(operator.name, operator=operator)
    graph.add_edges_from((a.name, b.name) for a, b in pairwise(operators))


def _entry_of(deployment: Deployment, pool: Pool, part: str) -> Elementwise:
    """What comes before attention or FFN: the residual stream takes up what was computed, and is normed if at all."""
    if deployment.model.pre_norms:
        return _norm(deployment, pool, f"{part}_norm")
    return _sum(f"{part}_residual", deployment)


def _sum(name: str, deployment: Deployment) -> Elementwise:
    """A sum of two hidden states: two read, one written."""
    return Elementwise(name, 3 * ACTIVATION_BYTES * deployment.model.hidden)


def _norm(deployment: Deployment, pool: Pool, name: str) -> Elementwise:
    """A fused residual-add and norm: reads and writes both the hidden state and the residual.

    Some engines do it in the all-reduce that comes before it.
    """
    width = ACTIVATION_BYTES * deployment.model.hidden
    fused_bytes = deployment.engine.communication.fused_norm_max_bytes if _own_kernel(deployment, pool) else 0
    return Elementwise(name, 4 * width, hidden_rows=fused_bytes / width)


def _post_norm(deployment: Deployment, name: str) -> tuple[RowOperator, ...]:
    """A norm over the output of attention or FFN alone, where the model has one."""
    model = deployment.model
    return (Elementwise(name, 2 * ACTIVATION_BYTES * model.hidden),) if model.post_norms else ()


Mixed = tuple[Mixing | None, list[RowOperator], list[RowOperator]]


def _mixer_part(deployment: Deployment, pool: Pool, kind: LayerKind) -> Mixed:
    """What mixes tokens, with what comes before it and after it; nothing in a layer that is an FFN alone."""
    if kind.mixer is None:
        return None, [], []
    part = _latent_part if deployment.model.mla else _attention_part
    part = _recurrent_part if kind.mixer == "recurrent" else part
    attention, before, after = part(deployment, pool, kind)
    after += _all_reduce(deployment, pool, "attention_all_reduce")
    after += _post_norm(deployment, "attention_post_norm")
    return attention, [_entry_of(deployment, pool, "attention"), *before], after


def _attention_part(deployment: Deployment, pool: Pool, kind: LayerKind) -> Mixed:
    """QKV (an output gate with the queries), QK norm, rotation; the gate and the output projection."""
    model, tensor = deployment.model, pool.plan.tensor
    heads, kv_heads = model.heads // tensor, max(1, model.kv_heads // tensor)
    dtype, gates = model.part_dtype("mixer", kind, deployment.weights), heads if model.output_gate else 0
    qk_bytes = 2 * ACTIVATION_BYTES * (heads + kv_heads)
    before: list[RowOperator] = [
        _gemm(deployment, "qkv", (heads + gates + 2 * kv_heads) * model.head_dim, model.hidden, dtype)
    ]
    head_bytes = 2 * ACTIVATION_BYTES * model.head_dim
    before += _qk_norm(deployment, pool, head_bytes * heads, head_bytes * kv_heads)
    if model.rotates(kind) and "rope" not in deployment.engine.fusions:
        before.append(Elementwise("rope", qk_bytes * (model.rotary_dim or model.head_dim)))
    after: list[RowOperator] = [_gemm(deployment, "o", model.hidden, heads * model.head_dim, dtype)]
    if gates:
        after.insert(0, Elementwise("output_gate", 3 * ACTIVATION_BYTES * heads * model.head_dim))
    shape = AttentionShape(heads, kv_heads, model.head_dim, kind.window, deployment.kv_cache)
    return Attention("attention", shape), before, after


def _qk_norm(deployment: Deployment, pool: Pool, q_bytes: float, k_bytes: float) -> list[RowOperator]:
    """The norm of queries and keys, where the model has one; ``q_bytes`` and ``k_bytes`` read and written a token.

    One over all heads of a layer needs their squares from all ranks. vLLM (``MiniMaxText01RMSNormTP``) sums those of
    queries and keys, joins both, adds two float32 a token up over the ranks, and scales both, a kernel each.
    """
    if deployment.model.qk_norm is None:
        return []
    if deployment.model.qk_norm != "layer" or pool.plan.tensor == 1:
        return [Elementwise("qk_norm", q_bytes + k_bytes)]
    squares = [Elementwise("q_squares", q_bytes / 2), Elementwise("k_squares", k_bytes / 2)]
    joined = [Elementwise("join_squares", 4 * FP32_BYTES)]
    summed = _all_reduce(deployment, pool, "qk_all_reduce", row_bytes=2 * FP32_BYTES)
    return [*squares, *joined, *summed, Elementwise("q_norm", q_bytes), Elementwise("k_norm", k_bytes)]


def _gemm(deployment: Deployment, name: str, n: int, k: int, dtype: str) -> Gemm:
    """A product of activations, which the kernel before it may have quantised already."""
    engine, is_fp8 = deployment.engine, dtype == "fp8"
    like = "bf16" if is_fp8 and engine.kernels.fp8_reads_like_bf16 else None
    return Gemm(name, n, k, dtype, quantised=is_fp8 and "quantise" in engine.fusions, reads_like=like)


def _latent_part(deployment: Deployment, pool: Pool, kind: LayerKind) -> Mixed:
    """Latent attention, its heads split over ranks; down-projections and latent vectors whole on every rank."""
    model, heads = deployment.model, deployment.model.heads // pool.plan.tensor
    assert model.mla is not None, "the caller has seen it"
    dtype, product = model.part_dtype("mixer", kind, deployment.weights), partial(_gemm, deployment)
    shape = (model.hidden, heads)
    before, after = projections(model.mla, shape, dtype, indexed=kind.indexed, product=product)
    if "rope" not in deployment.engine.fusions:
        before += latent_copies(model.mla)
    indexed = sum(each.count for each in model.layer_kinds if each.indexed) / model.layers
    share = indexed if model.mla.indexer else 1.0
    return LatentMixing("attention", model.mla, model.hidden, heads, deployment.kv_cache, share), before, after


def _recurrent_part(deployment: Deployment, pool: Pool, kind: LayerKind) -> Mixed:
    """Input projection; convolution and state; the gated norm and the output projection."""
    model, tensor, layer = deployment.model, pool.plan.tensor, deployment.model.recurrent
    assert layer is not None, "a recurrent layer belongs to a model that says of which kind"
    inner = layer.inner(tensor)
    dtype = model.part_dtype("mixer", kind, deployment.weights)
    before: list[RowOperator] = [_gemm(deployment, "state_in", layer.projected(tensor), model.hidden, dtype)]
    gated = Elementwise("state_norm", 3 * ACTIVATION_BYTES * inner)
    after: list[RowOperator] = [gated, _gemm(deployment, "state_out", model.hidden, inner, dtype)]
    return StateUpdate("state", layer, tensor), before, after


def _ffn(deployment: Deployment, width: int, dtype: str, prefix: str = "") -> list[Gemm | Elementwise]:
    """A dense FFN whose shard on this rank is ``width`` wide."""
    model = deployment.model
    up, inputs = ("gate_up", 2) if model.gated else ("up", 1)
    return [
        _gemm(deployment, prefix + up, inputs * width, model.hidden, dtype),
        Elementwise(prefix + "activation", ACTIVATION_BYTES * (inputs + 1) * width),
        _gemm(deployment, prefix + "down", model.hidden, width, dtype),
    ]


def _ffn_part(deployment: Deployment, pool: Pool, kind: LayerKind) -> list[list[RowOperator]]:
    """Branches of the FFN that run beside each other."""
    if not kind.ffn:
        return []
    if kind.moe:
        return _moe_part(deployment, pool, kind)
    dtype = deployment.model.part_dtype("ffn", kind, deployment.weights)
    return [[*_ffn(deployment, (deployment.model.ffn or 0) // pool.plan.tensor, dtype)]]


def _moe_part(deployment: Deployment, pool: Pool, kind: LayerKind) -> list[list[RowOperator]]:
    """Router and routed experts; shared experts as one dense FFN, hidden by them in small steps of some engines."""
    model, moe = deployment.model, moe_of(deployment)
    routed = routed_part(deployment, pool, kind)
    if not moe.shared_width:
        return [routed]
    dtype = model.part_dtype("shared", kind, deployment.weights)
    shared = _ffn(deployment, moe.shared_width // pool.plan.tensor, dtype, "shared_")
    if moe.shared_gate:
        shared.append(Gemm("shared_gate", 1, model.hidden, "bf16"))
    beside = deployment.engine.host.beside_tokens
    return [routed, [replace(op, hidden_rows=beside) for op in shared]]


def _closing(deployment: Deployment, pool: Pool, kind: LayerKind, branches: int) -> list[RowOperator]:
    """What joins the FFN's branches and its ranks."""
    width = ACTIVATION_BYTES * deployment.model.hidden
    joined: list[RowOperator] = [Elementwise("add_shared", 3 * width)] if branches > 1 else []
    post = _post_norm(deployment, "ffn_post_norm")
    if not branches:
        return []
    if kind.moe and dispatches(deployment, pool):
        if pool.plan.tensor == 1:
            return [*joined, *post]
        nodes = _spans(deployment, pool).tensor
        return [*joined, Collective("ffn_all_gather", "all_gather", pool.plan.tensor, width, nodes=nodes), *post]
    return [*joined, *_all_reduce(deployment, pool, "ffn_all_reduce"), *post]
