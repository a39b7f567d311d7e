"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): its sizes, and the parameters that follow."""

from __future__ import annotations

from pydantic import Field

from apexsim.specs.base import Spec

# Checkpoints in four bits keep latent attention in bf16: Kimi-K2.5 lists self_attn among what its config leaves alone,
# and so are the projections of nvidia/DeepSeek-R1-FP4 stored (NVIDIA/Model-Optimizer issue 150).
FOUR_BIT = ("nvfp4", "mxfp4", "int4_wo")


class SparseIndexer(Spec):
    """Sparse attention of DeepSeek-V3.2 and GLM-5: a small scorer picks the ``top_k`` keys that a query attends to.

    The scorer has ``heads`` query heads over one key of ``head_dim`` elements a token, which is cached beside the
    latent vector. No kernel of it is measured: whatever rests on it is an estimate.
    """

    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    top_k: int = Field(gt=0)


class LatentAttention(Spec):
    """Keys and values of all heads are projected from one latent vector of a token, which is all that is cached.

    ``kv_lora_rank`` elements of it are compressed keys and values, ``qk_rope_head_dim`` a rotated key that all heads
    share. Queries are compressed to ``q_lora_rank``. A head's query and key have ``qk_nope_head_dim`` +
    ``qk_rope_head_dim`` elements, its value ``v_head_dim``. One latent vector serves all heads: every rank of tensor
    parallelism keeps the whole of it.
    """

    q_lora_rank: int = Field(gt=0)
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

    @property
    def cached(self) -> int:
        """Elements cached for a token: the latent vector, and the key of an indexer."""
        return self.latent + (self.indexer.head_dim if self.indexer else 0)

    def params(self, hidden: int, heads: int) -> int:
        """Elements of the matrices of one layer, the indexer's included."""
        down = hidden * (self.q_lora_rank + self.latent)
        up = heads * (
            self.q_lora_rank * self.qk_head_dim + self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        )
        return down + up + heads * self.v_head_dim * hidden + self._indexer_params(hidden)

    def _indexer_params(self, hidden: int) -> int:
        if self.indexer is None:
            return 0
        scorer = self.indexer
        return self.q_lora_rank * scorer.heads * scorer.head_dim + hidden * (scorer.head_dim + scorer.heads)

    def unfolding_params(self, heads: int) -> int:
        """Elements of the up-projections of keys and values, which are kept as bf16 (see ``projection_dtype``)."""
        return heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)

    @staticmethod
    def projection_dtype(weights: str) -> str:
        """Dtype of the projections in a checkpoint of ``weights``.

        Up-projections of keys and values are bf16 whatever the others are: engines unpack them once to absorb them.
        """
        return "bf16" if weights in FOUR_BIT else weights

    @property
    def small_params(self) -> int:
        """Elements of the norms over the two latent vectors of one layer."""
        return self.q_lora_rank + self.kv_lora_rank

    def attended(self, context: float) -> float:
        """Keys that a query attends to among ``context`` tokens."""
        return context if self.indexer is None else min(context, self.indexer.top_k)

    def flops_per_query(self, heads: int, context: float) -> float:
        """FLOPs of one query of ``heads`` heads over ``context`` tokens: scores, weighted sum, the indexer.

        Keys and values as if unfolded from the latent vector (whose unfolding is counted among the projections).
        """
        scored = 0.0 if self.indexer is None else 2.0 * self.indexer.heads * self.indexer.head_dim * context
        return 2.0 * heads * (self.qk_head_dim + self.v_head_dim) * self.attended(context) + scored
