"""Read a Hugging Face ``config.json`` as a ModelSpec.

A configuration is imported only when everything that sets a model's weights, KV cache and FLOPs is understood.
Anything else is refused by file and key: a spec that looks right and is wrong would be worse than none.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput
from apexsim.io.hf_checkpoint import checkpoint_of
from apexsim.io.hf_families import Family, family_of
from apexsim.io.hf_json import Config, read_json
from apexsim.io.hf_keys import left_over
from apexsim.io.hf_layers import layer_fields
from apexsim.specs.base import parse_spec
from apexsim.specs.model import MAX_LAYERS, ModelSpec

# Keys that, when set, mean something that only families which know it can read.
BLOCKERS = {
    "kv_lora_rank": "multi-head latent attention is known for the DeepSeek-V3 family only",
    "attention_chunk_size": "chunked local attention is known for the Llama 4 family only",
    "linear_num_value_heads": "linear attention layers are known for Qwen3-Next and Qwen3.5 only",
    "attn_output_gate": "gated attention output is known for Qwen3-Next and Qwen3.5 only",
    "cross_attention_layers": "cross-attention layers are not modelled",
}


def import_model(path: str | os.PathLike[str], *, name: str | None = None) -> ModelSpec:
    """The spec of the model that a Hugging Face ``config.json`` describes; of a multi-modal one, its text model.

    ``name`` defaults to the file's name, or its folder's for a file called config.json. The dtype of a
    quantised checkpoint is read from the config, or from an ``hf_quant_config.json`` beside it. The spec carries no
    published parameter counts: a config has none. Its ``source`` says what was left out, taken as a default or not
    understood. Raises BadInput for a file that is not such a config, Unsupported for a model that ModelSpec cannot
    express; both name the file and the key that stands in the way.
    """
    outer = Config(os.fspath(path), read_json(path))
    given = _text_part(outer)
    family = family_of(given)
    for key, reason in BLOCKERS.items():
        if given.get(key) and key not in family.knows:
            raise given.refuse(key, reason)
    config = _completed(given, family)
    fields = {"name": name or _name(Path(path)), **_shared_fields(config)}
    fields["tied_embeddings"] = config.get("tie_word_embeddings", outer.get("tie_word_embeddings", family.tied))
    fields |= layer_fields(config, family.layers) | family.read(config)
    notes = [
        *_left_out(outer, config),
        *_full_windows(fields),
        *_defaults_taken(given, family),
        *_keys_left(given, family),
    ]
    fields["source"] = "; ".join(
        [f"imported from {Path(outer.where).name} (model_type {outer.get('model_type')})", *notes]
    )
    spec = parse_spec(ModelSpec, fields, outer.where)
    checkpoint = checkpoint_of(outer, config, spec)
    return parse_spec(ModelSpec, {**fields, "checkpoint": checkpoint}, outer.where) if checkpoint else spec


def _completed(config: Config, family: Family) -> Config:
    """The config with what its family's class leaves out, by the names that readers ask for."""
    data = dict(config.data)
    for key, other in family.renamed.items():
        data[key] = config.get(other, data.get(key))
    if family.counted and data.get("num_hidden_layers") is None and isinstance(data.get(family.counted), list):
        data["num_hidden_layers"] = len(data[family.counted])
    given = {key: value for key, value in data.items() if value is not None}
    config = replace(config, data={**data, **family.defaults, **given})
    if (layers := config.whole("num_hidden_layers")) > MAX_LAYERS:
        key = config.prefix + "num_hidden_layers"
        raise BadInput(f"give at most {MAX_LAYERS:,}", where=config.where, key=key, got=layers)
    return config


def _defaults_taken(given: Config, family: Family) -> list[str]:
    """A note on keys that were asked for and that only the family's defaults answered."""
    taken = [
        f"{key} {value}"
        for key, value in family.defaults.items()
        if given.data.get(key) is None and key in given.seen and key not in ("partial_rotary_factor", "topk_method")
    ]
    return [f"not in the config, so as its class in transformers has it: {', '.join(taken)}"] if taken else []


def _keys_left(given: Config, family: Family) -> list[str]:
    """A note on keys that mean nothing here; refuses those that may change what layers are made of."""
    noted, structural = left_over(given, family.ignores)
    if structural:
        value = given.data[structural[0]]
        reason = f"got {str(value)[:60]}; not understood for model_type {given.get('model_type')}: it may change"
        would_do = "what layers are made of (take the key out if it does not)"
        raise given.refuse(structural[0], f"{reason} {would_do}")
    return [f"keys not understood and taken to be of no account: {', '.join(sorted(noted))}"] if noted else []


def _full_windows(fields: dict[str, Any]) -> list[str]:
    """Takes windows away that no context exceeds, and says so: such a layer attends to everything."""
    window, context = fields.get("window"), fields["max_context"]
    if window is None or window < context or fields.get("positions") == "rope_windowed":
        return []
    del fields["window"]
    layers = tuple("full" if kind == "window" else kind for kind in fields.pop("layer_pattern"))
    if set(layers) != {"full"}:
        fields["layer_pattern"] = layers
    return [f"its window of {window} tokens holds the whole context, so layers attend to everything"]


def _text_part(config: Config) -> Config:
    """The config of the text model inside a multi-modal one (of Qwen-Omni: of the thinker); else the config itself."""
    for key in ("thinker_config", "text_config", "llm_config"):
        if config.get(key) is not None:
            config = Config(config.where, config.mapping(key), f"{config.prefix}{key}.")
    return config


def _name(path: Path) -> str:
    stem = path.resolve().parent.name if path.stem == "config" else path.stem
    return stem.lower()


def _left_out(outer: Config, config: Config) -> list[str]:
    """What of the checkpoint the spec leaves out."""
    towers = [key for key in ("vision_config", "audio_config", "visual") if outer.get(key)]
    notes = []
    if config.prefix or towers:
        notes.append("only the text model is imported: towers for images and sound are left out")
    drafts = ("use_mtp", "num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_layers_block_type")
    if any(config.get(key) for key in drafts):
        notes.append("multi-token prediction layers are left out")
    return notes


def _shared_fields(config: Config) -> dict[str, Any]:
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    head_dim = config.whole("head_dim", hidden // max(1, heads))
    return {
        "layers": config.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.whole("num_key_value_heads", heads),
        "head_dim": head_dim,
        "rotary_dim": _rotary_dim(config, head_dim),
        "vocab": config.whole("vocab_size"),
        "max_context": config.whole("max_position_embeddings"),
    }


def _rotary_dim(config: Config, head_dim: int) -> int | None:
    """Elements of a head that are rotated, where they are not all."""
    share = config.get("partial_rotary_factor", config.mapping("rope_parameters").get("partial_rotary_factor", 1.0))
    if not isinstance(share, int | float) or not 0 < share <= 1:
        key = config.prefix + "partial_rotary_factor"
        raise BadInput("give a share of at most 1", where=config.where, key=key, got=share)
    rotated = config.whole("rotary_dim", int(head_dim * share))
    return rotated if rotated != head_dim else None
