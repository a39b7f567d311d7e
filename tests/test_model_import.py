"""Configs of many families: held against transformers' own classes, understood or refused by key, quantised or not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import hf_configs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.cli.main import main
from apexsim.costs.lowering import lower
from apexsim.costs.memory import weights_bytes
from apexsim.errors import ApexsimError, BadInput, Unsupported
from apexsim.io.hf_config import import_model
from apexsim.specs.checkpoint import Checkpoint
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Deployment
from apexsim.specs.model import ModelSpec

LLAMA = hf_configs.config_of("llama")
MOE = hf_configs.config_of("qwen3_moe")

# Parameters of transformers' class on each small config (bias buffers of routers counted), and FLOPs that torch counts
# in a step of one token: `python -m pytest tests/test_model_import.py -m long` computes them anew (transformers 5.24).
RECORDED = {
    "llama": (311360, 608256),
    "mistral": (311360, 608256),
    "granite": (254528, 508928),
    "phi3": (262208, 508928),
    "smollm3": (262208, 508928),
    "seed_oss": (312896, 608256),
    "glm": (312896, 608256),
    "glm4": (313920, 608256),
    "ernie4_5": (311360, 608256),
    "olmo2": (262976, 508928),
    "olmo3": (262976, 508928),
    "exaone4": (311744, 608256),
    "cohere2": (254016, 508928),
    "hunyuan_dense": (311744, 608256),
    "qwen2": (263232, 508928),
    "qwen3": (311744, 608256),
    "phimoe": (709368, 807936),
    "qwen3_moe": (536000, 565248),
    "ernie4_5_moe": (565994, 686336),
    "hunyuan_moe": (903616, 1202176),
    "deepseek_v2": (574272, 702464),
    "deepseek_v2_lite": (561600, 677888),
    "moonlight": (561642, 677888),
    "glm4_moe_lite": (574314, 702464),
    "glm_dsa": (609386, 773184),
    "glm_dsa_shared": (591850, 737824),
    "nemotron": (227412, None),
}


def write(tmp_path: Path, config: object, name: str = "config.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(config))
    return path


def imported(tmp_path: Path, name: str, **changes: Any) -> ModelSpec:
    return import_model(write(tmp_path, hf_configs.config_of(name) | changes))


def kv_bytes(spec: ModelSpec) -> float:
    return sum(group.bytes_per_token("bf16") for group in spec.kv_groups)


# Shapes


@pytest.mark.parametrize("name", hf_configs.CONFIGS)
def test_parameters_and_flops_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """FLOPs of a token at context 1; an indexer's weighted sum over its heads (2 a head and layer) is left out."""
    spec, (params, flops) = imported(tmp_path, name), RECORDED[name]
    assert spec.params == params
    if flops is not None:
        assert spec.flops_per_token(1) == pytest.approx(flops, rel=1e-4)


@pytest.mark.parametrize("name", hf_configs.CONFIGS)
def test_every_family_is_lowered_to_its_weights(tmp_path: Path, name: str) -> None:
    """All of them but the bias of a head."""
    spec = imported(tmp_path, name)
    cluster = Cluster(device=catalog.load("device", "h100-sxm"), devices_per_node=1)
    served = Deployment(model=spec, cluster=cluster, engine=catalog.load("engine", "vllm-v1-async"))
    assert weights_of(served) == pytest.approx(2 * (spec.params - spec.vocab * spec.head_bias))


@pytest.mark.parametrize("name", hf_configs.CONFIGS)
def test_flops_are_twice_the_active_matrices(tmp_path: Path, name: str) -> None:
    spec = imported(tmp_path, name)
    small = spec.norm_params + spec.vocab * spec.head_bias
    for kind in spec.layer_kinds:
        experts = spec.moe.active if spec.moe and kind.moe else 0
        small += kind.count * (spec._small(kind, experts) - (spec.router_params if kind.moe else 0))
    tied = spec.vocab * spec.hidden if spec.tied_embeddings else 0
    active = spec.active_params - spec.embedding_params - small + tied
    state = 0.0 if spec.recurrent is None else 3 * spec.recurrent.flops_per_token()
    assert spec.flops_per_token(0) - state == pytest.approx(2 * active)


