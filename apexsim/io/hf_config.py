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
from apexsim.io.hf_families import family_of
from apexsim.io.hf_json import Config, read_json
from apexsim.io.hf_layers import layer_fields
from apexsim.specs.base import parse_spec
from apexsim.specs.model import ModelSpec

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

    ``name`` defaults to the file's name, or its folder's for a file called config.json. The spec carries no
    published parameter counts: a config has none. Raises BadInput for a file that is not such a config, Unsupported
    for a model that ModelSpec cannot express; both name the file and the key that stands in the way.
    """
    outer = Config(os.fspath(path), read_json(path))
    config = _text_part(outer)
    family = family_of(config)
    for key, reason in BLOCKERS.items():
        if config.get(key) and key not in family.knows:
            raise config.refuse(key, reason)
    config = replace(config, data={**family.defaults, **config.data})
    fields = {"name": name or _name(Path(path)), "source": _source(outer, config), **_shared_fields(config)}
    fields["tied_embeddings"] = config.get("tie_word_embeddings", outer.get("tie_word_embeddings", family.tied))
    fields |= layer_fields(config, family.layers) | family.read(config)
    return parse_spec(ModelSpec, fields, outer.where)


def _text_part(config: Config) -> Config:
    """The config of the text model inside a multi-modal one (of Qwen-Omni: of the thinker); else the config itself."""
    for key in ("thinker_config", "text_config", "llm_config"):
        if config.get(key) is not None:
            config = Config(config.where, config.mapping(key), f"{config.prefix}{key}.")
    return config


def _name(path: Path) -> str:
    stem = path.resolve().parent.name if path.stem == "config" else path.stem
    return stem.lower()


def _source(outer: Config, config: Config) -> str:
    """Where the spec comes from, and what of the checkpoint it leaves out."""
    notes = [f"imported from {Path(outer.where).name} (model_type {outer.get('model_type')})"]
    if config.prefix:
        notes.append("only the text model is imported")
    method = config.mapping("quantization_config").get("quant_method")
    if method not in (None, "mxfp4"):
        notes.append(f"published quantised with {method}: set the weight dtype in the deployment")
    if any(config.get(key) for key in ("use_mtp", "num_nextn_predict_layers", "mtp_num_hidden_layers")):
        notes.append("multi-token prediction layers are left out")
    return "; ".join(notes)


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
