"""In which dtype a checkpoint was published, as its ``quantization_config`` or ``hf_quant_config.json`` says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput
from apexsim.io.hf_json import Config, read_json
from apexsim.io.hf_modules import Kept, Pattern, kept_parts, parts_of
from apexsim.specs.checkpoint import Checkpoint
from apexsim.specs.model import ModelSpec

# What ModelOpt calls its algorithms.
_MODELOPT = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "FP8_PB_WO": "fp8_block",
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "MXFP4": "mxfp4",
    "W4A16_AWQ": "int4_wo",
    "INT4_AWQ": "int4_wo",
    "W4A16": "int4_wo",
    "W8A16": "int8_wo",
    "INT8_SQ": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
}
# Quark's element types by whether a block of elements shares a scale; "float 4" is read with its groups.
_QUARK = {("fp8_e4m3", False): "fp8", ("fp4", True): "float 4", ("int4", True): "int4_wo", ("int8", False): "int8"}
# Floats of 4 bits by how many of them share a scale.
_FLOAT_4 = {16: "nvfp4", 32: "mxfp4"}
# Elements that share a scale, as the bytes of a dtype count them (units.py).
_COUNTED = {"int4_wo": "128", "int8_wo": "whole channels"}
_WOULD_DO = "take it out to import the shape alone, and give weights in the deployment"


def checkpoint_of(outer: Config, config: Config, spec: ModelSpec) -> Checkpoint | None:
    """What the weights were published in; None where nothing says that they are quantised.

    ``spec`` is the model that the config describes: which modules it has is what lists of modules are held against.
    Raises Unsupported, with the file and key, for a method whose dtype is not known.
    """
    quant = _described(outer, config)
    if quant is None:
        return None
    method = _method(quant)
    reader = _READERS.get(method.removesuffix("_marlin"))
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise quant.refuse("quant_method", f"got {method!r}; known: {known}; or {_WOULD_DO}")
    dtype = reader(quant)
    kept, partly = kept_parts(spec, _left_alone(quant))
    if method == "mxfp4" and spec.moe:  # it quantises experts alone, whatever the list says
        kept |= {"mixer": "all", "ffn": "all", "shared": "all"}
    return _as_spec(spec, dtype, (kept, partly), quant)


def _described(outer: Config, config: Config) -> Config | None:
    """The mapping that describes how a checkpoint is quantised, in the config or in the file beside it."""
    for each in (outer, config):
        for key in ("quantization_config", "compression_config"):
            if mapping := each.mapping(key):
                return Config(each.where, mapping, f"{each.prefix}{key}.")
    beside = Path(outer.where).parent / "hf_quant_config.json"
    if not beside.is_file():
        return None
    data = read_json(beside)
    whole = Config(str(beside), data)
    mapping = {**whole.mapping("quantization")}
    producer = whole.mapping("producer").get("name", "modelopt")
    if not mapping.get("quant_algo"):
        return None
    return Config(str(beside), {"quant_method": producer, **mapping}, "quantization.")


def _method(quant: Config) -> str:
    """What the checkpoint calls its quantisation; ModelOpt's configs may name the algorithm alone."""
    method = quant.get("quant_method", "modelopt" if quant.get("quant_algo") else None)
    if method is None:
        raise quant.refuse("quant_method", f"is missing; give it, or {_WOULD_DO}")
    return str(method)


def _as_spec(spec: ModelSpec, dtype: str, held: tuple[Kept, list[str]], quant: Config) -> Checkpoint | None:
    """The checkpoint in the fewest words: experts apart where all else is kept, nothing where everything is."""
    kept, partly = held
    parts = {part for kind in spec.layer_kinds for part in parts_of(spec, kind)}
    rest = {part for part in parts if kept.get(part) != "all"}
    if not rest:
        return None
    kept = {part: layers for part, layers in kept.items() if part in parts}
    fields: dict[str, Any] = {"method": _method(quant), "notes": tuple(_notes(quant, dtype, partly))}
    if rest == {"experts"}:
        kept = {part: layers for part, layers in kept.items() if part == "experts"}
        return Checkpoint(dtype="bf16", experts=dtype, kept=kept, **fields)
    return Checkpoint(dtype=dtype, kept=kept, **fields)


