"""Engine profiles: what a serving engine adds to its kernels, and how its scheduler is set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apexsim.specs.base import Spec

# A host that takes a minute over one thing is a unit mistake.
MAX_HOST_S = 60.0


class HostTerms(Spec):
    """Host time, in seconds. Few, additive and named; calibrated from served runs, never mixed with kernels.

    ``step_s`` is paid by every step and ``per_sequence_s`` by every scheduled sequence of it. An engine that
    prepares a step while the device runs the one before (``overlapped``) pays only what exceeds the device time.
    ``exposed_step_s`` is what no overlap hides. ``frontend_per_request_s`` is a serial queue before the scheduler
    (tokenise, admit); ``response_s`` is the way of a token from the device to the client.
    """

    step_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    per_sequence_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    exposed_step_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    frontend_per_request_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    response_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    overlapped: bool = False


class SchedulerDefaults(Spec):
    """How an engine batches when nobody tells it otherwise; every field is an ``--engine-option``.

    ``admission`` says which KV blocks a request must find free to start: those of its prompt (``prompt``: vLLM V1
    takes only the first chunk's but asks for all), or of its whole life, which it then holds (``full``: never
    preempted, as TensorRT-LLM's GUARANTEED_NO_EVICT). ``max_num_batched_tokens``
    of None means as many as the context limit (vLLM V0 without chunks). ``lookahead_steps`` 1 composes a step while
    the one before runs; on one stage only, since a pipeline's other batches hide the host anyway. ``pipeline_split``
    spreads decodes over the batches of a pipeline or lets each take all it can.
    """

    policy: str
    max_num_batched_tokens: int | None = Field(8192, gt=0)
    max_num_seqs: int = Field(256, gt=0)
    block_size: int = Field(16, gt=0)
    chunked_prefill: bool = True
    admission: Literal["prompt", "full"] = "prompt"
    lookahead_steps: Literal[0, 1] = 0
    pipeline_split: Literal["greedy", "balanced"] = "greedy"
    max_model_len: int | None = Field(None, gt=0)

    @property
    def token_budget(self) -> int:
        """Tokens a step may compute, once ``EngineProfile.scheduler_for`` has settled it."""
        assert self.max_num_batched_tokens is not None, "settled by scheduler_for"
        return self.max_num_batched_tokens


class LongContextDefaults(Spec):
    """Scheduler fields that an engine changes by itself when the context limit exceeds ``above_tokens``."""

    above_tokens: int = Field(gt=0)
    policy: str
    max_num_batched_tokens: int = Field(gt=0)
    chunked_prefill: bool


class MemoryDefaults(Spec):
    """Share of device memory the engine takes, and the bytes of it that are neither weights nor KV cache."""

    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    reserve_bytes: int = Field(0, ge=0)


class CommunicationDefaults(Spec):
    """Which collective kernels an engine uses: its own all-reduce up to ``custom_all_reduce_max_bytes``, else NCCL.

    ``moe_dispatch`` says how tokens reach experts that are whole on a rank (expert = tensor degree > 1); where experts
    are cut by tensor parallelism every rank has all tokens, and partial sums are all-reduced.
    """

    custom_all_reduce: bool = True
    custom_all_reduce_max_bytes: int = Field(8 << 20, ge=0)
    moe_dispatch: Literal["all_reduce", "all_to_all"] = "all_reduce"


class EngineProfile(Spec):
    """One engine family. ``versions`` are the prefixes it answers for; ``evidence`` says where its terms come from."""

    name: str
    engine: str
    versions: tuple[str, ...]
    host: HostTerms
    scheduler: SchedulerDefaults
    long_context: LongContextDefaults | None = None
    memory: MemoryDefaults
    communication: CommunicationDefaults
    evidence: Literal["serving", "prior"]
    source: str

    def scheduler_for(self, context_limit: int) -> SchedulerDefaults:
        """The scheduler's settings for this context limit in tokens, every one of them resolved."""
        changed: dict[str, object] = {"max_model_len": context_limit}
        if self.long_context and context_limit > self.long_context.above_tokens:
            changed |= self.long_context.model_dump(exclude={"above_tokens"})
        settled = self.scheduler.model_copy(update=changed)
        budget = settled.max_num_batched_tokens or context_limit
        return settled.model_copy(update={"max_num_batched_tokens": budget})
