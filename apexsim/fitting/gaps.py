"""What passes between kernels: layers of vLLM were timed as CUDA time, kernel by kernel, and leave it out.

Tables of replays hold it: a graph starts a kernel some time after the one before it has ended. The RTX PRO 6000 has
decodes both ways. Where they are too small to take longer than a launch, what the replay takes more is the gap.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd

from apexsim.fitting.tables import SECONDS_PER_US, read_table
from apexsim.fitting.timed_models import MODELS

COLUMNS = {
    "tp": "tp",
    "prefill_chunk_tokens": "chunk",
    "prefill_kv_history_tokens": "history",
    "n_decode_requests": "decodes",
    "decode_kv_tokens": "keys",
    "time_us_per_layer": "us",
}
LAYERS, REPLAYS = "RTXPRO6000", "rtx_pro_6000_server"
# Beyond them decodes take longer than a launch, or split their keys over a second one.
MOST_KEYS, MOST_DECODES = 64, 32


def timed_attention(folder: Path) -> pd.DataFrame:
    """CUDA time of the attention of a layer: ``chunk`` tokens behind ``history``, ``decodes`` at ``keys``, ``us``.

    ``folder`` holds the layers of one device. ``heads`` and ``kv_heads`` are those of one rank; ``model`` says whose
    they are.
    """
    found = []
    for model, widths in MODELS.items():
        table = folder / model / "attention.parquet"
        if table.is_file():
            rows = read_table(table, list(COLUMNS)).rename(columns=COLUMNS)
            rows["heads"], rows["kv_heads"] = widths.heads / rows["tp"], (widths.kv_heads / rows["tp"]).clip(lower=1.0)
            found.append(rows.assign(model=model))
    return pd.concat(found, ignore_index=True)


@lru_cache
def launch_gap_s(kernels: Path) -> float:
    """Seconds between one kernel of a graph and the next, the median over small decodes that were timed both ways."""
    layers = timed_attention(kernels / "vllm_layers" / LAYERS)
    layers = layers[
        (layers["chunk"] == 0) & (layers["keys"] <= MOST_KEYS) & (layers["decodes"].between(1, MOST_DECODES))
    ]
    numbers = ["batch", "kv_len", "heads", "kv_heads", "head_dim", "window_size", "latency_us"]
    replays = read_table(kernels / "datacenter" / REPLAYS / "generation_attention.parquet", numbers, ["kv_dtype"])
    replays = replays[
        (replays["kv_dtype"] == "bf16") & (replays["head_dim"] == 128) & (replays["window_size"] == 0)
    ].rename(columns={"batch": "decodes", "kv_len": "keys"})
    both = layers.merge(replays, on=["decodes", "keys", "heads", "kv_heads"])
    return float(f"{(both['latency_us'] - both['us']).median() * SECONDS_PER_US:.2g}")
