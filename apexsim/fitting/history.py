"""Whether kernels skip the upper triangle of a chunk behind a history, which no table of a Hopper device says.

The RTX PRO 6000 has both kinds of tables: whole prompts, and (from another laboratory, through the same attention
library) chunks behind a history. The form is fitted on the former alone and judged on the latter, with the triangle
skipped, half skipped or computed; the best is taken for every device and its error reported in every profile.

The 2024 table of chunks on A100 is of no use here: that kernel computes the whole rectangle even without a history,
which the kernels of the A100 prompt table do not.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.forms import prefill
from apexsim.costs.forms.hardware import Array
from apexsim.costs.forms.residual import LogGrid
from apexsim.fitting.attention import Heads, prefill_problem
from apexsim.fitting.mixed import RTX_PRO_6000, attention_rows
from apexsim.fitting.problems import fit_all_rows, summary
from apexsim.fitting.timed_models import MODELS
from apexsim.specs.device import HoldOut

SWITCHES = (0.0, 0.5, 1.0)


@lru_cache
def causal_skip(kernels: Path) -> tuple[float, HoldOut]:
    """The switch that predicts measured chunks best from prompts alone, and its error on them."""
    prompts = kernels / "datacenter" / "rtx_pro_6000_server" / "context_attention.parquet"
    c, grid = fit_all_rows(prefill_problem(prompts, Heads("bf16", 128, RTX_PRO_6000.hw)))
    residual = LogGrid.of(grid)
    chunks = _chunks(attention_rows(kernels / "vllm_layers", RTX_PRO_6000))
    scores = []
    for switch in SWITCHES:
        errors = [
            _errors(
                chunks[chunks["model"] == model],
                prefill.Heads(widths.heads, widths.kv_heads, 128, None, 2.0),
                {**c, "causal_skip": switch},
                residual,
            )
            for model, widths in MODELS.items()
        ]
        scores.append((summary(np.concatenate(errors)), switch))
    best, switch = min(scores)
    return switch, best


def _chunks(rows: pd.DataFrame) -> pd.DataFrame:
    """Lone chunks of at least two tokens behind a history, at tensor degree 1."""
    return rows[(rows["tp"] == 1) & (rows["decodes"] == 0) & (rows["chunk"] > 1) & (rows["history"] > 0)]


def _errors(frame: pd.DataFrame, heads: prefill.Heads, c: dict[str, float], residual: LogGrid) -> Array:
    chunks = prefill.Chunks(frame["chunk"].to_numpy(), frame["history"].to_numpy())
    seconds, _ = prefill.prefill_s(chunks, prefill.bind(heads, c, RTX_PRO_6000.hw))
    seconds = seconds * np.exp(residual.log_factor(*prefill.residual_coordinates(chunks, heads)))
    return np.asarray(np.abs(seconds / frame["seconds"].to_numpy() - 1))
