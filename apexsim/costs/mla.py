"""Multi-head latent attention on one rank: its projections as row operators, and the attention between them.

Projections cost by the tokens of a step, as plain products: weights are read once a step. Attention depends on who
asks. A decode meets the cached latent vectors directly, the up-projections absorbed into query and output. A chunk
unfolds keys and values (same products, same FLOPs a token) and runs ordinary attention over them; of its history too,
which is unfolded again for every chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from apexsim.costs.attention import CURVE_KEYS, PrefillCost
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms import mla
from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Array, Hardware
from apexsim.costs.forms.prefill import Heads, causal_pairs
from apexsim.costs.forms.residual import LogGrid
from apexsim.costs.operators import ACTIVATION_BYTES, Elementwise, Gemm, RowOperator
from apexsim.costs.stand_ins import SPARSE
from apexsim.specs.device import FittedOperator
from apexsim.specs.latent import LatentAttention
from apexsim.units import dtype_bytes

# Rows at which the price of unfolding a token of history is read off the product's cost.
UNFOLDED_ROWS = 8192.0
# Share of the peaks that an indexer's scores reach: a prior, nothing measured. Its kernels: scores, selection.
INDEXER_EFFICIENCY, INDEXER_KERNELS = 0.5, 2

# Makes a product of (name, n, k, dtype).
Product = Callable[[str, int, int, str], Gemm]


def projections(
    sizes: LatentAttention, shape: tuple[int, int], dtype: str, *, indexed: bool, product: Product = Gemm
) -> tuple[list[RowOperator], ...]:
    """Row operators before and after the attention of one rank; ``shape`` is the hidden size and the rank's heads.

    The down-projections are repeated on every rank. ``dtype`` is the checkpoint's: see
    ``LatentAttention.projection_dtype`` for what it leaves as bf16. ``indexed``: the layer has an indexer of its own.
    ``product`` makes the products.
    """
    hidden, heads = shape
    compressed, dtype = sizes.kv_lora_rank, sizes.projection_dtype(dtype)
    before: list[RowOperator] = [
        *_queries(sizes, shape, dtype, product),
        Elementwise("rope", 2 * ACTIVATION_BYTES * (heads + 1) * sizes.qk_rope_head_dim),
        Gemm("kv_b_keys", heads * sizes.qk_nope_head_dim, compressed, "bf16"),
    ]
    if sizes.indexer and indexed:
        scorer, queries = sizes.indexer, sizes.q_lora_rank or hidden
        before.append(product("indexer_q", scorer.heads * scorer.head_dim, queries, dtype))
        before.append(product("indexer_k", scorer.head_dim + scorer.heads, hidden, dtype))
    after: list[RowOperator] = [
        Gemm("kv_b_values", heads * sizes.v_head_dim, compressed, "bf16"),
        product("o", hidden, heads * sizes.v_head_dim, dtype),
    ]
    return before, after


def _queries(sizes: LatentAttention, shape: tuple[int, int], dtype: str, product: Product) -> list[RowOperator]:
    """Queries and the latent vector: both down-projections in one product, or queries projected at once beside it."""
    hidden, heads = shape
    kv_norm = Elementwise("kv_norm", 2 * ACTIVATION_BYTES * sizes.kv_lora_rank)
    if sizes.q_lora_rank is None:
        queries = product("q", heads * sizes.qk_head_dim, hidden, dtype)
        return [queries, product("kv_a", sizes.latent, hidden, dtype), kv_norm]
    return [
        product("qkv_a", sizes.q_lora_rank + sizes.latent, hidden, dtype),
        Elementwise("q_norm", 2 * ACTIVATION_BYTES * sizes.q_lora_rank),
        kv_norm,
        product("q_b", heads * sizes.qk_head_dim, sizes.q_lora_rank, dtype),
    ]


def latent_copies(sizes: LatentAttention) -> list[RowOperator]:
    """Kernels between projections and attention: latent vectors go to the cache, both parts of a query are joined.

    Joining is charged by its launch: decodes have few bytes to copy, and the copies of prompts are in their attention.
    TensorRT-LLM does both with the rotation (``mla_rope_append_paged_kv_assign_q``).
    """
    return [Elementwise("cache_write", 2 * ACTIVATION_BYTES * sizes.latent), Elementwise("join_queries", 0.0)]


@dataclass(frozen=True, slots=True)
class LatentMixing:
    """Latent attention of one layer on one rank: ``heads`` are the rank's, the latent cache is whole on every rank.

    ``indexed`` is the share of the model's layers that have an indexer of their own: the cost of scoring is spread
    evenly over all, which adds up to that of the model (and is a little off for stages of a pipeline).
    """

    name: str
    shape: LatentAttention
    hidden: int
    heads: int
    kv_dtype: str
    indexed: float = 1.0
    weight_bytes = 0.0
    kind = "attention"
    kinds = ("mla_decode", "mla_prefill")
    launches = 4  # splitting what is written, the kernel, and the two absorbed products
    window = None

    @property
    def key(self) -> str:
        """Key of the fitted operators. Nobody measured sparse attention: its costs are estimates made from dense."""
        return self.kv_dtype + (SPARSE if self.shape.indexer else "")

    @property
    def dtype(self) -> str:
        return self.kv_dtype

    @property
    def widest(self) -> int:
        """Queries, unfolded keys and values, and outputs of a token."""
        return 2 * self.heads * (self.shape.qk_head_dim + self.shape.v_head_dim)

    def decode_s(self, costs: OperatorCosts, batch: int, mean_context: Array) -> Array:
        """``batch`` sequences of one query token each, attending to ``mean_context`` tokens on average.

        The form at fixed contexts, never falling, joined by straight lines (as ``DecodeCost``).
        """
        op = costs.operator("mla_decode", self.key)
        hw = _hardware(costs, self.kv_dtype)
        keys = CURVE_KEYS if self.shape.indexer is None else np.minimum(CURVE_KEYS, self.shape.indexer.top_k)
        decodes = self._batch(float(batch), keys)
        seconds = mla.decode_s(decodes, op.coefficients, hw)
        if op.residual:
            seconds = seconds * np.exp(LogGrid.of(op.residual).log_factor(*mla.residual_coordinates(decodes)))
        seconds = np.maximum.accumulate(np.maximum(seconds, mla.roofline_s(decodes, hw)))
        seconds = seconds + self.indexer_s(costs, batch * CURVE_KEYS, batch * CURVE_KEYS)
        return np.asarray(np.interp(mean_context, CURVE_KEYS, seconds))

    def chunk_cost(self, costs: OperatorCosts) -> LatentChunkCost:
        """Cost of chunks of a prompt."""
        return LatentChunkCost(self, costs)

    def decode_work(self, queries: Array, pairs: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of ``queries`` single tokens that see ``pairs`` keys in all."""
        attended = pairs if self.shape.indexer is None else np.minimum(pairs, queries * self.shape.indexer.top_k)
        wide = 2 * self.shape.kv_lora_rank + self.shape.qk_rope_head_dim
        moved = dtype_bytes(self.kv_dtype) * self.shape.latent * attended
        scored, scanned = self._indexer_work(pairs, pairs)
        return (
            2.0 * self.heads * wide * attended + scored,
            moved + ACTIVATION_BYTES * self.heads * wide * queries + scanned,
        )

    def chunk_work(self, tokens: Array, history: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of chunks of ``tokens`` behind ``history``: unfolding the history included."""
        sizes, scorer = self.shape, self.shape.indexer
        wide = sizes.qk_head_dim + sizes.v_head_dim
        pairs = causal_pairs(tokens, history, scorer.top_k if scorer else None)
        unfolding = 2.0 * self.heads * sizes.kv_lora_rank * (sizes.qk_nope_head_dim + sizes.v_head_dim) * history
        scored, scanned = self._indexer_work(causal_pairs(tokens, history, None), tokens + history)
        moved = ACTIVATION_BYTES * self.heads * wide * (2.0 * tokens + history)
        return 2.0 * self.heads * wide * pairs + unfolding + scored, moved + scanned

    def sizes(self) -> dict[str, int]:
        return {"heads": self.heads}

    def _batch(self, batch: Any, keys: Any) -> mla.LatentBatch:
        sizes = self.shape
        width = dtype_bytes(self.kv_dtype)
        return mla.LatentBatch(batch, keys, self.heads, sizes.kv_lora_rank, sizes.qk_rope_head_dim, width)

    def _indexer_work(self, pairs: Any, keys: Any) -> tuple[Any, Any]:
        """FLOPs and bytes of an indexer that scores ``pairs`` query-key pairs, reading ``keys`` keys."""
        if self.shape.indexer is None:
            return 0.0 * pairs, 0.0 * keys
        scorer = self.shape.indexer
        flops = 2.0 * scorer.heads * scorer.head_dim * pairs
        return self.indexed * flops, self.indexed * dtype_bytes(self.kv_dtype) * scorer.head_dim * keys

    def indexer_s(self, costs: OperatorCosts, pairs: Any, keys: Any) -> Any:
        """Seconds of the indexer, 0 without one: a roofline at an assumed share of the peaks, and its launches."""
        flops, moved = self._indexer_work(pairs, keys)
        if self.shape.indexer is None:
            return flops
        hw = _hardware(costs, self.kv_dtype)
        busy = np.maximum(flops / hw.flops_per_s, moved / hw.bytes_per_s) / INDEXER_EFFICIENCY
        return busy + self.indexed * INDEXER_KERNELS * costs.elementwise_s(0.0)


class LatentChunkCost:
    """Cost of one chunk: attention over unfolded keys and values, unfolding those of the history, copies of its tokens.

    With an indexer the cheaper of two kernels runs: over everything, or over the picked latent vectors, which costs
    absorbed FLOPs a pair.
    """

    def __init__(self, mixing: LatentMixing, costs: OperatorCosts) -> None:
        op, sizes, hw = costs.operator("mla_prefill", mixing.key), mixing.shape, _hardware(costs, "bf16")
        width = dtype_bytes(mixing.kv_dtype)
        size = (sizes.qk_head_dim + sizes.v_head_dim) / 2
        self._dense = PrefillCost(op, Heads(mixing.heads, mixing.heads, size, None, width), hw)
        self._sparse = self._sparse_cost(mixing, op, hw) if sizes.indexer else None
        self.launch_s = self._dense.launch_s
        self._token_s = op.coefficients["hidden_passes"] * ACTIVATION_BYTES * mixing.hidden / hw.bytes_per_s
        unfolded = mixing.heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        self._history_s = float(costs.gemm_s(UNFOLDED_ROWS, unfolded, sizes.kv_lora_rank, "bf16")) / UNFOLDED_ROWS
        self._mixing, self._costs = mixing, costs

    @staticmethod
    def _sparse_cost(mixing: LatentMixing, op: FittedOperator, hw: Hardware) -> PrefillCost:
        sizes = mixing.shape
        assert sizes.indexer is not None
        ratio = (sizes.qk_head_dim + sizes.v_head_dim) / (2 * sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        op = op.model_copy(update={"coefficients": {**op.coefficients, "window_efficiency": ratio}})
        size = (sizes.qk_head_dim + sizes.v_head_dim) / 2
        return PrefillCost(op, Heads(mixing.heads, mixing.heads, size, sizes.indexer.top_k, 2.0), hw)

    def __call__(self, chunk: float, history: float, *, launch: bool = True) -> float:
        """Seconds of a chunk of ``chunk`` >= 1 tokens behind ``history``."""
        seconds = self._dense(chunk, history, launch=launch) + self._history_s * history
        if self._sparse:
            seconds = min(seconds, self._sparse(chunk, history, launch=launch))
        return float(seconds + self._token_s * chunk + self._scoring_s(chunk, history))

    def many(self, chunk: Any, history: Any, *, launch: bool = True) -> Array:
        """The same over arrays; zero where a chunk is empty."""
        tokens, past = np.broadcast_arrays(np.asarray(chunk, dtype=float), np.asarray(history, dtype=float))
        seconds = self._dense.many(tokens, past, launch=launch) + self._history_s * past
        if self._sparse:
            seconds = np.minimum(seconds, self._sparse.many(tokens, past, launch=launch))
        seconds = seconds + self._token_s * tokens + self._scoring_s(tokens, past)
        return np.asarray(np.where(tokens > 0, seconds, 0.0))

    def _scoring_s(self, tokens: Any, history: Any) -> Any:
        return self._mixing.indexer_s(self._costs, causal_pairs(tokens, history, None), tokens + history)


def _hardware(costs: OperatorCosts, dtype: str) -> Hardware:
    """Peaks for a cache of ``dtype``: attention computes in bf16 where the device has no such tensor cores."""
    sheet = costs.profile.datasheet
    return Hardware.of(sheet, dtype if COMPUTE_DTYPE.get(dtype) in sheet.flops_per_s else "bf16")
