"""What the host takes to launch a kernel: many small ones in a row, launched singly or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernels_profiling.rig import Rig, UnsupportedHereError
from kernels_profiling.timers import clocked


def measured(point: Mapping[str, Any], rig: Rig, point_s: float) -> dict[str, Any]:
    """Seconds a kernel, by the host's clock until the last has run; ``mode`` is eager or graph."""
    kernels, mode = int(point["kernels"]), point["mode"]
    if mode == "graph" and rig.device.type != "cuda":
        raise UnsupportedHereError("CUDA graphs need a CUDA device")
    x = torch.zeros(64, device=rig.device)

    def launch() -> None:
        for _ in range(kernels):
            x.add_(1.0)

    timing = clocked(_replayed(launch) if mode == "graph" else launch, rig, point_s)
    about = {"calls": kernels, "kernel_source": f"torch {torch.__version__} add_ of 64 elements", "buffers": 1}
    seconds = {name: value / kernels for name, value in timing._asdict().items() if name.startswith("latency")}
    return {**about, "rotated_bytes": 0, "repeats": timing.repeats, **seconds}


def _replayed(launch: Any) -> Any:
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay
