"""A decoder with random weights in the shape of a ``ModelSpec``, made of the kernels that are timed.

A step computes all its tokens at once: those that decode first, one a sequence, then every chunk. The residual stream
goes through the layers beside what the last block put out, so that each norm is the fused ``add_rms_norm``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apexsim.errors import BadInput, Unsupported
from apexsim.specs.model import ModelSpec
from kernels_profiling import attention, kernels
from kernels_profiling.machine import memory_bytes

# Base of the rotary embedding: that of Llama 3; it changes no cost.
ROPE_BASE = 500_000.0


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of a step, on the device. Sequences are the ``decodes``, one token each, then the ``chunks``.

    ``chunks`` are (tokens, history) of the others. ``tables`` and ``lengths`` have a row a sequence: its blocks, and
    how many keys it has with this step's. ``slots`` is where each token's keys and values go, ``last`` the row of every
    sequence's last token.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    lengths: Tensor
    last: Tensor
    decodes: int
    chunks: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer. An FFN is ``(gate and up, down)``; that of experts has another axis, and a ``router``."""

    attention_norm: Tensor
    qkv: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    output: Tensor
    ffn_norm: Tensor
    ffn: tuple[Tensor, Tensor]
    router: Tensor | None


@dataclass(frozen=True, slots=True)
class CacheShape:
    """A paged KV cache of ``blocks`` of ``block_size`` tokens, for sequences of up to ``positions`` tokens."""

    blocks: int
    block_size: int
    positions: int


