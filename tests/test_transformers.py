"""The long proof of imports: every family's small config against transformers' own class, run and counted.

Not part of the ordinary tests (transformers is large): ``pip install transformers``, then ``pytest -m long``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_configs
import pytest

from apexsim.io.hf_config import import_model
from apexsim.specs.model import ModelSpec

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

TOKENS = 20
# Cached by transformers unfolded (latent attention), or as states: their caches say nothing of ours.
CACHED_OTHERWISE = ("deepseek", "moonlight", "glm4_moe_lite", "glm_dsa", "nemotron")


def built(name: str) -> Any:
    """The class of transformers for a small config, with random weights."""
    transformers = pytest.importorskip("transformers")
    keys = hf_configs.config_of(name)
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    config._experts_implementation = "eager"  # products that torch's counter sees
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def imported(tmp_path: Path, name: str) -> ModelSpec:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(hf_configs.config_of(name)))
    return import_model(path)


@pytest.mark.parametrize("name", hf_configs.CONFIGS)
def test_parameters(tmp_path: Path, name: str) -> None:
    model = built(name)
    params = sum(each.numel() for each in model.parameters())
    # The bias that balances a router is a buffer in some classes.
    biases = sum(each.numel() for key, each in model.named_buffers() if key.endswith("bias"))
    assert imported(tmp_path, name).params == params + biases


@pytest.mark.parametrize("name", [name for name in hf_configs.CONFIGS if name != "nemotron"])
def test_flops_of_one_token(tmp_path: Path, name: str) -> None:
    """An indexer's weighted sum over its heads is left out; Mamba-2 is padded to a chunk there, and not compared."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = built(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[5]]))
    assert imported(tmp_path, name).flops_per_token(1) == pytest.approx(counter.get_total_flops(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in hf_configs.CONFIGS if not name.startswith(CACHED_OTHERWISE)])
def test_bytes_of_the_cache(tmp_path: Path, name: str) -> None:
    """What transformers itself has cached after a few tokens, fewer than any window."""
    import torch

    model = built(name)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(TOKENS)[None], use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    spec = imported(tmp_path, name)
    assert sum(group.bytes_per_token("bf16") for group in spec.kv_groups) * TOKENS == 2 * elements


@pytest.mark.parametrize("name", hf_configs.CONFIGS)
def test_kinds_of_layers(tmp_path: Path, name: str) -> None:
    config, spec = built(name).config, imported(tmp_path, name)
    kinds = [spec.kinds_of(range(layer, layer + 1))[0] for layer in range(spec.layers)]
    if types := getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None):
        words = {"sliding_attention": "window", "linear_attention": "recurrent", "moe": "ffn", "mlp": "ffn"}
        pattern = spec.layer_pattern or ("full",)
        assert [words.get(each, "full") for each in types] == [pattern[i % len(pattern)] for i in range(spec.layers)]
    if rotates := getattr(config, "no_rope_layers", None):
        assert [int(spec.rotates(kind)) for kind in kinds] == rotates
    if indexers := getattr(config, "indexer_types", None):
        assert [kind.indexed for kind in kinds] == [each == "full" for each in indexers]
