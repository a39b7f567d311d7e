"""Operators that no table of a data-centre device measures: their form from elsewhere, marked estimated."""

from __future__ import annotations

from apexsim.specs.device import FittedOperator, SustainedClock


def elementwise() -> FittedOperator:
    """Element-wise kernels: launch inside a CUDA graph and three quarters of the HBM peak."""
    return FittedOperator(
        form="elementwise",
        coefficients={"launch_s": 1.6e-6, "memory_efficiency": 0.75},
        evidence="estimated",
        source="form of the norm and rope rows of vllm_layers; constants that reproduce served runs",
    )


def sustained() -> SustainedClock:
    """Slow-down of compute-bound products under sustained load, of a 700 W Hopper device."""
    return SustainedClock(evidence="estimated", source="none")