@pytest.mark.parametrize(
    ("name", "kinds", "per_token"),
    [
        ("exaone4", [(6, 64, True), (2, None, False)], 8 * 2 * 2 * 24),
        ("cohere2", [(6, 64, True), (2, None, False)], 8 * 2 * 2 * 16),
        ("olmo3", [(6, 64, True), (2, None, True)], 8 * 2 * 2 * 16),
        ("smollm3", [(6, None, True), (2, None, False)], 8 * 2 * 2 * 16),
        ("phi3", [(8, None, True)], 8 * 2 * 2 * 16),
        ("moonlight", [(1, None, True), (7, None, True)], 8 * (32 + 8)),
        ("glm_dsa", [(1, None, True), (7, None, True)], 8 * (32 + 8 + 16)),
        ("glm_dsa_shared", [(1, None, True), (3, None, True), (4, None, True)], 8 * (32 + 8) + 4 * 16),
    ],
)
def test_kinds_of_layers_and_cached_elements(
    tmp_path: Path, name: str, kinds: list[tuple[int, int | None, bool]], per_token: int
) -> None:
    """Kinds by count, window and whether positions rotate; elements a token that the cache holds, in bf16."""
    spec = imported(tmp_path, name)
    assert [(kind.count, kind.window, spec.rotates(kind)) for kind in spec.layer_kinds] == kinds
    assert kv_bytes(spec) == 2 * per_token


