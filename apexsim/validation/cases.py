"""A measured run as something to simulate: the one place where a row becomes a deployment.

What a row does not say takes the default of the engine profile that answers for its version, and is listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from apexsim import catalog
from apexsim.errors import BadInput, InfeasiblePlan
from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.specs.base import parse_spec
from apexsim.specs.deployment import Deployment
from apexsim.validation.asked import prompts_of, sampling_of
from apexsim.validation.recipes import Launch, launched
from apexsim.validation.runs import RunRow

_OPTION_COLUMNS = (
    "max_num_seqs", "max_num_batched_tokens", "chunked_prefill", "block_size", "kv_blocks", "gpu_memory_utilization",
)  # fmt: skip

_DEGREES = ("tensor", "pipeline", "attention_data", "expert", "replicas")

# Flags of servers that an engine option stands for: pattern -> options, given the match.
_FLAGS: dict[str, Callable[[re.Match[str]], dict[str, Any]]] = {
    r"--max-model-len (\d+)": lambda match: {"max_model_len": int(match[1])},
    r"--max-num-batched-tokens (\d+)": lambda match: {"max_num_batched_tokens": int(match[1])},
    r"--gpu-memory-utilization (0?\.\d+)": lambda match: {"gpu_memory_utilization": float(match[1])},
    r"--disable-custom-all-reduce": lambda _: {"custom_all_reduce": False},
    r"--(?:disable-cuda-graph|enforce-eager)": lambda _: {"cuda_graphs": False},
    r"--async-scheduling true": lambda _: {"lookahead_steps": 1, "overlapped": True},
}
# Flags that change nothing here, or that a column says already.
_SAID_ELSEWHERE = (
    r"--enable-expert-parallel true", r"--enable-ep-moe", r"--ep \d+", r"--dtype \S+", r"--kv-cache-dtype \S+",
    r"--quantization fp8 \(online dynamic W8A8\)", r"--data-parallel-size \d+", r"--enable-metrics",
    r"--tokenizer_mode \S+",
)  # fmt: skip

# Models whose own "fp8" checkpoint is scaled by blocks of 128 x 128 (quantization_config of its config.json, or the
# model card, on Hugging Face). TensorRT-LLM quantises by itself, one scale a tensor.
_BLOCK_SCALED = ("deepseek-", "minimax-", "qwen3-")
# Models of whose weights the NVFP4 checkpoints quantise those of experts alone (model card on Hugging Face).
_NVFP4_EXPERTS = ("minimax-",)


@dataclass(frozen=True)
class Case:
    """What a run is simulated as. ``notes`` say what the row left open and what stood in for it."""

    deployment: Deployment
    notes: tuple[str, ...]


def case_of(row: RunRow, engine_options: Mapping[str, Any] = MappingProxyType({})) -> Case:
    """The deployment of a row; ``engine_options`` hold where the row says nothing.

    What it raises is the row's status, not a fault of its file. Whether files may name code, ``read_runs`` has asked.

    ``BadInput``: a model, device, engine or dtype that is not known. ``InfeasiblePlan``: a plan that cannot be laid
    out.
    """
    choice = catalog.engine_for(row.engine, row.engine_version)
    launch = launched(row)
    row, laid_out = _as_laid_out(row, launch)
    options, notes = _engine_options(row, launch)
    notes += laid_out
    notes += [f"{degree} not known: 1" for degree in _DEGREES if not getattr(row, degree)]
    weights, experts, taken = _dtypes(row)
    notes += taken
    choices: dict[str, Any] = {
        "model": row.model,
        "device": row.device,
        "engine": choice.name,
        "engine_options": {**engine_options, **options},
        **{degree: getattr(row, degree) or 1 for degree in _DEGREES},
        "weights": weights,
        "moe_weights": experts,
        "sampling": sampling_of(row),
        "prompts": prompts_of(row),
    }
    if choices["sampling"] != "greedy" and not row.sampling:
        notes.append("sampling not known: top_p, as the client of its benchmark asks for")
    if row.kv_dtype or launch.kv_dtype:
        choices["kv_cache"] = row.kv_dtype or launch.kv_dtype
    deployment = resolve_deployment(parse_spec(DeploymentFile, choices, "run"), "run", allow_plugins=True)
    if not row.kv_dtype:
        chosen = "as its benchmark launches it" if launch.kv_dtype else "the engine default"
        notes.append(f"kv_dtype not known: {chosen}, {deployment.kv_cache}")
    if deployment.model.moe and not row.prompts:
        notes.append(f"prompts not known: {deployment.prompts}")
    _check_plan(row, deployment)
    notes += [choice.note] * (not choice.mapped) + [note for pool in deployment.pools for note in pool.plan.assumptions]
    return Case(deployment, tuple(notes))


def version_known(row: RunRow) -> bool:
    """Whether an engine profile names the version of a run, rather than standing in for it."""
    try:
        return catalog.engine_for(row.engine, row.engine_version).mapped
    except BadInput:
        return False


def kind_of(name: str) -> str:
    """The class of a model by name or path; ``unknown`` where there is no such model."""
    known = name in catalog.names("model") or Path(name).is_file()
    return catalog.load("model", name).kind if known else "unknown"


def _check_plan(row: RunRow, deployment: Deployment) -> None:
    """Refuse what a plan cannot say, and degrees that cannot be laid out or contradict each other."""
    (pool,) = deployment.pools
    plan = pool.plan
    reasons = list(plan.lawful(deployment.model, deployment.cluster.group()))
    if plan.tensor > (node := deployment.cluster.devices_per_node):
        # Rows that say 16 and 64 multiplied their degrees: no measured run has tensor ranks on several nodes.
        reasons.append(f"tensor degree {plan.tensor} crosses nodes of {node} devices, which no measured run did")
    if deployment.model.moe and row.moe_tensor not in (None, plan.moe_tensor):
        ranks = f" x attention_data {plan.attention_data}" * (plan.attention_data > 1)
        degrees = f"tensor {plan.tensor}{ranks} and expert {plan.expert} give {plan.moe_tensor}"
        reasons.append(f"moe_tensor is {row.moe_tensor}; {degrees}")
    if reasons:
        raise InfeasiblePlan(reasons)


def _dtypes(row: RunRow) -> tuple[str, str | None, list[str]]:
    """Dtypes of the weights and of the experts (None: as the model has them), and what was assumed of them.

    A row whose weights are MXFP4 is a model with MXFP4 experts and bf16 elsewhere.
    """
    weights, experts = row.weight_dtype or "bf16", row.moe_dtype
    if row.weight_dtype is None:
        return weights, experts, [f"weight_dtype not known: {weights}"]
    if weights == "mxfp4":
        return "bf16", experts or "mxfp4", ["weight_dtype mxfp4: that of the experts alone, bf16 elsewhere"]
    if weights == "nvfp4" and row.model.startswith(_NVFP4_EXPERTS):
        return "bf16", experts or "nvfp4", ["weight_dtype nvfp4: that of the experts alone, as in the checkpoint"]
    if weights == "fp8" and row.engine != "trtllm" and row.model.startswith(_BLOCK_SCALED):
        return "fp8_block", experts, ["weight_dtype fp8: scaled by blocks, as the checkpoint of the model is"]
    return weights, experts, []


def _as_laid_out(row: RunRow, launch: Launch) -> tuple[RunRow, list[str]]:
    """A row with the degrees that its benchmark's script makes of it, and what changed."""
    if not launch.degrees:
        return row, []
    changes = [f"{name} {value} instead of {getattr(row, name) or 1}" for name, value in launch.degrees.items()]
    # What experts are cut into follows from the other degrees.
    laid_out = row.model_copy(update={**launch.degrees, "moe_tensor": None})
    return laid_out, [f"as its benchmark launches it: {', '.join(changes)}"]


