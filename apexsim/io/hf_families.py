"""Families of models by ``model_type``: how each reads its config, and why some are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apexsim.errors import BadInput, nearest
from apexsim.io import hf_dense, hf_experts, hf_hybrid, hf_layers
from apexsim.io.hf_json import Config


@dataclass(frozen=True)
class Family:
    """How a family reads its config.

    ``layers`` is what layers are where no ``layer_types`` says so, ``tied`` what a config without
    ``tie_word_embeddings`` means, ``defaults`` of other keys that its configs leave out (those of its class in
    transformers). ``knows`` are keys of ``hf_config.BLOCKERS`` that it has an answer for. ``renamed`` are other names
    of keys, ``counted`` a list whose length is the number of layers where none is given, ``ignores`` keys of no
    account.
    """

    read: Callable[[Config], dict[str, Any]]
    layers: Callable[[Config], hf_layers.Layers] = hf_layers.no_window
    tied: bool = False
    knows: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    counted: str | None = None
    ignores: tuple[str, ...] = ()


_DELTA = ("linear_num_value_heads", "attn_output_gate")
_LATENT = ("kv_lora_rank",)
# Defaults of Gemma3TextConfig in transformers, which published configs rely on.
_GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_GEMMA3 |= {"max_position_embeddings": 131072, "sliding_window": 4096}
# Of NemotronHConfig.
_NEMOTRON = {"mlp_hidden_act": "relu2", "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8}
_NEMOTRON |= {"ssm_state_size": 128, "conv_kernel": 4, "intermediate_size": 21504, "n_routed_experts": 8}
_NEMOTRON |= {"num_experts_per_tok": 2, "moe_intermediate_size": 7688, "n_shared_experts": 1}
_NEMOTRON |= {"moe_shared_expert_intermediate_size": 7688, "head_dim": 128, "num_key_value_heads": 8}
# Left out of configs of DeepSeek-V2 as they are the class's own.
_DEEPSEEK2 = {"topk_method": "greedy"}
# Half of a head is rotated (partial_rotary_factor of GlmConfig; the rotary embedding of the authors' own code).
_HALF = {"partial_rotary_factor": 0.5}
_CHATGLM = {"num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size", "head_dim": "kv_channels"}
_CHATGLM |= {"vocab_size": "padded_vocab_size", "max_position_embeddings": "seq_length"}
_CHATGLM |= {"num_key_value_heads": "multi_query_group_num"}
# Switches of MiniMax's own code, which transformers' class leaves out: it has both.
_MINIMAX = {"use_qk_norm": True, "use_routing_bias": True}
_QWEN_EXPERTS = {"num_experts": "num_local_experts"}
_HUNYUAN = ("cla_share_factor", "attention_head_dim", "org_vocab_size", "num_media_embeds", "use_rotary_pos_emb")
# FFNs that no layer has are of no account either.
_NEMOTRON_OWN = ("expand", "hidden_act", "chunk_size", "moe_shared_expert_overlap", "attention_head_dim", *_NEMOTRON)
_COHERE = (
    "use_embedding_sharing",
    "use_parallel_embedding",
    "position_embedding_type",
    "order_of_interleaved_layers",
    "rotary_pct",
    "layer_switch",
    "use_gated_activation",
)

_FAMILIES = {
    "llama": Family(hf_dense.llama),
    "mistral": Family(hf_dense.llama, hf_layers.every_layer),
    "granite": Family(hf_dense.llama),
    "phi3": Family(hf_dense.phi3, hf_layers.every_layer),
    "smollm3": Family(hf_dense.smollm3, hf_layers.unused_window, tied=True),
    "seed_oss": Family(hf_dense.seed_oss),
    "glm": Family(hf_dense.glm, defaults=_HALF),
    "glm4": Family(hf_dense.glm4, defaults=_HALF),
    "chatglm": Family(hf_dense.chatglm, defaults=_HALF, renamed=_CHATGLM),
    "ernie4_5": Family(hf_dense.ernie, tied=True),
    "olmo2": Family(hf_dense.olmo3),
    "olmo3": Family(hf_dense.olmo3, hf_layers.every_fourth),
    "exaone4": Family(hf_dense.exaone4, hf_layers.every_fourth),
    "cohere2": Family(hf_dense.cohere2, hf_layers.every_fourth, tied=True, ignores=_COHERE),
    "mimo": Family(hf_dense.mimo, hf_layers.late_layers),
    "hunyuan_v1_dense": Family(hf_dense.hunyuan_dense, ignores=_HUNYUAN),
    "qwen2": Family(hf_dense.qwen2, hf_layers.late_layers),
    "qwen2_vl": Family(hf_dense.qwen2, hf_layers.late_layers),
    "qwen2_vl_text": Family(hf_dense.qwen2, hf_layers.late_layers),
    "qwen2_5_vl": Family(hf_dense.qwen2, hf_layers.late_layers),
    "qwen2_5_vl_text": Family(hf_dense.qwen2, hf_layers.late_layers),
    "qwen3": Family(hf_dense.qwen3, hf_layers.late_layers),
    "qwen3_vl_text": Family(hf_dense.qwen3),
    "gemma2": Family(hf_dense.gemma, hf_layers.every_other, tied=True, ignores=("hidden_act",)),
    "gemma3_text": Family(hf_dense.gemma3, hf_layers.five_of_six, tied=True, defaults=_GEMMA3),
    "opt": Family(hf_dense.opt, tied=True),
    "mixtral": Family(hf_experts.mixtral, hf_layers.every_layer),
    "phimoe": Family(hf_experts.phimoe, hf_layers.every_layer),
    "qwen2_moe": Family(hf_experts.qwen2_moe, hf_layers.late_layers, renamed=_QWEN_EXPERTS),
    "qwen3_moe": Family(hf_experts.qwen3_moe, hf_layers.late_layers, renamed=_QWEN_EXPERTS),
    "qwen3_omni_moe_text": Family(hf_experts.qwen3_moe, renamed=_QWEN_EXPERTS),
    "qwen3_vl_moe_text": Family(hf_experts.qwen3_moe, renamed=_QWEN_EXPERTS),
    "llama4_text": Family(hf_experts.llama4, hf_layers.rotated_layers, knows=("attention_chunk_size",)),
    "glm4_moe": Family(hf_experts.glm4_moe),
    "ernie4_5_moe": Family(hf_experts.ernie_moe, tied=True, ignores=("moe_capacity", "moe_gate", "moe_group")),
    "hunyuan_v1_moe": Family(hf_experts.hunyuan_moe, ignores=_HUNYUAN),
    "gpt_oss": Family(hf_experts.gpt_oss, hf_layers.every_other),
    "minimax_m2": Family(hf_experts.minimax_m2, defaults=_MINIMAX, ignores=("attn_type_list",)),
    "deepseek_v2": Family(hf_experts.deepseek, knows=_LATENT, defaults=_DEEPSEEK2),
    "deepseek_v3": Family(hf_experts.deepseek, knows=_LATENT),
    "deepseek_v32": Family(hf_experts.deepseek, knows=_LATENT),
    "kimi_k2": Family(hf_experts.deepseek, knows=_LATENT),
    "glm4_moe_lite": Family(hf_experts.deepseek, knows=_LATENT),
    "glm_moe_dsa": Family(hf_experts.deepseek, knows=_LATENT),
    "qwen3_next": Family(hf_hybrid.qwen_next, hf_layers.recurrent_layers, knows=_DELTA),
    "qwen3_5_text": Family(hf_hybrid.qwen_next_dense, hf_layers.recurrent_layers, knows=_DELTA),
    "qwen3_5_moe_text": Family(hf_hybrid.qwen_next, hf_layers.recurrent_layers, knows=_DELTA),
    "nemotron_h": Family(
        hf_hybrid.nemotron_h,
        hf_layers.spelt_layers,
        defaults=_NEMOTRON,
        renamed={"head_dim": "attention_head_dim"},
        counted="layers_block_type",
        ignores=_NEMOTRON_OWN,
    ),
}

# Families that are known and not modelled: what of them a ModelSpec cannot say.
_REFUSED = {
    "gemma3n": "embeddings of every layer's own, AltUp streams, and layers that use the keys and values of others",
    "gemma4": "keys that are values too, heads of two sizes, and layers that use the keys and values of others",
    "falcon_h1": "attention and Mamba-2 side by side in one layer",
    "hunyuan": "layers that use the keys and values of others (cross-layer attention)",
    "granitemoehybrid": "Mamba-2 layers with FFNs or experts of their own behind them",
    "mimo_v2_flash": "windowed layers with other KV heads than the full ones, and values narrower than keys",
    "deepseek_v4": "keys and values compressed over tokens",
    "kimi_linear": "delta attention with a gate for every channel",
    "minimax": "lightning attention",
    "jamba": "Mamba-1 layers",
    "bamba": "Mamba-2 layers with FFNs behind them, rotated attention between",
    "lfm2": "short convolutions in place of attention",
    "longcat_flash": "two attentions in a layer, and experts that do nothing",
    "mllama": "cross-attention layers",
}


def family_of(config: Config) -> Family:
    """The family that a config's ``model_type`` names; raises BadInput without one, Unsupported for one not known."""
    kind = str(config.get("model_type", ""))
    if not kind:
        raise BadInput(
            "is missing; is this a model's config.json?", where=config.where, key=config.prefix + "model_type"
        )
    if kind not in _FAMILIES:
        why = _REFUSED.get(kind.removesuffix("_text").removesuffix("_unified"))
        reason = f": it has {why}" if why else f"; {nearest(kind, _FAMILIES)}"
        raise config.refuse("model_type", f"{kind} is not modelled{reason}")
    return _FAMILIES[kind]
