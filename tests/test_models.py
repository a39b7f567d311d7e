"""Models: arithmetic by hand, published counts, and what the importer takes and refuses."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.errors import ApexsimError, BadInput, Unsupported
from apexsim.io.hf_config import import_model
from apexsim.specs.base import parse_spec
from apexsim.specs.layers import KVGroup, LayerKind
from apexsim.specs.model import ModelSpec
from apexsim.specs.recurrent import Recurrent

MODELS = catalog.names("model")
DATA = Path(os.environ.get("APEXSIM_DATA", Path(__file__).parents[2] / "shared" / "data"))
CONFIGS = DATA / "model_configs"
needs_data = pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"no reference data: {CONFIGS} is absent")


def model(name: str) -> ModelSpec:
    return catalog.load("model", name)


def small(**changes: Any) -> ModelSpec:
    """Two layers, hidden 8, 4 heads of 2, 2 KV heads, FFN 16, vocabulary 10."""
    shape = {"layers": 2, "hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn": 16, "vocab": 10}
    fixed = {"name": "small", "source": "made up", "max_context": 100}
    return parse_spec(ModelSpec, {**fixed, **shape, **changes}, "small")


# Published counts


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_published(name: str) -> None:
    spec = model(name)
    # Kimi's config adds up to 1.026T where its report says 1.04T: what makes up the rest is not published.
    # Qwen3-1.7B is 1.72B cut to two digits. Llama-4-Scout is published with its vision encoder of 0.9B.
    within = {"kimi-k2.5": 0.015, "qwen3-1.7b": 0.013, "llama-4-scout-17b-16e": 0.012}.get(name, 0.01)
    assert spec.params == pytest.approx(spec.published_params, rel=within)
    assert spec.source
    assert (spec.published_active_params is None) == (spec.moe is None)


def test_every_model_of_the_first_release_ships() -> None:
    llamas = {f"llama-3.1-{size}" for size in ("8b", "70b", "405b")} | {"llama-2-7b", "llama-2-70b", "codellama-34b"}
    qwens = {f"qwen3-{size}" for size in ("8b", "14b", "32b", "30b-a3b", "235b-a22b")}
    others = {"mixtral-8x7b", "mixtral-8x22b", "mistral-large-2407", "gpt-oss-20b", "gpt-oss-120b"}
    opts = {"opt-13b", "opt-66b", "opt-175b"}
    assert llamas | qwens | others | opts <= set(MODELS)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b", "qwen3-235b-a22b"])
def test_active_parameters_are_those_published(name: str) -> None:
    spec = model(name)
    assert spec.active_params == pytest.approx(spec.published_active_params, rel=0.01)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_active_parameters_of_gpt_oss_leave_the_input_embedding_out(name: str) -> None:
    spec = model(name)
    assert spec.active_params - spec.embedding_params == pytest.approx(spec.published_active_params, rel=0.01)


def test_active_parameters_of_qwen3_30b_are_published_cut_to_two_digits() -> None:
    spec = model("qwen3-30b-a3b")
    assert spec.published_active_params == 3.3e9
    assert spec.active_params // 100_000_000 == 33


@needs_data
@pytest.mark.parametrize("group", ["silicon", "apex_h100", "vllm_runs", "energy_h100_b200"])
def test_every_measured_model_ships(group: str) -> None:
    runs = pd.read_csv(DATA / "ground_truth" / group / "runs.csv", usecols=["model"])
    assert set(runs["model"]) <= set(MODELS)


# By hand


def test_llama_70b_by_hand() -> None:
    spec = model("llama-3.1-70b")
    attention = 8192 * 8192 + 2 * 8192 * 1024 + 8192 * 8192  # Q, K and V for 8 heads of 128, output
    ffn = 3 * 8192 * 28672
    by_hand = 80 * (attention + ffn + 2 * 8192) + 2 * 128256 * 8192 + 8192
    assert by_hand == 70_553_706_496
    assert spec.params == spec.active_params == by_hand
    assert spec.weight_bytes("bf16", "bf16") == 2 * by_hand == 141_107_412_992
    matrices = 80 * (attention + ffn)
    assert spec.weight_bytes("fp8", "bf16") == 2 * by_hand - matrices  # one byte less for each
    [group] = spec.kv_groups
    assert group == KVGroup(layers=80, kv_heads=8, head_dim=128, window=None)
    assert group.bytes_per_token("bf16") == 80 * 2 * 8 * 128 * 2 == 327_680
    assert group.bytes_per_token("fp8", tensor=4) == 40_960
    assert group.bytes_per_token("bf16", tensor=8) == group.bytes_per_token("bf16", tensor=16) == 40_960


def test_mixtral_by_hand() -> None:
    spec = model("mixtral-8x7b")
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert = 3 * 4096 * 14336
    rest = attention + 4096 * 8 + 2 * 4096  # router and norms
    outside = 2 * 32000 * 4096 + 4096
    assert spec.params == 32 * (rest + 8 * expert) + outside == 46_702_792_704
    assert spec.active_params == 32 * (rest + 2 * expert) + outside == 12_879_925_248
    saved = 1.0 * 32 * 8 * expert
    assert spec.weight_bytes("bf16", "fp8") == 2 * spec.params - saved
    assert spec.sharded_widths(moe_tensor=2, tensor=4) == [("expert width", 14336, 2)]


def test_opt_by_hand() -> None:
    """13 GEMM weights of hidden^2 less one: 4 in attention, 8 in a plain FFN; every projection and norm has a bias."""
    spec, h = model("opt-13b"), 5120
    layer = 12 * h * h + 4 * h + (4 * h + h) + 2 * 2 * h
    assert spec.params == 40 * layer + 50272 * h + 2050 * h + 2 * h == 12_853_473_280
    assert spec.head_params == 0  # tied to the embeddings
    assert spec.sharded_widths(1, 2) == [("FFN width", 20480, 2)]


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [("opt-13b", 819_200), ("opt-66b", 2_359_296), ("opt-175b", 4_718_592), ("llama-3.1-8b", 131_072)],
)
def test_kv_bytes_of_a_token(name: str, kv_bytes: int) -> None:
    assert sum(group.bytes_per_token("bf16") for group in model(name).kv_groups) == kv_bytes


def test_gpt_oss_by_hand() -> None:
    spec, h = model("gpt-oss-120b"), 2880
    qkv, out = h * (64 + 2 * 8) * 64 + 80 * 64, 64 * 64 * h + h
    expert = 3 * h * h + 3 * h  # gate, up and down, each with its bias
    router = h * 128 + 128
    layer = qkv + out + 64 + router + 128 * expert + 2 * h  # 64 sinks
    assert spec.params == 36 * layer + 2 * 201088 * h + h
    assert spec.windows == (128,)
    assert spec.layer_kinds == (LayerKind(18, 128, moe=True), LayerKind(18, None, moe=True))
    assert spec.kv_groups == (KVGroup(18, 8, 64, None), KVGroup(18, 8, 64, 128))


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_gpt_oss_checkpoint_size_is_that_of_its_model_card(name: str, gib: float) -> None:
    """arXiv 2508.10925, table 1: checkpoint size with MXFP4 experts, all else bf16."""
    spec = model(name)
    assert spec.moe is not None
    assert spec.moe.dtype == "mxfp4"
    assert spec.weight_bytes("bf16", "mxfp4") / 2**30 == pytest.approx(gib, rel=0.005)


def test_flops_of_a_token_by_hand() -> None:
    spec = model("llama-3.1-8b")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    matrices = 32 * layer + 128256 * 4096
    assert spec.flops_per_token(0) == 2 * matrices
    assert spec.flops_per_token(1000) == 2 * matrices + 32 * 4 * 32 * 128 * 1000


def test_flops_of_windowed_layers_stop_growing_at_the_window() -> None:
    spec = model("gpt-oss-20b")
    per_token = 12 * 4 * 64 * 64
    assert spec.flops_per_token(100) - spec.flops_per_token(0) == pytest.approx(24 * 4 * 64 * 64 * 100)
    assert spec.flops_per_token(1128) - spec.flops_per_token(128) == pytest.approx(1000 * per_token)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_twice_the_active_matrices(name: str) -> None:
    """Biases, norms and embeddings aside, each active parameter is one multiply-add."""
    spec = model(name)
    head = spec.vocab * spec.hidden - spec.head_params  # multiplied with whether it is stored apart or not
    active = spec.active_params - spec.embedding_params + head
    assert spec.flops_per_token(0) == pytest.approx(2 * active, rel=0.06)


def test_a_gated_delta_net_by_hand() -> None:
    """Qwen3.5-397B-A17B: three layers in four keep 64 states of 128 x 128; the fourth has gated attention."""
    spec, h = model("qwen3.5-397b-a17b"), 4096
    value, key = 64 * 128, 16 * 128
    delta = h * (2 * value + 2 * key + 2 * 64) + value * h  # query, key, value, gate; decay and strength; output
    delta += 4 * (value + 2 * key) + 2 * 64 + 128  # convolution; decay and step bias of every head; norm
    attention = h * 256 * (2 * 32 + 2 * 2) + 32 * 256 * h + 2 * 256
    experts = 512 * 3 * h * 1024 + 3 * h * 1024 + h * 513  # routed, shared, router and the gate of the shared one
    assert spec.params == 45 * delta + 15 * attention + 60 * (experts + 2 * h) + 2 * 248320 * h + h
    assert spec.layer_kinds == (LayerKind(45, 1, moe=True, mixer="recurrent"), LayerKind(15, None, moe=True))
    assert spec.kv_groups == (KVGroup(15, 2, 256, None),)
    assert spec.windows == (1,)
    tail = 3 * (value + 2 * key) * 2
    assert spec.state_bytes_of(range(60)) == 45 * (64 * 128 * 128 * 4 + tail)
    assert spec.state_bytes_of(range(60), tensor=8) == 45 * (8 * 128 * 128 * 4 + tail / 8)
    assert spec.state_bytes_of(range(60), tensor=32) == 45 * (2 * 128 * 128 * 4 + 3 * (256 + 2 * 128) * 2)


def test_a_mamba_hybrid_by_hand() -> None:
    """Nemotron-Nano-9B-v2: 27 layers of Mamba-2, 25 of FFN, 4 of attention, each with one norm."""
    spec, h = model("nvidia-nemotron-nano-9b-v2"), 4480
    inner, shared = 128 * 80, 2 * 8 * 128
    mamba = h * (2 * inner + shared + 128) + inner * h + 5 * (inner + shared) + 3 * 128 + inner
    ffn, attention = 2 * h * 15680, 2 * h * 128 * (40 + 8)
    assert spec.params == 27 * mamba + 25 * ffn + 4 * attention + 57 * h + 2 * 131072 * h
    assert [(kind.count, kind.mixer, kind.ffn) for kind in spec.layer_kinds] == [
        (27, "recurrent", False),
        (25, None, True),
        (4, "attention", False),
    ]
    assert sum(group.bytes_per_token("bf16") for group in spec.kv_groups) == 4 * 2 * 8 * 128 * 2


def test_every_second_layer_of_maverick_has_experts() -> None:
    spec, h = model("llama-4-maverick-17b-128e"), 5120
    attention, expert = 2 * h * 128 * (40 + 8), 3 * h * 8192
    experts = 24 * (129 * expert + h * 128)
    assert spec.params == 48 * (attention + 2 * h) + experts + 24 * 3 * h * 16384 + 2 * 202048 * h + h
    rotated = [kind for kind in spec.layer_kinds if spec.rotates(kind)]
    assert sum(kind.count for kind in rotated) == 36
    assert {kind.window for kind in rotated} == {8192}


def test_gemma_has_four_norms_a_layer() -> None:
    spec, h = model("gemma-3-12b"), 3840
    layer = 2 * h * 256 * (16 + 8) + 3 * h * 15360 + 4 * h + 2 * 256
    assert spec.params == 48 * layer + 262208 * h + h
    assert spec.kv_groups == (KVGroup(8, 8, 256, None), KVGroup(40, 8, 256, 1024))


# Shapes that no shipped model has yet


def test_shared_experts_and_leading_dense_layers() -> None:
    moe = {"experts": 4, "active": 2, "ffn": 6, "shared_experts": 2, "shared_ffn": 5, "dense_layers": 1}
    spec = small(layers=3, moe=moe)
    attention, norms = 2 * 8 * 8 + 2 * 8 * 4, 2 * 8
    dense, expert, shared, router = 3 * 8 * 16, 3 * 8 * 6, 3 * 8 * 10, 8 * 4
    outside = 2 * 10 * 8 + 8
    assert spec.shared_params == shared
    assert spec.params == 3 * (attention + norms) + dense + 2 * (4 * expert + shared + router) + outside
    assert spec.active_params == 3 * (attention + norms) + dense + 2 * (2 * expert + shared + router) + outside
    assert spec.layer_kinds == (LayerKind(1, None, moe=False), LayerKind(2, None, moe=True))
    assert spec.sharded_widths(2, 4) == [("FFN width", 16, 4), ("expert width", 6, 2), ("shared width", 10, 4)]
    at_fp8 = 2 * spec.params - (3 * attention + dense + 2 * shared)  # shared experts follow the weights' dtype
    assert spec.weight_bytes("fp8", "bf16") == at_fp8
    assert spec.flops_per_token(0) == 2 * (80 + 3 * attention + dense + 2 * (2 * expert + shared + router))


def test_small_parameters_one_by_one() -> None:
    """Each switch adds what it says to each of the two layers."""
    plain = small().params
    assert small(tied_embeddings=True).params == plain - 80
    assert small(gated=False).params == plain - 2 * 8 * 16
    assert small(qkv_bias=True).params == plain + 2 * (8 + 4 + 4)
    assert small(o_bias=True).params == plain + 2 * 8
    assert small(ffn_bias=True).params == plain + 2 * (2 * 16 + 8)
    assert small(ffn_bias=True, gated=False).params == small(gated=False).params + 2 * (16 + 8)
    assert small(attention_sinks=True).params == plain + 2 * 4
    assert small(qk_norm="head").params == plain + 2 * (2 + 2)
    assert small(qk_norm="layer").params == plain + 2 * (8 + 4)
    assert small(norm="layer").params == plain + (2 * 2 + 1) * 8
    assert small(positions="learned").params == plain + 102 * 8


def test_a_layer_pattern_repeats_and_is_cut_at_the_last_layer() -> None:
    spec = small(layers=8, window=5, layer_pattern=["window", "window", "full"])
    assert [kind.count for kind in spec.layer_kinds] == [6, 2]
    assert spec.kv_groups == (KVGroup(2, 2, 2, None), KVGroup(6, 2, 2, 5))
    assert spec.kv_groups_of(range(2, 3)) == (KVGroup(1, 2, 2, None),)


@given(name=st.sampled_from(MODELS), cut=st.floats(0, 1), tensor=st.sampled_from([1, 2, 4, 8]))
def test_stages_add_up_to_the_model(name: str, cut: float, tensor: int) -> None:
    spec = model(name)
    middle = round(cut * spec.layers)
    stages = (range(middle), range(middle, spec.layers))
    assert sum(kind.count for stage in stages for kind in spec.kinds_of(stage)) == spec.layers
    whole = sum(group.bytes_per_token("bf16", tensor) for group in spec.kv_groups)
    parts = sum(group.bytes_per_token("bf16", tensor) for stage in stages for group in spec.kv_groups_of(stage))
    assert parts == whole


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_layer_add_up_to_the_model(name: str) -> None:
    spec = model(name)
    total = spec.embedding_params + spec.head_params + spec.norm_params
    for kind in spec.layer_kinds:
        experts = spec.moe.experts * spec.expert_params if spec.moe and kind.moe else 0
        total += kind.count * (spec.dense_params(kind) + experts + spec.small_params(kind))
    assert total == spec.params


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_heads": 3}, "kv_heads (3) must divide heads (4)"),
        ({"window": 5}, "give window and a layer_pattern with window layers"),
        ({"window": 5, "layer_pattern": ["full"]}, "give window and a layer_pattern with window layers"),
        ({"layer_pattern": ["window"]}, "give window and a layer_pattern with window layers"),
        ({"ffn": None}, "the width of the 2 dense layers: give it"),
        ({"moe": {"experts": 4, "active": 2, "ffn": 6}}, "the width of the 0 dense layers: leave it out"),
        ({"moe": {"experts": 4, "active": 5, "ffn": 6}, "ffn": None}, "active (5) must not exceed experts (4)"),
        ({"moe": {"experts": 4, "active": 2, "ffn": 6, "dense_layers": 2}}, "must leave layers with experts"),
        ({"moe": {"experts": 4, "active": 2, "ffn": 6, "shared_experts": 1}}, "together, or neither"),
        ({"moe": {"experts": 4, "active": 2, "ffn": 6, "dtype": "fp3"}}, "use one of fp32, bf16"),
        ({"moe": {"active": 2, "ffn": 6}}, "moe.experts: is missing"),
        ({"moe": {"expert": 4, "active": 2, "ffn": 6}}, "moe.expert: unknown key; did you mean experts"),
        ({"layer": 2}, "layer: unknown key; did you mean layers"),
        ({"layers": 0}, "layers: got 0"),
        ({"qk_norm": True}, "qk_norm: got True"),
        ({"layer_pattern": ["recurrent", "full"]}, "give recurrent and a layer_pattern with recurrent layers"),
        ({"layer_pattern": ["ffn"]}, "no layer of attention"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        small(**changes)
    assert said in str(caught.value)


# The importer

SHIPPED = {
    "Meta-Llama-3.1-8B": "llama-3.1-8b",
    "Meta-Llama-3.1-70B": "llama-3.1-70b",
    "Meta-Llama-3.1-405B": "llama-3.1-405b",
    "Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "Mixtral-8x22B-v0.1": "mixtral-8x22b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
}
SHIPPED |= {"DeepSeek-V3": "deepseek-v3", "DeepSeek-R1": "deepseek-r1", "Kimi-K2.5": "kimi-k2.5", "GLM-5": "glm-5"}
SHIPPED |= {"MiniMax-M2.5": "minimax-m2.5", "Qwen3-VL-8B-Instruct": "qwen3-vl-8b"}
SHIPPED |= {"Llama-4-Scout-17B-16E-Instruct": "llama-4-scout-17b-16e", "Qwen3.5-397B-A17B": "qwen3.5-397b-a17b"}
BESIDE_THE_SHAPE = ("attention_bf16", "checkpoint", "name", "source", "published_params", "published_active_params")


def shape(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(exclude=set(BESIDE_THE_SHAPE))


@needs_data
def test_every_reference_config_is_accounted_for() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(SHIPPED)


@needs_data
@pytest.mark.parametrize(("file", "name"), SHIPPED.items())
def test_an_imported_model_equals_the_shipped_one(file: str, name: str) -> None:
    imported = import_model(CONFIGS / f"{file}.json", name=name)
    assert shape(imported) == shape(model(name))
    assert imported.name == name
    assert imported.published_params is None


@needs_data
def test_the_text_part_of_a_multi_modal_model_is_imported() -> None:
    spec = import_model(CONFIGS / "Qwen3-VL-8B-Instruct.json")
    assert spec.name == "qwen3-vl-8b-instruct"
    assert "only the text model is imported" in spec.source
    assert shape(spec) == shape(model("qwen3-8b")) | {"max_context": 262144}


@needs_data
def test_minimax_is_imported_without_its_draft_layers() -> None:
    spec = import_model(CONFIGS / "MiniMax-M2.5.json")
    assert spec.params == pytest.approx(229e9, rel=0.01)  # 229B on its model page
    assert spec.active_params == pytest.approx(11e9, rel=0.01)  # 10B on its card, embeddings apart
    assert spec.qk_norm == "layer"
    assert "multi-token prediction layers are left out" in spec.source
    assert spec.checkpoint is not None
    assert (spec.checkpoint.dtype, spec.checkpoint.kept, spec.checkpoint.method) == ("fp8_block", {}, "fp8")


def write(tmp_path: Path, config: object) -> Path:
    folder = tmp_path / "My-Model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@needs_data
@pytest.mark.parametrize(("method", "exponent"), [(None, 0.75), ("noaux_tc", 0.75), ("greedy", 1.0)])
def test_a_bias_that_balanced_experts_makes_them_more_even(tmp_path: Path, method: str, exponent: float) -> None:
    config = json.loads((CONFIGS / "DeepSeek-V3.json").read_text())
    moe = import_model(write(tmp_path, config | {"topk_method": method})).moe
    assert moe is not None
    assert (moe.router_bias, moe.random_routing_exponent) == (exponent < 1, exponent)
    with pytest.raises(Unsupported, match="topk_method: got 'best'; known: greedy, group_limited_greedy, noaux_tc"):
        import_model(write(tmp_path, config | {"topk_method": "best"}))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
}
OPT = {key: value for key, value in LLAMA.items() if key != "intermediate_size"} | {
    "model_type": "opt",
    "ffn_dim": 256,
    "word_embed_proj_dim": 64,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
QWEN_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


NEMOTRON = LLAMA | {
    "model_type": "nemotron_h",
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "mlp_hidden_act": "relu2",
    "hybrid_override_pattern": "M*M-",
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
}
QWEN_NEXT = QWEN_MOE | {
    "model_type": "qwen3_next",
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "shared_expert_intermediate_size": 32,
    "partial_rotary_factor": 0.25,
}


def test_what_a_config_leaves_out_means_the_family_default(tmp_path: Path) -> None:
    spec = import_model(write(tmp_path, LLAMA))
    assert (spec.name, spec.kv_heads, spec.head_dim, spec.tied_embeddings) == ("my-model", 4, 16, False)
    assert (spec.qkv_bias, spec.o_bias, spec.ffn_bias, spec.gated) == (False, False, False, True)
    opt = import_model(write(tmp_path, OPT))
    assert (opt.tied_embeddings, opt.qkv_bias, opt.ffn_bias, opt.gated) == (True, True, True, False)
    assert (opt.norm, opt.positions, opt.ffn) == ("layer", "learned", 256)
    qwen2 = import_model(write(tmp_path, LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm, qwen2.tied_embeddings) == (True, False, None, True)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"model_type": "mistral", "sliding_window": 256}, ("window",)),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen3", "sliding_window": 256, "use_sliding_window": False, "max_window_layers": 4}, None),
        (
            {"model_type": "qwen3", "sliding_window": 256, "use_sliding_window": True, "max_window_layers": 4},
            ("full",) * 4 + ("window",) * 2,
        ),
        (
            {"sliding_window": 256, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
            ("window", "window", "full"),
        ),
        ({"layer_types": ["full_attention"] * 6}, None),
    ],
)
def test_sliding_windows_are_read_from_every_spelling(
    tmp_path: Path, change: dict[str, Any], pattern: tuple[str, ...] | None
) -> None:
    spec = import_model(write(tmp_path, LLAMA | change))
    assert spec.layer_pattern == pattern
    assert spec.window == (256 if pattern else None)


def test_hybrids_are_read(tmp_path: Path) -> None:
    spec = import_model(write(tmp_path, NEMOTRON))
    assert spec.layer_pattern == ("recurrent", "full", "recurrent", "ffn")
    assert spec.recurrent == Recurrent(kind="mamba2", heads=8, head_dim=4, groups=2, state=16, conv=4, conv_bias=True)
    assert (spec.positions, spec.gated, spec.ffn) == ("none", False, 128)
    spec = import_model(write(tmp_path, QWEN_NEXT))
    assert spec.layer_pattern == ("recurrent", "recurrent", "full")
    assert spec.recurrent == Recurrent(kind="gated_delta", heads=8, head_dim=16, groups=4, state=16)
    assert (spec.rotary_dim, spec.output_gate, spec.ffn) == (4, True, None)
    assert spec.moe is not None
    assert spec.moe.shared_gate


def test_the_text_model_is_found_however_deep_it_stands(tmp_path: Path) -> None:
    text = QWEN_MOE | {"model_type": "qwen3_omni_moe_text"}
    deep = import_model(write(tmp_path, {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": text}}))
    assert shape(deep) == shape(import_model(write(tmp_path, QWEN_MOE)))
    flat = import_model(write(tmp_path, {"model_type": "NemotronH_Nano_VL_V2", "llm_config": NEMOTRON}))
    assert shape(flat) == shape(import_model(write(tmp_path, NEMOTRON)))
    with pytest.raises(Unsupported, match=r"thinker_config\.text_config\.hidden_act: got 'gelu'"):
        import_model(write(tmp_path, {"thinker_config": {"text_config": text | {"hidden_act": "gelu"}}}))


def test_gated_shared_experts_are_read(tmp_path: Path) -> None:
    config = QWEN_MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64, "decoder_sparse_step": 2}
    spec = import_model(write(tmp_path, config))
    assert spec.moe is not None
    assert (spec.moe.shared_width, spec.moe.shared_gate, spec.moe.every, spec.ffn) == (64, True, 2, 128)


def test_gemma_relies_on_the_defaults_of_its_family(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024}
    spec = import_model(write(tmp_path, {"model_type": "gemma3", "text_config": text}))
    assert shape(spec) == shape(model("gemma-3-12b"))


def test_llama_4_is_read_with_interleaved_experts(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "llama4_text", "attention_chunk_size": 64, "num_local_experts": 8}
    config |= {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 256}
    spec = import_model(write(tmp_path, config))
    assert spec.layer_pattern == ("window", "window", "window", "full")
    assert (spec.window, spec.ffn, spec.positions) == (64, 256, "rope_windowed")
    assert [(kind.count, kind.moe) for kind in spec.layer_kinds] == [(3, False), (2, True), (1, True)]


def test_leading_dense_layers_are_read(tmp_path: Path) -> None:
    spec = import_model(write(tmp_path, QWEN_MOE | {"mlp_only_layers": [0, 1]}))
    assert spec.layer_kinds == (LayerKind(2, None, moe=False), LayerKind(4, None, moe=True))
    assert (spec.ffn, spec.qk_norm) == (128, "head")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LLAMA | {"model_type": "gemma9"}, "model_type: gemma9 is not modelled; "),
        (LLAMA | {"model_type": "Qwen3MoE"}, "did you mean qwen3_moe"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act: got 'gelu'; only SwiGLU"),
        (LLAMA | {"sliding_window": 256}, "sliding_window: unknown for model_type llama"),
        (LLAMA | {"kv_lora_rank": 512}, "kv_lora_rank: multi-head latent attention"),
        (LLAMA | {"layer_types": ["lightning"] * 6}, "layer_types: lightning layers are not modelled"),
        (LLAMA | {"attention_chunk_size": 64}, "attention_chunk_size: chunked local attention"),
        (LLAMA | {"attn_output_gate": True}, "attn_output_gate: gated attention output"),
        (NEMOTRON | {"hybrid_override_pattern": "M*-X"}, "hybrid_override_pattern: X layers are not modelled"),
        (NEMOTRON | {"hybrid_override_pattern": "M*-E"}, "dense and routed FFNs in one model"),
        (NEMOTRON | {"mlp_hidden_act": "silu"}, "mlp_hidden_act: got 'silu'; only squared ReLU"),
        (QWEN_MOE | {"mlp_only_layers": [3]}, "mlp_only_layers: got [3]; "),
        (OPT | {"do_layer_norm_before": False}, "do_layer_norm_before: got False; "),
        (OPT | {"word_embed_proj_dim": 32}, "word_embed_proj_dim: got 32; "),
        (OPT | {"activation_function": "gelu"}, "activation_function: got 'gelu'; "),
    ],
)
def test_what_is_not_modelled_is_refused_by_key(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported) as caught:
        import_model(write(tmp_path, config))
    assert said in str(caught.value)


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type"}))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(BadInput, match=rf"config\.json: {key}: is missing"):
        import_model(write(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "give a JSON object"),
        ({}, "model_type: is missing"),
        ({"text_config": 3}, "text_config: got 3; give a JSON object"),
        (LLAMA | {"hidden_size": "wide"}, "hidden_size: got 'wide'; give a whole number"),
        (LLAMA | {"hidden_size": 64.5}, "hidden_size: got 64.5; give a whole number"),
        (LLAMA | {"num_attention_heads": 0}, "heads: got 0"),
        (LLAMA | {"num_key_value_heads": 3}, "kv_heads (3) must divide heads (4)"),
        (LLAMA | {"layer_types": 4}, "layer_types: got 4; give a list"),
        (LLAMA | {"layer_types": ["linear_attention", "full_attention"] * 3}, "give recurrent and a layer_pattern"),
        (LLAMA | {"partial_rotary_factor": 2}, "partial_rotary_factor: got 2; give a share of at most 1"),
        (LLAMA | {"layer_types": ["full_attention"]}, "layer_types: got 1; give one entry a layer"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, config: object, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        import_model(write(tmp_path, config))
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.json: cannot be read"):
        import_model(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"model_type": ')
    with pytest.raises(BadInput, match=r"half\.json: not valid JSON"):
        import_model(tmp_path / "half.json")


JSON = st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.floats(), st.text(max_size=5), st.just([]))


@given(base=st.sampled_from([LLAMA, OPT, QWEN_MOE, NEMOTRON, QWEN_NEXT]), data=st.data())
def test_a_mangled_config_gives_a_spec_or_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any], data: st.DataObject
) -> None:
    keys = data.draw(
        st.lists(st.sampled_from(sorted({*base, "layer_types", "head_dim", "mlp_only_layers"})), max_size=3)
    )
    path = write(tmp_path_factory.getbasetemp(), base | {key: data.draw(JSON) for key in keys})
    with contextlib.suppress(ApexsimError):
        assert import_model(path).params > 0


def test_checkpoints_may_leave_attention_in_bf16() -> None:
    """Llama-3.1-405B in fp8: a byte a parameter of the FFN, two of everything else."""
    model = catalog.load("model", "llama-3.1-405b")
    ffn = 126 * 3 * 16384 * 53248
    assert model.weight_bytes("fp8", "fp8") == pytest.approx(ffn + 2 * (model.params - ffn))
    assert model.part_dtype("mixer", model.layer_kinds[0], "fp8") == "bf16"
