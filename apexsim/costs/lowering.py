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
from apexsim.specs.server import Server

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


def lower(server: Server) -> Lowered:
    """Lower a server's model onto its plan."""
    model, plan = server.model, server.plan
    blocks = {kind.one: _block(server, kind.one) for kind in model.layer_kinds}
    stages = []
    for index, layers in enumerate(split_layers(model.layers, plan.pipeline)):
        counted = tuple((blocks[kind.one], kind.count) for kind in model.kinds_of(layers))
        last = index == plan.pipeline - 1
        end = (_last_norm(server),) if last else (_hand_over(server, across_nodes=server.spans.hand_overs[index]),)
        once = (*(_entry(server) if index == 0 else ()), *end)
        stages.append(StageLayers(layers, counted, once, _head(server) if last else ()))
    return Lowered(plan.tensor, plan.attention_data, tuple(blocks.values()), tuple(stages))


def split_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Layers of each stage, as even as can be: the first stages take the remainder."""
    base, extra = divmod(layers, stages)
    starts = [stage * base + min(stage, extra) for stage in range(stages + 1)]
    return tuple(range(start, end) for start, end in pairwise(starts))


def _entry(server: Server) -> tuple[RowOperator, ...]:
    """Token embedding: a lookup in this rank's part of the vocabulary, summed over ranks."""
    width = ACTIVATION_BYTES * server.model.hidden
    return (Elementwise("embedding", 2 * width), *_all_reduce(server, "embedding_all_reduce"))


def _last_norm(server: Server) -> Elementwise:
    return Elementwise("last_norm", 4 * ACTIVATION_BYTES * server.model.hidden)


def _hand_over(server: Server, *, across_nodes: bool) -> Collective:
    """Activations to the next stage, in the sender's time."""
    kind: CollectiveKind = "send_recv_across_nodes" if across_nodes else "send_recv"
    return Collective("send", kind, 2, ACTIVATION_BYTES * server.model.hidden)


def _head(server: Server) -> tuple[RowOperator, ...]:
    """LM head (bf16 whatever the weights are), the logits gathered over ranks, sampling on every rank alike."""
    model, tensor = server.model, server.plan.tensor
    lm_head = Gemm("lm_head", math.ceil(model.vocab / tensor), model.hidden, "bf16", rows="survivors")
    passes = server.engine.sampler.top_p_passes if server.sampling == "top_p" else 0.0
    sampling = Sampling("sampling", model.vocab, passes)
    if tensor == 1:
        return (lm_head, sampling)
    width, nodes = ACTIVATION_BYTES * model.vocab, server.spans.tensor
    gathered = Collective("logits_all_gather", "all_gather", tensor, width, rows="survivors", nodes=nodes)
    return (lm_head, gathered, sampling)


def _all_reduce(server: Server, name: str, *, row_bytes: float | None = None) -> tuple[RowOperator, ...]:
    """The all-reduce that ends a row-split product, or of ``row_bytes`` a token; nothing on one rank."""
    if server.plan.tensor == 1:
        return ()
    communication, nodes = server.engine.communication, server.spans.tensor
    width = row_bytes or ACTIVATION_BYTES * server.model.hidden
    plain = Collective(name, "all_reduce", server.plan.tensor, width, nodes=nodes)
    if not (communication.custom_all_reduce and _own_kernel(server)):
        return (plain,)
    custom, at_once = communication.custom_all_reduce_max_bytes, communication.one_shot_bytes(width)
    return (replace(plain, custom_max_bytes=custom, one_shot_max_bytes=at_once),)


def _own_kernel(server: Server) -> bool:
    """Whether an engine's own all-reduce runs: in one node, on a device that has its times.

    Such kernels read the memory of other devices, which those on consumer boards and on other nodes do not allow.
    """
    known = server.device.operators.get("all_reduce", {})
    return f"custom_{server.plan.tensor}" in known and server.spans.tensor == 1


def _block(server: Server, kind: LayerKind) -> Block:
    """One layer: a chain of operators; the residual stream joins its norms, and experts fork from it."""
    import networkx as nx

    attention, before, after = _mixer_part(server, kind)
    beside = server.model.parallel and bool(before)
    norm = [_entry_of(server, "ffn")] if kind.ffn and not beside else []
    flat: list[Operator] = [*before, *([attention] if attention else []), *after, *norm]
    graph = nx.DiGraph(window=kind.window, moe=kind.moe)
    _chain(graph, flat)
    ffn = _ffn_part(server, kind)
    for branch in ffn:
        _chain(graph, [before[0] if beside else flat[-1], *branch])
    ends = [branch[-1].name for branch in ffn]
    closing = _closing(server, kind, len(ffn))
    for operator in closing:
        graph.add_node(operator.name, operator=operator)
        graph.add_edges_from((end, operator.name) for end in ends)
        ends = [operator.name]
    if beside:
        closing.append(_sum("add_parallel", server))
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


