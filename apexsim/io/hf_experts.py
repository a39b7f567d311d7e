"""Families of models with routed experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apexsim.errors import BadInput
from apexsim.io.hf_dense import hunyuan_dense, qwen2, qwen3, swiglu
from apexsim.io.hf_json import Config

# Routing exponent of routers that a bias balances (docs/validation.md); others have the default.
BALANCED_EXPONENT = 0.75
# Of DeepSeek's models: by score, by group and score, and with a bias that balances.
TOP_K_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def qwen2_moe(config: Config) -> dict[str, Any]:
    """Qwen2-MoE: shared experts behind a gate."""
    return experts_where_configured(config, qwen2(config), gated_shared_experts(config))


def gated_shared_experts(config: Config) -> dict[str, Any]:
    """Experts of Qwen2-MoE, Qwen3-Next and Qwen3.5."""
    return {
        "experts": config.whole("num_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
        "shared_experts": 1,
        "shared_ffn": config.whole("shared_expert_intermediate_size"),
        "shared_gate": True,
    }


def qwen3_moe(config: Config) -> dict[str, Any]:
    """Qwen3-MoE: Qwen3 with experts in its layers."""
    moe = {
        "experts": config.whole("num_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
    }
    return experts_where_configured(config, qwen3(config), moe)


def mixtral(config: Config) -> dict[str, Any]:
    """Mixtral: Llama with experts in every layer."""
    swiglu(config)
    return {"moe": local_experts(config)}


def local_experts(config: Config) -> dict[str, Any]:
    """Experts as wide as the FFN that they stand for."""
    return {
        "experts": config.whole("num_local_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("intermediate_size"),
    }


def gpt_oss(config: Config) -> dict[str, Any]:
    """gpt-oss: biases everywhere, attention sinks."""
    swiglu(config)
    bias = bool(config.get("attention_bias", True))
    method = config.mapping("quantization_config").get("quant_method")
    experts = {"router_bias": True, "dtype": "mxfp4" if method == "mxfp4" else None}
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": True,
        "attention_sinks": True,
        "moe": local_experts(config) | experts,
    }


def minimax_m2(config: Config) -> dict[str, Any]:
    """MiniMax-M2: queries and keys are normed over all heads of a layer at once."""
    swiglu(config)
    config.demand("shared_intermediate_size", 0, "shared experts are unknown for this family")
    config.demand("qk_norm_type", "per_layer", "only per_layer QK norm is known for this family")
    return {
        "qk_norm": "layer" if config.get("use_qk_norm") else None,
        "moe": local_experts(config) | balanced(bool(config.get("use_routing_bias"))),
    }


def balanced(by_bias: bool) -> dict[str, Any]:
    """What it means for a router that a bias added to its scores kept its experts balanced in training.

    The bias of gpt-oss's router is another thing: a part of its product, trained as all weights are.
    """
    return {"router_bias": True, "random_routing_exponent": BALANCED_EXPONENT} if by_bias else {"router_bias": False}


def _top_k_method(config: Config) -> str:
    """How the router picks experts; configurations of transformers' own classes leave out the one there is now."""
    method = config.get("topk_method", "noaux_tc")
    if method not in TOP_K_METHODS:
        raise config.refuse("topk_method", f"got {method!r}; known: {', '.join(TOP_K_METHODS)}")
    return str(method)


def deepseek(config: Config) -> dict[str, Any]:
    """DeepSeek and its kin (Kimi-K2, GLM-5): latent attention, the first layers dense, experts in all others."""
    swiglu(config)
    config.demand("attention_bias", False, "biases in latent attention are not modelled")
    config.demand("moe_layer_freq", 1, "experts in every layer after the dense ones only")
    config.demand("mlp_bias", False, "biases are not known for this family")
    mla = _latent(config)
    query = mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"]
    config.demand("qk_head_dim", query, "heads are known as qk_nope_head_dim + qk_rope_head_dim elements only")
    moe = _first_dense(config, by_bias=_top_k_method(config) == "noaux_tc")
    ffn = dense_width(config, needed=moe["dense_layers"] > 0)
    return {"ffn": ffn, "kv_heads": 1, "head_dim": query, "mla": mla, "moe": moe}