def test_glm_5_2_owns_21_indexers(tmp_path: Path) -> None:
    """Its published size: 743.377 B, of which 21 layers in 78 have an indexer."""
    sizes = {"hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64, "num_key_value_heads": 64}
    sizes |= {"q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64}
    sizes |= {"v_head_dim": 256, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    sizes |= {"intermediate_size": 12288, "first_k_dense_replace": 3, "vocab_size": 154880, "index_n_heads": 32}
    sizes |= {"index_head_dim": 128, "index_topk": 2048, "index_topk_freq": 4, "index_skip_topk_offset": 3}
    spec = imported(tmp_path, "glm_dsa", **sizes)
    assert round(spec.params / 1e9, 3) == 743.377
    owners = sum(kind.count for kind in spec.layer_kinds if kind.indexed)
    assert owners == 21
    assert kv_bytes(spec) == 2 * (78 * 576 + 21 * 128)
    spelt = ["full" if layer < 3 or (layer - 2) % 4 == 0 else "shared" for layer in range(78)]
    assert imported(tmp_path, "glm_dsa", **sizes, indexer_types=spelt).mla == spec.mla
    letters = "".join(word[0].upper() for word in spelt)
    assert imported(tmp_path, "glm_dsa", **sizes, index_topk_pattern=letters).mla == spec.mla


def test_every_spelling_of_layers_means_the_same(tmp_path: Path) -> None:
    exaone = imported(tmp_path, "exaone4").model_dump()
    assert imported(tmp_path, "exaone4", sliding_window_pattern="LLLG").model_dump() == exaone
    assert imported(tmp_path, "exaone4", layer_types=hf_configs.WINDOWS).model_dump() == exaone
    words = imported(tmp_path, "nemotron")
    letters = {"layers_block_type": None, "hybrid_override_pattern": "MEM*EM*E"}
    assert imported(tmp_path, "nemotron", **letters) == words
    assert imported(tmp_path, "nemotron", num_hidden_layers=None) == words
    dense = imported(tmp_path, "glm4_moe_lite", first_k_dense_replace=2)
    typed = {"first_k_dense_replace": None, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6}
    assert imported(tmp_path, "glm4_moe_lite", **typed) == dense
    assert imported(tmp_path, "smollm3", no_rope_layers=None) == imported(tmp_path, "smollm3")


def test_glm_4_by_its_authors_names_is_glm_4(tmp_path: Path) -> None:
    theirs = {
        **{"num_layers": 8, "ffn_hidden_size": 96, "kv_channels": 24, "padded_vocab_size": 120, "seq_length": 512},
        **{"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "rmsnorm": True},
        **{"hidden_size": 64, "num_attention_heads": 4, "model_type": "chatglm", "post_layer_norm": True},
        **{"num_hidden_layers": 8, "vocab_size": 117, "bias_dropout_fusion": True, "original_rope": True},
        **{"add_bias_linear": False, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
    }
    spec = import_model(write(tmp_path, theirs))
    assert spec.params == RECORDED["glm"][0]
    assert spec.rotary_dim == 12


def test_a_window_that_holds_the_context_is_none(tmp_path: Path) -> None:
    wide = imported(tmp_path, "mistral", sliding_window=512)
    assert (wide.window, wide.layer_pattern) == (None, None)
    assert "its window of 512 tokens holds the whole context" in wide.source
    assert imported(tmp_path, "mistral", sliding_window=511).window == 511


def test_a_flat_config_of_a_model_that_sees_says_what_is_left_out(tmp_path: Path) -> None:
    seeing = hf_configs.config_of("qwen2") | {"model_type": "qwen2_5_vl", "vision_config": {"depth": 3}}
    spec = import_model(write(tmp_path, seeing | {"image_token_id": 5}))
    assert spec.params == RECORDED["qwen2"][0]
    assert "towers for images and sound are left out" in spec.source


def test_defaults_of_a_class_are_taken_and_named(tmp_path: Path) -> None:
    spec = imported(tmp_path, "nemotron", mamba_num_heads=None, moe_intermediate_size=None)
    assert spec.recurrent is not None
    assert spec.moe is not None
    assert (spec.recurrent.heads, spec.moe.ffn) == (128, 7688)
    assert "as its class in transformers has it: mamba_num_heads 128, moe_intermediate_size 7688" in spec.source


# Keys


def test_keys_of_no_account_are_passed_over_and_strange_ones_noted(tmp_path: Path) -> None:
    trained = {"initializer_range": 0.02, "attention_dropout": 0.1, "rope_theta": 1e6, "bos_token_id": 1, "top_k": 50}
    assert import_model(write(tmp_path, LLAMA | trained)) == import_model(write(tmp_path, LLAMA))
    spec = import_model(write(tmp_path, LLAMA | {"zest": "much", "brio": 3, "calm": False}))
    assert spec.source.endswith("keys not understood and taken to be of no account: brio, zest")


@pytest.mark.parametrize("key", ["indexer_types", "num_kv_shared_layers", "hidden_size_per_layer_input", "altup_rank"])
def test_keys_that_may_change_layers_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(Unsupported, match=rf"{key}: got 7; not understood for model_type llama: it may change"):
        import_model(write(tmp_path, LLAMA | {key: 7}))
    assert import_model(write(tmp_path, LLAMA | {key: 0})).params == RECORDED["llama"][0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma3n_text", "embeddings of every layer's own"),
        ("gemma4_text", "keys that are values too"),
        ("gemma4_unified_text", "keys that are values too"),
        ("falcon_h1", "attention and Mamba-2 side by side in one layer"),
        ("hunyuan", "layers that use the keys and values of others"),
        ("granitemoehybrid", "Mamba-2 layers with FFNs or experts of their own"),
        ("mimo_v2_flash", "values narrower than keys"),
    ],
)
def test_families_that_are_not_modelled_are_refused_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"model_type: {kind} is not modelled: it has .*{reason}"):
        import_model(write(tmp_path, LLAMA | {"model_type": kind}))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("hunyuan_dense", {"use_cla": True}, "use_cla: got True; layers that use the keys and values of another"),
        ("hunyuan_moe", {"moe_topk": [1, 2] * 4}, "moe_topk: layers of unlike experts"),
        ("smollm3", {"no_rope_layers": [0, 1] * 4}, "no_rope_layers: layers without positions"),
        ("glm_dsa", {"indexer_types": ["full"] * 7 + ["half"]}, "indexer_types: got 'half'; known: full, shared"),
        ("exaone4", {"sliding_window_pattern": "LX"}, "sliding_window_pattern: got 'LX'"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block: got False"),
        ("nemotron", {"layers_block_type": ["mamba", "rwkv"]}, "layers_block_type: rwkv layers are not modelled"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"] * 4}, "mlp_layer_types: "),
        ("ernie4_5_moe", {"moe_layer_end_index": 3}, "moe_layer_end_index: dense layers must be the first"),
    ],
)
def test_parts_that_are_not_modelled_are_refused_by_key(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        imported(tmp_path, name, **changes)
    assert said in str(caught.value)


# Hostile files


def test_layers_without_end_are_refused_before_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="num_hidden_layers: got 1000000000; give at most 10,000"):
        import_model(write(tmp_path, LLAMA | {"num_hidden_layers": 10**9}))


def test_a_pattern_of_ten_thousand_layers_has_its_period_found(tmp_path: Path) -> None:
    layers = ["full_attention"] * 9_999 + ["sliding_attention"]
    config = hf_configs.config_of("mistral") | {"num_hidden_layers": 10_000, "layer_types": layers}
    spec = import_model(write(tmp_path, config))
    assert spec.layer_pattern is not None
    assert len(spec.layer_pattern) == 10_000


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text('{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(BadInput, match=r"deep\.json: not valid JSON: it is nested too deep"):
        import_model(deep)
    with pytest.raises(BadInput, match="give the path of a file"):
        import_model(tmp_path)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(33 << 20)
    with pytest.raises(BadInput, match="has 34,603,008 bytes; give at most 33,554,432"):
        import_model(large)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=4,
)


@given(name=st.sampled_from(sorted(hf_configs.CONFIGS)), data=st.data())
def test_a_mangled_config_gives_a_spec_or_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    config = hf_configs.config_of(name)
    extra = {"layer_types", "indexer_types", "layers_block_type", "no_rope_layers", "quantization_config", "moe_topk"}
    keys = data.draw(st.lists(st.sampled_from(sorted({*config, *extra})), max_size=3))
    path = write(tmp_path_factory.getbasetemp(), config | {key: data.draw(JSON) for key in keys})
    with contextlib.suppress(ApexsimError):
        assert import_model(path).params > 0


# Checkpoints


def compressed(bits: int, kind: str, inputs: int | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}}
    group["input_activations"] = {"num_bits": inputs, "type": kind} if inputs else None
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def quark(dtype: str, **weights: Any) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": "per_group", **weights}
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4_wo"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4_wo"),
        ({"quant_method": "gptq", "bits": 8}, "int8_wo"),
        ({"quant_method": "gptq_marlin", "bits": 4}, "int4_wo"),
        (compressed(8, "float", 8, strategy="channel"), "fp8"),
        (compressed(8, "float", 8, strategy="block"), "fp8_block"),
        (compressed(8, "int", 8, strategy="channel"), "int8"),
        (compressed(8, "int", strategy="channel"), "int8_wo"),
        (compressed(4, "int", strategy="group", group_size=128), "int4_wo"),
        (compressed(4, "float", 4, group_size=16), "nvfp4"),
        (compressed(4, "float", group_size=32), "mxfp4"),
        ({"quant_method": "awq", "w_bit": 4}, "int4_wo"),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "int", "group_size": 128}, "int4_wo"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "nvfp4"),
        (quark("fp4", group_size=16), "nvfp4"),
        (quark("fp4", group_size=32), "mxfp4"),
        (quark("int4", group_size=128), "int4_wo"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_algo": "FP8", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, "fp8"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, "fp8"),
    ],
)
def test_the_dtype_of_a_checkpoint_is_read(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    spec = import_model(write(tmp_path, LLAMA | {"quantization_config": config}))
    assert spec.checkpoint == Checkpoint(dtype=dtype, method=config.get("quant_method", "modelopt"))
    assert spec.params == RECORDED["llama"][0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quantization_config.quant_method: got 'bitsandbytes'; known: auto-round, awq",
        ),
        ({"quant_method": "gptq", "bits": 3}, "quantization_config.bits: got 3; weights of 4 and 8 bits are known"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic: other bits for some modules"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo: got 'MIXED_PRECISION'"),
        (compressed(4, "int", 8), "config_groups.group_0: weights of int 4 with activations of 8 bits are not known"),
        ({"bits": 4}, "config.json: quantization_config.quant_method: is missing"),
        ({"quant_method": "gptq"}, "config.json: quantization_config.bits: is missing; give 4 or 8"),
        ({"quant_method": "auto-round"}, "quantization_config.bits: is missing"),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "data_type: got 'mx_fp'; integers are known"),
        (compressed(4, "float", 4, group_size=128), "config_groups.group_0.weights.group_size: got 128; floats of 4"),
        (compressed(4, "float"), "config_groups.group_0.weights.group_size: got None; floats of 4 bits are known in"),
        (quark("fp4", group_size=64), "global_quant_config.weight.group_size: got 64; floats of 4 bits are known in"),
        (quark("fp4"), "global_quant_config.weight.group_size: got None"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
            "group_size: got 32; another than that",
        ),
    ],
)
def test_a_checkpoint_that_is_not_understood_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported) as caught:
        import_model(write(tmp_path, LLAMA | {"quantization_config": config}))
    assert said in str(caught.value)
    assert "take it out to import the shape alone" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 64}, "groups of 64, counted as whole channels"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "groups of 128, counted as whole channels"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, None),
        (compressed(8, "int", strategy="group", group_size=32), "groups of 32, counted as whole channels"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "groups of 64, counted as 128"),
        (quark("int4", group_size=32), "groups of 32, counted as 128"),
        (quark("int4", group_size=128), None),
    ],
)
def test_scales_of_other_groups_are_noted(tmp_path: Path, config: dict[str, Any], note: str | None) -> None:
    checkpoint = import_model(write(tmp_path, LLAMA | {"quantization_config": config})).checkpoint
    assert checkpoint is not None
    assert checkpoint.notes == ((f"its scales hold for {note}",) if note else ())


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (
            {"ignore": ["re:(", "lm_head"]},
            "config.json: quantization_config.ignore: got 're:('; not a regular expression",
        ),
        ({"dynamic": {"-:[": {}}}, "config.json: quantization_config.dynamic: got 're:['; not a regular expression"),
        ({"ignore": ["lm_head", 7]}, "config.json: quantization_config.ignore: got 7; give names of modules"),
    ],
)
def test_names_of_modules_that_are_none_are_told_with_their_place(
    tmp_path: Path, left: dict[str, Any], said: str
) -> None:
    config = {"quant_method": "gptq", "bits": 4} | left
    with pytest.raises(BadInput) as caught:
        import_model(write(tmp_path, LLAMA | {"quantization_config": config}))
    assert said in str(caught.value)


