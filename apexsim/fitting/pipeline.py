"""``apexsim fit``: the whole profile of a device from the reference tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from apexsim import __version__
from apexsim.costs.forms.hardware import Hardware
from apexsim.errors import BadInput, nearest
from apexsim.fitting import attention, estimates, facts, gemm, history, links, mixed, mla, moe, small
from apexsim.fitting.facts import Facts
from apexsim.fitting.problems import Problem, solve
from apexsim.fitting.tables import data_root
from apexsim.specs.device import DeviceProfile, FittedOperator, Provenance

FIT_DATE = "2026-11-21"
HEAD_DIMS = (64, 128)
Progress = Callable[[str], None]


def fit_device(name: str, root: str | Path | None = None, progress: Progress | None = None) -> DeviceProfile:
    """Fit every operator of device ``name`` from the tables under ``root`` (default: where the reference data lie).

    ``progress`` is told, in a few words, what is being fitted. The same tables give the same profile, to the byte.
    """
    known = facts.devices()
    if name not in known:
        raise BadInput(f"no tables of it can be fitted; {nearest(name, known)}", where="--device", got=name)
    device, kernels = known[name], data_root(root) / "kernels"
    operators: dict[str, dict[str, FittedOperator]] = {}
    for problem in _problems(device, kernels):
        if progress:
            progress(f"{name}: {problem.kind} {problem.key}, {len(problem.frame)} rows")
        operators.setdefault(problem.kind, {})[problem.key] = solve(problem)
    for kind, found in _tables(device, kernels).items():
        operators.setdefault(kind, {}).update(found)
    folders = (f"datacenter/{device.folder}", "datacenter/rtx_pro_6000_server", "vllm_layers", "a100_h100_2024")
    profile = DeviceProfile(
        name=name,
        datasheet=device.datasheet,
        price=device.price,
        power=device.power,
        sustained=estimates.sustained_clock(kernels, device.folder),
        operators=operators,
        provenance=Provenance(tool=f"apexsim fit {__version__}", date=FIT_DATE, tables=folders),
    )
    # Measured modules of latent attention contain products: these are fitted first.
    latent = mla.operators(profile, kernels, device.folder)
    return profile.model_copy(update={"operators": {**operators, **latent}})


def _problems(device: Facts, kernels: Path) -> Iterator[Problem]:
    """Every operator of the device that is fitted from its own tables."""
    folder, sheet = kernels / "datacenter" / device.folder, device.datasheet
    hopper = "fp8" in sheet.flops_per_s
    skip, check = history.causal_skip(kernels)
    for dtype in ("bf16", "fp8", "fp8_block") if hopper else ("bf16",):
        table = {"bf16": "gemm", "fp8": "gemm", "fp8_block": "gemm__fp8_block_trtllm"}[dtype]
        path = folder / f"{table if hopper else 'gemm__sglang'}.parquet"
        yield gemm.problem(path, dtype, Hardware.of(sheet, dtype))
    for kv_dtype in ("bf16", "fp8") if hopper else ("bf16",):
        hw = Hardware.of(sheet, kv_dtype)
        for head_dim in HEAD_DIMS if hopper else (128,):
            prompts = attention.prefill_problem(folder / "context_attention.parquet", kv_dtype, head_dim, hw, skip)
            judged = (kv_dtype, head_dim) == ("bf16", 128)
            yield replace(prompts, checks={"chunk_with_history_on_rtx_pro_6000": check} if judged else {})
            yield attention.decode_problem(folder / "generation_attention.parquet", kv_dtype, head_dim, hw)
    yield from moe.problems(device, kernels)


def _tables(device: Facts, kernels: Path) -> links.Operators:
    """Operators kept as tables, and those estimated from elsewhere."""
    found = links.operators(device, kernels) | mixed.operators(device, kernels)
    found["elementwise"] = {"any": estimates.elementwise()}
    found["sampling"] = {"any": small.sampling(kernels / "vllm_layers" / "RTXPRO6000")}
    return found
