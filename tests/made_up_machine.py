"""A machine whose time is made up: kernels really run, and each moves a clock on by what a simple law says it takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

# A launch, bytes and FLOPs, one after the other: slow enough that a second holds few steps to compute.
LAUNCH_S, BYTES_PER_S, FLOPS_PER_S = 50e-6, 2e9, 2e10
# Calls that read or write a few rows of a large tensor.
OF_ROWS = {"index_select", "embedding", "__getitem__"}
PRODUCTS = {"linear", "matmul", "__matmul__"}


class MadeUpMachine(TorchFunctionMode):
    """The clock, as long as the block lasts. ``spread`` is that of a factor drawn for every kernel, in log space.

    After ``quick_s`` seconds kernels take ``slowness`` times as long.
    """

    def __init__(self, *, spread: float = 0.0, quick_s: float = 0.0, slowness: float = 1.0) -> None:
        super().__init__()
        self._draw = np.random.default_rng(0)
        self._spread, self._quick_s, self._slowness = spread, quick_s, slowness
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until(self, at_ns: int) -> None:
        self._now_ns = max(self._now_ns, at_ns)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if seconds := law_s(func.__name__, args, out):
            factor = self._slowness if self._now_ns > 1e9 * self._quick_s else 1.0
            factor *= float(np.exp(self._spread * self._draw.standard_normal()))
            self._now_ns += max(1, round(1e9 * factor * seconds))
        return out


def law_s(name: str, args: Any, out: Any) -> float:
    """Seconds that a call takes; nothing where it makes a view, or no tensor."""
    given = list(tensors(args))
    if name in ("__setitem__", "index_copy_"):
        return LAUNCH_S + 2 * given[-1].nbytes / BYTES_PER_S
    made = list(tensors([out]))
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    in_place = name.endswith("_") and not name.endswith("__")
    if not made or (not in_place and all(tensor.untyped_storage().data_ptr() in known for tensor in made)):
        return 0.0
    moved = sum(tensor.nbytes for tensor in made) * (2 if name in OF_ROWS else 1)
    moved += 0 if name in OF_ROWS else sum(tensor.nbytes for tensor in given)
    flops = 0
    if name in PRODUCTS:
        flops = 2 * out.numel() * given[0].shape[-1]
    if name == "scaled_dot_product_attention":
        chunk, keys = given[0].shape[-2], given[1].shape[-2]
        flops = 4 * given[0].numel() * (keys - (chunk - 1) / 2)
    return LAUNCH_S + moved / BYTES_PER_S + flops / FLOPS_PER_S


def tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The tensors among values and inside lists of them; masks, which kernels never read, are none."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from tensors(value)
        elif type(value) is torch.Tensor:
            yield value