class Transformer:
    """Weights, a paged KV cache with a block more for padding, and the forward pass.

    With ``swiftkv_layers`` only so many layers see every token: the keys and values of all later layers are projected
    from what the last of these puts out, and only each sequence's last token goes on through them (SwiftKV, arXiv
    2410.03960, without its sharing of the cache between layers).
    """

    def __init__(
        self, model: ModelSpec, cache: CacheShape, *, like: Tensor, swiftkv_layers: int | None = None, seed: int = 0
    ) -> None:
        """Everything is made in the dtype and on the device of ``like``."""
        check_supported(model)
        check_memory(model, cache, like)
        self.model = model
        self.block_size = cache.block_size
        self.first = check_layers(model, swiftkv_layers)
        self._draw = torch.Generator(like.device).manual_seed(seed)
        self._like = like
        self._embedding = self._matrix(model.vocab, model.hidden, scale=1.0)
        self._layers = [self._layer(index) for index in range(model.layers)]
        self._norm = self._norm_weight(model.hidden)
        self._head = self._embedding if model.tied_embeddings else self._matrix(model.vocab, model.hidden)
        shape = (model.layers, cache.blocks + 1, cache.block_size, model.kv_heads, model.head_dim)
        self.keys, self.values = (like.new_zeros(shape) for _ in range(2))
        self._cos, self._sin = kernels.rope_tables(cache.positions, model.head_dim, ROPE_BASE, like)
        self._one_launch = attention.one_launch(like.device)

    # -- weights ----------------------------------------------------------------------------------------------

    def _matrix(self, *shape: int, scale: float | None = None) -> Tensor:
        """Normal weights that keep the size of what they multiply."""
        weight = torch.empty(shape, dtype=self._like.dtype, device=self._like.device)
        return weight.normal_(0.0, scale or 1 / math.sqrt(shape[-1]), generator=self._draw)

    def _norm_weight(self, width: int) -> Tensor:
        return 1.0 + 0.1 * self._matrix(width, scale=1.0)

    def _layer(self, index: int) -> Layer:
        model = self.model
        queries, cached = model.heads * model.head_dim, model.kv_heads * model.head_dim
        routed = model.moe if model.moe and model.moe.at(index) else None
        lead, width = ((routed.experts,), routed.ffn) if routed else ((), model.ffn or 0)
        return Layer(
            attention_norm=self._norm_weight(model.hidden),
            qkv=self._matrix(queries + 2 * cached, model.hidden),
            head_norms=tuple(self._norm_weight(model.head_dim) for _ in range(2)) if model.qk_norm else None,  # type: ignore[arg-type]
            output=self._matrix(model.hidden, queries),
            ffn_norm=self._norm_weight(model.hidden),
            ffn=(self._matrix(*lead, 2 * width, model.hidden), self._matrix(*lead, model.hidden, width)),
            router=self._matrix(routed.experts, model.hidden) if routed else None,
        )

    # -- forward ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, packed: Packed) -> Tensor:
        """The likeliest next token of every sequence; its keys and values are in the cache afterwards."""
        return kernels.sample_greedy(self.logits(packed))

    @torch.inference_mode()
    def logits(self, packed: Packed) -> Tensor:
        """Logits behind the last token of every sequence."""
        turn = self._cos[packed.positions], self._sin[packed.positions]
        out, residual = self._whole_layer(0, packed, turn, (None, kernels.embed(packed.ids, self._embedding)))
        for index in range(1, self.first):
            out, residual = self._whole_layer(index, packed, turn, (out, residual))
        if self.first < self.model.layers:
            out, residual = self._last_tokens(packed, turn, residual + out, (out, residual))
        normed, _ = kernels.add_rms_norm(out, residual, self._norm)
        if self.first == self.model.layers:
            normed = normed.index_select(0, packed.last)
        return kernels.gemm(normed, self._head)

    def _whole_layer(
        self, index: int, packed: Packed, turn: tuple[Tensor, Tensor], stream: tuple[Tensor | None, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One layer over all tokens; ``stream`` is what the block before put out, and the residual."""
        layer, model = self._layers[index], self.model
        normed, residual = _normed(layer, stream)
        sizes = [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2]
        queries, keys, values = (self._heads(part) for part in kernels.gemm(normed, layer.qkv).split(sizes, dim=-1))
        if layer.head_norms:
            queries, keys = (kernels.rms_norm(x, w) for x, w in zip((queries, keys), layer.head_norms, strict=True))
        queries, keys = kernels.rope(queries, keys, *turn)
        kernels.write_kv(self.keys[index], self.values[index], packed.slots, keys, values)
        return self._rest_of_layer(layer, self._attend(index, queries, packed), residual)

    def _last_tokens(
        self, packed: Packed, turn: tuple[Tensor, Tensor], source: Tensor, stream: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Layers behind the first ones: keys and values of all tokens from ``source``, else the last ones only."""
        model, last = self.model, packed.last
        split = model.heads * model.head_dim
        out, residual = (x.index_select(0, last) for x in stream)
        own_turn = turn[0].index_select(0, last), turn[1].index_select(0, last)
        for index in range(self.first, model.layers):
            layer = self._layers[index]
            self._project(index, packed, turn, source)
            normed, residual = _normed(layer, (out, residual))
            queries = self._heads(kernels.gemm(normed, layer.qkv[:split]))
            queries = _turned(queries, layer.head_norms and layer.head_norms[0], own_turn)
            cache = self.keys[index], self.values[index]
            attended = attention.decode_attention(queries, *cache, packed.tables, packed.lengths)
            out, residual = self._rest_of_layer(layer, attended, residual)
        return out, residual

    def _project(self, index: int, packed: Packed, turn: tuple[Tensor, Tensor], source: Tensor) -> None:
        """Keys and values of a layer from what an earlier layer put out."""
        layer, model = self._layers[index], self.model
        normed = kernels.rms_norm(source, layer.attention_norm)
        projected = kernels.gemm(normed, layer.qkv[model.heads * model.head_dim :])
        keys, values = (self._heads(part) for part in projected.chunk(2, dim=-1))
        keys = _turned(keys, layer.head_norms and layer.head_norms[1], turn)
        kernels.write_kv(self.keys[index], self.values[index], packed.slots, keys, values)

    def _rest_of_layer(self, layer: Layer, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and FFN; (what the FFN puts out, the residual before it)."""
        projected = kernels.gemm(attended.reshape(attended.shape[0], -1), layer.output)
        normed, residual = kernels.add_rms_norm(projected, residual, layer.ffn_norm)
        gate_up, down = layer.ffn
        if layer.router is not None:
            assert self.model.moe is not None, "a router belongs to experts"
            chosen = kernels.gemm(normed, layer.router)
            return kernels.moe(normed, chosen, gate_up, down, self.model.moe.active), residual
        return kernels.gemm(kernels.silu_mul(kernels.gemm(normed, gate_up)), down), residual

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.model.head_dim)

    def _attend(self, index: int, queries: Tensor, packed: Packed) -> Tensor:
        """Attention of all tokens to their own sequences: in one launch where the device has one, else part by part."""
        cache, decodes = (self.keys[index], self.values[index]), packed.decodes
        if not packed.chunks:
            return attention.decode_attention(queries, *cache, packed.tables, packed.lengths)
        if self._one_launch:
            return attention.mixed_attention(queries, *cache, _ragged(packed))
        out, begin = torch.empty_like(queries), decodes
        if decodes:
            tables, lengths = packed.tables[:decodes], packed.lengths[:decodes]
            out[:decodes] = attention.decode_attention(queries[:decodes], *cache, tables, lengths)
        for at, (tokens, history) in enumerate(packed.chunks, start=decodes):
            blocks = packed.tables[at, : -(-(history + tokens) // self.block_size)]
            part = slice(begin, begin := begin + tokens)
            out[part] = attention.prefill_attention(queries[part], *cache, blocks, history)
        return out


def check_supported(model: ModelSpec) -> None:
    """Raise ``Unsupported`` with every part of a model that this decoder does not have."""
    parts = {
        "latent attention": model.mla, "recurrent layers": model.recurrent, "a sliding window": model.window,
        "layers of different parts": model.layer_pattern, "biases": model.qkv_bias or model.o_bias or model.ffn_bias,
        "attention sinks": model.attention_sinks, "an output gate": model.output_gate, "LayerNorm": model.norm != "rms",
        "norms after blocks": model.post_norms, "blocks side by side": model.parallel,
        "a head with a bias": model.head_bias, "layers without positions": model.nope_every,
        "an FFN without a gate": not model.gated,
        f"positions: {model.positions}": model.positions != "rope", "partly rotated heads": model.rotary_dim,
        f"qk_norm: {model.qk_norm}": model.qk_norm not in (None, "head"),
        "shared experts": model.moe and model.moe.shared_experts,
        "router biases": model.moe and model.moe.router_bias,
        f"odd heads: head_dim {model.head_dim}": model.head_dim % 2,
    }  # fmt: skip
    missing = [part for part, present in parts.items() if present]
    if missing:
        raise Unsupported(f"{model.name}: the live engine has no {', '.join(missing)}")


def check_memory(model: ModelSpec, cache: CacheShape, like: Tensor) -> None:
    """Raise ``BadInput`` where weights and cache are larger than the memory of the device of ``like``."""
    tokens = cache.blocks * cache.block_size
    weights = model.params * like.itemsize
    cached = 2 * model.layers * model.kv_heads * model.head_dim * like.itemsize * tokens
    has = memory_bytes(like.device)
    if weights + cached > has:
        said = (
            f"its weights take {weights:.3g} bytes and a KV cache of {tokens} tokens {cached:.3g}, the device has "
            f"{has:.3g}; give a smaller model, shorter requests, or fewer --kv-blocks or --max-num-seqs"
        )
        raise BadInput(said, where="--model", got=model.name)


def check_layers(model: ModelSpec, swiftkv_layers: int | None) -> int:
    """Layers that see every token: all, or so many of them."""
    layers = model.layers if swiftkv_layers is None else swiftkv_layers
    if not 1 <= layers <= model.layers:
        raise BadInput(f"give 1 to {model.layers}, the layers of {model.name}", where="--swiftkv-layers", got=layers)
    return layers


def _normed(layer: Layer, stream: tuple[Tensor | None, Tensor]) -> tuple[Tensor, Tensor]:
    """The norm before attention, and the residual with what the block before put out."""
    out, residual = stream
    if out is None:
        return kernels.rms_norm(residual, layer.attention_norm), residual
    return kernels.add_rms_norm(out, residual, layer.attention_norm)


def _turned(x: Tensor, norm: Tensor | None, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys alone: normed by head where the model does, and rotated."""
    normed = x if norm is None else kernels.rms_norm(x, norm)
    return kernels.rope(normed, normed[:, :0], *turn)[0]


def _ragged(packed: Packed) -> attention.Ragged:
    """Tables, lengths, where each sequence's queries begin, and the most queries of one."""
    begins = torch.nn.functional.pad(packed.last + 1, (1, 0)).to(torch.int32)
    return attention.Ragged(packed.tables, packed.lengths, begins, max(tokens for tokens, _ in packed.chunks))
