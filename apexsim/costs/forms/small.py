"""The small operators: element-wise kernels and the sampler."""

from __future__ import annotations

from typing import Any

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware

ELEMENTWISE = (
    Coefficient("launch_s", 1.6e-6, 0.5e-6, 6e-6, "launch and drain"),
    Coefficient("memory_efficiency", 0.75, 0.2, 0.97, "share of the HBM peak"),
    Coefficient("cached_speed", 2.0, 0.9, 8.0, "bytes a second between kernels that fit in L2, in HBM peaks"),
    Coefficient("cached_share", 0.5, 0.02, 1.5, "c: share of L2 that keeps what the kernel before has written"),
)
SAMPLING = (
    Coefficient("launch_s", 15e-6, 2e-6, 100e-6, "launches of the sampler's kernels"),
    Coefficient("passes", 1.0, 0.1, 100.0, "passes over 4-byte logits at the HBM peak"),
    Coefficient("extra_passes", 2.0, 0.01, 100.0, "further passes for sequences beyond the knee"),
    Coefficient("knee_l2_share", 0.45, 0.05, 1.5, "share of L2 whose logits cost only the first slope"),
)


def elementwise_s(moved_bytes: Any, c: Coefficients, hw: Hardware) -> Array:
    """Seconds of one kernel that reads and writes ``moved_bytes`` B: launch + B (miss / e_m + (1 - miss) / speed) / BW.

    ``miss`` = 1 / (1 + (c L2 / B)^4): what fits stays in L2 from one kernel to the next, in serving too. Without a
    measured ``cached_speed`` every byte goes to HBM.
    """
    seconds = np.asarray(moved_bytes, dtype=float) / hw.bytes_per_s
    if "cached_speed" not in c:
        return np.asarray(c["launch_s"] + seconds / c["memory_efficiency"])
    miss = 1 / (1 + (c["cached_share"] * hw.l2_bytes / np.maximum(moved_bytes, 1.0)) ** 4)
    return np.asarray(c["launch_s"] + seconds * (miss / c["memory_efficiency"] + (1 - miss) / c["cached_speed"]))


def sampling_s(sequences: Any, vocab: Any, c: Coefficients, hw: Hardware) -> Array:
    """Seconds to sample one token for every sequence: a line in logits with a second slope once they outgrow L2."""
    logits = 4.0 * np.asarray(vocab, dtype=float) * np.asarray(sequences, dtype=float)
    beyond = np.maximum(0.0, logits - c["knee_l2_share"] * hw.l2_bytes)
    return np.asarray(c["launch_s"] + (c["passes"] * logits + c["extra_passes"] * beyond) / hw.bytes_per_s)
