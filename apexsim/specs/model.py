"""Models: their shapes, and the arithmetic of weights, KV cache and FLOPs that follows from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from apexsim.specs.base import Spec
from apexsim.specs.latent import LatentAttention
from apexsim.units import dtype_bytes

Span = Literal["window", "full"]

# OPT's table of learned positions starts at row 2 (its tokens count from the padding index).
LEARNED_POSITION_OFFSET = 2


@dataclass(frozen=True, slots=True)
class LayerKind:
    """``count`` layers that are alike: ``window`` tokens of attention (None = all), experts or a dense FFN."""

    count: int
    window: int | None
    moe: bool


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV cache lives alike. A windowed layer needs only its last ``window`` tokens.

    ``latent`` is the elements of one vector a token that stands for all keys and values: every rank keeps the whole.
    """

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None
    latent: int | None = None

    def bytes_per_token(self, dtype: str, tensor: int = 1) -> float:
        """Bytes of keys and values of one token on one rank, all layers of the group.

        KV heads are split over ``tensor`` ranks, and repeated where there are more ranks than heads.
        """
        if self.latent is not None:
            return self.layers * self.latent * dtype_bytes(dtype)
        heads_here = max(1, self.kv_heads // tensor)
        return 2 * self.layers * heads_here * self.head_dim * dtype_bytes(dtype)


# Beyond these stands a unit mistake, and lists and integers of that size.
MAX_LAYERS, MAX_WINDOW = 10_000, 2**31 - 1


class MoESpec(Spec):
    """Mixture of experts. Every token visits ``active`` of ``experts`` experts and all ``shared_experts``.

    ``ffn`` is the width of one routed expert, ``shared_ffn`` that of one shared expert; the first ``dense_layers``
    layers have a dense FFN instead. ``dtype`` is set where the weights were published in that dtype only (MXFP4).
    ``routing`` is how uneven the router's choices are: the expert of rank r is chosen with weight r^-1.01 or r^-1.2, or
    all alike.
    """

    experts: int = Field(ge=2)
    active: int = Field(ge=1)
    ffn: int = Field(gt=0)
    shared_experts: int = Field(0, ge=0)
    shared_ffn: int | None = Field(None, gt=0)
    dense_layers: int = Field(0, ge=0)
    router_bias: bool = False
    dtype: str | None = None
    routing: Literal["balanced", "power_law_1.01", "power_law_1.2"] = "power_law_1.01"

    @property
    def shared_width(self) -> int:
        """Summed width of the shared experts, which run as one FFN; 0 without any."""
        return self.shared_experts * (self.shared_ffn or 0)

    @model_validator(mode="after")
    def _consistent(self) -> MoESpec:
        if self.active > self.experts:
            raise ValueError(f"active ({self.active}) must not exceed experts ({self.experts})")
        if (self.shared_experts > 0) != (self.shared_ffn is not None):
            raise ValueError("give shared_experts and shared_ffn together, or neither")
        if self.dtype is not None:
            dtype_bytes(self.dtype)
        return self


class ModelSpec(Spec):
    """A decoder-only transformer.

    ``ffn`` is the width of the dense FFN, None where every layer has experts. ``window_pattern`` repeats over the
    layers and says which attend to the last ``window`` tokens only. ``qk_norm`` is over each head (Qwen3) or over
    all heads of a layer at once (MiniMax-M2). With ``mla`` one latent vector stands for the keys and values of all
    heads: ``kv_heads`` is 1 and ``head_dim`` that of queries. ``ffn_bias`` covers dense and routed experts. ``source``
    says where the shape and the published parameter counts come from.
    """

    name: str
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
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    attention_sinks: bool = False
    qk_norm: Literal["head", "layer"] | None = None
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned"] = "rope"
    window: int | None = Field(None, gt=0, le=MAX_WINDOW)
    window_pattern: tuple[Span, ...] | None = Field(None, min_length=1)
    mla: LatentAttention | None = None
    moe: MoESpec | None = None
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
        if (self.window is None) != (self.window_pattern is None):
            raise ValueError("give window and window_pattern together, or neither")
        if self.window_pattern is not None and "window" not in self.window_pattern:
            raise ValueError("window_pattern has no windowed layer; leave window and window_pattern out")
        dense = self.layers if self.moe is None else self.moe.dense_layers
        if dense > self.layers or (self.moe is not None and dense == self.layers):
            raise ValueError(f"moe.dense_layers ({dense}) must leave layers with experts")
        if (dense > 0) != (self.ffn is not None):
            raise ValueError(
                f"ffn is the width of the {dense} dense layers: " + ("give it" if dense else "leave it out")
            )
        return self

    # Layers

    def _kind(self, layer: int) -> tuple[int | None, bool]:
        windowed = self.window_pattern is not None and self.window_pattern[layer % len(self.window_pattern)] == "window"
        return (self.window if windowed else None, self.moe is not None and layer >= self.moe.dense_layers)

    def kinds_of(self, layers: range) -> tuple[LayerKind, ...]:
        """Kinds among the given layers (a pipeline stage's), in order of first appearance."""
        counts = Counter(self._kind(layer) for layer in layers)
        return tuple(LayerKind(count, window, moe) for (window, moe), count in counts.items())

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of all layers; their counts sum to ``layers``."""
        return self.kinds_of(range(self.layers))

    @property
    def windows(self) -> tuple[int, ...]:
        """Distinct attention windows, ascending; empty where every layer attends to everything."""
        return tuple(sorted({kind.window for kind in self.layer_kinds if kind.window is not None}))

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers grouped by window: full attention first, then windows ascending."""
        return self.kv_groups_of(range(self.layers))

    def kv_groups_of(self, layers: range) -> tuple[KVGroup, ...]:
        """KV groups of the given layers (a pipeline stage's)."""
        counts: Counter[int | None] = Counter()
        for kind in self.kinds_of(layers):
            counts[kind.window] += kind.count
        ordered = sorted(counts.items(), key=lambda item: item[0] or 0)
        latent = self.mla.cached if self.mla else None
        return tuple(KVGroup(count, self.kv_heads, self.head_dim, window, latent) for window, count in ordered)

    # Parameters of one layer: matrices, which weight dtypes apply to, apart from the small rest, which stays bf16

    @property
    def attention_params(self) -> int:
        """Elements of the Q, K, V and output matrices of one layer."""
        if self.mla:
            return self.mla.params(self.hidden, self.heads)
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

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
        """Elements of the router of one layer with experts; 0 without experts."""
        return self.hidden * self.moe.experts if self.moe else 0

    @property
    def norm_params(self) -> int:
        """Elements of one norm over the hidden size (LayerNorm has a bias, RMSNorm has none)."""
        return self.hidden * (1 if self.norm == "rms" else 2)

    def _attention_small(self) -> int:
        if self.mla:
            return self.mla.small_params
        qk_width = {None: 0, "head": 2, "layer": self.heads + self.kv_heads}[self.qk_norm] * self.head_dim
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        return qk_width + qkv + self.hidden * self.o_bias + self.heads * self.attention_sinks

    def _ffn_small(self, moe: bool, experts: int) -> int:
        router = self.moe.experts * self.moe.router_bias if self.moe and moe else 0
        width = self.moe.ffn if self.moe and moe else (self.ffn or 0)
        bias = width * (2 if self.gated else 1) + self.hidden
        return router + self.ffn_bias * bias * (experts if moe else 1)

    def small_params(self, moe: bool) -> int:
        """Elements of one layer that no weight dtype applies to: norms, biases, attention sinks, the router."""
        return self._small(moe, self.moe.experts if self.moe else 0)

    def _small(self, moe: bool, experts: int) -> int:
        router = self.router_params if moe else 0
        return 2 * self.norm_params + self._attention_small() + self._ffn_small(moe, experts) + router

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
        total = self.embedding_params + self.head_params + self.norm_params
        for kind in self.layer_kinds:
            ffn = experts * self.expert_params + self.shared_params if kind.moe else self.dense_ffn_params
            total += kind.count * (self.attention_params + ffn + self._small(kind.moe, experts))
        return total

    @property
    def params(self) -> int:
        """All parameters."""
        return self._count(self.moe.experts if self.moe else 0)

    @property
    def active_params(self) -> int:
        """Parameters less those of the experts that a token does not visit; embeddings and LM head counted."""
        return self._count(self.moe.active if self.moe else 0)

    def weight_bytes(self, weights: str, moe_weights: str) -> float:
        """Bytes of the whole model: matrices as ``weights``, routed experts as ``moe_weights``.

        Embeddings, LM head, norms, biases and routers stay bf16, as quantised checkpoints publish them.
        """
        dense = routed = 0
        for kind in self.layer_kinds:
            dense += kind.count * (self.attention_params + (self.shared_params if kind.moe else self.dense_ffn_params))
            routed += kind.count * (self.moe.experts * self.expert_params if self.moe and kind.moe else 0)
        rest = self.params - dense - routed
        return dense * dtype_bytes(weights) + routed * dtype_bytes(moe_weights) + rest * dtype_bytes("bf16")

    # Work

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of one token that attends to ``context`` tokens, itself included; LM head counted.

        2 per multiply-add with every active matrix, and 4 x heads x head_dim per attended token and layer
        (scores and weighted sum). Norms, biases and softmax are left out.
        """
        flops = 2.0 * self.vocab * self.hidden
        active = self.moe.active if self.moe else 0
        for kind in self.layer_kinds:
            experts = active * self.expert_params + self.shared_params + self.router_params
            matrices = self.attention_params + (experts if kind.moe else self.dense_ffn_params)
            flops += kind.count * (2.0 * matrices + self._attention_flops(context, kind.window))
        return flops

    def _attention_flops(self, context: float, window: int | None) -> float:
        if self.mla:
            return self.mla.flops_per_query(self.heads, context)
        return 4.0 * self.heads * self.head_dim * (context if window is None else min(context, window))

    def sharded_widths(self, moe_tensor: int, tensor: int) -> list[tuple[str, int, int]]:
        """(what, width, degree) of every FFN that tensor parallelism cuts: the degree must divide the width."""
        widths = [("FFN width", self.ffn or 0, tensor)]
        if self.moe:
            widths += [("expert width", self.moe.ffn, moe_tensor), ("shared width", self.moe.shared_width, tensor)]
        return [item for item in widths if item[1]]
