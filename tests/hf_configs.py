"""Small configs, one for each way that layers are made: sizes of our own under the keys of published configs."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]

BASE: Keys = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
HEADS: Keys = {"head_dim": 24}
LATENT: Keys = {
    **{"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20},
    **{"num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
INDEXED: Keys = {"index_topk": 32, "index_n_heads": 4, "index_head_dim": 16}
MAMBA: Keys = {
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_hidden_act": "relu2"},
    **{"moe_shared_expert_intermediate_size": 56, "n_shared_experts": 1, "head_dim": 24},
}
WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2

# Name: model_type and what its config has besides BASE.
CONFIGS: dict[str, tuple[str, Keys]] = {
    "llama": ("llama", HEADS),
    "mistral": ("mistral", HEADS | {"sliding_window": 64}),
    "granite": ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 16.0, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.75, "sliding_window": 1024}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0] * 2, "no_rope_layer_interval": 4}),
    "seed_oss": ("seed_oss", HEADS | {"attention_bias": True, "attention_out_bias": False}),
    "glm": ("glm", HEADS | {"attention_bias": True}),
    "glm4": ("glm4", HEADS | {"attention_bias": True}),
    "ernie4_5": ("ernie4_5", HEADS),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"layer_types": WINDOWS, "sliding_window": 64}),
    "exaone4": ("exaone4", HEADS | {"sliding_window": 64, "sliding_window_pattern": 4}),
    "cohere2": ("cohere2", {"sliding_window": 64, "layer_types": WINDOWS, "tie_word_embeddings": True}),
    "hunyuan_dense": ("hunyuan_v1_dense", HEADS),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
    "qwen3": ("qwen3", HEADS | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    "phimoe": (
        "phimoe",
        {"attention_bias": True, "lm_head_bias": True, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": ("qwen3_moe", HEADS | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 40, "moe_num_shared_experts": 2},
    ),
    "hunyuan_moe": ("hunyuan_v1_moe", HEADS | {"num_experts": 4, "moe_topk": [2] * 8}),
    "deepseek_v2": ("deepseek_v2", LATENT | {"topk_method": "greedy"}),
    "deepseek_v2_lite": ("deepseek_v2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "moonlight": ("deepseek_v3", LATENT | {"q_lora_rank": None, "topk_method": "noaux_tc"}),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT),
    "glm_dsa": ("glm_moe_dsa", LATENT | INDEXED),
    "glm_dsa_shared": ("glm_moe_dsa", LATENT | INDEXED | {"index_topk_freq": 4, "index_skip_topk_offset": 3}),
    "nemotron": (
        "nemotron_h",
        MAMBA | {"layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "mamba", "attention", "moe"]},
    ),
}


def config_of(name: str) -> Keys:
    """A whole config by name."""
    kind, own = CONFIGS[name]
    return {"model_type": kind, **BASE, **own}