def _first_dense(config: Config, *, by_bias: bool) -> dict[str, Any]:
    """Routed and shared experts of one width behind a few dense layers: DeepSeek and GLM-4.5."""
    shared, width = config.whole("n_shared_experts", 0), config.whole("moe_intermediate_size")
    return {
        "experts": config.whole("n_routed_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": width,
        "shared_experts": shared,
        "shared_ffn": width if shared else None,
        "dense_layers": _dense_layers(config),
        **balanced(by_bias),
    }


def _dense_layers(config: Config) -> int:
    """How many layers, all of them the first ones, have a dense FFN: a number, or a word for each layer."""
    dense, types = config.whole("first_k_dense_replace", 0), config.listed("mlp_layer_types")
    if types is None:
        return dense
    dense = types.index("sparse") if "sparse" in types else len(types)
    layers = config.whole("num_hidden_layers")
    if types != ["dense"] * dense + ["sparse"] * (layers - dense):
        reason = f"got {len(types)} layers; known: dense ones first, then sparse ones, {layers} in all"
        raise config.refuse("mlp_layer_types", reason)
    return dense


def dense_width(config: Config, *, needed: bool, key: str = "intermediate_size") -> int | None:
    """Width of dense FFNs; what the key says is of no account where no layer has one."""
    config.seen.add(key)
    return config.whole(key) if needed else None


def _latent(config: Config) -> dict[str, Any]:
    """Latent attention; smaller models of the family project queries at once, without a rank between."""
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla: dict[str, Any] = {size: config.whole(size) for size in sizes}
    mla["q_lora_rank"] = config.whole("q_lora_rank") if config.get("q_lora_rank") is not None else None
    if config.get("index_topk"):
        scorer = {"heads": "index_n_heads", "head_dim": "index_head_dim", "top_k": "index_topk"}
        mla["indexer"] = {name: config.whole(key) for name, key in scorer.items()}
        mla["indexer"]["layers"] = _indexed_layers(config)
    return mla


def _indexed_layers(config: Config) -> list[int] | None:
    """Layers with an indexer of their own, counted from 0; None where all have one.

    Spelt a layer each, by one letter a layer, or by a distance after the first few (as transformers'
    ``GlmMoeDsaConfig`` reads them).
    """
    layers, types = config.whole("num_hidden_layers"), config.listed("indexer_types")
    pattern = config.get("index_topk_pattern")
    every, first = config.whole("index_topk_freq", 1), config.whole("index_skip_topk_offset", 2)
    key = "indexer_types" if types is not None else "index_topk_pattern"
    if types is None and pattern is not None:
        letters = {"F": "full", "S": "shared"}
        types = [letters.get(str(each), each) for each in pattern] if isinstance(pattern, str | list) else [pattern]
    if types is None:
        owners = [layer for layer in range(layers) if max(layer - first + 1, 0) % max(every, 1) == 0]
        return owners if len(owners) < layers else None
    if strange := [each for each in types if each not in ("full", "shared")]:
        raise config.refuse(key, f"got {strange[0]!r}; known: full, shared")
    if len(types) != layers:
        raise BadInput("give one entry a layer", where=config.where, key=config.prefix + key, got=len(types))
    owners = [layer for layer, kind in enumerate(types) if kind == "full"]
    return owners if len(owners) < layers else None


def experts_where_configured(config: Config, fields: dict[str, Any], moe: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Qwen model with experts: dense layers are the first ones, experts in every n-th of the others."""
    dense = config.listed("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise config.refuse("mlp_only_layers", f"got {dense!r}; dense layers must be the first ones")
    every = config.whole("decoder_sparse_step", 1)
    ffn = dense_width(config, needed=bool(dense) or every > 1)
    return fields | {"ffn": ffn, "moe": moe | {"dense_layers": len(dense), "every": every}}


def llama4(config: Config) -> dict[str, Any]:
    """Llama 4: attention in chunks, experts in every or every second layer."""
    swiglu(config)
    config.demand("attention_bias", False, "biases are not known for this family")
    every, width = config.whole("interleave_moe_layer_step", 1), config.whole("intermediate_size")
    moe = local_experts(config) | {"shared_experts": 1, "shared_ffn": width, "every": every}
    layers = range(config.whole("num_hidden_layers"))
    given = config.listed("moe_layers")
    if given and given != [layer for layer in layers if every and (layer + 1) % every == 0]:
        raise config.refuse(
            "moe_layers", "experts in other layers than every interleave_moe_layer_step-th are not modelled"
        )
    return {
        "ffn": dense_width(config, needed=every > 1, key="intermediate_size_mlp"),
        "qk_norm": "plain" if config.get("use_qk_norm", True) else None,
        "positions": "rope_windowed",
        "moe": moe,
    }


def phimoe(config: Config) -> dict[str, Any]:
    """Phi-3.5-MoE: LayerNorm, biases in attention and on the head."""
    swiglu(config)
    bias = bool(config.get("attention_bias"))
    biases = {"qkv_bias": bias, "o_bias": bias, "head_bias": bool(config.get("lm_head_bias"))}
    return {**biases, "norm": "layer", "moe": local_experts(config)}


def ernie_moe(config: Config) -> dict[str, Any]:
    """ERNIE 4.5: shared experts, the first layers dense, a router that a bias balances."""
    swiglu(config)
    config.demand("use_bias", False, "biases are not known for this family")
    layers, first = config.whole("num_hidden_layers"), config.whole("moe_layer_start_index", 1)
    if config.get("moe_layer_end_index", -1) not in (-1, layers - 1):
        raise config.refuse("moe_layer_end_index", "dense layers must be the first ones")
    shared, width = config.whole("moe_num_shared_experts", 0), config.whole("moe_intermediate_size")
    moe = {
        "experts": config.whole("moe_num_experts"),
        "active": config.whole("moe_k"),
        "ffn": width,
        "shared_experts": shared,
        "shared_ffn": width if shared else None,
        "dense_layers": first,
        "every": config.whole("moe_layer_interval", 1),
        **balanced(bool(config.get("moe_use_aux_free", True))),
    }
    return {"ffn": dense_width(config, needed=first > 0 or moe["every"] > 1), "moe": moe}


def hunyuan_moe(config: Config) -> dict[str, Any]:
    """Hunyuan-A13B: experts beside one shared FFN in every layer; sizes are given a layer each, all alike."""
    config.demand("use_mixed_mlp_moe", True, "this family is known with a shared FFN only")
    config.demand("moe_layer_num_skipped", 0, "dense layers are not known for this family")
    fields = hunyuan_dense(config) | {"ffn": None}
    width = _alike(config, "moe_intermediate_size", config.whole("intermediate_size"))
    shared = _alike(config, "num_shared_expert", 1)
    moe = {
        "experts": _alike(config, "num_experts"),
        "active": _alike(config, "moe_topk"),
        "ffn": width,
        "shared_experts": shared,
        "shared_ffn": config.whole("intermediate_size") if shared else None,
    }
    return fields | {"moe": moe}


def _alike(config: Config, key: str, default: int | None = None) -> int:
    """A whole number, or a list of one a layer that are all the same."""
    value = config.get(key)
    if isinstance(value, list) and value:
        if any(each != value[0] for each in value):
            raise config.refuse(key, "layers of unlike experts are not modelled")
        config = replace(config, data={**config.data, key: value[0]})
    return config.whole(key, default)


def glm4_moe(config: Config) -> dict[str, Any]:
    """GLM-4.5: bias on QKV only, the first layers dense, a shared expert."""
    swiglu(config)
    moe = _first_dense(config, by_bias=True)
    return {
        "ffn": dense_width(config, needed=moe["dense_layers"] > 0),
        "qkv_bias": bool(config.get("attention_bias")),
        "qk_norm": "head" if config.get("use_qk_norm") else None,
        "moe": moe,
    }
