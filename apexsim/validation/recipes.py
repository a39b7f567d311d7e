"""What the published launch scripts of a benchmark set and the rows of its results do not say.

The facts are those of the scripts, not fits: InferenceX keeps them in ``benchmarks/`` of
github.com/SemiAnalysisAI/InferenceX (read in revisions of 2025 and 2026; they change over time). What a row states
itself outweighs them, and what neither says is the engine's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apexsim.specs.engine import token_budget
from apexsim.validation.runs import RunRow

_INFERENCEX, _NVIDIA = "inferencex", "nvidia"


@dataclass(frozen=True)
class Recipe:
    """How an engine was launched for models and devices whose names begin so. ``weights`` of None are any.

    ``kv_dtype`` and ``options`` are as in a deployment.
    """

    engine: str
    model: str = ""
    device: str = ""
    weights: str | None = None
    kv_dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def serves(self, row: RunRow) -> bool:
        """Whether a run was launched so."""
        alike = row.model.startswith(self.model) and row.device.startswith(self.device)
        return row.engine == self.engine and alike and self.weights in (None, row.weight_dtype)


# The first that serves a run counts. What NVIDIA published of SGLang and vLLM for these models are runs of InferenceX.
RECIPES = (
    Recipe("sglang", "deepseek-", "b", "nvfp4", "fp8", {"max_num_batched_tokens": 16_384}),
    Recipe("sglang", "deepseek-", "b", None, "fp8", {"max_num_batched_tokens": 32_768}),
    Recipe("sglang", "deepseek-", "h", None, None, {"max_num_batched_tokens": 32_768}),
    Recipe("sglang", "qwen3.5-", "b", "fp8", "fp8", {"max_num_batched_tokens": 32_768}),
    Recipe("trtllm", "deepseek-", kv_dtype="fp8"),
    Recipe("trtllm", "gpt-oss-", "h", None, "bf16", {"max_num_batched_tokens": 20_000}),
    Recipe("trtllm", "gpt-oss-", "", None, "fp8", {"max_num_batched_tokens": 20_000}),
    Recipe("trtllm", kv_dtype="fp8", options={"token_budget_rule": "one_prompt"}),
    Recipe("vllm", "minimax-", "b", None, "bf16", {"gpu_memory_utilization": 0.95, "block_size": 32}),
    Recipe("vllm", "minimax-", "h", None, "bf16", {"max_num_seqs": 256}),
)

# TensorRT-LLM holds prompts back until its token budget is nearly full, or so many steps have passed
# (batch_wait_timeout_iters), in these runs of Llama-70B: told here as tokens that a client sees so many steps late.
_WAITED_STEPS = 20
# SGLang's scheduler_recv_interval on Blackwell: below and from 16 clients on.
_RECEIVED = (10, 30)
# Least token budget of TensorRT-LLM for DeepSeek-R1.
_LEAST_BUDGET = 8192


def launched(row: RunRow) -> tuple[dict[str, Any], str | None]:
    """Engine options and KV dtype (None: not said) with which the benchmark behind a row launches its engine."""
    if row.engine == "trtllm" and row.source.startswith(_NVIDIA):
        return {"token_budget_rule": "two_prompts"}, None
    recipe = next((recipe for recipe in RECIPES if recipe.serves(row)), None)
    if recipe is None or not row.source.startswith((_INFERENCEX, _NVIDIA)):
        return {}, None
    return {**recipe.options, **_of_load(row)}, recipe.kv_dtype


def _of_load(row: RunRow) -> dict[str, Any]:
    """Options of InferenceX that follow from prompts and concurrency."""
    if row.engine == "sglang":
        return {"receive_interval": _RECEIVED[(row.concurrency or 1) >= 16]} if row.device.startswith("b") else {}
    if row.engine != "trtllm" or not (row.prompt_tokens and row.output_tokens and row.concurrency):
        return {}
    if row.model.startswith("deepseek-"):
        budget = token_budget("one_prompt", prompt_tokens=row.prompt_tokens, sequences=row.concurrency)
        return {"max_num_batched_tokens": max(_LEAST_BUDGET, budget)}
    short = (row.prompt_tokens, row.output_tokens) == (1024, 1024) and (row.tensor or 1) < 8
    return {"stream_interval": _WAITED_STEPS} if row.model.startswith("llama-") and short else {}
