"""Read a Hugging Face ``config.json`` as a ModelSpec.

A configuration is imported only when everything that sets a model's weights, KV cache and FLOPs is understood.
Anything else is refused by file and key: a spec that looks right and is wrong would be worse than none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput, Unsupported, nearest
from apexsim.specs.base import parse_spec
from apexsim.specs.model import LayerType, ModelSpec

# Keys that, when set, mean an attention we have no cost and no KV layout for.
_BLOCKERS = {
    "attention_chunk_size": "chunked local attention (windows that restart, not slide) is not modelled",
    "linear_num_value_heads": "linear attention layers (a fixed state in place of a KV cache) are not modelled",
    "attn_output_gate": "gated attention output is not modelled",
    "cross_attention_layers": "cross-attention layers are not modelled",
}


@dataclass(frozen=True)
class _Config:
    """A config.json, or the ``text_config`` inside one: every question names its key when the answer is missing."""

    where: str
    data: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise BadInput("is missing and has no default", where=self.where, key=self.prefix + key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BadInput("give a whole number", where=self.where, key=self.prefix + key, got=value)
        return value

    def listed(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise BadInput("give a list", where=self.where, key=self.prefix + key, got=value)
        return value

    def refuse(self, key: str, reason: str) -> Unsupported:
        return Unsupported(f"{self.where}: {self.prefix}{key}: {reason}")

    def demand(self, key: str, value: Any, reason: str) -> None:
        """Refuse a key that is set to anything but ``value``."""
        if self.get(key, value) != value:
            raise self.refuse(key, f"got {self.get(key)!r}; {reason}")


def import_model(path: str | os.PathLike[str], *, name: str | None = None) -> ModelSpec:
    """The spec of the model that a Hugging Face ``config.json`` describes; of a multi-modal one, its text model.

    ``name`` defaults to the file's name, or its folder's for a file called config.json. The spec carries no
    published parameter counts: a config has none. Raises BadInput for a file that is not such a config, Unsupported
    for a model that ModelSpec cannot express; both name the file and the key that stands in the way.
    """
    outer = _Config(os.fspath(path), _read_json(path))
    text = outer.get("text_config")
    config = outer if text is None else _Config(outer.where, _mapping(outer, "text_config"), "text_config.")
    for key, reason in _BLOCKERS.items():
        if config.get(key):
            raise config.refuse(key, reason)
    family = _family(config)
    if config.get("kv_lora_rank") and family.read is not _deepseek:
        raise config.refuse("kv_lora_rank", "latent attention is known for the DeepSeek-V3 family only")
    fields = {"name": name or _name(Path(path)), "source": _source(outer, config), **_shared_fields(config)}
    fields["tied_embeddings"] = config.get("tie_word_embeddings", outer.get("tie_word_embeddings", family.tied))
    fields |= _window_fields(config, family.windows) | family.read(config)
    return parse_spec(ModelSpec, fields, outer.where)


def _read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=os.fspath(path)) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not valid JSON: {error}", where=os.fspath(path)) from None
    if not isinstance(data, dict):
        raise BadInput("give a JSON object: the config.json of a model", where=os.fspath(path))
    return data


def _mapping(config: _Config, key: str) -> Mapping[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise BadInput("give a JSON object", where=config.where, key=config.prefix + key, got=value)
    return value


def _name(path: Path) -> str:
    stem = path.resolve().parent.name if path.stem == "config" else path.stem
    return stem.lower()


def _source(outer: _Config, config: _Config) -> str:
    """Where the spec comes from, and what of the checkpoint it leaves out."""
    notes = [f"imported from {Path(outer.where).name} (model_type {outer.get('model_type')})"]
    if config is not outer:
        notes.append("only the text model is imported")
    method = _mapping(config, "quantization_config").get("quant_method")
    if method not in (None, "mxfp4"):
        notes.append(f"published quantised with {method}: set the weight dtype in the deployment")
    if config.get("use_mtp") or config.get("num_nextn_predict_layers"):
        notes.append("multi-token prediction layers are left out")
    return "; ".join(notes)


def _shared_fields(config: _Config) -> dict[str, Any]:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    return {
        "layers": config.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.whole("num_key_value_heads", heads),
        "head_dim": config.whole("head_dim", hidden // max(1, heads)),
        "vocab": config.whole("vocab_size"),
        "max_context": config.whole("max_position_embeddings"),
    }


# Sliding windows: which layers slide where no ``layer_types`` says so, by family


def _no_window(config: _Config) -> list[bool]:
    if config.get("sliding_window"):
        raise config.refuse("sliding_window", f"unknown for model_type {config.get('model_type')}")
    return [False] * config.whole("num_hidden_layers")


def _every_layer(config: _Config) -> list[bool]:
    return [bool(config.get("sliding_window"))] * config.whole("num_hidden_layers")


def _late_layers(config: _Config) -> list[bool]:
    layers = config.whole("num_hidden_layers")
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return [False] * layers
    return [layer >= config.whole("max_window_layers") for layer in range(layers)]


def _every_other(config: _Config) -> list[bool]:
    return [layer % 2 == 0 for layer in range(config.whole("num_hidden_layers"))]


def _window_fields(config: _Config, default: Callable[[_Config], list[bool]]) -> dict[str, Any]:
    types = config.listed("layer_types")
    if types is None:
        slides = default(config)
    else:
        known = {"sliding_attention": True, "full_attention": False}
        strange = [kind for kind in types if str(kind) not in known]
        if strange:
            raise config.refuse("layer_types", f"{strange[0]} layers are not modelled")
        slides = [known[kind] for kind in types]
    if len(slides) != config.whole("num_hidden_layers"):
        raise BadInput("give one entry a layer", where=config.where, key=config.prefix + "layer_types", got=len(slides))
    if not any(slides):
        return {}
    return {"window": config.whole("sliding_window"), "layer_pattern": _shortest_pattern(slides)}


def _shortest_pattern(slides: list[bool]) -> tuple[LayerType, ...]:
    """The shortest run that, repeated over the layers, gives them all."""
    period = next(p for p in range(1, len(slides) + 1) if all(s == slides[i % p] for i, s in enumerate(slides)))
    return tuple("window" if slide else "full" for slide in slides[:period])


# Families: what differs from one model_type to the next


def _swiglu(config: _Config) -> None:
    config.demand("hidden_act", "silu", "only SwiGLU (silu) FFNs are known for this family")


def _llama(config: _Config) -> dict[str, Any]:
    _swiglu(config)
    bias = bool(config.get("attention_bias"))
    return {
        "ffn": config.whole("intermediate_size"),
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": bool(config.get("mlp_bias")),
    }


def _qwen2(config: _Config) -> dict[str, Any]:
    return _llama(config) | {"qkv_bias": True, "o_bias": False}


def _qwen3(config: _Config) -> dict[str, Any]:
    return _llama(config) | {"qk_norm": "head"}


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    config.demand("decoder_sparse_step", 1, "experts in every layer only")
    dense = config.listed("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise config.refuse("mlp_only_layers", f"got {dense!r}; dense layers must be the first ones")
    moe = {
        "experts": config.whole("num_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
        "dense_layers": len(dense),
    }
    fields = _qwen3(config) | {"moe": moe}
    return fields if dense else fields | {"ffn": None}


def _mixtral(config: _Config) -> dict[str, Any]:
    _swiglu(config)
    return {"moe": _local_experts(config)}


def _local_experts(config: _Config) -> dict[str, Any]:
    return {
        "experts": config.whole("num_local_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("intermediate_size"),
    }


def _gpt_oss(config: _Config) -> dict[str, Any]:
    _swiglu(config)
    bias = bool(config.get("attention_bias", True))
    method = _mapping(config, "quantization_config").get("quant_method")
    experts = {"router_bias": True, "routing": "power_law_1.2", "dtype": "mxfp4" if method == "mxfp4" else None}
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": True,
        "attention_sinks": True,
        "moe": _local_experts(config) | experts,
    }


def _minimax_m2(config: _Config) -> dict[str, Any]:
    _swiglu(config)
    config.demand("shared_intermediate_size", 0, "shared experts are unknown for this family")
    config.demand("qk_norm_type", "per_layer", "only per_layer QK norm is known for this family")
    return {
        "qk_norm": "layer" if config.get("use_qk_norm") else None,
        "moe": _local_experts(config) | {"router_bias": bool(config.get("use_routing_bias"))},
    }


def _deepseek(config: _Config) -> dict[str, Any]:
    """DeepSeek-V3 and its kin (Kimi-K2, GLM-5): latent attention, the first layers dense, experts in all others."""
    _swiglu(config)
    config.demand("attention_bias", False, "biases in latent attention are not modelled")
    config.demand("moe_layer_freq", 1, "experts in every layer after the dense ones only")
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla: dict[str, Any] = {size: config.whole(size) for size in sizes}
    if config.get("index_topk"):
        scorer = {"heads": "index_n_heads", "head_dim": "index_head_dim", "top_k": "index_topk"}
        mla["indexer"] = {name: config.whole(key) for name, key in scorer.items()}
    shared, width = config.whole("n_shared_experts", 0), config.whole("moe_intermediate_size")
    moe = {
        "experts": config.whole("n_routed_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": width,
        "shared_experts": shared,
        "shared_ffn": width if shared else None,
        "dense_layers": config.whole("first_k_dense_replace", 0),
        "router_bias": config.get("topk_method") == "noaux_tc",
    }
    ffn = config.whole("intermediate_size") if moe["dense_layers"] else None
    query = mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"]
    return {"ffn": ffn, "kv_heads": 1, "head_dim": query, "mla": mla, "moe": moe}


def _opt(config: _Config) -> dict[str, Any]:
    hidden, bias = config.whole("hidden_size"), bool(config.get("enable_bias", True))
    config.demand("activation_function", "relu", "OPT is known with relu only")
    config.demand("do_layer_norm_before", True, "norms after each block are not modelled")
    config.demand("word_embed_proj_dim", hidden, "embeddings narrower than the hidden size are not modelled")
    biases = {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bias}
    ffn = {"ffn": config.whole("ffn_dim"), "gated": False}
    return {**biases, **ffn, "norm": "layer", "positions": "learned"}


@dataclass(frozen=True)
class _Family:
    """``tied`` is what a config that does not mention ``tie_word_embeddings`` means."""

    read: Callable[[_Config], dict[str, Any]]
    windows: Callable[[_Config], list[bool]] = _no_window
    tied: bool = False


_FAMILIES = {
    "llama": _Family(_llama),
    "mistral": _Family(_llama, _every_layer),
    "mixtral": _Family(_mixtral, _every_layer),
    "qwen2": _Family(_qwen2, _late_layers),
    "qwen3": _Family(_qwen3, _late_layers),
    "qwen3_moe": _Family(_qwen3_moe, _late_layers),
    "qwen3_vl_text": _Family(_qwen3),
    "qwen3_vl_moe_text": _Family(_qwen3_moe),
    "gpt_oss": _Family(_gpt_oss, _every_other),
    "minimax_m2": _Family(_minimax_m2),
    "opt": _Family(_opt, tied=True),
    "deepseek_v3": _Family(_deepseek),
    "deepseek_v32": _Family(_deepseek),
    "kimi_k2": _Family(_deepseek),
    "glm_moe_dsa": _Family(_deepseek),
}


def _family(config: _Config) -> _Family:
    kind = str(config.get("model_type", ""))
    if not kind:
        raise BadInput(
            "is missing; is this a model's config.json?", where=config.where, key=config.prefix + "model_type"
        )
    if kind not in _FAMILIES:
        raise config.refuse("model_type", f"{kind} is not modelled; {nearest(kind, _FAMILIES)}")
    return _FAMILIES[kind]
