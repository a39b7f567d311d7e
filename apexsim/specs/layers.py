"""Layers of a model that are alike, to a step (``LayerKind``) and to the KV cache (``KVGroup``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from apexsim.specs.checkpoint import Part
from apexsim.units import dtype_bytes

Mixer = Literal["attention", "recurrent"]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """``count`` layers that are alike.

    ``mixer`` mixes tokens: attention over the last ``window`` tokens (None = all), a recurrent state (``window`` 1), or
    nothing (None) in layers that are an FFN alone. ``moe``: experts in place of a dense FFN. ``ffn`` False: no FFN.
    ``nope``: positions rotate nothing. ``indexed``: latent attention with an indexer of its own (others reuse what one
    before them picked). ``kept``: parts that a quantised checkpoint leaves in bf16.
    """

    count: int
    window: int | None
    moe: bool
    mixer: Mixer | None = "attention"
    ffn: bool = True
    nope: bool = False
    indexed: bool = False
    kept: tuple[Part, ...] = ()

    @property
    def one(self) -> LayerKind:
        """One layer of the kind: equal for equal kinds."""
        return replace(self, count=1)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV cache lives alike. A windowed layer needs only its last ``window`` tokens.

    ``latent`` is the elements of one vector a token that stands for all keys and values: every rank keeps the whole.
    ``index_keys`` is the elements a token of the keys of indexers, of all the group's layers together.
    """

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None
    latent: int | None = None
    index_keys: int = 0

    def bytes_per_token(self, dtype: str, tensor: int = 1) -> float:
        """Bytes of keys and values of one token on one rank, all layers of the group.

        KV heads are split over ``tensor`` ranks, and repeated where there are more ranks than heads.
        """
        if self.latent is not None:
            return (self.layers * self.latent + self.index_keys) * dtype_bytes(dtype)
        heads_here = max(1, self.kv_heads // tensor)
        return 2 * self.layers * heads_here * self.head_dim * dtype_bytes(dtype)