def _notes(quant: Config, dtype: str, partly: list[str]) -> list[str]:
    """What of the checkpoint's description is not taken into account."""
    notes = [f"modules of its {what} are bf16, counted as {dtype}" for what in partly]
    counted = _COUNTED.get(dtype)
    others = [size for size in sorted(_group_sizes(quant)) if counted and size > 0 and str(size) != counted]
    notes += [f"its scales hold for groups of {size}, counted as {counted}" for size in others]
    if any(quant.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config")):
        notes.append("its scales of a quantised KV cache are used only where kv_cache is set")
    return notes


def _group_sizes(quant: Config) -> set[int]:
    """How many elements share a scale, wherever it is said."""
    groups = [_inside(group, "weights") for group in quant.mapping("config_groups").values()]
    quark = _inside(quant.mapping("global_quant_config"), "weight")
    said = [quant.get("group_size"), *(each.get("group_size") for each in (*groups, quark))]
    return {size for size in said if isinstance(size, int)}


def _left_alone(quant: Config) -> list[Pattern]:
    """Names and patterns of modules that are not quantised, under any of the keys that list them."""
    listed: list[Pattern] = []
    for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude"):
        listed += [_pattern(quant, key, name) for name in quant.listed(key) or []]
    # GPTQModel: rules by regular expression, of which -: leaves modules out.
    rules = [rule for rule in quant.mapping("dynamic") if rule.startswith("-:")]
    return listed + [_pattern(quant, "dynamic", "re:" + rule[2:]) for rule in rules]


def _pattern(quant: Config, key: str, name: Any) -> Pattern:
    """A listed name, or the regular expression after ``re:``."""
    place: dict[str, Any] = {"where": quant.where, "key": quant.prefix + key, "got": name}
    if not isinstance(name, str):
        raise BadInput("give names of modules", **place)
    try:
        return re.compile(name[3:]) if name.startswith("re:") else name
    except re.error as error:
        raise BadInput(f"not a regular expression: {error}", **place) from None


def _inside(value: Any, key: str) -> dict[str, Any]:
    inside = value.get(key) if isinstance(value, dict) else None
    return inside if isinstance(inside, dict) else {}


def _fp8(quant: Config) -> str:
    """Scales of a tensor or of a block."""
    return "fp8_block" if quant.get("weight_block_size") else "fp8"


def _by_bits(quant: Config) -> str:
    """Integers with scales of groups, activations left alone."""
    bits = quant.get("bits", quant.get("w_bit", quant.get("weight_bits")))
    quant.demand("data_type", "int", f"integers are known; {_WOULD_DO}")
    if bits is None:
        raise quant.refuse("bits", f"is missing; give 4 or 8, or {_WOULD_DO}")
    if any(not rule.startswith("-:") for rule in quant.mapping("dynamic")):
        raise quant.refuse("dynamic", f"other bits for some modules are not modelled; {_WOULD_DO}")
    if bits not in (4, 8):
        raise quant.refuse("bits", f"got {bits!r}; weights of 4 and 8 bits are known; {_WOULD_DO}")
    return "int4_wo" if bits == 4 else "int8_wo"


def _compressed(quant: Config) -> str:
    """compressed-tensors: the scheme of the groups of modules, which must be one."""
    found = {_scheme(quant, name, group) for name, group in quant.mapping("config_groups").items()}
    if len(found) != 1:
        said = ", ".join(sorted(found)) or "none"
        raise quant.refuse("config_groups", f"got schemes {said}; checkpoints of one scheme are known; {_WOULD_DO}")
    return found.pop()


def _scheme(quant: Config, name: str, group: Any) -> str:
    """Dtype of one group: its weights, and whether activations are quantised too."""
    weights, inputs = _inside(group, "weights"), _inside(group, "input_activations")
    bits, kind, blocks = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    known = {
        ("float", 8, True): "fp8_block" if blocks == "block" else "fp8",
        ("float", 4, True): "float 4",
        ("float", 4, False): "float 4",
        ("int", 8, True): "int8",
        ("int", 8, False): "int8_wo",
        ("int", 4, False): "int4_wo",
    }
    key: Any = (str(kind), bits if isinstance(bits, int) else None, bool(inputs))
    if key not in known:
        with_inputs = f" with activations of {inputs.get('num_bits')} bits" if inputs else " with bf16 activations"
        reason = f"weights of {kind} {bits}{with_inputs} are not known; {_WOULD_DO}"
        raise quant.refuse(f"config_groups.{name}", reason)
    return _by_groups(quant, f"config_groups.{name}.weights", known[key], weights.get("group_size"))


def _by_groups(quant: Config, key: str, dtype: str, size: Any) -> str:
    """``dtype``, where it is a float of 4 bits by how many of them share a scale."""
    if dtype != "float 4":
        return dtype
    if not isinstance(size, int) or size not in _FLOAT_4:
        reason = f"got {size!r}; floats of 4 bits are known in groups of 16 and 32; {_WOULD_DO}"
        raise quant.refuse(f"{key}.group_size", reason)
    return _FLOAT_4[size]


def _modelopt(quant: Config) -> str:
    """ModelOpt: one algorithm for all that it quantises."""
    algorithm = str(quant.get("quant_algo")).upper()
    if algorithm not in _MODELOPT:
        raise quant.refuse("quant_algo", f"got {algorithm!r}; known: {', '.join(sorted(_MODELOPT))}; {_WOULD_DO}")
    dtype, size = _MODELOPT[algorithm], quant.get("group_size")
    own = [known for known, each in _FLOAT_4.items() if each == dtype]
    if own and size not in [None, *own]:
        raise quant.refuse("group_size", f"got {size!r}; another than that of {dtype} is not known; {_WOULD_DO}")
    return dtype


def _quark(quant: Config) -> str:
    """Quark: the scheme of all modules; others for some of them are not modelled."""
    if quant.mapping("layer_quant_config") or quant.mapping("layer_type_quant_config"):
        raise quant.refuse("layer_quant_config", f"other schemes for some modules are not modelled; {_WOULD_DO}")
    weights = _inside(quant.mapping("global_quant_config"), "weight")
    key = (str(weights.get("dtype")), weights.get("qscheme") == "per_group")
    if key not in _QUARK:
        reason = f"weights of {key[0]} by {weights.get('qscheme')} are not known; {_WOULD_DO}"
        raise quant.refuse("global_quant_config.weight", reason)
    return _by_groups(quant, "global_quant_config.weight", _QUARK[key], weights.get("group_size"))


_READERS: dict[str, Callable[[Config], str]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda quant: "fp8",
    "w8a8_fp8": lambda quant: "fp8",
    "w8a8": lambda quant: "int8",
    "w8a8_int8": lambda quant: "int8",
    "awq": _by_bits,
    "gptq": _by_bits,
    "auto-round": _by_bits,
    "mxfp4": lambda quant: "mxfp4",
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "quark": _quark,
}
