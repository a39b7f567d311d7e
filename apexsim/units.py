"""Units and number formats. Seconds, bytes, watts and joules everywhere; nanoseconds only inside ``serving/``."""

from __future__ import annotations

import math

from apexsim.errors import BadInput

NS_PER_S = 1_000_000_000

# Bytes that one stored element takes, block scales included: nvfp4 carries one fp8 scale per 16 values,
# mxfp4 one e8m0 scale per 32, fp8_block one fp32 scale per 128 x 128 (negligible), int4 one bf16 scale per 128.
DTYPE_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "int8_wo": 1.0,
    "nvfp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
    "int4_wo": 0.5 + 2 / 128,
}


def dtype_bytes(dtype: str) -> float:
    """Bytes an element of ``dtype`` takes in memory."""
    try:
        return DTYPE_BYTES[dtype]
    except KeyError:
        raise BadInput(f"use one of {', '.join(DTYPE_BYTES)}", key="dtype", got=dtype) from None


def to_ns(seconds: float) -> int:
    """Seconds to whole nanoseconds, rounded to the nearest."""
    return round(seconds * NS_PER_S)


def format_bytes(count: float) -> str:
    """Bytes for a person: binary units, three significant figures."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if size < 1000 else f"{size:.0f} TiB"


def format_seconds(seconds: float | None) -> str:
    """Seconds for a person, in the unit that suits their size; ``-`` when not known."""
    if seconds is None or math.isnan(seconds):
        return "-"
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(seconds) * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