def _entry_of(server: Server, part: str) -> Elementwise:
    """What comes before attention or FFN: the residual stream takes up what was computed, and is normed if at all."""
    if server.model.pre_norms:
        return _norm(server, f"{part}_norm")
    return _sum(f"{part}_residual", server)


def _sum(name: str, server: Server) -> Elementwise:
    """A sum of two hidden states: two read, one written."""
    return Elementwise(name, 3 * ACTIVATION_BYTES * server.model.hidden)


def _norm(server: Server, name: str) -> Elementwise:
    """A fused residual-add and norm: reads and writes both the hidden state and the residual.

    Some engines do it in the all-reduce that comes before it.
    """
    width = ACTIVATION_BYTES * server.model.hidden
    fused_bytes = server.engine.communication.fused_norm_max_bytes if _own_kernel(server) else 0
    return Elementwise(name, 4 * width, hidden_rows=fused_bytes / width)


def _post_norm(server: Server, name: str) -> tuple[RowOperator, ...]:
    """A norm over the output of attention or FFN alone, where the model has one."""
    model = server.model
    return (Elementwise(name, 2 * ACTIVATION_BYTES * model.hidden),) if model.post_norms else ()


Mixed = tuple[Mixing | None, list[RowOperator], list[RowOperator]]


def _mixer_part(server: Server, kind: LayerKind) -> Mixed:
    """What mixes tokens, with what comes before it and after it; nothing in a layer that is an FFN alone."""
    if kind.mixer is None:
        return None, [], []
    part = _latent_part if server.model.mla else _attention_part
    part = _recurrent_part if kind.mixer == "recurrent" else part
    attention, before, after = part(server, kind)
    after += _all_reduce(server, "attention_all_reduce")
    after += _post_norm(server, "attention_post_norm")
    return attention, [_entry_of(server, "attention"), *before], after


def _attention_part(server: Server, kind: LayerKind) -> Mixed:
    """QKV (an output gate with the queries), QK norm, rotation; the gate and the output projection."""
    model, tensor = server.model, server.plan.tensor
    heads, kv_heads = model.heads // tensor, max(1, model.kv_heads // tensor)
    dtype, gates = model.part_dtype("mixer", kind, server.weights), heads if model.output_gate else 0
    qk_bytes = 2 * ACTIVATION_BYTES * (heads + kv_heads)
    before: list[RowOperator] = [
        _gemm(server, "qkv", (heads + gates + 2 * kv_heads) * model.head_dim, model.hidden, dtype)
    ]
    head_bytes = 2 * ACTIVATION_BYTES * model.head_dim
    before += _qk_norm(server, head_bytes * heads, head_bytes * kv_heads)
    if model.rotates(kind) and "rope" not in server.engine.fusions:
        before.append(Elementwise("rope", qk_bytes * (model.rotary_dim or model.head_dim)))
    after: list[RowOperator] = [_gemm(server, "o", model.hidden, heads * model.head_dim, dtype)]
    if gates:
        after.insert(0, Elementwise("output_gate", 3 * ACTIVATION_BYTES * heads * model.head_dim))
    shape = AttentionShape(heads, kv_heads, model.head_dim, kind.window, server.kv_cache)
    return Attention("attention", shape), before, after


def _qk_norm(server: Server, q_bytes: float, k_bytes: float) -> list[RowOperator]:
    """The norm of queries and keys, where the model has one; ``q_bytes`` and ``k_bytes`` read and written a token.

    One over all heads of a layer needs their squares from all ranks. vLLM (``MiniMaxText01RMSNormTP``) sums those of
    queries and keys, joins both, adds two float32 a token up over the ranks, and scales both, a kernel each.
    """
    if server.model.qk_norm is None:
        return []
    if server.model.qk_norm != "layer" or server.plan.tensor == 1:
        return [Elementwise("qk_norm", q_bytes + k_bytes)]
    squares = [Elementwise("q_squares", q_bytes / 2), Elementwise("k_squares", k_bytes / 2)]
    joined = [Elementwise("join_squares", 4 * FP32_BYTES)]
    summed = _all_reduce(server, "qk_all_reduce", row_bytes=2 * FP32_BYTES)
    return [*squares, *joined, *summed, Elementwise("q_norm", q_bytes), Elementwise("k_norm", k_bytes)]


