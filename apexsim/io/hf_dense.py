"""Families of models whose layers all have a dense FFN: what differs from one ``model_type`` to the next."""

from __future__ import annotations

from typing import Any

from apexsim.io.hf_json import Config


def swiglu(config: Config) -> None:
    """Refuse an FFN of another kind than SwiGLU."""
    config.demand("hidden_act", "silu", "only SwiGLU (silu) FFNs are known for this family")


def llama(config: Config) -> dict[str, Any]:
    """Llama and what has its layers: Granite, Phi-3, Mistral."""
    swiglu(config)
    bias = bool(config.get("attention_bias"))
    return {
        "ffn": config.whole("intermediate_size"),
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_bias": bool(config.get("mlp_bias")),
    }


def phi3(config: Config) -> dict[str, Any]:
    """Phi-3 and Phi-4."""
    config.demand("lm_head_bias", False, "a head with a bias is not known for this family")
    config.demand("full_attn_mod", 1, "attention in every layer only")
    return llama(config)


def smollm3(config: Config) -> dict[str, Any]:
    """SmolLM3: every fourth layer rotates nothing."""
    rotates = config.listed("no_rope_layers")  # 1 = rotates, despite its name
    every = config.whole("no_rope_layer_interval", 4)
    layers = config.whole("num_hidden_layers")
    if rotates is not None:
        every = rotates.index(0) + 1 if 0 in rotates else layers + 1
        if rotates != [int((layer + 1) % every != 0) for layer in range(layers)]:
            raise config.refuse("no_rope_layers", "layers without positions are known at even distances only")
    return llama(config) | {"nope_every": every if 0 < every <= layers else None}


def seed_oss(config: Config) -> dict[str, Any]:
    """Seed-OSS: biases on queries, keys and values, and a switch of its own for the output's."""
    bias = bool(config.get("attention_bias", True))
    return llama(config) | {"qkv_bias": bias, "o_bias": bool(config.get("attention_out_bias"))}


def qwen2(config: Config) -> dict[str, Any]:
    """Qwen2: biases on queries, keys and values."""
    return llama(config) | {"qkv_bias": bool(config.get("qkv_bias", True)), "o_bias": False}


def mimo(config: Config) -> dict[str, Any]:
    """MiMo: Qwen2 whose biases have a switch."""
    return llama(config) | {"qkv_bias": bool(config.get("attention_bias", True)), "o_bias": False}


def qwen3(config: Config) -> dict[str, Any]:
    """Qwen3: queries and keys are normed head by head."""
    return llama(config) | {"qk_norm": "head"}


def hunyuan_dense(config: Config) -> dict[str, Any]:
    """Hunyuan's dense models: Qwen3 with switches."""
    config.demand("use_cla", False, "layers that use the keys and values of another one are not modelled")
    config.demand("use_qk_norm", True, "this family is known with QK norm only")
    config.demand("norm_type", "rms", "this family is known with RMSNorm only")
    return qwen3(config)


def ernie(config: Config) -> dict[str, Any]:
    """ERNIE 4.5: one switch for all biases."""
    bias = bool(config.get("use_bias"))
    return llama(config) | {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bias}


def glm(config: Config) -> dict[str, Any]:
    """GLM-4-9B: biases on queries, keys and values; half of a head is rotated."""
    return llama(config) | {"qkv_bias": bool(config.get("attention_bias", True)), "o_bias": False, "ffn_bias": False}


def glm4(config: Config) -> dict[str, Any]:
    """GLM-4-0414: norms after attention and FFN too."""
    return glm(config) | {"post_norms": True}


def chatglm(config: Config) -> dict[str, Any]:
    """GLM-4-9B and ChatGLM3 as their authors' own code names things."""
    config.demand("multi_query_attention", True, "this family is known with grouped KV heads only")
    config.demand("add_bias_linear", False, "biases of FFN and output are not modelled for this family")
    config.demand("rmsnorm", True, "this family is known with RMSNorm only")
    config.demand("apply_residual_connection_post_layernorm", False, "other orders of norms are not modelled")
    config.demand("post_layer_norm", True, "this family is known with a last norm only")
    config.demand("pre_seq_len", 0, "trained prefixes are not modelled")
    return {"ffn": config.whole("intermediate_size"), "qkv_bias": bool(config.get("add_qkv_bias", True))}


def olmo3(config: Config) -> dict[str, Any]:
    """OLMo 2 and 3: norms after attention and FFN only; queries and keys are normed over all heads at once."""
    return llama(config) | {"pre_norms": False, "post_norms": True, "qk_norm": "layer"}


def exaone4(config: Config) -> dict[str, Any]:
    """EXAONE 4: norms after attention and FFN only; where there are windows, other layers rotate nothing."""
    swiglu(config)
    positions = "rope_windowed" if config.get("sliding_window") else "rope"
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": "head"}
    return {"ffn": config.whole("intermediate_size"), "positions": positions, **norms}


def cohere2(config: Config) -> dict[str, Any]:
    """Command-A and Command-R7B: attention and FFN side by side on one norm; layers without a window rotate nothing."""
    config.demand("use_gated_activation", True, "FFNs without a gate are not known for this family")
    config.demand("use_parallel_block", True, "this family is known with attention and FFN side by side only")
    config.demand("use_qk_norm", False, "QK norm is not known for this family")
    return llama(config) | {"parallel": True, "positions": "rope_windowed"}


def gemma(config: Config) -> dict[str, Any]:
    """Gemma 2: gated GELU, norms before and after attention and FFN."""
    config.demand("hidden_activation", "gelu_pytorch_tanh", "only gated GELU FFNs are known for this family")
    config.demand("use_bidirectional_attention", False, "attention to later tokens is not modelled")
    bias = bool(config.get("attention_bias"))
    return {"ffn": config.whole("intermediate_size"), "qkv_bias": bias, "o_bias": bias, "post_norms": True}


def gemma3(config: Config) -> dict[str, Any]:
    """Gemma 3: Gemma 2 with QK norm."""
    return gemma(config) | {"qk_norm": "head"}


def opt(config: Config) -> dict[str, Any]:
    """OPT: LayerNorm, ReLU, learned positions, biases everywhere."""
    hidden, bias = config.whole("hidden_size"), bool(config.get("enable_bias", True))
    config.demand("activation_function", "relu", "OPT is known with relu only")
    config.demand("do_layer_norm_before", True, "norms after each block are not modelled")
    config.demand("word_embed_proj_dim", hidden, "embeddings narrower than the hidden size are not modelled")
    config.demand("layer_norm_elementwise_affine", True, "norms without weights are not modelled")
    biases = {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bias}
    ffn = {"ffn": config.whole("ffn_dim"), "gated": False}
    return {**biases, **ffn, "norm": "layer", "positions": "learned"}