def test_the_file_beside_a_config_is_read(tmp_path: Path) -> None:
    quantised = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.0*"]}
    write(tmp_path, {"producer": {"name": "modelopt"}, "quantization": quantised}, "hf_quant_config.json")
    checkpoint = import_model(write(tmp_path, LLAMA)).checkpoint
    assert checkpoint is not None
    assert (checkpoint.dtype, checkpoint.kept) == ("nvfp4", {"mixer": (0,), "ffn": (0,)})
    assert checkpoint.notes == ("its scales of a quantised KV cache are used only where kv_cache is set",)
    assert checkpoint.described == "nvfp4 (modelopt), bf16: attention of 1 layer, FFN of 1 layer"


@pytest.mark.parametrize(
    ("name", "kept", "meant"),
    [
        ("llama", ["lm_head"], {}),
        ("llama", ["self_attn"], {"mixer": "all"}),
        ("llama", ["re:.*self_attn.*"], {"mixer": "all"}),
        ("llama", ["model.layers.*.self_attn*"], {"mixer": "all"}),
        ("llama", ["model.layers.1", "model.layers.3.mlp"], {"mixer": (1,), "ffn": (1, 3)}),
        ("llama", ["language_model.model.layers.7.self_attn"], {"mixer": (7,)}),
        (
            "llama",
            ["model.layers.1.self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")],
            {"mixer": (1,)},
        ),
        ("qwen3_moe", ["gate", "lm_head", "re:.*mlp.gate$"], {}),
        ("glm4_moe_lite", ["re:.*self_attn", "model.layers.0.mlp"], {"mixer": "all", "ffn": "all"}),
        ("glm4_moe_lite", ["shared_experts"], {"shared": "all"}),
        ("nemotron", ["backbone.layers.3.mixer", "backbone.layers.0.mixer"], {"mixer": (0, 3)}),
        ("phi3", ["self_attn.qkv_proj", "self_attn.o_proj"], {"mixer": "all"}),
    ],
)
def test_modules_left_in_bf16_are_found(tmp_path: Path, name: str, kept: list[str], meant: dict[str, Any]) -> None:
    checkpoint = imported(
        tmp_path, name, quantization_config={"quant_method": "fp8", "modules_to_not_convert": kept}
    ).checkpoint
    assert checkpoint is not None
    assert checkpoint.kept == meant
    assert checkpoint.notes == ()