def _engine_options(row: RunRow, launch: Launch) -> tuple[dict[str, Any], list[str]]:
    """Engine options of a row, and what was not understood: columns outweigh flags, and those its recipe."""
    options = dict(launch.options)
    left = re.sub(r"\s+#.*|^[\w>=.\s]*(\(docker [^)]*\))?;", "", row.flags)
    for pattern, read in _FLAGS.items():
        if match := re.search(pattern, left):
            options |= read(match)
            left = left.replace(match[0], "")
    for pattern in _SAID_ELSEWHERE:
        left = re.sub(pattern, "", left)
    options |= {name: getattr(row, name) for name in _OPTION_COLUMNS if getattr(row, name) is not None}
    if "max_num_batched_tokens" in options:
        options.pop("token_budget_rule", None)
    if row.max_num_seqs and row.attention_data not in (None, 1):
        # A row counts the sequences of the whole server; the flag behind it was given to every rank.
        options["max_num_seqs"] = -(-row.max_num_seqs // row.attention_data)
    unknown = " ".join(left.replace(";", " ").split())
    notes = [f"flags without effect here: {unknown}"] if unknown else []
    if used := [f"{key} {value}" for key, value in launch.options.items() if options.get(key) == value]:
        notes.append(f"as its benchmark launches it: {', '.join(used)}")
    if row.prefix_caching:
        notes.append("prefixes that requests share are not looked for")
    return options, notes
