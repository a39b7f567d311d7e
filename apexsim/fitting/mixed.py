"""Fit of chunks and decodes in one launch, from layers of vLLM timed on two RTX devices; carried to other FA2 devices.

FlashAttention 3 (Hopper) and the TensorRT-LLM kernels (Blackwell) split and schedule such a batch in other ways, which
nobody has measured: there the parts of a step add up.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from apexsim.costs.forms import mixed
from apexsim.costs.forms.hardware import Array, Coefficients, Hardware
from apexsim.costs.forms.prefill import Heads
from apexsim.fitting.facts import Facts
from apexsim.fitting.fit import fit_coefficients
from apexsim.fitting.gaps import launch_gap_s, timed_attention
from apexsim.fitting.problems import FIT_ROWS, SEED, Operators, summary
from apexsim.fitting.tables import SECONDS_PER_US
from apexsim.specs.device import Evidence, FittedOperator, HoldOut

HEAD_DIM, KV_BYTES = 128.0, 2.0


class Timed(NamedTuple):
    """A device whose layers were timed: its folder among them, and its peaks (bf16)."""

    folder: str
    hw: Hardware


# Vendor figures, as in the fitted profiles of the two.
RTX_PRO_6000 = Timed("RTXPRO6000", Hardware(467.8e12, 1.792e12, 188, 128 * 1024.0**2))
RTX_4090 = Timed("RTX4090", Hardware(165e12, 1.008e12, 128, 72 * 1024.0**2))
# Devices that run FlashAttention 2, and whose timings they take: their own, or those of the nearest chip.
SINGLE_LAUNCH = {
    "rtx_pro_6000_server": RTX_PRO_6000,
    "rtx_4090": RTX_4090,
    "l40s": RTX_4090,
    "a100_sxm": RTX_PRO_6000,
}
OWN = ("rtx_pro_6000_server", "rtx_4090")


def attention_rows(layers: Path, timed: Timed) -> pd.DataFrame:
    """Attention of one layer as a step has it (``gaps.timed_attention``, and ``seconds`` with the gap before it)."""
    rows = timed_attention(layers / timed.folder)
    return rows.assign(head_dim=HEAD_DIM, seconds=rows["us"] * SECONDS_PER_US + launch_gap_s(layers.parent))


def operators(device: Facts, kernels: Path) -> Operators:
    """The operator of a device that launches chunks and decodes together; nothing for the others."""
    timed = SINGLE_LAUNCH.get(device.folder)
    if timed is None:
        return {}
    rows = attention_rows(kernels / "vllm_layers", timed)
    rows = rows[(rows["chunk"] > 0) & (rows["decodes"] > 0)].reset_index(drop=True)
    own = device.folder in OWN
    source = f"vllm_layers/{timed.folder} (vLLM 0.19)" + ("" if own else ", carried over by the peaks")
    found = shared_launch(rows, timed.hw, source)
    quality = found.quality | _held_out(rows, timed.hw)
    evidence: Evidence = "fitted" if own else "estimated"
    return {"mixed_attention": {"any": found.model_copy(update={"quality": quality, "evidence": evidence})}}


def shared_launch(rows: pd.DataFrame, hw: Hardware, source: str) -> FittedOperator:
    """The cost of one launch over a chunk and decodes, from rows of such."""
    c = _fit(rows, hw)
    return FittedOperator(
        form="mixed",
        coefficients=c,
        valid={name: (float(rows[name].min()), float(rows[name].max())) for name in ("chunk", "decodes", "keys")},
        evidence="fitted",
        source=source,
        rows_used=len(rows),
        quality={"in_sample": _score(rows, c, hw)},
    )


def _held_out(rows: pd.DataFrame, hw: Hardware) -> dict[str, HoldOut]:
    """Errors on each model from the others alone; nothing where one model was timed."""
    models = rows["model"].unique()
    if len(models) == 1:
        return {}
    scores = {}
    for model in models:
        other = rows["model"] != model
        scores[f"held_out_{model}"] = _score(rows[~other], _fit(rows[other], hw), hw)
    return scores


def _fit(rows: pd.DataFrame, hw: Hardware) -> dict[str, float]:
    part = rows.sample(min(FIT_ROWS, len(rows)), random_state=SEED)
    seconds = part["seconds"].to_numpy()
    return fit_coefficients(lambda c: _predict(part, c, hw), seconds, np.ones(len(part)), mixed.COEFFICIENTS, {})


def _score(rows: pd.DataFrame, c: Coefficients, hw: Hardware) -> HoldOut:
    return summary(np.abs(_predict(rows, c, hw) / rows["seconds"].to_numpy() - 1))


def _predict(rows: pd.DataFrame, c: Coefficients, hw: Hardware) -> Array:
    heads = Heads(rows["heads"].to_numpy(), rows["kv_heads"].to_numpy(), rows["head_dim"].to_numpy(), None, KV_BYTES)
    bound = mixed.bind(heads, c, hw)
    chunks = mixed.chunk_blocks(rows["chunk"].to_numpy(), rows["history"].to_numpy(), bound)
    decodes = mixed.decode_blocks(rows["decodes"].to_numpy(), rows["keys"].to_numpy(), bound)
    return np.asarray(mixed.launch_s(chunks, decodes, bound))
