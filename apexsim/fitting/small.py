"""The sampler, fitted on a device that has a table of it and carried to the others through bandwidth and cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.forms.hardware import Array, Coefficients, Hardware
from apexsim.costs.forms.small import SAMPLING, sampling_s
from apexsim.fitting.fit import fit_coefficients
from apexsim.fitting.problems import summary
from apexsim.fitting.tables import SECONDS_PER_US, read_table
from apexsim.specs.device import FittedOperator

# RTX PRO 6000 Blackwell Server Edition: vendor figures, and its system file in aiconfigurator.
RTX_PRO_6000 = Hardware(flops_per_s=467.8e12, bytes_per_s=1.792e12, sms=188, l2_bytes=128 * 1024**2)
VOCABULARIES = {"Llama-3.1-8B": 128256.0, "Qwen3-32B": 151936.0, "Qwen3-30B-A3B-Instruct-2507": 151936.0}


def sampling(folder: Path) -> FittedOperator:
    """The sampler from ``folder`` (one sub-folder a model, each with per_sequence.parquet), at tensor degree 1."""
    frame = pd.concat([_rows(folder / model / "per_sequence.parquet", v) for model, v in VOCABULARIES.items()])
    sequences, vocab = frame["sequences"].to_numpy(), frame["vocab"].to_numpy()

    def predict(c: Coefficients) -> Array:
        return sampling_s(sequences, vocab, c, RTX_PRO_6000)

    seconds = frame["seconds"].to_numpy()
    c = fit_coefficients(predict, seconds, np.ones(len(frame)), SAMPLING, {})
    return FittedOperator(
        form="sampling",
        coefficients=c,
        valid={"sequences": (float(sequences.min()), float(sequences.max()))},
        evidence="estimated",
        source="fitted on vllm_layers (RTX PRO 6000, vLLM 0.19), carried over by HBM bandwidth and L2 size",
        rows_used=len(frame),
        quality={"in_sample_on_rtx_pro_6000": summary(np.abs(predict(c) / seconds - 1))},
    )


def _rows(table: Path, vocab: float) -> pd.DataFrame:
    frame = read_table(table, ["tp", "sequences", "time_us_per_call"], ["layer"])
    frame = frame[(frame["layer"] == "sampler") & (frame["tp"] == 1)].reset_index(drop=True)
    frame["seconds"] = frame["time_us_per_call"] * SECONDS_PER_US
    frame["vocab"] = vocab
    return frame
