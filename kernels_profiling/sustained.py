"""Burst against sustained: the same case timed in a moment, and replayed for seconds with its power."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernels_profiling.operators import CASES
from kernels_profiling.rig import Rig
from kernels_profiling.timers import hold, time_case

# Heads of the attention that is held: those of an 8B model, on a CPU too.
HEADS = {"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "window_size": 0, "kv_dtype": "bf16"}


def held(point: Mapping[str, Any], rig: Rig, point_s: float) -> dict[str, Any]:
    """``latency_s`` over ``held_s`` seconds of replays, ``burst_latency_s`` before them, and the watts drawn.

    ``content`` is what weights and cache hold: normal (as random weights and trained ones do, about) or zeros, which
    draw far less.
    """
    case = CASES[point["operator"]](_sizes(point), rig.with_content(point["content"]))
    timing = time_case(case, rig, point_s)
    latency_s, drawn = hold(case, rig, float(point["held_s"]), rig.meter)
    about = {"kernel_source": case.kernel_source, "buffers": case.buffers, "rotated_bytes": case.rotated_bytes}
    measured = {"latency_s": latency_s, "burst_latency_s": timing.latency_s, "repeats": 1, "calls": timing.calls}
    measured |= {"latency_mean_s": latency_s, "latency_p10_s": latency_s}
    return {**about, **measured, "power_w": drawn.power_w, "sm_clock_mhz": drawn.sm_clock_mhz}


def _sizes(point: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of the operator's own table: (m, n, k), (chunk) or (batch, keys)."""
    first, second, third = (int(point[f"size_{at}"]) for at in range(3))
    if point["operator"] == "gemm":
        return {"m": first, "n": second, "k": third, "dtype": "bf16"}
    if point["operator"] == "prefill_attention":
        return {**HEADS, "q_len": first, "kv_len": first}
    return {**HEADS, "batch": first, "q_len": 1, "kv_len": second}
