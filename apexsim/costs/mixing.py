"""What a step may ask of whatever mixes tokens in a layer: attention over a KV cache, or a recurrent state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms.hardware import Array


class ChunkCost(Protocol):
    """Seconds of chunks of a prompt: one chunk in floats, ``many`` over arrays (see ``PrefillCost``)."""

    @property
    def launch_s(self) -> float:
        """Part of a chunk's seconds that chunks in one kernel pay once."""

    def __call__(self, chunk: float, history: float, *, launch: bool = True) -> float: ...

    def many(self, chunk: Any, history: Any, *, launch: bool = True) -> Array: ...


class Mixing(Protocol):
    """An operator that costs by sequence.

    ``kind`` names it to people; ``kinds`` are those of a device profile for decodes and for chunks.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def kinds(self) -> tuple[str, str]: ...

    @property
    def key(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def window(self) -> int | None: ...

    @property
    def widest(self) -> int:
        """Elements of a token's tensors that live together around it: inputs and output."""

    @property
    def launches(self) -> int:
        """Kernels that an engine launches for it."""

    def decode_s(self, costs: OperatorCosts, batch: int, mean_context: Array) -> Array: ...

    def chunk_cost(self, costs: OperatorCosts) -> ChunkCost: ...

    def decode_work(self, queries: Array, pairs: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of ``queries`` single tokens that attend to ``pairs`` keys in all."""

    def chunk_work(self, tokens: Array, history: Array) -> tuple[Array, Array]:
        """FLOPs and bytes of chunks of ``tokens`` behind ``history``."""

    def sizes(self) -> Mapping[str, int]:
        """What a device profile's measured ranges are checked against, besides batch and tokens."""

    def __hash__(self) -> int: ...