def test_modules_left_in_part_are_said(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "ignored_layers": ["model.layers.2.mlp.down_proj"]}
    checkpoint = import_model(write(tmp_path, LLAMA | {"quantization_config": config})).checkpoint
    assert checkpoint is not None
    assert (checkpoint.kept, checkpoint.notes) == ({}, ("modules of its FFN are bf16, counted as fp8",))


def test_where_experts_alone_are_quantised_the_rest_is_bf16(tmp_path: Path) -> None:
    left = ["re:.*self_attn.*", r"re:.*mlp\.(gate|up|down)_proj.*", "re:.*shared_experts.*"]
    config = compressed(4, "int", group_size=32) | {"ignore": left}
    checkpoint = imported(tmp_path, "glm4_moe_lite", quantization_config=config).checkpoint
    assert checkpoint is not None
    assert (checkpoint.dtype, checkpoint.experts, checkpoint.kept) == ("bf16", "int4_wo", {})
    assert checkpoint.notes == ("its scales hold for groups of 32, counted as 128",)
    still = imported(tmp_path, "glm4_moe_lite", quantization_config=config | {"ignore": left[:2]}).checkpoint
    assert still is not None
    assert (still.dtype, still.experts, still.kept) == ("int4_wo", None, {"mixer": "all", "ffn": "all"})


