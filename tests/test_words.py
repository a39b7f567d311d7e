"""Words of other tools: understood where they mean the same, answered with the word that would do where not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apexsim
from apexsim.cli.main import main
from apexsim.errors import BadInput
from apexsim.io.deployments import deployment_from
from apexsim.io.model_ids import shipped_name
from apexsim.io.search_files import read_search
from apexsim.io.words import FLAGS, QUANTISED, dtype_word
from apexsim.specs.workload import Requests
from apexsim.units import DTYPE_BYTES

NAMES = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "vllm@0.11.0"}


def deployment(**choices: Any) -> Any:
    return deployment_from(None, {**NAMES, **choices})


@pytest.mark.parametrize(
    ("word", "meant"),
    [("bfloat16", "bf16"), ("BF16", "bf16"), ("fp8_e4m3", "fp8"), ("float8_e4m3fn", "fp8")],
)
def test_dtypes_that_are_the_same_are_understood(word: str, meant: str) -> None:
    assert deployment(weights=word) == deployment(weights=meant)
    assert deployment(kv_cache=word) == deployment(kv_cache=meant)


def test_every_word_of_quantisation_is_answered_alike_in_a_flag_and_in_a_name() -> None:
    assert dtype_word("float32") == "fp32"
    for word in QUANTISED.keys() - DTYPE_BYTES.keys():
        with pytest.raises(BadInput, match=re.escape(f"say {QUANTISED[word]}")):
            deployment(weights=word)
    for word, dtypes in QUANTISED.items():
        with pytest.raises(BadInput, match=re.escape(f"with weights {dtypes}, or import")):
            shipped_name(f"someone/Llama-3.1-8B-{word}", {"llama-3.1-8b": "llama-3.1-8b"})


def test_auto_is_the_default() -> None:
    assert deployment(weights="auto", moe_weights="auto", kv_cache="auto") == deployment()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("awq", "say int4_wo"), ("gptq", "say int4_wo"), ("w4a16", "say int4_wo"), ("AWQ", "say int4_wo"),
        ("float16", "say bf16"), ("fp16", "say bf16"), ("half", "say bf16"), ("fp8_e5m2", "say fp8"),
        ("w8a8", "say int8 for"), ("fp4", "say nvfp4 or mxfp4"), ("bf15", "did you mean bf16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["weights", "moe_weights", "kv_cache"])
def test_dtypes_that_are_not_the_same_are_answered(word: str, said: str, key: str) -> None:
    with pytest.raises(BadInput) as refused:
        deployment(**{key: word})
    assert str(refused.value).startswith(f"deployment: {key}: got {word!r}; {said}")


def test_a_search_understands_the_same_words(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("model: llama-3.1-8b\ndevices: 1xh100-sxm\nworkload: chat\nweights: bfloat16\nkv_cache: auto\n")
    read = read_search(file)
    assert (read.weights, read.kv_cache) == ("bf16", None)
    file.write_text(file.read_text().replace("bfloat16", "awq"))
    with pytest.raises(BadInput, match=r"search.yaml: weights: got 'awq'; say int4_wo"):
        read_search(file)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"enforce_eager": True}, {"cuda_graphs": False}),
        ({"--enforce-eager": False}, {"cuda_graphs": True}),
        ({"disable-cuda-graph": True}, {"cuda_graphs": False}),
        ({"max-num-seqs": 128}, {"max_num_seqs": 128}),
        ({"async_scheduling": True}, {"lookahead_steps": 1, "overlapped": True}),
        ({"enable_prefix_caching": True}, {"prefix_caching": True}),
        ({"disable_radix_cache": True}, {"prefix_caching": False}),
        (
            {"max_running_requests": 64, "chunked_prefill_size": 512},
            {"max_num_seqs": 64, "max_num_batched_tokens": 512},
        ),
        ({"max_batch_size": 64, "max_num_tokens": 512}, {"max_num_seqs": 64, "max_num_batched_tokens": 512}),
        ({"num_gpu_blocks_override": 1000}, {"kv_blocks": 1000}),
        ({"max_seq_len": 4096}, {"max_model_len": 4096}),
    ],
)
def test_flags_of_engines_are_engine_options(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    found = deployment(engine_options=theirs).engine
    assert found == deployment(engine_options=ours).engine


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 4}, "engine_options: for tensor_parallel_size say --tensor"),
        ({"tp": 4}, "for tp say --tensor"),
        ({"pipeline-parallel-size": 2}, "say --pipeline"),
        ({"enable_expert_parallel": True}, "say --expert"),
        ({"quantization": "fp8"}, "say --weights"),
        ({"kv_cache_dtype": "fp8"}, "say --kv-cache"),
        ({"enforce_eager": "yes"}, "engine_options: enforce_eager is true or false"),
        ({"enforce_eager": True, "cuda_graphs": True}, "engine_options: cuda_graphs is given twice"),
        ({"max_num_seqs": 9, "max_running_requests": 8}, "engine_options: max_num_seqs is given twice"),
        ({"max_num_seqs": 1, "max-num-seqs": 64}, "engine_options: max_num_seqs is given twice"),
        ({"max_num_sequ": 8}, "did you mean max_num_seqs"),
    ],
)
def test_flags_that_are_no_engine_options_are_answered(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        deployment(engine_options=options)
    assert said in str(refused.value)


def test_options_chosen_outweigh_those_of_a_file_whatever_they_are_called(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: llama-3.1-8b\ndevice: h100-sxm\nengine_options: {enforce-eager: true}\n")
    assert not deployment_from(file, {}).engine.host.cuda_graphs
    assert deployment_from(file, {"engine_options": {"cuda_graphs": True}}).engine.host.cuda_graphs
    assert deployment_from(file, {"engine_options": {"disable_cuda_graph": False}}).engine.host.cuda_graphs


@pytest.mark.parametrize("key", ["policy", "--policy", "' policy '"])
def test_code_that_a_file_names_is_seen_in_every_spelling(tmp_path: Path, key: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: llama-3.1-8b\ndevice: h100-sxm\nengine_options: {{{key}: 'nowhere:Policy'}}\n")
    with pytest.raises(BadInput, match=r"engine_options.policy: got 'nowhere:Policy'; the file names code to import"):
        deployment_from(file, {})


@pytest.mark.parametrize("flag", ["--tp", "--tensor-parallel-size", "--pp", "--kv-cache-dtype", "--quantization"])
@pytest.mark.parametrize("command", ["simulate", "search"])
def test_flags_of_engines_on_the_command_line_are_answered(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--model", "llama-3.1-8b", "--workload", "chat", flag, "4"]) == 2
    word = FLAGS[flag.lstrip("-").replace("-", "_")]
    assert capsys.readouterr().err == f"apexsim: {command}: no such option: {flag}; say {word}\n"


def test_enforce_eager_launches_every_kernel() -> None:
    """A step that no graph replays lasts at least until the host has launched its last kernel: a small one, longer."""
    one = Requests(name="one", prompt_tokens=np.array([10]), output_tokens=np.array([100]), arrival_s=np.zeros(1))
    graphs, eager = (
        apexsim.simulate(deployment(engine_options={"enforce_eager": value}), one).summary()["tpot_s"]["mean"]
        for value in (False, True)
    )
    assert eager > 1.5 * graphs
