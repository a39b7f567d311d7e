"""Models: their shapes, and the arithmetic of weights, KV cache and FLOPs that follows from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from apexsim.specs.base import Name, Spec
from apexsim.specs.checkpoint import Checkpoint, Part
from apexsim.specs.experts import MoESpec
from apexsim.specs.latent import LatentAttention
from apexsim.specs.layers import KVGroup, LayerKind, Mixer
from apexsim.specs.recurrent import Recurrent
from apexsim.units import dtype_bytes

LayerType = Literal["window", "full", "recurrent", "ffn"]

# OPT's table of learned positions starts at row 2 (its tokens count from the padding index).
LEARNED_POSITION_OFFSET = 2

# To a step, a recurrent layer is attention over a window of one token: what it reads never grows with the context.
RECURRENT_WINDOW = 1


# Beyond these stands a unit mistake, and lists and integers of that size.
MAX_LAYERS, MAX_WINDOW = 10_000, 2**31 - 1


class ModelSpec(Spec):
    """A decoder-only transformer.

    ``ffn`` is the width of the dense FFN, None where every layer has experts. ``layer_pattern`` repeats over the
    layers: attention to all tokens (``full``) or to the last ``window`` only, or a ``recurrent`` state; each with an
    FFN behind it, unless the pattern names layers that are an ``ffn`` alone (Nemotron-H): then no other has one.
    Attention in chunks of ``window`` tokens (Llama-4) counts as a window, which is the most a chunk attends to.
    ``attention_bf16`` names weight dtypes whose published checkpoints leave the attention matrices in bf16.
    ``qk_norm`` is over each head (Qwen3), over all heads of a layer at once (MiniMax-M2) or ``plain``, without weights
    (Llama-4). ``output_gate`` is a gate on the attention output, projected with the queries. ``pre_norms`` and
    ``post_norms`` stand before and after attention and FFN. ``parallel``: both read one norm and are summed (Cohere).
    ``norm`` ``layer`` has a bias; one without counts as ``rms``. ``rotary_dim`` elements of a head are rotated, all if
    None; positions ``rope_windowed``: in windowed layers only; every ``nope_every``-th layer rotates nothing. With
    ``mla`` one latent vector stands for the keys and values of all heads: ``kv_heads`` is 1 and ``head_dim`` that of
    queries. ``ffn_bias`` covers dense and routed experts. ``checkpoint`` is what the weights were published in, where
    that is not bf16 throughout. ``source`` says where the shape and the published parameter counts come from.
    """

    name: Name
    source: str
    layers: int = Field(gt=0, le=MAX_LAYERS)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    ffn: int | None = Field(None, gt=0)
    gated: bool = True
    vocab: int = Field(gt=0)
    max_context: int = Field(gt=0)
    tied_embeddings: bool = False
    head_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    attention_sinks: bool = False
    attention_bf16: tuple[str, ...] = ()
    qk_norm: Literal["head", "layer", "plain"] | None = None
    output_gate: bool = False
    norm: Literal["rms", "layer"] = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    positions: Literal["rope", "rope_windowed", "learned", "none"] = "rope"
    nope_every: int | None = Field(None, gt=0)
    rotary_dim: int | None = Field(None, gt=0)
    window: int | None = Field(None, gt=RECURRENT_WINDOW, le=MAX_WINDOW)
    layer_pattern: tuple[LayerType, ...] | None = Field(None, min_length=1)
    recurrent: Recurrent | None = None
    mla: LatentAttention | None = None
    moe: MoESpec | None = None
    checkpoint: Checkpoint | None = None
    published_params: float | None = Field(None, gt=0)
    published_active_params: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.mla and (self.kv_heads, self.head_dim) != (1, self.mla.qk_head_dim):
            raise ValueError(f"with mla give kv_heads 1 and head_dim {self.mla.qk_head_dim} (that of queries)")
        if self.mla and self.window is not None:
            raise ValueError("latent attention with a sliding window is not modelled")
        for what, given in (("window", self.window), ("recurrent", self.recurrent)):
            if (given is not None) != (what in (self.layer_pattern or ())):
                raise ValueError(f"give {what} and a layer_pattern with {what} layers together, or neither")
        if not self.kv_groups:
            raise ValueError("layer_pattern has no layer of attention")
        if not (self.pre_norms or self.post_norms):
            raise ValueError("give pre_norms, post_norms or both")
        self._check_layers_named()
        self._check_ffns()
        return self

    def _check_layers_named(self) -> None:
        named = {"checkpoint.kept": self.checkpoint.layers_named if self.checkpoint else ()}
        named["mla.indexer.layers"] = (self.mla.indexer.layers or ()) if self.mla and self.mla.indexer else ()
        for key, layers in named.items():
            if layers and max(layers) >= self.layers:
                raise ValueError(f"{key} names layer {max(layers)} of {self.layers} (counted from 0)")

    def _check_ffns(self) -> None:
        kinds = self.layer_kinds
        if self.moe is not None and not any(kind.moe for kind in kinds):
            raise ValueError(f"moe.dense_layers ({self.moe.dense_layers}) must leave layers with experts")
        dense = sum(kind.count for kind in kinds if kind.ffn and not kind.moe)
        if (dense > 0) != (self.ffn is not None):
            raise ValueError(
                f"ffn is the width of the {dense} dense layers: " + ("give it" if dense else "leave it out")
            )

    # Layers

    def _kind(self, layer: int) -> LayerKind:
        pattern = self.layer_pattern or ("full",)
        part = pattern[layer % len(pattern)]
        window = {"window": self.window, "recurrent": RECURRENT_WINDOW}.get(part)
        mixers: dict[LayerType, Mixer | None] = {"recurrent": "recurrent", "ffn": None}
        ffn = part == "ffn" or "ffn" not in pattern
        moe = ffn and self.moe is not None and self.moe.at(layer)
        nope = self.nope_every is not None and (layer + 1) % self.nope_every == 0
        indexed = self.mla is not None and self.mla.indexed(layer)
        kept = self.checkpoint.kept_in(layer) if self.checkpoint else ()
        return LayerKind(1, window, moe, mixers.get(part, "attention"), ffn, nope, indexed, kept)

    def kinds_of(self, layers: range) -> tuple[LayerKind, ...]:
        """Kinds among the given layers (a pipeline stage's), in order of first appearance."""
        counts = Counter(self._kind(layer) for layer in layers)
        return tuple(replace(kind, count=count) for kind, count in counts.items())

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of all layers; their counts sum to ``layers``."""
        return self.kinds_of(range(self.layers))

    def rotates(self, kind: LayerKind) -> bool:
        """Whether attention of this kind rotates queries and keys by their position."""
        if kind.nope:
            return False
        return self.positions == "rope" or (self.positions == "rope_windowed" and kind.window is not None)

    @property
    def windows(self) -> tuple[int, ...]:
        """Distinct windows, ascending, a recurrent layer's of one token too; empty where all attend to everything."""
        return tuple(sorted({kind.window for kind in self.layer_kinds if kind.window is not None}))

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers of attention grouped by window: full attention first, then windows ascending."""
        return self.kv_groups_of(range(self.layers))

    def kv_groups_of(self, layers: range) -> tuple[KVGroup, ...]:
        """KV groups of the given layers (a pipeline stage's)."""
        counts: Counter[int | None] = Counter()
        indexed = 0
        for kind in self.kinds_of(layers):
            counts[kind.window] += kind.count if kind.mixer == "attention" else 0
            indexed += kind.count if kind.indexed else 0
        ordered = sorted(((window, n) for window, n in counts.items() if n), key=lambda item: item[0] or 0)
        latent = self.mla.latent if self.mla else None
        keys = indexed * self.mla.indexer.head_dim if self.mla and self.mla.indexer else 0
        return tuple(KVGroup(count, self.kv_heads, self.head_dim, window, latent, keys) for window, count in ordered)

    def state_bytes_of(self, layers: range, tensor: int = 1) -> float:
        """Bytes that the recurrent layers among these keep of a sequence on one rank, however long it is."""
        if self.recurrent is None:
            return 0.0
        count = sum(kind.count for kind in self.kinds_of(layers) if kind.mixer == "recurrent")
        return count * self.recurrent.state_bytes(tensor)

    # Parameters of one layer: matrices, which weight dtypes apply to, apart from the small rest, which stays bf16

    def mixer_params(self, kind: LayerKind) -> int:
        """Elements of the matrices of attention (an output gate's included), or of what stands in its place."""
        if kind.mixer == "recurrent" and self.recurrent:
            return self.recurrent.params(self.hidden)
        if kind.mixer is None:
            return 0
        if self.mla:
            return self.mla.params(self.hidden, self.heads, indexed=kind.indexed)
        gate = self.hidden * self.head_dim * self.heads * self.output_gate
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + gate

    def dense_params(self, kind: LayerKind) -> int:
        """Elements of the matrices of one layer, routed experts apart."""
        if not kind.ffn:
            return self.mixer_params(kind)
        return self.mixer_params(kind) + (self.shared_params if kind.moe else self.dense_ffn_params)

    def _ffn_params(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def dense_ffn_params(self) -> int:
        """Elements of the dense FFN's matrices of one layer; 0 where no layer is dense."""
        return self._ffn_params(self.ffn or 0)

    @property
    def expert_params(self) -> int:
        """Elements of one routed expert's matrices; 0 without experts."""
        return self._ffn_params(self.moe.ffn) if self.moe else 0

    @property
    def shared_params(self) -> int:
        """Elements of the matrices of all shared experts of one layer; 0 without any."""
        return self._ffn_params(self.moe.shared_width) if self.moe else 0

    @property
    def router_params(self) -> int:
        """Elements of the router (and of the gate of shared experts) of one layer with experts; 0 without experts."""
        return self.hidden * (self.moe.experts + self.moe.shared_gate) if self.moe else 0

    @property
    def norm_params(self) -> int:
        """Elements of one norm over the hidden size (LayerNorm has a bias, RMSNorm has none)."""
        return self.hidden * (1 if self.norm == "rms" else 2)

    def _attention_small(self, indexed: bool) -> int:
        if self.mla:
            return self.mla.small_params(indexed=indexed)
        qk_width = {None: 0, "plain": 0, "head": 2, "layer": self.heads + self.kv_heads}[self.qk_norm] * self.head_dim
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        return qk_width + qkv + self.hidden * self.o_bias + self.heads * self.attention_sinks

    def _ffn_small(self, moe: bool, experts: int) -> int:
        router = self.moe.experts * self.moe.router_bias + self.router_params if self.moe and moe else 0
        width = self.moe.ffn if self.moe and moe else (self.ffn or 0)
        bias = width * (2 if self.gated else 1) + self.hidden
        return router + self.ffn_bias * bias * (experts if moe else 1)

    def small_params(self, kind: LayerKind) -> int:
        """Elements of one layer that no weight dtype applies to: norms, biases, attention sinks, the router."""
        return self._small(kind, self.moe.experts if self.moe else 0)

    def _small(self, kind: LayerKind, experts: int) -> int:
        blocks = 1 if self.parallel else (kind.mixer is not None) + kind.ffn
        norms = blocks * (self.pre_norms + self.post_norms) * self.norm_params
        recurrent = self.recurrent.small_params if self.recurrent and kind.mixer == "recurrent" else 0
        attention = self._attention_small(kind.indexed) if kind.mixer == "attention" else 0
        return norms + recurrent + attention + (self._ffn_small(kind.moe, experts) if kind.ffn else 0)

    # Parameters of the whole model

    @property
    def embedding_params(self) -> int:
        """Token embeddings and, where learned, the position table."""
        rows = self.max_context + LEARNED_POSITION_OFFSET if self.positions == "learned" else 0
        return (self.vocab + rows) * self.hidden

    @property
    def head_params(self) -> int:
        """Weights of the LM head that exist beside the embeddings: 0 where tied."""
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    def _count(self, experts: int) -> int:
        total = self.embedding_params + self.head_params + self.vocab * self.head_bias + self.norm_params
        for kind in self.layer_kinds:
            routed = experts * self.expert_params if kind.moe else 0
            total += kind.count * (self.dense_params(kind) + routed + self._small(kind, experts))
        return total

    @property
    def kind(self) -> Literal["dense", "moe", "mla", "hybrid"]:
        """The class it is scored in: mla = latent attention, hybrid = recurrent layers or sparse attention."""
        if self.recurrent or (self.mla and self.mla.indexer):
            return "hybrid"
        if self.mla:
            return "mla"
        return "moe" if self.moe else "dense"

    @property
    def params(self) -> int:
        """All parameters."""
        return self._count(self.moe.experts if self.moe else 0)

    @property
    def active_params(self) -> int:
        """Parameters less those of the experts that a token does not visit; embeddings and LM head counted."""
        return self._count(self.moe.active if self.moe else 0)

    # Dtypes

    @property
    def published_dtype(self) -> str:
        """Dtype that the checkpoint's weights were published in; bf16 where none is named."""
        return self.checkpoint.dtype if self.checkpoint else "bf16"

    def expert_dtype(self, weights: str) -> str:
        """Dtype of experts where nobody asks for one: the model's own (MXFP4 of gpt-oss), else that of ``weights``.

        Where the weights are as published, that of experts is too.
        """
        if self.moe and self.moe.dtype:
            return self.moe.dtype
        as_published = self.checkpoint is not None and weights == self.checkpoint.dtype
        return (self.checkpoint.experts if self.checkpoint and as_published else None) or weights

    def part_dtype(self, part: Part, kind: LayerKind, dtype: str) -> str:
        """Dtype of the matrices of a part of a layer where those of its kind are asked for in ``dtype``.

        bf16 where a checkpoint of that dtype leaves the part alone.
        """
        kept = self.checkpoint is not None and part in kind.kept and dtype == self.checkpoint.dtype_of(part)
        attention = part == "mixer" and kind.mixer == "attention" and self.mla is None
        return "bf16" if kept or (attention and dtype in self.attention_bf16) else dtype

    def weight_bytes(self, weights: str, moe_weights: str) -> float:
        """Bytes of the whole model: matrices as ``weights``, routed experts as ``moe_weights``.

        Embeddings, LM head, norms, biases and routers stay bf16, as quantised checkpoints publish them, and so do the
        parts that this checkpoint keeps and of latent attention what ``LatentAttention.projection_dtype`` says.
        """
        size, counted = 0.0, 0
        for kind in self.layer_kinds:
            for elements, dtype in (*self._dense(kind, weights), *self._experts(kind, moe_weights)):
                size += kind.count * elements * dtype_bytes(dtype)
                counted += kind.count * elements
        return size + (self.params - counted) * dtype_bytes("bf16")

    def dense_dtypes(self, weights: str) -> set[str]:
        """Dtypes of the matrices of the layers, routed experts left out."""
        return {dtype for kind in self.layer_kinds for elements, dtype in self._dense(kind, weights) if elements}

    def expert_dtypes(self, moe_weights: str) -> set[str]:
        """Dtypes of routed experts: bf16 in layers where the checkpoint keeps it."""
        return {dtype for kind in self.layer_kinds for _, dtype in self._experts(kind, moe_weights)}

    def _dense(self, kind: LayerKind, weights: str) -> list[tuple[int, str]]:
        """Elements and dtype of the matrices of one layer, routed experts left out."""
        mixer, mixer_dtype = self.mixer_params(kind), self.part_dtype("mixer", kind, weights)
        parts = [(mixer, mixer_dtype)]
        if self.mla and kind.mixer == "attention":
            unfolding = self.mla.unfolding_params(self.heads)
            parts = [(mixer - unfolding, self.mla.projection_dtype(mixer_dtype)), (unfolding, "bf16")]
        if kind.ffn and kind.moe and self.moe:
            parts.append((self.shared_params, self.part_dtype("shared", kind, weights)))
        elif kind.ffn:
            parts.append((self.dense_ffn_params, self.part_dtype("ffn", kind, weights)))
        return parts

    def _experts(self, kind: LayerKind, moe_weights: str) -> list[tuple[int, str]]:
        """The same of the routed experts of one layer; empty where it has none."""
        if not (kind.ffn and kind.moe and self.moe):
            return []
        return [(self.moe.experts * self.expert_params, self.part_dtype("experts", kind, moe_weights))]

    # Work

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of one token that attends to ``context`` tokens, itself included; LM head counted.

        2 per multiply-add with every active matrix, and 4 x heads x head_dim per attended token and layer
        (scores and weighted sum). Norms, biases and softmax are left out.
        """
        flops = 2.0 * self.vocab * self.hidden
        active = self.moe.active if self.moe else 0
        for kind in self.layer_kinds:
            experts = active * self.expert_params + self.router_params if kind.moe else 0
            flops += kind.count * (2.0 * (self.dense_params(kind) + experts) + self._mixer_flops(context, kind))
        return flops

    def _mixer_flops(self, context: float, kind: LayerKind) -> float:
        if self.recurrent and kind.mixer == "recurrent":
            return self.recurrent.flops_per_token()
        if self.mla:
            return self.mla.flops_per_query(self.heads, context, indexed=kind.indexed)
        attended = context if kind.window is None else min(context, kind.window)
        return 4.0 * self.heads * self.head_dim * attended * (kind.mixer is not None)

    def sharded_widths(self, moe_tensor: int, tensor: int) -> list[tuple[str, int, int]]:
        """(what, width, degree) of all but attention that tensor parallelism cuts: the degree must divide the width."""
        widths = [("FFN width", self.ffn or 0, tensor)]
        widths.append(("recurrent heads", self.recurrent.heads if self.recurrent else 0, tensor))
        if self.moe:
            widths += [("expert width", self.moe.ffn, moe_tensor), ("shared width", self.moe.shared_width, tensor)]
        return [item for item in widths if item[1]]
