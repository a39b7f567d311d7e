"""The models whose layers another laboratory timed one by one (vllm_layers), by the names of their folders."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array


class Widths(NamedTuple):
    """Sizes of a model: hidden, query and KV heads of 128, FFN (None: experts), vocabulary."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int | None
    vocab: int

    def products(self, tp: Array) -> dict[str, tuple[Array, Array]]:
        """(n, k) of every product of a dense layer on one device, by its name in the tables."""
        assert self.ffn is not None, "a model with experts"
        hidden = np.full(len(tp), float(self.hidden))
        return {
            "qkv_proj": ((self.heads + 2 * self.kv_heads) * 128 / tp, hidden),
            "o_proj": (hidden, self.heads * 128 / tp),
            "gate_up_proj": (2 * self.ffn / tp, hidden),
            "down_proj": (hidden, self.ffn / tp),
        }


DENSE = {
    "Llama-3.1-8B": Widths(4096, 32, 8, 14336, 128256),
    "Qwen3-32B": Widths(5120, 64, 8, 25600, 151936),
}
MODELS = {**DENSE, "Qwen3-30B-A3B-Instruct-2507": Widths(2048, 32, 4, None, 151936)}
