"""Words of other tools: what they are called here, or which word would do where none means just the same.

They are what vLLM, SGLang and TensorRT-LLM call dtypes, and their own flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from apexsim.errors import BadInput
from apexsim.specs.base import Holds
from apexsim.specs.engine import EngineProfile
from apexsim.units import DTYPE_BYTES

_SAME_DTYPE = {
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
    "fp8_e4m3": "fp8",
    "float8_e4m3fn": "fp8",
}
_HALF = "say bf16: it takes the same bytes and time"
# Words that say how weights were quantised, and the dtypes that they may mean. In names of checkpoints, those that are
# dtypes here too.
QUANTISED = {
    "fp8": "fp8, or fp8_block where scales are those of blocks",
    "awq": "int4_wo",
    "awq_marlin": "int4_wo",
    "gptq": "int4_wo (int8_wo for 8 bits)",
    "gptq_marlin": "int4_wo (int8_wo for 8 bits)",
    "int4": "int4_wo",
    "w4a16": "int4_wo",
    "int8": "int8_wo, or int8 where activations are of 8 bits too",
    "w8a16": "int8_wo",
    "w8a8": "int8 for integers of 8 bits, fp8 for floats",
    "nvfp4": "nvfp4",
    "fp4": "nvfp4 or mxfp4",
    "mxfp4": "mxfp4",
}
_NEAR_DTYPE = {
    **{word: f"say {dtypes}" for word, dtypes in QUANTISED.items() if word not in DTYPE_BYTES},
    "float16": _HALF,
    "fp16": _HALF,
    "half": _HALF,
    "fp8_e5m2": "say fp8: it takes the same bytes and time",
}


def dtype_word(word: Any) -> Any:
    """The name here of a dtype; None for ``auto``. ``ValueError`` says which one would do where none is the same.

    What nobody knows comes back as it is.
    """
    if not isinstance(word, str) or word in DTYPE_BYTES:
        return word
    lowered = word.strip().lower()
    if lowered in _NEAR_DTYPE:
        raise ValueError(_NEAR_DTYPE[lowered])
    if lowered == "auto":
        return None
    return _SAME_DTYPE.get(lowered, lowered if lowered in DTYPE_BYTES else word)


# A dtype in a file or a flag; None is the default's.
Dtype = Annotated[str | None, BeforeValidator(dtype_word)]


# Flags of engines that are engine options by another name.
_SAME_OPTION = {
    "enable_chunked_prefill": "chunked_prefill",
    "enable_prefix_caching": "prefix_caching",
    "long_prefill_token_threshold": "max_chunk_tokens",
    "num_gpu_blocks_override": "kv_blocks",
    "max_running_requests": "max_num_seqs",
    "max_batch_size": "max_num_seqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "max_num_tokens": "max_num_batched_tokens",
    "context_length": "max_model_len",
    "max_seq_len": "max_model_len",
    "page_size": "block_size",
    "tokens_per_block": "block_size",
    "scheduler_recv_interval": "receive_interval",
}
# Switches of engines: the options that they set when true, and when false.
_SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "enforce_eager": ({"cuda_graphs": False}, {"cuda_graphs": True}),
    "disable_cuda_graph": ({"cuda_graphs": False}, {"cuda_graphs": True}),
    "disable_custom_all_reduce": ({"custom_all_reduce": False}, {"custom_all_reduce": True}),
    "disable_radix_cache": ({"prefix_caching": False}, {"prefix_caching": True}),
    "async_scheduling": ({"lookahead_steps": 1, "overlapped": True}, {"lookahead_steps": 0, "overlapped": False}),
}
# Flags of engines that are no engine options here.
_RANKS = "--replicas, or --attention-data for ranks that share experts"
FLAGS = {
    "tensor_parallel_size": "--tensor",
    "tp_size": "--tensor",
    "tp": "--tensor",
    "pipeline_parallel_size": "--pipeline",
    "pp_size": "--pipeline",
    "pp": "--pipeline",
    "data_parallel_size": _RANKS,
    "dp_size": _RANKS,
    "dp": _RANKS,
    "enable_dp_attention": "--attention-data",
    "expert_parallel_size": "--expert",
    "ep_size": "--expert",
    "ep": "--expert",
    "enable_expert_parallel": "--expert",
    "quantization": "--weights",
    "dtype": "--weights",
    "kv_cache_dtype": "--kv-cache",
    "mem_fraction_static": "--engine-option gpu_memory_utilization",
}


def option_words(options: Any) -> Any:
    """Engine options by their names here; what is no mapping comes back as it is.

    ``ValueError`` where one is said twice, or is another flag's business.
    """
    if not isinstance(options, Mapping):
        return options
    found: dict[str, Any] = {}
    for word, value in options.items():
        name = str(word).strip().lstrip("-").replace("-", "_")
        if name in FLAGS:
            raise ValueError(f"for {word} say {FLAGS[name]}")
        if name in _SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{word} is true or false")
        if name == "policy":
            code_name(value)
        given = _SWITCHES[name][not value] if name in _SWITCHES else {_SAME_OPTION.get(name, name): value}
        if twice := found.keys() & given.keys():
            raise ValueError(f"{min(twice)} is given twice")
        found |= given
    return found


def code_name(value: Any) -> Any:
    """The name of a policy or router as it is; ``ValueError`` for a class or an object of one, with its name."""
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ == "builtins":
        return value
    raise ValueError(f"give 'module:Name', here '{kind.__module__}:{kind.__qualname__}'")


# The name of a router in a file or a flag.
CodeName = Annotated[str, BeforeValidator(code_name)]

# Parts of an engine profile whose fields are engine options; no two of them share a field name.
OPTION_SECTIONS = ("scheduler", "memory", "communication", "host", "sampler", "kernels")


def engine_option_names() -> frozenset[str]:
    """Names of all engine options."""
    sections: list[Any] = [EngineProfile.model_fields[section].annotation for section in OPTION_SECTIONS]
    return frozenset(name for section in sections for name in section.model_fields)


EngineOption = bool | int | float | str | None
# Engine options in a file or a flag, by their names here or by those of engines' own flags.
EngineOptions = Annotated[dict[str, EngineOption], BeforeValidator(option_words), Holds(engine_option_names)]


def outweighing(written: Mapping[str, Any], chosen: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Engine options of a file with those ``chosen`` in their place, whatever words they are said in."""
    try:
        return {**option_words(written), **option_words(chosen)}
    except ValueError as error:
        raise BadInput(str(error), where=where, key="engine_options") from None
