"""Mixtures of experts: their sizes, and how unevenly a router chooses among them."""

from __future__ import annotations

from pydantic import Field, model_validator

from apexsim.specs.base import Spec
from apexsim.units import dtype_bytes


class MoESpec(Spec):
    """Mixture of experts. Every token visits ``active`` of ``experts`` experts and all ``shared_experts``.

    ``ffn`` is the width of one routed expert, ``shared_ffn`` that of one shared expert; ``shared_gate`` weighs the
    shared experts by a scalar of the token. The first ``dense_layers`` layers have a dense FFN instead; of the others
    every ``every``-th has experts (Llama-4-Maverick: 2). ``dtype`` is set where the weights were published in that
    dtype only (MXFP4). ``routing_exponent`` is how uneven the router's choices are for text: the expert of rank r is
    chosen with weight r^-routing_exponent, all alike with 0; ``random_routing_exponent`` for prompts of random tokens
    (docs/validation.md says where the defaults come from).
    """

    experts: int = Field(ge=2)
    active: int = Field(ge=1)
    ffn: int = Field(gt=0)
    shared_experts: int = Field(0, ge=0)
    shared_ffn: int | None = Field(None, gt=0)
    shared_gate: bool = False
    dense_layers: int = Field(0, ge=0)
    every: int = Field(1, ge=1)
    router_bias: bool = False
    dtype: str | None = None
    routing_exponent: float = Field(0.5, ge=0, le=3)
    random_routing_exponent: float = Field(1.0, ge=0, le=3)

    @property
    def shared_width(self) -> int:
        """Summed width of the shared experts, which run as one FFN; 0 without any."""
        return self.shared_experts * (self.shared_ffn or 0)

    def at(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return layer >= self.dense_layers and (layer + 1) % self.every == 0

    @model_validator(mode="after")
    def _consistent(self) -> MoESpec:
        if self.active > self.experts:
            raise ValueError(f"active ({self.active}) must not exceed experts ({self.experts})")
        if (self.shared_experts > 0) != (self.shared_ffn is not None):
            raise ValueError("give shared_experts and shared_ffn together, or neither")
        if self.dtype is not None:
            dtype_bytes(self.dtype)
        return self
