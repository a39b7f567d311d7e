"""Layers with a state in place of a KV cache: gated delta nets and Mamba-2, and the sizes that follow."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apexsim.specs.base import Spec

STATE_ELEMENT_BYTES = 4.0
CONV_ELEMENT_BYTES = 2.0


class Recurrent(Spec):
    """One matrix of ``state`` x ``head_dim`` a head is all that a layer remembers of a sequence.

    ``gated_delta`` (Qwen3-Next, Qwen3.5; arXiv 2412.06464): ``heads`` value heads of ``head_dim``, ``groups`` key heads
    of ``state``. ``mamba2`` (Nemotron-H; arXiv 2405.21060): ``heads`` of ``head_dim``, ``groups`` that share B and C of
    ``state``. Both project a token to an input and a gate of heads x head_dim, two vectors of groups x state, and a few
    scalars a head; run a causal convolution over ``conv`` tokens of all but the gate; and update their state. The state
    is kept in fp32 (``mamba_ssm_dtype`` of the published configs), the convolution's last tokens in bf16.
    """

    kind: Literal["gated_delta", "mamba2"]
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    groups: int = Field(gt=0)
    state: int = Field(gt=0)
    conv: int = Field(4, ge=2)
    conv_bias: bool = False

    def groups_here(self, tensor: int) -> int:
        """Groups of one rank: repeated where there are more ranks than groups."""
        return max(1, self.groups // tensor)

    @property
    def scalars(self) -> int:
        """Scalars of a token and head: the time step of Mamba-2; decay and strength of a delta net."""
        return 1 if self.kind == "mamba2" else 2

    def inner(self, tensor: int = 1) -> int:
        """Elements of heads x head_dim on one rank."""
        return self.heads // tensor * self.head_dim

    def convolved(self, tensor: int = 1) -> int:
        """Elements of a token that the convolution runs over, on one rank."""
        return self.inner(tensor) + 2 * self.groups_here(tensor) * self.state

    def projected(self, tensor: int = 1) -> int:
        """Elements that a token is projected to on one rank."""
        return self.inner(tensor) + self.convolved(tensor) + self.scalars * self.heads // tensor

    def params(self, hidden: int) -> int:
        """Elements of the input and output projections of one layer."""
        return hidden * (self.projected() + self.inner())

    @property
    def small_params(self) -> int:
        """Elements of the convolution, of the decay, step bias (and skip of Mamba-2) of every head, and of the norm."""
        norm = self.inner() if self.kind == "mamba2" else self.head_dim
        return self.convolved() * (self.conv + self.conv_bias) + self.heads * (4 - self.scalars) + norm

    def state_bytes(self, tensor: int = 1) -> float:
        """Bytes that one layer keeps of a sequence on one rank, however long it is."""
        tail = (self.conv - 1) * self.convolved(tensor)
        return self.inner(tensor) * self.state * STATE_ELEMENT_BYTES + tail * CONV_ELEMENT_BYTES

    def flops_per_token(self, tensor: int = 1) -> float:
        """FLOPs of one token on one rank: the convolution, the state updated and read (twice by a delta net)."""
        passes = 2 if self.kind == "mamba2" else 3
        return 2.0 * passes * self.inner(tensor) * self.state + 2.0 * self.conv * self.convolved(tensor)
