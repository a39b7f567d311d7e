"""``swiftkv``: what running prompts through the first layers only saves, measured beside the FLOPs it leaves out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import check_targets, with_flags
from apexsim.errors import BadInput
from kernels_profiling.serving_flags import ModelFlags

if TYPE_CHECKING:
    import torch

    from apexsim.specs.model import ModelSpec
    from kernels_profiling.transformer import Packed

_BLOCK_SIZE = 16
_PROMPTS = (128, 256, 512, 1024, 2048)
# Repeats of a prompt: at least so many and so many seconds, the median counts.
_REPEATS, _REPEAT_S = 5, 0.5


@dataclass(frozen=True)
class Saved:
    """Prefill of one prompt: seconds without and with SwiftKV, and the share of FLOPs it leaves out."""

    prompt_tokens: int
    plain_s: float
    swiftkv_s: float
    flops_saved: float

    @property
    def time_saved(self) -> float:
        """Share of the time of a plain prefill."""
        return 1 - self.swiftkv_s / self.plain_s


@with_flags
def swiftkv(
    model_flags: ModelFlags,
    swiftkv_layers: Annotated[
        int | None, typer.Option(help="Layers that see every prompt token; default the first half.")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompt length (repeatable); default 128 to 2048.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV of the same figures.")] = None,
) -> None:
    """Time prefills with and without SwiftKV, beside the share of FLOPs that it saves."""
    from kernels_profiling.transformer import check_layers, check_supported

    check_targets({"--out": out})
    place, model = model_flags.place(), model_flags.spec()
    check_supported(model)
    layers = check_layers(model, max(1, model.layers // 2) if swiftkv_layers is None else swiftkv_layers)
    found = measure_saved(model, layers, _prompts(model, prompt_tokens), place)
    _print(model, layers, found)
    if out:
        _write(out, found)


def _prompts(model: ModelSpec, given: list[int] | None) -> list[int]:
    """Prompt lengths as given, else the usual ones that its context holds. Raises BadInput for one that it does not."""
    longest = model.max_context
    if too_long := [tokens for tokens in given or () if tokens > longest]:
        said = f"give at most {longest}, the context of {model.name}"
        raise BadInput(said, where="--prompt-tokens", got=too_long[0])
    return given or [tokens for tokens in _PROMPTS if tokens <= longest] or [longest]


def measure_saved(model: ModelSpec, layers: int, prompts: list[int], place: torch.Tensor) -> list[Saved]:
    """Times of prefills of every length, in the dtype and on the device of ``place``; plain and SwiftKV take turns."""
    from kernels_profiling.transformer import CacheShape, Transformer

    shape = CacheShape(-(-max(prompts) // _BLOCK_SIZE), _BLOCK_SIZE, max(prompts))
    network = Transformer(model, shape, like=place)
    found = []
    for tokens in prompts:
        packed = _prompt(tokens, model.vocab, place)

        def run(first: int, packed: Packed = packed) -> None:
            network.first = first
            network.forward(packed).tolist()

        plain_s, swift_s = _alternately(lambda run=run: run(model.layers), lambda run=run: run(layers))  # type: ignore[misc]
        found.append(Saved(tokens, plain_s, swift_s, flops_saved(model, layers, tokens)))
    return found


def flops_saved(model: ModelSpec, layers: int, prompt_tokens: int) -> float:
    """Share of a prefill's FLOPs that SwiftKV leaves out: of later layers, all but K and V of every token but the last.

    2 per multiply-add of active matrices, 4 x heads x head_dim per attended token, and the LM head of the last token.
    """
    contexts = prompt_tokens * (prompt_tokens + 1) / 2
    attention = 4.0 * model.heads * model.head_dim
    cached = 2.0 * 2 * model.hidden * model.kv_heads * model.head_dim
    layer = (model.flops_per_token(0) - 2.0 * model.vocab * model.hidden) / model.layers
    whole = model.layers * (prompt_tokens * layer + attention * contexts) + 2.0 * model.vocab * model.hidden
    before_last = contexts - prompt_tokens
    left_out = (model.layers - layers) * ((prompt_tokens - 1) * (layer - cached) + attention * before_last)
    return left_out / whole


def _prompt(tokens: int, vocab: int, place: torch.Tensor) -> Packed:
    """A prompt alone in the first blocks."""
    import torch

    from kernels_profiling.transformer import Packed

    device = place.device
    positions = torch.arange(tokens, device=device)
    return Packed(
        ids=torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device),
        positions=positions,
        slots=positions,
        tables=torch.arange(-(-tokens // _BLOCK_SIZE), dtype=torch.int32, device=device)[None],
        lengths=torch.tensor([tokens], dtype=torch.int32, device=device),
        last=torch.tensor([tokens - 1], device=device),
        decodes=0,
        chunks=[(tokens, 0)],
    )


def _alternately(*works: Callable[[], None]) -> list[float]:
    """Median seconds of each, run in turns so that a disturbance meets all alike."""
    import numpy as np

    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    until = time.perf_counter() + len(works) * _REPEAT_S
    while len(times[0]) < _REPEATS or time.perf_counter() < until:
        for work, spent in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return [float(np.median(spent)) for spent in times]


def _print(model: ModelSpec, layers: int, found: list[Saved]) -> None:
    from rich.table import Table

    from apexsim.cli.options import table_console

    title = f"{model.name}: prompts through {layers} of {model.layers} layers"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("prompt tokens", "plain s", "SwiftKV s", "time saved", "FLOPs saved"):
        table.add_column(heading, justify="right")
    for row in found:
        times = f"{row.plain_s:.4g}", f"{row.swiftkv_s:.4g}"
        table.add_row(str(row.prompt_tokens), *times, f"{row.time_saved:.1%}", f"{row.flops_saved:.1%}")
    table_console(None).print(table)


def _write(path: Path, found: list[Saved]) -> None:
    import pandas as pd

    from apexsim.atomic import atomic_path

    rows: list[dict[str, Any]] = [{**vars(row), "time_saved": row.time_saved} for row in found]
    with atomic_path(path) as scratch:
        pd.DataFrame(rows).to_csv(scratch, index=False)
