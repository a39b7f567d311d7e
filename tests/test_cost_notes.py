"""What stands in for kernels and links that nobody measured, and what a result says of it."""

from __future__ import annotations

from typing import Any

import pytest

from apexsim import catalog
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.lowering import lower
from apexsim.costs.notes import cost_notes
from apexsim.costs.operators import Collective, Experts
from apexsim.costs.steps import build_step_cost
from apexsim.io.deployments import deployment_from
from apexsim.serving.simulator import simulate
from apexsim.specs.deployment import Deployment


def deployed(model: str, device: str, **choices: Any) -> Deployment:
    return deployment_from(None, {"model": model, "device": device, **choices})


def notes(deployment: Deployment) -> list[str]:
    return list(cost_notes(build_step_cost(deployment.colocated_server())))


def shares(deployment: Deployment) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = simulate(
        deployment, catalog.load("workload", "chat").sample(requests=20)
    ).summary()["provenance"]
    return found


def test_tensor_parallelism_on_geforce_boards_is_estimated_from_the_same_link() -> None:
    deployment = deployed("llama-3.1-8b", "rtx-4090", tensor=2)
    found = shares(deployment)
    assert set(found["all_reduce"]) == set(found["all_gather"]) == {"estimated"}
    lent, own = (OperatorCosts(catalog.load("device", name)) for name in ("rtx-4090", "l40s"))
    for kind, group in (("all_reduce", 2), ("all_gather", 4), ("reduce_scatter", 8), ("send_recv", 2)):
        assert lent.collective_s(kind, group, 1e6) == own.collective_s(kind, group, 1e6)
    rows = [op for block in lower(deployment.colocated_server()).blocks for op in block.rows]
    # No board reads another's memory, so no engine's own all-reduce runs.
    assert not any(op.custom_max_bytes for op in rows if isinstance(op, Collective))


def test_mxfp4_experts_run_on_int4_kernels_where_no_others_were_timed() -> None:
    deployment = deployed("gpt-oss-20b", "a100-sxm")
    (layer,) = {
        op.layer
        for block in lower(deployment.colocated_server()).blocks
        for op in block.rows
        if isinstance(op, Experts)
    }
    assert (layer.dtype, layer.kernel) == ("mxfp4", "int4_wo")
    assert set(shares(deployment)["moe"]) <= {"estimated", "extrapolated"}
    said = "estimated: experts in mxfp4 take what those in int4_wo do on a100-sxm"
    assert said in notes(deployment)
    assert not any("mxfp4" in note for note in notes(deployed("gpt-oss-20b", "h100-sxm")))


@pytest.mark.parametrize(
    ("engine", "older"),
    [("vllm-0.6", True), ("vllm-v1-sync", True), ("vllm-v1-async", False), ("sglang-0.5", False)],
)
def test_an_engine_older_than_the_tables_says_so(engine: str, older: bool) -> None:
    said = [note for note in notes(deployed("llama-3.1-8b", "h100-sxm", engine=engine)) if "older" in note]
    assert bool(said) == older
    if engine == "vllm-0.6":
        assert said[0].startswith("vllm up to 0.7 (vllm-0.6) is older than the tables of kernels, timed on ")
        assert "0.24.0 (decode_attention, " in said[0]


def test_a_series_contains_its_patches_and_words_are_no_versions() -> None:
    deployment = deployed("llama-3.1-8b", "h100-sxm", engine="vllm-0.6")

    def listed(*versions: str) -> Deployment:
        engine = deployment.engine.model_copy(update={"versions": versions})
        return deployment.model_copy(update={"engine": engine})

    assert not any("older" in note for note in notes(listed("0.9", "0.24")))
    assert any("vllm up to 0.9 " in note for note in notes(listed("0.9", "nightly")))
    assert not any("older" in note for note in notes(listed("nightly")))
    assert any("vllm up to 0.9 " in note for note in notes(listed("v0.9-cu128", "0.8.x")))
    assert not any("older" in note for note in notes(listed("v0.24-cu130")))


@pytest.mark.parametrize(
    ("model", "device", "weights", "said"),
    [
        ("llama-3.1-8b", "h100-sxm", "int4_wo", ["int4_wo products of h100-sxm are estimated"]),
        ("llama-3.1-8b", "h100-sxm", "fp8", []),
        ("llama-3.1-8b", "h200-sxm", "int4_wo", []),
        ("mixtral-8x7b", "h100-sxm", "fp8", ["fp8 experts of h100-sxm are estimated"]),
    ],
)
def test_a_dtype_of_weights_that_nobody_timed_is_told(model: str, device: str, weights: str, said: list[str]) -> None:
    deployment = deployed(model, device, weights=weights, tensor=2)
    assert [note for note in notes(deployment) if " are estimated" in note] == said
    estimated = {kind for kind, by in shares(deployment).items() if "estimated" in by} & {"gemm", "moe"}
    assert estimated == {{"products": "gemm", "experts": "moe"}[note.split()[1]] for note in said}
