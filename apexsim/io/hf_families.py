"""Families of models: what differs from one ``model_type`` to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apexsim.errors import BadInput, nearest
from apexsim.io import hf_layers
from apexsim.io.hf_json import Config

# Routing exponent of routers that a bias balances (docs/validation.md); others have the default.
BALANCED_EXPONENT = 0.75
# Of DeepSeek's models: by score, by group and score, and with a bias that balances.
TOP_K_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def _swiglu(config: Config) -> None:
    config.demand("hidden_act", "silu", "only SwiGLU (silu) FFNs are known for this family")


def _llama(config: Config) -> dict[str, Any]:
    _swiglu(config)
    bias = bool(config.get("attention_bias"))
    return {
        "ffn": config.whole("intermediate_size"),
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": bool(config.get("mlp_bias")),
    }


def _qwen2(config: Config) -> dict[str, Any]:
    return _llama(config) | {"qkv_bias": True, "o_bias": False}


def _qwen3(config: Config) -> dict[str, Any]:
    return _llama(config) | {"qk_norm": "head"}


def _qwen2_moe(config: Config) -> dict[str, Any]:
    return _experts_where_configured(config, _qwen2(config), _gated_shared_experts(config))


def _gated_shared_experts(config: Config) -> dict[str, Any]:
    return {
        "experts": config.whole("num_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
        "shared_experts": 1,
        "shared_ffn": config.whole("shared_expert_intermediate_size"),
        "shared_gate": True,
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    moe = {
        "experts": config.whole("num_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
    }
    return _experts_where_configured(config, _qwen3(config), moe)


def _mixtral(config: Config) -> dict[str, Any]:
    _swiglu(config)
    return {"moe": _local_experts(config)}


def _local_experts(config: Config) -> dict[str, Any]:
    return {
        "experts": config.whole("num_local_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("intermediate_size"),
    }


def _gpt_oss(config: Config) -> dict[str, Any]:
    _swiglu(config)
    bias = bool(config.get("attention_bias", True))
    method = config.mapping("quantization_config").get("quant_method")
    experts = {"router_bias": True, "dtype": "mxfp4" if method == "mxfp4" else None}
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": True,
        "attention_sinks": True,
        "moe": _local_experts(config) | experts,
    }


def _minimax_m2(config: Config) -> dict[str, Any]:
    _swiglu(config)
    config.demand("shared_intermediate_size", 0, "shared experts are unknown for this family")
    config.demand("qk_norm_type", "per_layer", "only per_layer QK norm is known for this family")
    return {
        "qk_norm": "layer" if config.get("use_qk_norm") else None,
        "moe": _local_experts(config) | _balanced(bool(config.get("use_routing_bias"))),
    }


def _balanced(by_bias: bool) -> dict[str, Any]:
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


def _deepseek(config: Config) -> dict[str, Any]:
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
        **_balanced(_top_k_method(config) == "noaux_tc"),
    }
    ffn = config.whole("intermediate_size") if moe["dense_layers"] else None
    query = mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"]
    return {"ffn": ffn, "kv_heads": 1, "head_dim": query, "mla": mla, "moe": moe}


def _experts_where_configured(config: Config, fields: dict[str, Any], moe: dict[str, Any]) -> dict[str, Any]:
    """Fields of a Qwen model with experts: dense layers are the first ones, experts in every n-th of the others."""
    dense = config.listed("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise config.refuse("mlp_only_layers", f"got {dense!r}; dense layers must be the first ones")
    every = config.whole("decoder_sparse_step", 1)
    ffn = config.whole("intermediate_size") if dense or every > 1 else None
    return fields | {"ffn": ffn, "moe": moe | {"dense_layers": len(dense), "every": every}}


def _gemma(config: Config) -> dict[str, Any]:
    config.demand("hidden_activation", "gelu_pytorch_tanh", "only gated GELU FFNs are known for this family")
    bias = bool(config.get("attention_bias"))
    return {"ffn": config.whole("intermediate_size"), "qkv_bias": bias, "o_bias": bias, "post_norms": True}


def _gemma3(config: Config) -> dict[str, Any]:
    return _gemma(config) | {"qk_norm": "head"}


def _llama4(config: Config) -> dict[str, Any]:
    _swiglu(config)
    config.demand("attention_bias", False, "biases are not known for this family")
    every, width = config.whole("interleave_moe_layer_step", 1), config.whole("intermediate_size")
    moe = _local_experts(config) | {"shared_experts": 1, "shared_ffn": width, "every": every}
    return {
        "ffn": config.whole("intermediate_size_mlp") if every > 1 else None,
        "qk_norm": "plain" if config.get("use_qk_norm", True) else None,
        "positions": "rope_windowed",
        "moe": moe,
    }


def _gated_delta(config: Config) -> dict[str, Any]:
    """Attention and gated delta nets of Qwen3-Next and Qwen3.5, less their FFNs."""
    _swiglu(config)
    config.demand("attention_bias", False, "biases are not known for this family")
    config.demand("attn_output_gate", True, "this family is known with gated attention output only")
    if config.whole("linear_key_head_dim") != config.whole("linear_value_head_dim"):
        raise config.refuse("linear_value_head_dim", "key and value heads of unequal size are not modelled")
    recurrent = {
        "kind": "gated_delta",
        "heads": config.whole("linear_num_value_heads"),
        "head_dim": config.whole("linear_value_head_dim"),
        "groups": config.whole("linear_num_key_heads"),
        "state": config.whole("linear_key_head_dim"),
        "conv": config.whole("linear_conv_kernel_dim"),
    }
    return {"qk_norm": "head", "output_gate": True, "recurrent": recurrent}


def _qwen_next_dense(config: Config) -> dict[str, Any]:
    return _gated_delta(config) | {"ffn": config.whole("intermediate_size")}


def _qwen_next(config: Config) -> dict[str, Any]:
    return _experts_where_configured(config, _gated_delta(config), _gated_shared_experts(config))


def _nemotron_h(config: Config) -> dict[str, Any]:
    """Nemotron-H: Mamba-2, a little attention without positions, and FFNs of squared ReLU, each a layer of its own."""
    config.demand("mlp_hidden_act", "relu2", "only squared ReLU is known for this family")
    for key in ("attention_bias", "mlp_bias", "mamba_proj_bias", "moe_latent_size"):
        if config.get(key):
            raise config.refuse(key, f"got {config.get(key)!r}; not modelled for this family")
    recurrent = {
        "kind": "mamba2",
        "heads": config.whole("mamba_num_heads"),
        "head_dim": config.whole("mamba_head_dim"),
        "groups": config.whole("n_groups"),
        "state": config.whole("ssm_state_size"),
        "conv": config.whole("conv_kernel"),
        "conv_bias": bool(config.get("use_conv_bias", True)),
    }
    spelt = str(config.get("hybrid_override_pattern"))
    if "-" in spelt and "E" in spelt:
        raise config.refuse("hybrid_override_pattern", "dense and routed FFNs in one model are not modelled")
    fields = {"gated": False, "positions": "none", "recurrent": recurrent}
    if "E" not in spelt:
        return fields | {"ffn": config.whole("intermediate_size")}
    shared = config.whole("n_shared_experts", 0)
    moe = {
        "experts": config.whole("n_routed_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
        "shared_experts": shared,
        "shared_ffn": config.whole("moe_shared_expert_intermediate_size") if shared else None,
        **_balanced(True),
    }
    return fields | {"moe": moe}


def _glm4_moe(config: Config) -> dict[str, Any]:
    """GLM-4.5: bias on QKV only, the first layers dense, a shared expert."""
    _swiglu(config)
    shared, width = config.whole("n_shared_experts", 0), config.whole("moe_intermediate_size")
    dense = config.whole("first_k_dense_replace", 0)
    moe = {
        "experts": config.whole("n_routed_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": width,
        "shared_experts": shared,
        "shared_ffn": width if shared else None,
        "dense_layers": dense,
        **_balanced(True),
    }
    return {
        "ffn": config.whole("intermediate_size") if dense else None,
        "qkv_bias": bool(config.get("attention_bias")),
        "qk_norm": "head" if config.get("use_qk_norm") else None,
        "moe": moe,
    }


def _opt(config: Config) -> dict[str, Any]:
    hidden, bias = config.whole("hidden_size"), bool(config.get("enable_bias", True))
    config.demand("activation_function", "relu", "OPT is known with relu only")
    config.demand("do_layer_norm_before", True, "norms after each block are not modelled")
    config.demand("word_embed_proj_dim", hidden, "embeddings narrower than the hidden size are not modelled")
    biases = {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bias}
    ffn = {"ffn": config.whole("ffn_dim"), "gated": False}
    return {**biases, **ffn, "norm": "layer", "positions": "learned"}


@dataclass(frozen=True)
class Family:
    """How a family reads its config.

    ``layers`` is what layers are where no ``layer_types`` says so, ``tied`` what a config that does not mention
    ``tie_word_embeddings`` means, ``defaults`` of other keys that its configs leave out. ``knows`` are keys of
    ``hf_config.BLOCKERS`` that it has an answer for.
    """

    read: Callable[[Config], dict[str, Any]]
    layers: Callable[[Config], hf_layers.Layers] = hf_layers.no_window
    tied: bool = False
    knows: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_DELTA = ("linear_num_value_heads", "attn_output_gate")
# Defaults of Gemma3TextConfig in transformers, which published configs rely on.
_GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_GEMMA3 |= {"max_position_embeddings": 131072, "sliding_window": 4096}

_FAMILIES = {
    "llama": Family(_llama),
    "mistral": Family(_llama, hf_layers.every_layer),
    "mixtral": Family(_mixtral, hf_layers.every_layer),
    "phi3": Family(_llama, hf_layers.every_layer),
    "qwen2": Family(_qwen2, hf_layers.late_layers),
    "qwen3": Family(_qwen3, hf_layers.late_layers),
    "qwen3_moe": Family(_qwen3_moe, hf_layers.late_layers),
    "qwen2_vl_text": Family(_qwen2, hf_layers.late_layers),
    "qwen2_5_vl_text": Family(_qwen2, hf_layers.late_layers),
    "qwen2_moe": Family(_qwen2_moe, hf_layers.late_layers),
    "qwen3_omni_moe_text": Family(_qwen3_moe),
    "qwen3_vl_text": Family(_qwen3),
    "qwen3_vl_moe_text": Family(_qwen3_moe),
    "qwen3_next": Family(_qwen_next, hf_layers.recurrent_layers, knows=_DELTA),
    "qwen3_5_text": Family(_qwen_next_dense, hf_layers.recurrent_layers, knows=_DELTA),
    "qwen3_5_moe_text": Family(_qwen_next, hf_layers.recurrent_layers, knows=_DELTA),
    "gemma2": Family(_gemma, hf_layers.every_other, tied=True),
    "gemma3_text": Family(_gemma3, hf_layers.five_of_six, tied=True, defaults=_GEMMA3),
    "llama4_text": Family(_llama4, hf_layers.rotated_layers, knows=("attention_chunk_size",)),
    "nemotron_h": Family(_nemotron_h, hf_layers.spelt_layers),
    "glm4_moe": Family(_glm4_moe),
    "gpt_oss": Family(_gpt_oss, hf_layers.every_other),
    "minimax_m2": Family(_minimax_m2),
    "opt": Family(_opt, tied=True),
    "deepseek_v3": Family(_deepseek, knows=("kv_lora_rank",)),
    "deepseek_v32": Family(_deepseek, knows=("kv_lora_rank",)),
    "kimi_k2": Family(_deepseek, knows=("kv_lora_rank",)),
    "glm_moe_dsa": Family(_deepseek, knows=("kv_lora_rank",)),
}


def family_of(config: Config) -> Family:
    """The family that a config's ``model_type`` names; raises BadInput without one, Unsupported for one not known."""
    kind = str(config.get("model_type", ""))
    if not kind:
        raise BadInput(
            "is missing; is this a model's config.json?", where=config.where, key=config.prefix + "model_type"
        )
    if kind not in _FAMILIES:
        raise config.refuse("model_type", f"{kind} is not modelled; {nearest(kind, _FAMILIES)}")
    return _FAMILIES[kind]
