"""The operators of a transformer, each with the shape that one rank runs.

A row operator costs by its number of rows: tokens of the step, or survivors (sequences whose logits are needed), those
of its attention-data rank alone; ``all_tokens`` are the tokens of all such ranks, where there are several.
Attention alone costs by sequence. Every operator answers for its seconds, FLOPs and bytes on one rank, vectorised over
rows, and for the weights it keeps in memory; ``kind`` and ``key`` name the fitted operator of a device profile behind
it, ``sizes`` what its measured range is checked against, and ``launches`` how many kernels an engine launches for it.
Activations are bf16 whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from apexsim.costs.attention import PrefillCost
from apexsim.costs.fitted import ONE_SHOT_MEASURED, AttentionShape, MoeLayer, OperatorCosts
from apexsim.costs.forms.hardware import Array
from apexsim.costs.forms.prefill import causal_pairs
from apexsim.units import dtype_bytes

Sizes = Mapping[str, Array | int]
Rows = Literal["tokens", "all_tokens", "survivors"]
CollectiveKind = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send_recv",
    "send_recv_across_nodes",
    "deepep_dispatch",
    "deepep_combine",
    "deepep_ll_dispatch",
    "deepep_ll_combine",
    "trtllm_dispatch",
    "trtllm_combine",
]

ACTIVATION_BYTES = 2.0
LOGIT_BYTES = 4.0

# Calls that an engine makes besides the one that is timed, counted in vLLM's sources: quantising activations, writing
# the KV cache. What one call launches is one launch.
QUANTISE_LAUNCHES = {"fp8": 1, "fp8_block": 1, "nvfp4": 1}
ATTENTION_LAUNCHES = 2


@dataclass(frozen=True, slots=True)
class Gemm:
    """y[rows, n] = x[rows, k] W[k, n]: n and k are the shard of one rank.

    ``quantised``: the operator before it hands over x in ``dtype``. In steps of up to ``hidden_rows`` it runs beside
    another kernel and takes no time of its own. ``reads_like``: it reads W at least as fast, as a share of the memory's
    peak, as products in that dtype do (an engine's kernel that nobody measured).
    """

    name: str
    n: int
    k: int
    dtype: str
    rows: Rows = "tokens"
    quantised: bool = False
    hidden_rows: float = 0.0
    reads_like: str | None = None
    kind = "gemm"

    @property
    def key(self) -> str:
        return self.dtype

    @property
    def launches(self) -> int:
        return 1 if self.quantised else 1 + QUANTISE_LAUNCHES.get(self.dtype, 0)

    @property
    def weight_bytes(self) -> float:
        return self.n * self.k * dtype_bytes(self.dtype)

    def seconds(self, costs: OperatorCosts, rows: Array) -> Array:
        seconds = costs.gemm_s(rows, self.n, self.k, self.dtype, quantised=self.quantised, reads_like=self.reads_like)
        return np.where(rows > self.hidden_rows, seconds, 0.0)

    def flops(self, rows: Array) -> Array:
        return 2.0 * self.n * self.k * rows

    def bytes_moved(self, rows: Array) -> Array:
        return self.weight_bytes + ACTIVATION_BYTES * (self.n + self.k) * rows

    def sizes(self, rows: Array) -> Sizes:
        return {"m": rows, "n": self.n, "k": self.k}


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer: ``layer`` has the width on one rank and the experts of the whole group.

    ``choice_s``: seconds of choosing them, beyond what the fitted kernel contains.
    """

    name: str
    layer: MoeLayer
    rows: Rows = "tokens"
    choice_s: float = 0.0
    kind = "moe"
    launches = 0  # an engine's own term: HostTerms.expert_launch_s

    @property
    def key(self) -> str:
        return self.layer.key

    @property
    def _expert_elements(self) -> int:
        """Matrix elements of one expert on this rank."""
        return (3 if self.layer.gated else 2) * self.layer.hidden * self.layer.inter

    @property
    def weight_bytes(self) -> float:
        return self.layer.experts / self.layer.ep * self._expert_elements * dtype_bytes(self.layer.dtype)

    def seconds(self, costs: OperatorCosts, rows: Array) -> Array:
        return costs.moe_s(rows, self.layer) + np.where(rows > 0, self.choice_s, 0.0)

    def flops(self, rows: Array) -> Array:
        """Of an average rank; the most loaded one does more, which its time contains."""
        return 2.0 * self._expert_elements * self.layer.topk / self.layer.ep * rows

    def bytes_moved(self, rows: Array) -> Array:
        """Weights of the experts that a balanced router is expected to touch, and activations in and out."""
        touched = 1.0 - (1.0 - self.layer.topk / self.layer.experts) ** rows
        visits = rows * self.layer.topk / self.layer.ep
        return self.weight_bytes * touched + ACTIVATION_BYTES * visits * 2 * (self.layer.hidden + self.layer.inter)

    def sizes(self, rows: Array) -> Sizes:
        layer = self.layer
        fixed = {"hidden": layer.hidden, "inter": layer.inter, "topk": layer.topk}
        return {"tokens": rows, **fixed, "experts": layer.experts, "ep": layer.ep}


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A memory-bound kernel (norm, rotary embedding, activation, lookup) moving ``bytes_per_row``.

    In steps of up to ``hidden_rows`` it runs inside or beside another kernel and takes no time of its own.
    """

    name: str
    bytes_per_row: float
    rows: Rows = "tokens"
    hidden_rows: float = 0.0
    kind = "elementwise"
    key = "any"
    launches = 1
    weight_bytes = 0.0

    def seconds(self, costs: OperatorCosts, rows: Array) -> Array:
        return np.where(rows > self.hidden_rows, costs.elementwise_s(self.bytes_moved(rows), self.name), 0.0)

    def flops(self, rows: Array) -> Array:
        return np.zeros_like(rows)

    def bytes_moved(self, rows: Array) -> Array:
        return self.bytes_per_row * rows

    def sizes(self, rows: Array) -> Sizes:
        return {"bytes": self.bytes_moved(rows)}


# Passes over the logits whose bytes PyTorch's search for the most likely tokens moves: four digits of a radix sort read
# and write keys (4 bytes) and indices (8), 24 passes; softmax, running sum, mask and the way back in order some 16.
SEARCHED_PASSES = 40.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """Softmax and draw over the fp32 logits of every survivor, and ``passes`` over them at the peak of memory.

    The passes find the most likely tokens (see ``SamplerDefaults``); no profile of a device contains them. They are a
    measure of time: what a sort moves are ``SEARCHED_PASSES`` of them at most.
    """

    name: str
    vocab: int
    passes: float = 0.0
    rows: Rows = "survivors"
    kind = "sampling"
    key = "any"
    launches = 1
    weight_bytes = 0.0

    def seconds(self, costs: OperatorCosts, rows: Array) -> Array:
        searched_s = self._logit_bytes(rows) * self.passes / costs.profile.datasheet.memory_bytes_per_s
        return costs.sampling_s(rows, self.vocab) + searched_s

    def flops(self, rows: Array) -> Array:
        return np.zeros_like(rows)

    def bytes_moved(self, rows: Array) -> Array:
        return (1.0 + min(self.passes, SEARCHED_PASSES)) * self._logit_bytes(rows)

    def _logit_bytes(self, rows: Array) -> Array:
        return LOGIT_BYTES * self.vocab * rows

    def sizes(self, rows: Array) -> Sizes:
        return {"sequences": rows, "vocab": self.vocab}


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over ``group`` ranks with ``bytes_per_row`` of payload, counted as nccl-tests counts it.

    That is: the buffer of a rank for all-reduce and send/recv, the gathered whole for all-gather, all that one rank
    sends for all-to-all. All-reduce uses the engine's own kernel up to ``custom_max_bytes``, the library's above; up to
    ``one_shot_max_bytes`` every rank sends everything to every other at once. The ranks lie on ``nodes`` nodes, as many
    on each.
    """

    name: str
    kind: CollectiveKind
    group: int
    bytes_per_row: float
    custom_max_bytes: float = 0.0
    one_shot_max_bytes: float = 0.0
    rows: Rows = "tokens"
    nodes: int = 1
    launches = 1
    weight_bytes = 0.0

    @property
    def key(self) -> str:
        custom = self.custom_max_bytes > 0
        return OperatorCosts.collective_key(self.kind, self.group, custom=custom, nodes=self.nodes)

    @property
    def crosses_nodes(self) -> bool:
        """Whether its ranks lie on more than one node."""
        return self.nodes > 1 or self.kind == "send_recv_across_nodes"

    @property
    def largest_measured_at_once(self) -> float:
        """Bytes up to which the measured all-reduce sends at once, too: what follows is drawn on from there."""
        return float(ONE_SHOT_MEASURED.get(self.group, math.inf))

    @property
    def library(self) -> Collective:
        """The same collective by the library alone, whatever its size."""
        return replace(self, custom_max_bytes=0.0, one_shot_max_bytes=0.0)

    def seconds(self, costs: OperatorCosts, rows: Array) -> Array:
        payload = self.bytes_per_row * rows
        custom = payload <= self.custom_max_bytes
        seconds = costs.collective_s(self.kind, self.group, payload, custom, nodes=self.nodes)
        if not self.one_shot_max_bytes:
            return seconds
        at_once = (payload > 0) & (payload <= self.one_shot_max_bytes)
        return np.where(at_once, np.maximum(seconds, costs.one_shot_s(self.group, payload)), seconds)

    def flops(self, rows: Array) -> Array:
        return np.zeros_like(rows)

    def bytes_moved(self, rows: Array) -> Array:
        """Bytes a rank writes to and reads from its memory for the payload, links left out."""
        return 2.0 * self.bytes_per_row * rows

    def sizes(self, rows: Array) -> Sizes:
        return {"bytes": self.bytes_per_row * rows}


RowOperator = Gemm | Experts | Elementwise | Sampling | Collective


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer on one rank, KV-cache write included (the measured kernels contain it)."""

    name: str
    shape: AttentionShape
    weight_bytes = 0.0
    kind = "attention"
    kinds = ("decode_attention", "prefill_attention")
    launches = ATTENTION_LAUNCHES

    @property
    def key(self) -> str:
        return self.shape.key

    @property
    def dtype(self) -> str:
        """What it computes in, as far as power goes."""
        return self.shape.kv_dtype

    @property
    def window(self) -> int | None:
        """Tokens that it attends to at most; None = all."""
        return self.shape.window

    def decode_s(self, costs: OperatorCosts, batch: int, mean_context: Array) -> Array:
        """``batch`` sequences of one query token each, attending to ``mean_context`` tokens on average."""
        return costs.decode_attention_s(batch, mean_context, self.shape)

    def chunk_cost(self, costs: OperatorCosts) -> PrefillCost:
        """Cost of chunks of a prompt."""
        return costs.prefill_attention(self.shape)

    def decode_work(self, queries: Array, pairs: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of ``queries`` single tokens that attend to ``pairs`` keys in all."""
        return self.flops(pairs), self.bytes_moved(queries, pairs)

    def chunk_work(self, tokens: Array, history: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of chunks of ``tokens`` behind ``history``."""
        keys = tokens + (history if self.window is None else np.minimum(history, self.window))
        return self.flops(causal_pairs(tokens, history, self.window)), self.bytes_moved(tokens, keys)

    @property
    def widest(self) -> int:
        """Elements of a token's queries, keys, values and output."""
        return 2 * (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim

    def sizes(self) -> Mapping[str, int]:
        return {"heads": self.shape.heads, "kv_heads": self.shape.kv_heads}

    def flops(self, attended: Array) -> Array:
        """Scores and weighted sum over ``attended`` query-key pairs."""
        return 4.0 * self.shape.heads * self.shape.head_dim * attended

    def bytes_moved(self, queries: Array, keys: Array) -> Array:
        """Queries in and outputs out; every key and value once."""
        shape = self.shape
        io = 2 * ACTIVATION_BYTES * shape.heads * shape.head_dim
        cached = 2 * shape.kv_heads * shape.head_dim * dtype_bytes(shape.kv_dtype)
        return io * queries + cached * keys
