"""Recurrent layers (gated delta nets, Mamba-2): what one rank takes to advance a state. No kernel of them is measured.

The estimate is a roofline of fitted pieces: every kernel costs its launch and its bytes like an element-wise one, and
the products of a chunked scan run at an assumed share of the tensor cores' peak. Every answer is marked ``estimated``.

A decode step reads and writes the state of every sequence. A chunk works in blocks of ``SCAN_TOKENS``: products within
a block, and one state a block written and read between blocks (arXiv 2405.21060, section 7; arXiv 2412.06464).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms.hardware import Array
from apexsim.specs.model import RECURRENT_WINDOW
from apexsim.specs.recurrent import STATE_ELEMENT_BYTES, Recurrent

ACTIVATION_BYTES = 2.0
# Kernels of a decode step: convolution, state. Of a chunk: convolution, decay, scores, states, passing, output.
DECODE_KERNELS, CHUNK_KERNELS = 2, 6
SCAN_TOKENS = 64
# Share of the tensor cores' peak that products of 64 x 64 x 128 reach: a prior, nothing measured.
SCAN_EFFICIENCY = 0.2


@dataclass(frozen=True, slots=True)
class StateUpdate:
    """Convolution and state of one recurrent layer on one rank of ``tensor``: takes the place of attention."""

    name: str
    layer: Recurrent
    tensor: int
    kind = "recurrent"
    kinds = ("recurrent", "recurrent")
    launches = CHUNK_KERNELS
    key = "any"
    dtype = "bf16"
    window = RECURRENT_WINDOW

    @property
    def widest(self) -> int:
        """Elements of a token's projection, convolved tensors and output."""
        return self.layer.projected(self.tensor) + self.layer.convolved(self.tensor) + self.layer.inner(self.tensor)

    def decode_s(self, costs: OperatorCosts, batch: int, mean_context: Array) -> Array:
        """Seconds to advance ``batch`` sequences by one token, whatever their context."""
        moved = self._streamed + 2 * self.layer.state_bytes(self.tensor)
        seconds = costs.elementwise_s(batch * moved) + (DECODE_KERNELS - 1) * costs.elementwise_s(0.0)
        return np.full(np.shape(mean_context), float(seconds))

    def chunk_cost(self, costs: OperatorCosts) -> ScanCost:
        """Cost of chunks of a prompt."""
        launch_s = float(costs.elementwise_s(0.0))
        flops, moved = (float(one) for one in self.chunk_work(np.ones(()), np.zeros(())))
        state_bytes = 2 * self.layer.state_bytes(self.tensor)
        byte_s = float(costs.elementwise_s(moved - state_bytes)) - launch_s
        flop_s = flops / (costs.profile.datasheet.flops_per_s["bf16"] * SCAN_EFFICIENCY)
        state_s = float(costs.elementwise_s(state_bytes)) - launch_s
        return ScanCost(CHUNK_KERNELS * launch_s, byte_s + flop_s, state_s)

    def decode_work(self, queries: Array, pairs: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of ``queries`` single tokens, each of which reads and writes its sequence's state."""
        flops = self.layer.flops_per_token(self.tensor) * queries
        return flops, (self._streamed + 2 * self.layer.state_bytes(self.tensor)) * queries

    def chunk_work(self, tokens: Array, history: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of chunks of ``tokens``.

        The recurrence and the products of each token with its block; tokens in, convolved, out, one state a block
        written and read, the sequence's once.
        """
        layer, heads = self.layer, self.layer.heads // self.tensor
        within = 2.0 * SCAN_TOKENS * heads * (layer.state + layer.head_dim)
        solved = within if layer.kind == "gated_delta" else 0.0  # the block's triangular system
        flops = (layer.flops_per_token(self.tensor) + within + solved) * tokens
        between = 2 * layer.inner(self.tensor) * layer.state * STATE_ELEMENT_BYTES / SCAN_TOKENS
        return flops, (self._streamed + between) * tokens + 2 * layer.state_bytes(self.tensor)

    @property
    def _streamed(self) -> float:
        """Bytes of a token read and written besides states: in, convolved, out."""
        return ACTIVATION_BYTES * (3 * self.layer.convolved(self.tensor) + self.layer.inner(self.tensor))

    def sizes(self) -> Mapping[str, int]:
        return {}


@dataclass(frozen=True, slots=True)
class ScanCost:
    """Cost of one chunk: launches, a price a token, and the sequence's state read and written once."""

    launch_s: float
    token_s: float
    state_s: float

    def __call__(self, chunk: float, history: float, *, launch: bool = True) -> float:
        """Seconds of a chunk of ``chunk`` >= 1 tokens: ``history`` stands in the state already."""
        return self.token_s * chunk + self.state_s + (self.launch_s if launch else 0.0)

    def many(self, chunk: Any, history: Any, *, launch: bool = True) -> Array:
        """The same over arrays; zero where a chunk is empty."""
        tokens, _ = np.broadcast_arrays(np.asarray(chunk, dtype=float), np.asarray(history, dtype=float))
        seconds = self.token_s * tokens + self.state_s + (self.launch_s if launch else 0.0)
        return np.asarray(np.where(tokens > 0, seconds, 0.0))
