"""Which attention is fitted for which device: KV dtypes and head sizes by the kernels that its tables hold.

FlashAttention 3 on Hopper, FlashInfer with TensorRT-LLM's kernels on Blackwell, FlashAttention 2 elsewhere with
FlashInfer for fp8 caches. Head sizes that are not listed follow the nearest one. Tables of TensorRT-LLM that claim
more than the bandwidth of the memory (``b200_sxm/generation_attention__power_trtllm``) are not read at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from apexsim.fitting import history
from apexsim.fitting.attention import Heads, decode_problem, decodes_inside, layer_problems, prefill_problem
from apexsim.fitting.facts import LAYERS_ONLY, Facts, hardware, tables_of
from apexsim.fitting.mixed import OWN, SINGLE_LAUNCH, attention_rows
from apexsim.fitting.problems import Problem

# fp8 caches of heads of 256 are rare and follow those of 128.
HEAD_DIMS = {"bf16": (64, 128, 256), "fp8": (64, 128)}
# The judged one carries the error of the form on chunks behind a history, found on another device.
JUDGED = ("bf16", 128)


def problems(device: Facts, kernels: Path) -> Iterator[Problem]:
    """Prefill and decode attention of a device, from its own tables or those of its nearest kin."""
    folder, evidence = tables_of(device)
    tables = kernels / "datacenter" / folder
    skip, check = history.causal_skip(kernels)
    a100 = folder == "a100_sxm"
    for kv_dtype in ("bf16",) if a100 else ("bf16", "fp8"):
        hw = hardware(folder, kv_dtype)
        for head_dim in (128,) if a100 else HEAD_DIMS[kv_dtype]:
            if device.folder in LAYERS_ONLY and (kv_dtype, head_dim) == JUDGED:
                yield from _of_layers(device, kernels)
                continue
            heads = Heads(kv_dtype, head_dim, hw)
            prompts = prefill_problem(tables / "context_attention.parquet", heads, skip)
            checks = {"chunk_with_history_on_rtx_pro_6000": check} if (kv_dtype, head_dim) == JUDGED else {}
            yield replace(prompts, checks=checks, evidence=evidence)
            decodes = decode_problem(tables / "generation_attention.parquet", heads)
            if device.folder in OWN and (kv_dtype, head_dim) == JUDGED:
                timed = SINGLE_LAUNCH[device.folder]
                rows = attention_rows(kernels / "vllm_layers", timed)
                decodes = decodes_inside(decodes, rows, heads, f"vllm_layers/{timed.folder} (vLLM 0.19)")
            yield replace(decodes, evidence=evidence)


def _of_layers(device: Facts, kernels: Path) -> Iterator[Problem]:
    """The judged kind of attention from timed layers."""
    timed = SINGLE_LAUNCH[device.folder]
    rows = attention_rows(kernels / "vllm_layers", timed)
    yield from layer_problems(
        rows, Heads(*JUDGED, timed.hw), f"vllm_layers/{timed.folder} (vLLM 0.19), FlashAttention 2"
    )