def test_bytes_of_a_checkpoint_by_hand(tmp_path: Path) -> None:
    """A byte for every quantised element of the FFNs of seven layers, two for all else."""
    left = ["self_attn", "model.layers.0"]
    config = {"quant_method": "fp8", "modules_to_not_convert": left}
    spec = import_model(write(tmp_path, LLAMA | {"quantization_config": config}))
    assert spec.weight_bytes("fp8", "fp8") == 2 * spec.params - 7 * 3 * 64 * 96
    assert spec.weight_bytes("fp8_block", "fp8_block") == 2 * spec.params - 8 * (3 * 64 * 96 + 2 * 64 * 24 * 6)


# Deployments of checkpoints


def saved(tmp_path: Path, spec: ModelSpec, **changes: Any) -> str:
    from apexsim.io.yaml_files import write_yaml

    path = tmp_path / "model.yaml"
    write_yaml(path, spec.model_copy(update=changes).model_dump(mode="json", exclude_defaults=True))
    return str(path)


def weights_of(deployment: Deployment) -> float:
    server = deployment.colocated_server()
    return weights_bytes(server, lower(server), 0)


def test_a_deployment_serves_the_checkpoint_as_published(tmp_path: Path) -> None:
    import apexsim

    kept = Checkpoint(dtype="fp8", method="fp8", kept={"mixer": "all", "ffn": (0, 31)})
    llama = catalog.load("model", "llama-3.1-8b").model_copy(update={"checkpoint": kept})
    path = saved(tmp_path, llama)
    served = apexsim.deployment(model=path, device="h100-sxm")
    assert served.weights == "fp8"
    result = apexsim.simulate(served, apexsim.workload("chat", requests=2))
    assert "weights as llama-3.1-8b was published: fp8 (fp8), bf16: attention, FFN of 2 layers" in result.notes
    ffn = 3 * 4096 * 14336
    assert weights_of(served) == pytest.approx(2 * llama.params - 30 * ffn)
    bf16 = apexsim.deployment(model=path, device="h100-sxm", weights="bf16")
    assert weights_of(bf16) == pytest.approx(2 * llama.params)
    assert bf16.colocated_server().assumptions == ()


def test_shipped_models_stay_in_bf16() -> None:
    import apexsim

    assert all(catalog.load("model", name).checkpoint is None for name in catalog.names("model"))
    assert apexsim.deployment(model="deepseek-v3", device="b200-sxm", tensor=8).weights == "bf16"
    oss = apexsim.deployment(model="gpt-oss-20b", device="h100-sxm")
    assert (oss.weights, oss.expert_dtype) == ("bf16", "mxfp4")


def test_experts_of_a_checkpoint_have_its_dtype(tmp_path: Path) -> None:
    import apexsim

    own = Checkpoint(dtype="bf16", experts="int4_wo", method="awq")
    path = saved(tmp_path, catalog.load("model", "qwen3-30b-a3b"), checkpoint=own)
    assert apexsim.deployment(model=path, device="h100-sxm").expert_dtype == "int4_wo"
    assert apexsim.deployment(model=path, device="h100-sxm", weights="fp8").expert_dtype == "fp8"
    assert apexsim.deployment(model=path, device="h100-sxm", moe_weights="bf16").expert_dtype == "bf16"


