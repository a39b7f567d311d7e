"""Engine profiles: what a serving engine adds to its kernels, and how its scheduler is set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from apexsim.specs.base import Name, Spec
from apexsim.specs.device import Datasheet
from apexsim.specs.memory import ExpertPadding, MemoryChange, MemoryDefaults, MemoryEvidence
from apexsim.versions import begins

# A host that takes a minute over one thing is a unit mistake.
MAX_HOST_S = 60.0
# More passes over the logits than any sort needs.
MAX_PASSES = 10_000.0


class HostTerms(Spec):
    """What an engine adds to its kernels, in seconds. Few, additive and named; calibrated from served runs.

    All but ``expert_choice_s`` is time of the host.

    ``step_s`` is paid by every step and ``per_sequence_s`` by every scheduled sequence of it. An engine that
    prepares a step while the device runs the one before (``overlapped``) pays only what exceeds the device time.
    ``exposed_step_s`` is what no overlap hides. ``frontend_per_request_s`` is a serial queue before the scheduler
    (tokenise, admit); ``response_s`` is the way of a token from the device to the client.

    ``launch_s`` is what the host takes to launch one kernel, ``expert_launch_s`` all those of the experts of a layer
    (engines differ more in them than in anything else). Where no CUDA graph replays the kernels of a step, the
    device cannot end it before the host has launched the last: such a step takes at least as long, however small
    its kernels are. Graphs replay the steps that only decode, and steps that compute prompts up to
    ``graph_tokens`` tokens; without ``cuda_graphs`` none. Shared experts run beside the routed ones, on a stream of
    their own or as one expert more, in steps of up to ``beside_tokens`` tokens, and then take no time of their own.

    ``expert_choice_s`` is what a layer of experts takes on the device beyond the kernel of the device's table: what
    served runs leave over, mostly choosing experts and sorting tokens in kernels of the engine's own.
    """

    step_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    per_sequence_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    exposed_step_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    frontend_per_request_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    response_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    launch_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    expert_launch_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    expert_choice_s: float = Field(0.0, ge=0, le=MAX_HOST_S)
    graph_tokens: int = Field(0, ge=0)
    beside_tokens: int = Field(0, ge=0)
    overlapped: bool = False
    cuda_graphs: bool = True

    def launching_s(self, launches: int, expert_layers: int) -> float:
        """Seconds to launch so many kernels and the experts of so many layers."""
        return launches * self.launch_s + expert_layers * self.expert_launch_s

    def replays(self, tokens: int, *, prompts: bool) -> bool:
        """Whether a CUDA graph replays a step of so many tokens, with or without prompts among them."""
        return self.cuda_graphs and (not prompts or tokens <= self.graph_tokens)


TokenBudgetRule = Literal["one_prompt"]


def token_budget(*, prompt_tokens: int, sequences: int) -> int:
    """Tokens a step may compute as benchmark recipes for TensorRT-LLM set it from their load (``one_prompt``).

    A prompt and a token for everybody else, rounded up to 64 (the recipe of InferenceX:
    ceil((sequences + prompt + 64) / 64) x 64).
    """
    return -(-(sequences + prompt_tokens + 64) // 64) * 64


class SchedulerDefaults(Spec):
    """How an engine batches when nobody tells it otherwise; every field is an ``--engine-option``.

    ``admission`` says which KV blocks a request must find free to start: those of its prompt (``prompt``: vLLM V1
    takes only the first chunk's but asks for all), or of its whole life, which it then holds (``full``: never
    preempted, as TensorRT-LLM's GUARANTEED_NO_EVICT). ``max_num_batched_tokens`` of None means as many as the context
    limit (vLLM V0 without chunks); a ``token_budget_rule`` sets it from the load instead (see ``token_budget``).
    ``lookahead_steps`` 1 composes a step while the one before runs; on one stage only, since a pipeline's other batches
    hide the host anyway. ``pipeline_split`` spreads decodes over the batches of a pipeline or lets each take all it
    can.

    ``prefix_caching`` lets a preempted request find again those of its blocks that nobody has taken meanwhile; prefixes
    that requests share are not looked for. ``stream_interval`` hands tokens to the client so many at a time: the first
    token of a request is seen with the ``stream_interval``-th (its last, if it has fewer), later ones as they come.

    ``max_chunk_tokens`` is the most that one prompt gets of a step (``long_prefill_token_threshold`` of vLLM). With
    attention-data ranks, ``max_num_batched_tokens`` and ``max_num_seqs`` are those of each rank (``limits_per_rank``:
    vLLM, TensorRT-LLM) or of all together (SGLang).
    ``receive_interval`` is how many steps that only decode pass between two looks at the requests that have come; an
    idle replica looks at once, and so does one that has just computed prompts (SGLang's scheduler_recv_interval).
    ``knows_output`` lets ``shortest_first`` order by output tokens too, which no server knows beforehand: a bound on
    what a predictor of lengths could gain.
    """

    policy: str
    max_num_batched_tokens: int | None = Field(8192, gt=0)
    token_budget_rule: TokenBudgetRule | None = None
    max_num_seqs: int = Field(256, gt=0)
    block_size: int = Field(16, gt=0)
    chunked_prefill: bool = True
    admission: Literal["prompt", "full"] = "prompt"
    lookahead_steps: Literal[0, 1] = 0
    pipeline_split: Literal["greedy", "balanced"] = "greedy"
    prefix_caching: bool = False
    stream_interval: int = Field(1, gt=0)
    receive_interval: int = Field(1, gt=0)
    max_chunk_tokens: int | None = Field(None, gt=0)
    limits_per_rank: bool = True
    max_model_len: int | None = Field(None, gt=0)
    knows_output: bool = False

    @model_validator(mode="after")
    def _output_is_known_to_one_policy(self) -> SchedulerDefaults:
        if self.knows_output and self.policy != "shortest_first":
            raise ValueError(f"knows_output goes with policy shortest_first; {self.policy} makes no use of it")
        return self

    def of_ranks(self, ranks: int) -> SchedulerDefaults:
        """Settled settings of ``ranks`` attention-data ranks together, none of which takes more of one prompt."""
        if ranks == 1:
            return self
        budget, seats = self.token_budget, self.max_num_seqs
        if not self.limits_per_rank:
            budget, seats = max(1, budget // ranks), max(1, seats // ranks)
        chunk = min(budget, self.max_chunk_tokens or budget)
        limits = {"max_num_batched_tokens": ranks * budget, "max_num_seqs": ranks * seats, "max_chunk_tokens": chunk}
        return self.model_copy(update=limits)

    @property
    def token_budget(self) -> int:
        """Tokens a step may compute, once ``EngineProfile.scheduler_for`` has settled it."""
        assert self.max_num_batched_tokens is not None, "settled by scheduler_for"
        return self.max_num_batched_tokens


class Circumstance(Spec):
    """When an engine changes its defaults by itself: everything given must hold."""

    context_above_tokens: int | None = Field(None, ge=0)
    memory_below_bytes: int | None = Field(None, gt=0)
    devices: tuple[str, ...] | None = None

    def holds(self, context_limit: int, device: str, sheet: Datasheet) -> bool:
        """Whether this is so for a context limit (tokens) on this device."""
        above, below, devices = self.context_above_tokens, self.memory_below_bytes, self.devices
        return (
            (above is None or context_limit > above)
            and (below is None or sheet.memory_bytes < below)
            and (devices is None or device in devices)
        )


class SchedulerChange(Spec):
    """Scheduler fields that an engine sets by itself under a circumstance; None leaves the default."""

    when: Circumstance
    policy: str | None = None
    max_num_batched_tokens: int | None = Field(None, gt=0)
    max_num_seqs: int | None = Field(None, gt=0)
    chunked_prefill: bool | None = None

    @property
    def settings(self) -> dict[str, object]:
        """The fields it sets."""
        return self.model_dump(exclude={"when"}, exclude_none=True)


class KvCacheRule(Spec):
    """KV dtype that an engine takes by itself for checkpoints with weights or experts in one of ``weights``.

    ``device_computes`` restricts it to devices that compute in a dtype (nvfp4: Blackwell).
    """

    dtype: str
    weights: tuple[str, ...]
    device_computes: str | None = None


class CommunicationDefaults(Spec):
    """Which collective kernels an engine uses: its own all-reduce up to ``custom_all_reduce_max_bytes``, else NCCL.

    All-reduces of up to ``fused_norm_max_bytes`` do the residual add and the norm behind them in the same kernel
    (FlashInfer's and TensorRT-LLM's fused all-reduce). Up to ``one_shot_max_tokens`` tokens or ``one_shot_max_bytes``,
    every rank then sends all it has to every other at once, which is the quickest for small messages only; larger ones
    cost what the kernel of the device's table does.

    ``moe_dispatch`` says how tokens reach experts that are whole on a rank (expert degree = devices of a stage > 1);
    where experts are cut, and under ``all_reduce``, every rank has all tokens (gathered over attention-data ranks)
    and partial sums are all-reduced (and scattered to those ranks). ``all_to_all`` is NCCL's;
    ``deepep`` and ``deepep_ll`` (low latency) are the kernels of DeepEP, ``trtllm`` those of TensorRT-LLM over NVLink.
    """

    custom_all_reduce: bool = True
    custom_all_reduce_max_bytes: int = Field(8 << 20, ge=0)
    fused_norm_max_bytes: int = Field(0, ge=0)
    one_shot_max_tokens: int = Field(0, ge=0, le=2**24)
    one_shot_max_bytes: int = Field(0, ge=0, le=2**40)
    moe_dispatch: Literal["all_reduce", "all_to_all", "deepep", "deepep_ll", "trtllm"] = "all_reduce"

    def one_shot_bytes(self, row_bytes: float) -> float:
        """Largest all-reduce, of ``row_bytes`` a token, that is sent at once; 0 where none is."""
        if not self.custom_all_reduce:
            return 0.0
        largest = max(self.one_shot_max_tokens * row_bytes, self.one_shot_max_bytes)
        return min(largest, self.fused_norm_max_bytes, self.custom_all_reduce_max_bytes)


class KernelDefaults(Spec):
    """Where the measured kernels are not the engine's own, and what stands for those; or are, and what goes with it.

    Where a device computes in ``own_experts_on``, the measured kernels of experts are the engine's, choosing included:
    no ``expert_choice_s`` is paid there. ``fp8_reads_like_bf16``: products in fp8 are kernels that no table holds, and
    are taken to read weights at no smaller a share of the memory's peak than products in bf16. ``marlin_experts``:
    MXFP4 experts run on Marlin (vLLM's VLLM_MXFP4_USE_MARLIN), for which its kernel of int4 experts stands.
    """

    own_experts_on: str | None = None
    fp8_reads_like_bf16: bool = False
    marlin_experts: bool = False


class SamplerDefaults(Spec):
    """How an engine draws a token where the most likely ones alone may be drawn (top-p, top-k).

    ``top_p_passes`` is what finding them takes beyond a greedy choice, in passes over all 4-byte logits at the peak of
    the device's memory; where it was calibrated, a repetition penalty that those requests asked for is in it. PyTorch
    sorts them (a radix sort: many passes), writes them back in order and masks them; a kernel that needs no sort, as
    FlashInfer's, takes a few.
    """

    top_p_passes: float = Field(0.0, ge=0, le=MAX_PASSES)


class CalibratedTerm(Spec):
    """A fitted term and its standard error, in the term's own unit: seconds, or passes over the logits.

    ``began`` is what the fit began with, and believed in as far as the rows said nothing else.
    """

    began: float
    value: float
    standard_error: float


class LeftOut(Spec):
    """Errors of runs in percent: mean size (``mape``) and mean (``bias``) of TPOT and TTFT; None without such figures.

    Where a run has no TPOT, its ITL stands in.
    """

    tpot_mape: float | None
    ttft_mape: float | None
    tpot_bias: float | None
    ttft_bias: float | None


class CalibrationReport(Spec):
    """How host terms and passes of a profile were fitted, with the errors of the ``rows`` it used.

    ``before`` are errors under the terms that the fit began with, ``fitted`` under its result; ``left_out`` has, for
    every (model, device), the errors of its rows under terms fitted on all the others.
    """

    rows: int
    terms: dict[str, CalibratedTerm]
    before: LeftOut
    fitted: LeftOut
    left_out: dict[str, LeftOut]


Fusion = Literal["quantise", "rope"]


class EngineProfile(Spec):
    """One engine family. ``versions`` are the prefixes it answers for; ``evidence`` says where its terms come from.

    Of ``changes``, later ones outweigh earlier ones; of ``kv_cache`` and ``expert_padding``, the first rule that holds
    counts. ``memory_changes`` are memory terms of some of the versions (see ``for_version``). ``fusions`` are small
    kernels that the engine has no launch of its own for: those that quantise activations to fp8 (done by the kernel
    before), and the rotary embedding (done by attention). ``given`` are the options that a person gave.
    """

    name: Name
    engine: str
    versions: tuple[str, ...]
    host: HostTerms
    scheduler: SchedulerDefaults
    changes: tuple[SchedulerChange, ...] = ()
    given: tuple[str, ...] = ()
    memory: MemoryDefaults
    memory_changes: tuple[MemoryChange, ...] = ()
    memory_evidence: MemoryEvidence | None = None
    expert_padding: tuple[ExpertPadding, ...] = ()
    kv_cache: tuple[KvCacheRule, ...] = ()
    communication: CommunicationDefaults
    fusions: tuple[Fusion, ...] = ()
    kernels: KernelDefaults = KernelDefaults()
    sampler: SamplerDefaults = SamplerDefaults()
    evidence: Literal["serving", "prior"]
    source: str
    calibration: CalibrationReport | None = None

    def scheduler_for(self, context_limit: int, device: str, sheet: Datasheet) -> SchedulerDefaults:
        """The scheduler's settings for this context limit in tokens on this device, every one of them resolved."""
        changed: dict[str, object] = {"max_model_len": context_limit}
        for change in self.changes:
            if change.when.holds(context_limit, device, sheet):
                changed |= change.settings
        settled = self.scheduler.model_copy(update=changed)
        budget = settled.max_num_batched_tokens or context_limit
        return settled.model_copy(update={"max_num_batched_tokens": budget})

    def for_version(self, version: str) -> EngineProfile:
        """The profile with the memory terms of a version that it answers for."""
        found = [change for change in self.memory_changes if any(begins(version, each) for each in change.versions)]
        terms = {key: value for change in found for key, value in change.terms.items()}
        return self.model_copy(update={"memory": self.memory.model_copy(update=terms)}) if terms else self

    def padding_factor(self, dtype: str, sheet: Datasheet, *, hidden: int, inter: int) -> float:
        """Bytes of experts as loaded over bytes as published, for a hidden size and the width of one on a rank."""
        for rule in self.expert_padding:
            if rule.dtype == dtype and (rule.device_computes is None or rule.device_computes in sheet.flops_per_s):
                return rule.factor(hidden, inter)
        return 1.0

    def with_token_budget(self, tokens: int) -> EngineProfile:
        """The same engine with this token budget, whatever the circumstances."""
        scheduler = {"max_num_batched_tokens": tokens, "token_budget_rule": None}
        changes = [change.model_copy(update={"max_num_batched_tokens": None}) for change in self.changes]
        return self.model_copy(
            update={"scheduler": self.scheduler.model_copy(update=scheduler), "changes": tuple(changes)}
        )

    def expert_choice_s(self, sheet: Datasheet) -> float:
        """Seconds that a layer of experts takes on this device beyond the measured kernel."""
        return 0.0 if self.kernels.own_experts_on in sheet.flops_per_s else self.host.expert_choice_s

    def kv_dtype_for(self, weights: Iterable[str], sheet: Datasheet) -> str:
        """KV dtype of a checkpoint with weights of these dtypes, where nobody asks for another."""
        for rule in self.kv_cache:
            computes = rule.device_computes is None or rule.device_computes in sheet.flops_per_s
            if computes and not set(rule.weights).isdisjoint(weights):
                return rule.dtype
        return "bf16"
