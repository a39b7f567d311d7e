"""Keys of a config that no reader asked for: of no account, noted, or a reason to refuse a model.

A key that a family's reader never looks at may mean nothing to weights, KV cache and FLOPs (how a model was trained,
how it samples), or it may change what layers are made of. The first are known by name or by how the name ends. The
second are told by the words in their name, and refused where they are set. Whatever is left is noted in the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from apexsim.io.hf_json import Config

# Of no account whatever they are set to.
_HARMLESS = """
    attn_temperature_tuning for_llm_compressor architectures auto_map model_type dtype torch_dtype
    transformers_version _name_or_path _commit_hash quantization_config compression_config use_cache
    cache_implementation is_decoder is_encoder_decoder add_cross_attention torchscript tie_encoder_decoder
    tie_word_embeddings pruned_heads chunk_size_feed_forward return_dict output_attentions output_hidden_states
    output_scores output_router_logits return_dict_in_generate use_bfloat16 tf_legacy_loss prefix id2label label2id
    num_labels problem_type task_specific_params finetuning_task tokenizer_class pretraining_tp ep_size do_sample
    early_stopping max_length min_length num_beams num_beam_groups num_return_sequences top_k top_p typical_p
    length_penalty repetition_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids suppress_tokens begin_suppress_tokens remove_invalid_values cross_attention_hidden_size
    use_flash_attn use_flash_attention _flash_attn_2_enabled attn_implementation _attn_implementation
    _attn_implementation_internal attn_implementation_autoset _attn_implementation_autoset use_mrope mrope_section
    use_mamba_kernels seq_aux scoring_func score_function norm_topk_prob n_group topk_group num_expert_group
    router_noise moe_router_fusion original_max_position_embeddings initial_context_length rotary_base rope_ratio
    rope_interleave indexer_rope_interleave num_logits_to_keep residual_in_fp32 rescale_prenorm_residual
    mamba_ssm_dtype mamba_ssm_cache_dtype mamba_hidden_act fp32_residual_connection attention_softmax_in_fp32
    original_rope apply_query_key_layer_scaling query_pre_attn_scalar swiglu_limit layerdrop experts_per_token
    max_window_layers num_nextn_predict_layers model_max_length tokenizer_config base_model_name_or_path
    unsloth_version unsloth_fixed use_qkv_fusion interpolate_factor head_dtype gradient_checkpointing
    weight_share_add_bias use_sliding_window_cache bias_dropout_fusion interleaved_qkv
"""
_ENDINGS = (
    r"id|token_ids|token_index|tokens_ids|dropout|dropout_prob|drop|pdrop|eps|epsilon|coef|coefficient|alpha|loss"
    r"|scale|scaling|scaling_factor|factor|multiplier|multipliers|softcapping|temperature|theta|jitter|std|range"
    r"|noise|kernels|seed|version|mup|moe_aux|clip|min|max|limit|floor"
)
_BEGINNINGS = r"rope_|initializer_|init_|mtp_|num_mtp_|vision_|image_|video_|audio_|mm_|projector_|time_step_|_"
_OF_NO_ACCOUNT = re.compile(rf"(?:{_BEGINNINGS}).*|(?:.*_)?(?:{_ENDINGS})")

# Words in the names of keys that may say what layers are made of.
_STRUCTURE = """
    layer layers block blocks head heads expert experts rank lora dim dims size width ffn mlp moe intermediate
    hidden kv mla attn attention window windows sliding chunk conv kernel ssm mamba state recurrent linear gate
    gated bias biases norm norms layernorm rmsnorm share shared sharing embed embedding embeddings every freq
    frequency interval pattern types skip indexer index latent router routed altup laurel adapter adapters parallel
    sparse sparsity vocab nope cla
"""


def left_over(given: Config, also: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Keys that were given and never asked for: those to note, and those that may change a model's structure.

    ``also`` are keys that are of no account for the config's family.
    """
    harmless, structure = {*_HARMLESS.split(), *also}, set(_STRUCTURE.split())
    left = [
        key
        for key, value in given.data.items()
        if value and key not in given.seen and key not in harmless and not _OF_NO_ACCOUNT.fullmatch(key)
    ]
    structural = [key for key in left if not structure.isdisjoint(key.lower().split("_"))]
    return [key for key in left if key not in structural], structural
