"""What an engine keeps of a device's memory besides its KV cache, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from apexsim.specs.base import Spec

ShareOf = Literal["total", "started", "loaded"]
# Share that an engine leaves outside at most: on small devices SGLang computes shorter chunks, and leaves less.
# A fifth is an assumption, not read from a log.
MOST_LEFT = 0.2


class MemoryDefaults(Spec):
    """Share of device memory that an engine takes, and what it keeps of it beyond weights and KV cache.

    ``gpu_memory_utilization`` is a share of what ``share_of`` says. ``total`` (vLLM): of all memory a process sees;
    weights, the peak of a full step and the bytes below come out of it. ``started`` (SGLang's mem-fraction-static): of
    what is free before weights are loaded; it holds weights and KV cache, and steps live on the rest. ``loaded``
    (TensorRT-LLM's free_gpu_memory_fraction): of what is free once weights are loaded and a full step has run. Where it
    is None the engine chooses it so that ``left_bytes`` of a device stay outside, but no more than a fifth (see
    ``share_on``).

    ``reserve_bytes`` is what lies outside PyTorch's tensors on one device: CUDA's context where the engine counts it,
    loaded kernels, cached blocks. ``graph_bytes``: CUDA graphs, where the engine counts them before it sizes its cache.
    ``communicators``: how many communicators of the collective library a rank of a group opens, each of the device's
    ``nccl_bytes``. ``sampler_logit_copies``: 4-byte logits of every seat that are alive at once when the engine samples
    for all its seats before it sizes its cache, as multiples of seats x vocabulary x 4 bytes; 1 = the logits alone.
    ``context_must_fit``: it refuses a context limit longer than its cache holds; others start, and reject what is too
    long. ``seats_need_states``: it refuses more seats than it has room for states of recurrent layers.

    ``kv_blocks``: the KV blocks of a replica where a server told how many it has; None = worked out from the rest.
    """

    gpu_memory_utilization: float | None = Field(0.9, gt=0, le=1)
    left_bytes: int = Field(0, ge=0)
    share_of: ShareOf = "total"
    reserve_bytes: int = Field(0, ge=0)
    graph_bytes: int = Field(0, ge=0)
    communicators: int = Field(1, ge=0, le=1000)
    sampler_logit_copies: float = Field(1.0, ge=0, le=1000)
    context_must_fit: bool = True
    seats_need_states: bool = False
    kv_blocks: int | None = Field(None, gt=0, le=2**40)

    def share_on(self, memory_bytes: int) -> float:
        """The share of a device of that much memory, chosen by the engine where it is not given."""
        if self.gpu_memory_utilization is not None:
            return self.gpu_memory_utilization
        return 1.0 - min(self.left_bytes / memory_bytes, MOST_LEFT)


class MemoryChange(Spec):
    """Memory terms of some of the versions that a profile answers for; None leaves the profile's own."""

    versions: tuple[str, ...]
    reserve_bytes: int | None = Field(None, ge=0)
    graph_bytes: int | None = Field(None, ge=0)
    sampler_logit_copies: float | None = Field(None, ge=0, le=1000)

    @property
    def terms(self) -> Mapping[str, object]:
        """The terms it sets."""
        return self.model_dump(exclude={"versions"}, exclude_none=True)


class MemoryEvidence(Spec):
    """Where the memory terms come from. ``kept_error``: relative standard error of the bytes kept beyond the weights.

    The bytes kept are those of a full step, the reserve and the collectives: memory less weights and KV cache.
    """

    kept_error: float = Field(gt=0, le=10)
    source: str


class ExpertPadding(Spec):
    """Experts of ``dtype`` are loaded with their sizes rounded up to multiples that the engine's kernels ask for.

    ``hidden`` is the multiple of the hidden size, ``inter`` that of the width on one rank. ``device_computes``
    restricts it to devices that compute in a dtype (nvfp4: Blackwell).
    """

    dtype: str
    hidden: int = Field(gt=0)
    inter: int = Field(gt=0)
    device_computes: str | None = None

    def factor(self, hidden: int, inter: int) -> float:
        """Bytes as loaded over bytes as published."""
        return -(-hidden // self.hidden) * self.hidden / hidden * (-(-inter // self.inter) * self.inter / inter)
