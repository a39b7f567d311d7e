"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): its sizes, and the parameters that follow."""

from __future__ import annotations

from pydantic import Field, model_validator

from apexsim.specs.base import Spec

# Checkpoints in four bits keep latent attention in bf16: Kimi-K2.5 lists self_attn among what its config leaves alone,
# and so are the projections of nvidia/DeepSeek-R1-FP4 stored (NVIDIA/Model-Optimizer issue 150).
FOUR_BIT = ("nvfp4", "mxfp4", "int4_wo")


class SparseIndexer(Spec):
    """Sparse attention of DeepSeek-V3.2 and GLM-5: a small scorer picks the ``top_k`` keys that a query attends to.

    The scorer has ``heads`` query heads over one key of ``head_dim`` elements a token, which is cached beside the
    latent vector. ``layers`` (counted from 0) have a scorer, all if None; the others attend to what the last one before
    them picked (GLM-5.2). No kernel of it is measured: whatever rests on it is an estimate.
    """

    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    top_k: int = Field(gt=0)
    layers: tuple[int, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> SparseIndexer:
        if self.layers is not None and (self.layers[0] != 0 or list(self.layers) != sorted(set(self.layers))):
            raise ValueError("layers with an indexer are counted from 0, in order, the first layer among them")
        return self


class LatentAttention(Spec):
    """Keys and values of all heads are projected from one latent vector of a token, which is all that is cached.

    ``kv_lora_rank`` elements of it are compressed keys and values, ``qk_rope_head_dim`` a rotated key that all heads
    share. Queries are compressed to ``q_lora_rank`` (None: projected at once). A head's query and key have
    ``qk_nope_head_dim`` + ``qk_rope_head_dim`` elements, its value ``v_head_dim``. One latent vector serves all heads:
    every rank of tensor parallelism keeps the whole of it.
    """

    q_lora_rank: int | None = Field(None, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    indexer: SparseIndexer | None = None

    @property
    def qk_head_dim(self) -> int:
        """Elements of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent(self) -> int:
        """Elements of the cached latent vector of a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def indexed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has an indexer of its own."""
        if self.indexer is None:
            return False
        return self.indexer.layers is None or layer in self.indexer.layers

    def query_params(self, hidden: int, heads: int) -> int:
        """Elements of the matrices that make queries."""
        if self.q_lora_rank is None:
            return hidden * heads * self.qk_head_dim
        return self.q_lora_rank * (hidden + heads * self.qk_head_dim)

    def params(self, hidden: int, heads: int, *, indexed: bool) -> int:
        """Elements of the matrices of one layer, those of an indexer included where it has one."""
        keys_values = hidden * self.latent + self.unfolding_params(heads)
        scorer = self._indexer_params(hidden) if indexed else 0
        return self.query_params(hidden, heads) + keys_values + heads * self.v_head_dim * hidden + scorer

    def _indexer_params(self, hidden: int) -> int:
        assert self.indexer is not None, "a layer with an indexer belongs to a model that has one"
        scorer = self.indexer
        queries = (self.q_lora_rank or hidden) * scorer.heads * scorer.head_dim
        return queries + hidden * (scorer.head_dim + scorer.heads)

    def unfolding_params(self, heads: int) -> int:
        """Elements of the up-projections of keys and values, which are kept as bf16 (see ``projection_dtype``)."""
        return heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)

    @staticmethod
    def projection_dtype(weights: str) -> str:
        """Dtype of the projections in a checkpoint of ``weights``.

        Up-projections of keys and values are bf16 whatever the others are: engines unpack them once to absorb them.
        """
        return "bf16" if weights in FOUR_BIT else weights

    def small_params(self, *, indexed: bool) -> int:
        """Elements of the norms of one layer: over the latent vectors, and (with a bias) over an indexer's key."""
        key = 2 * self.indexer.head_dim if self.indexer and indexed else 0
        return (self.q_lora_rank or 0) + self.kv_lora_rank + key

    def attended(self, context: float) -> float:
        """Keys that a query attends to among ``context`` tokens."""
        return context if self.indexer is None else min(context, self.indexer.top_k)

    def flops_per_query(self, heads: int, context: float, *, indexed: bool) -> float:
        """FLOPs of one query of ``heads`` heads over ``context`` tokens: scores, weighted sum, its indexer.

        Keys and values as if unfolded from the latent vector (whose unfolding is counted among the projections).
        """
        scorer = self.indexer if indexed else None
        scored = 2.0 * scorer.heads * scorer.head_dim * context if scorer else 0.0
        return 2.0 * heads * (self.qk_head_dim + self.v_head_dim) * self.attended(context) + scored
