"""The small operators: element-wise kernels and the sampler."""

from __future__ import annotations

from typing import Any

import numpy as np

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware

ELEMENTWISE = (
    Coefficient("launch_s", 1.6e-6, 0.5e-6, 6e-6, "launch and drain"),
    Coefficient("memory_efficiency", 0.75, 0.2, 0.97, "share of the HBM peak"),
)
SAMPLING = (
    Coefficient("launch_s", 15e-6, 2e-6, 100e-6, "launches of the sampler's kernels"),
    Coefficient("passes", 1.0, 0.1, 100.0, "passes over 4-byte logits at the HBM peak"),
    Coefficient("extra_passes", 2.0, 0.01, 100.0, "further passes for sequences beyond the knee"),
    Coefficient("knee_l2_share", 0.45, 0.05, 1.5, "share of L2 whose logits cost only the first slope"),
)


def elementwise_s(moved_bytes: Any, c: Coefficients, hw: Hardware) -> Array:
    """Seconds of one kernel that reads and writes ``moved_bytes``: launch + bytes / (efficiency x HBM peak)."""
    return np.asarray(c["launch_s"] + moved_bytes / (hw.bytes_per_s * c["memory_efficiency"]))


def sampling_s(sequences: Any, vocab: Any, c: Coefficients, hw: Hardware) -> Array:
    """Seconds to sample one token for every sequence: a line in logits with a second slope once they outgrow L2."""
    logits = 4.0 * np.asarray(vocab, dtype=float) * np.asarray(sequences, dtype=float)
    beyond = np.maximum(0.0, logits - c["knee_l2_share"] * hw.l2_bytes)
    return np.asarray(c["launch_s"] + (c["passes"] * logits + c["extra_passes"] * beyond) / hw.bytes_per_s)
