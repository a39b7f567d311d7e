"""Families of models with recurrent layers beside attention."""

from __future__ import annotations

from typing import Any

from apexsim.io.hf_dense import swiglu
from apexsim.io.hf_experts import balanced, experts_where_configured, gated_shared_experts
from apexsim.io.hf_json import Config
from apexsim.io.hf_layers import spelt_pattern


def _gated_delta(config: Config) -> dict[str, Any]:
    """Attention and gated delta nets of Qwen3-Next and Qwen3.5, less their FFNs."""
    swiglu(config)
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


def qwen_next_dense(config: Config) -> dict[str, Any]:
    """Qwen3.5 with dense FFNs."""
    return _gated_delta(config) | {"ffn": config.whole("intermediate_size")}


def qwen_next(config: Config) -> dict[str, Any]:
    """Qwen3-Next and Qwen3.5 with experts."""
    return experts_where_configured(config, _gated_delta(config), gated_shared_experts(config))


def nemotron_h(config: Config) -> dict[str, Any]:
    """Nemotron-H: Mamba-2, a little attention without positions, and FFNs of squared ReLU, each a layer of its own."""
    config.demand("mlp_hidden_act", "relu2", "only squared ReLU is known for this family")
    for key in ("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias", "moe_latent_size"):
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
    key, letters = spelt_pattern(config)
    if "-" in letters and "E" in letters:
        raise config.refuse(key, "dense and routed FFNs in one model are not modelled")
    fields = {"gated": False, "positions": "none", "recurrent": recurrent}
    if "E" not in letters:
        return fields | {"ffn": config.whole("intermediate_size")}
    shared = config.whole("n_shared_experts", 0)
    moe = {
        "experts": config.whole("n_routed_experts"),
        "active": config.whole("num_experts_per_tok"),
        "ffn": config.whole("moe_intermediate_size"),
        "shared_experts": shared,
        "shared_ffn": config.whole("moe_shared_expert_intermediate_size") if shared else None,
        **balanced(True),
    }
    return fields | {"moe": moe}