def _gemm(server: Server, name: str, n: int, k: int, dtype: str) -> Gemm:
    """A product of activations, which the kernel before it may have quantised already."""
    engine, is_fp8 = server.engine, dtype == "fp8"
    like = "bf16" if is_fp8 and engine.kernels.fp8_reads_like_bf16 else None
    return Gemm(name, n, k, dtype, quantised=is_fp8 and "quantise" in engine.fusions, reads_like=like)


def _latent_part(server: Server, kind: LayerKind) -> Mixed:
    """Latent attention, its heads split over ranks; down-projections and latent vectors whole on every rank."""
    model, heads = server.model, server.model.heads // server.plan.tensor
    assert model.mla is not None, "the caller has seen it"
    dtype, product = model.part_dtype("mixer", kind, server.weights), partial(_gemm, server)
    shape = (model.hidden, heads)
    before, after = projections(model.mla, shape, dtype, indexed=kind.indexed, product=product)
    if "rope" not in server.engine.fusions:
        before += latent_copies(model.mla)
    indexed = sum(each.count for each in model.layer_kinds if each.indexed) / model.layers
    share = indexed if model.mla.indexer else 1.0
    return LatentMixing("attention", model.mla, model.hidden, heads, server.kv_cache, share), before, after


def _recurrent_part(server: Server, kind: LayerKind) -> Mixed:
    """Input projection; convolution and state; the gated norm and the output projection."""
    model, tensor, layer = server.model, server.plan.tensor, server.model.recurrent
    assert layer is not None, "a recurrent layer belongs to a model that says of which kind"
    inner = layer.inner(tensor)
    dtype = model.part_dtype("mixer", kind, server.weights)
    before: list[RowOperator] = [_gemm(server, "state_in", layer.projected(tensor), model.hidden, dtype)]
    gated = Elementwise("state_norm", 3 * ACTIVATION_BYTES * inner)
    after: list[RowOperator] = [gated, _gemm(server, "state_out", model.hidden, inner, dtype)]
    return StateUpdate("state", layer, tensor), before, after


def _ffn(server: Server, width: int, dtype: str, prefix: str = "") -> list[Gemm | Elementwise]:
    """A dense FFN whose shard on this rank is ``width`` wide."""
    model = server.model
    up, inputs = ("gate_up", 2) if model.gated else ("up", 1)
    return [
        _gemm(server, prefix + up, inputs * width, model.hidden, dtype),
        Elementwise(prefix + "activation", ACTIVATION_BYTES * (inputs + 1) * width),
        _gemm(server, prefix + "down", model.hidden, width, dtype),
    ]


def _ffn_part(server: Server, kind: LayerKind) -> list[list[RowOperator]]:
    """Branches of the FFN that run beside each other."""
    if not kind.ffn:
        return []
    if kind.moe:
        return _moe_part(server, kind)
    dtype = server.model.part_dtype("ffn", kind, server.weights)
    return [[*_ffn(server, (server.model.ffn or 0) // server.plan.tensor, dtype)]]


def _moe_part(server: Server, kind: LayerKind) -> list[list[RowOperator]]:
    """Router and routed experts; shared experts as one dense FFN, hidden by them in small steps of some engines."""
    model, moe = server.model, moe_of(server)
    routed = routed_part(server, kind)
    if not moe.shared_width:
        return [routed]
    dtype = model.part_dtype("shared", kind, server.weights)
    shared = _ffn(server, moe.shared_width // server.plan.tensor, dtype, "shared_")
    if moe.shared_gate:
        shared.append(Gemm("shared_gate", 1, model.hidden, "bf16"))
    beside = server.engine.host.beside_tokens
    return [routed, [replace(op, hidden_rows=beside) for op in shared]]


def _closing(server: Server, kind: LayerKind, branches: int) -> list[RowOperator]:
    """What joins the FFN's branches and its ranks."""
    width = ACTIVATION_BYTES * server.model.hidden
    joined: list[RowOperator] = [Elementwise("add_shared", 3 * width)] if branches > 1 else []
    post = _post_norm(server, "ffn_post_norm")
    if not branches:
        return []
    if kind.moe and dispatches(server):
        if server.plan.tensor == 1:
            return [*joined, *post]
        nodes = server.spans.tensor
        return [*joined, Collective("ffn_all_gather", "all_gather", server.plan.tensor, width, nodes=nodes), *post]
    return [*joined, *_all_reduce(server, "ffn_all_reduce"), *post]