def test_a_device_without_the_dtype_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(
        tmp_path, catalog.load("model", "llama-3.1-8b"), checkpoint=Checkpoint(dtype="nvfp4", method="modelopt")
    )
    command = ["simulate", "--model", path, "--device", "h100-sxm", "--workload", "chat", "--requests", "2"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "weights: h100-sxm has no gemm cost for nvfp4; it has: bf16, fp8," in said
    assert "llama-3.1-8b was published in it: give another dtype, or another device" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"model": "llama-3.1-8b", "weights": "int8"}, "deployment: weights: h100-sxm has no gemm cost for int8"),
        ({"model": "qwen3-30b-a3b", "moe_weights": "int8_wo"}, "deployment: moe_weights: h100-sxm has no moe cost for"),
        ({"model": "gpt-oss-20b", "weights": "mxfp4"}, "deployment: weights: h100-sxm has no gemm cost for mxfp4"),
    ],
)
def test_a_dtype_asked_for_is_refused_in_the_same_words(choices: dict[str, str], said: str) -> None:
    import apexsim

    with pytest.raises(Unsupported) as caught:
        apexsim.deployment(device="h100-sxm", **choices)
    assert str(caught.value).startswith(said)
    assert "published" not in str(caught.value)
    assert str(caught.value).endswith("give another dtype, or another device")


def test_parts_that_stay_in_bf16_and_stand_ins_need_no_products(tmp_path: Path) -> None:
    import apexsim

    kept = Checkpoint(dtype="nvfp4", method="modelopt", kept={"mixer": "all", "ffn": "all"})
    path = saved(tmp_path, catalog.load("model", "llama-3.1-8b"), checkpoint=kept)
    assert apexsim.deployment(model=path, device="h100-sxm").weights == "nvfp4"
    assert apexsim.deployment(model="gpt-oss-20b", device="a100-sxm").expert_dtype == "mxfp4"


def test_a_search_of_weights_without_products_is_refused() -> None:
    from apexsim.io.search_files import SearchFile, resolve_search

    file = SearchFile(model="llama-3.1-8b", devices="1xh100-sxm", workload="chat", weights="int8")
    with pytest.raises(Unsupported, match="question: weights: h100-sxm has no gemm cost for int8"):
        resolve_search(file, "question")


def test_import_says_what_it_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LLAMA | {"zest": 1, "quantization_config": {"quant_method": "awq", "bits": 4}}
    out = tmp_path / "model.yaml"
    assert main(["import-model", str(write(tmp_path, config)), "--out", str(out), "--name", "small"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no account: zest; weights int4_wo (awq)" in said
    assert catalog.load("model", out).checkpoint == Checkpoint(dtype="int4_wo", method="awq")


# Names of publishers


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
    ],
)
def test_names_of_publishers_are_understood(name: str, shipped: str) -> None:
    assert catalog.load("model", name).name == shipped


@pytest.mark.parametrize("name", catalog.names("model"))
def test_a_shipped_model_answers_to_the_checkpoint_it_was_taken_from(name: str) -> None:
    source = catalog.load("model", name).source
    owners = [word.rstrip(";:,") for word in source.split() if word.count("/") == 1 and "." not in word.split("/")[0]]
    found = [owner for owner in owners if not owner.split("/")[0][0].isdigit() or owner.startswith("01-ai/")]
    assert all(catalog.load("model", each).name == name for each in found[:1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "Qwen/Qwen3-30B-A3B-FP8",
            "a quantised checkpoint of qwen3-30b-a3b: give model qwen3-30b-a3b with weights fp8",
        ),
        ("x/Llama-3.1-70B-Instruct-AWQ-INT4", "give model llama-3.1-70b with weights int4_wo"),
        ("nvidia/DeepSeek-R1-FP4", "give model deepseek-r1 with weights nvfp4 or mxfp4"),
        (
            "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
            "give model llama-3.1-8b with weights int8 for integers",
        ),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w4a16", "give model llama-3.1-70b with weights int4_wo,"),
        ("deepseek-ai/DeepSeek-R1-0528", "no such shipped model; did you mean deepseek-r1"),
        ("mistralai/Mistral-7B-v0.1", "no such shipped model; did you mean mistral-7b"),
    ],
)
def test_other_names_are_answered_with_what_would_do(name: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        catalog.load("model", name)
    assert said in str(caught.value)
    assert "import its config.json" in str(caught.value)
