"""Collectives through torch.distributed, over ranks that are processes of this machine: NCCL on GPUs, gloo on a CPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from kernels_profiling.timers import summarised

WARM_UP, REPEATS, CALLS = 3, 20, 5
TIMEOUT = timedelta(minutes=10)
Outcome = dict[str, Any]


def measured(points: Sequence[Mapping[str, Any]], device: torch.device) -> list[Outcome]:
    """Outcomes of collectives over one group of ranks; ``bytes`` as nccl-tests counts them, the largest of a rank."""
    group = int(points[0]["num_gpus"])
    if device.type == "cuda" and torch.cuda.device_count() < group:
        said = f"{group} ranks need as many GPUs; there are {torch.cuda.device_count()}"
        return [{"status": "unsupported", "error": said} for _ in points]
    with tempfile.TemporaryDirectory() as folder:
        wanted = [(str(point["collective"]), int(point["bytes"])) for point in points]
        try:
            start_processes(_rank, (group, device.type, wanted, folder), nprocs=group, start_method="spawn")
            found: list[Outcome] = json.loads(_answer(folder).read_text())
        except Exception as error:  # a rank that died: torch wraps what it raised
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found = [{"status": "failed", "error": lines[-1][:300]} for _ in points]
    source = f"torch {torch.__version__} {_backend(device.type)}"
    return [{"kernel_source": source, "buffers": 1, "rotated_bytes": 0, **outcome} for outcome in found]


def _backend(kind: str) -> str:
    return "nccl" if kind == "cuda" else "gloo"


def _answer(folder: str) -> Path:
    return Path(folder) / "outcomes.json"


def _rank(rank: int, group: int, kind: str, wanted: list[tuple[str, int]], folder: str) -> None:
    """One rank: every collective in turn; the first rank writes what it saw."""
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    meeting = f"file://{folder}/store"
    dist.init_process_group(_backend(kind), init_method=meeting, rank=rank, world_size=group, timeout=TIMEOUT)
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    found = [_outcome(name, size, group, device) for name, size in wanted]
    if rank == 0:
        _answer(folder).write_text(json.dumps(found))
    dist.destroy_process_group()


def _outcome(name: str, size: int, group: int, device: torch.device) -> Outcome:
    """Timing of one collective, or why there is none; what a backend lacks fails on all ranks alike."""
    elements = max(group, size // 2 // group * group)
    whole = torch.ones(elements, dtype=torch.bfloat16, device=device)
    part = torch.ones(elements // group, dtype=torch.bfloat16, device=device)
    run = _calls(whole, part)[name]
    try:
        for _ in range(WARM_UP):
            run()
        seconds = [_repeat_s(run, device) for _ in range(REPEATS)]
    except (RuntimeError, ValueError) as error:
        return {"status": "failed", "error": " ".join(str(error).split())[:300]}
    return {"status": "ok", **summarised(seconds, CALLS)._asdict()}


def _repeat_s(run: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


def _calls(whole: Tensor, part: Tensor) -> dict[str, Callable[[], object]]:
    """Every collective over a buffer of the group and one of a rank's share."""
    other = torch.empty_like(whole)
    # Newer releases of torch have other names for two of them, and warn of these.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: gather(whole, part),
        "reduce_scatter": lambda: scatter(part, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "send_recv": lambda: _hand_over(whole),
    }


def _hand_over(buffer: Tensor) -> None:
    """The first rank sends, the second receives."""
    if dist.get_rank() == 0:
        dist.send(buffer, 1)
    elif dist.get_rank() == 1:
        dist.recv(buffer, 0)
