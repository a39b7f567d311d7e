"""What the weights of a model were published in: their dtype, and what a quantised checkpoint leaves in bf16."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from apexsim.specs.base import Spec
from apexsim.units import dtype_bytes

# Matrices of a layer: of attention or what stands in its place, of a dense FFN, of shared and of routed experts.
Part = Literal["mixer", "ffn", "shared", "experts"]

PART_NAMES: dict[Part, str] = {"mixer": "attention", "ffn": "FFN", "shared": "shared experts", "experts": "experts"}


class Checkpoint(Spec):
    """A checkpoint as published, which a deployment serves unless it asks for other weights.

    ``dtype`` is that of the matrices of the layers, ``experts`` of routed experts where it is another one. ``kept``
    names parts that stay bf16, in all layers or in those listed (counted from 0); embeddings, LM head, norms and
    routers always do. ``method`` is what the checkpoint itself calls its quantisation. ``notes`` say what of it is not
    taken into account.
    """

    dtype: str
    experts: str | None = None
    kept: dict[Part, tuple[int, ...] | Literal["all"]] = Field(default_factory=dict)
    method: str
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Checkpoint:
        for dtype in (self.dtype, self.experts or self.dtype):
            dtype_bytes(dtype)
        if any(layer < 0 for layer in self.layers_named):
            raise ValueError("kept counts layers from 0")
        return self

    def dtype_of(self, part: Part) -> str:
        """Dtype of a part where it is not kept."""
        return (self.experts if part == "experts" else None) or self.dtype

    def kept_in(self, layer: int) -> tuple[Part, ...]:
        """Parts that stay bf16 in a layer, counted from 0."""
        return tuple(part for part, layers in self.kept.items() if layers == "all" or layer in layers)

    @property
    def layers_named(self) -> tuple[int, ...]:
        """Layers that are named one by one."""
        return tuple(layer for layers in self.kept.values() if layers != "all" for layer in layers)

    @property
    def described(self) -> str:
        """The checkpoint in words."""
        experts = f", experts {self.experts}" if self.experts else ""
        bf16 = [
            PART_NAMES[part] + ("" if layers == "all" else f" of {len(layers)} layer{'s' * (len(layers) > 1)}")
            for part, layers in self.kept.items()
        ]
        return f"{self.dtype}{experts} ({self.method})" + (f", bf16: {', '.join(bf16)}" if bf16 else "")
