"""Flags of the commands that serve, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexsim.errors import BadInput, nearest

if TYPE_CHECKING:
    import torch

    from apexsim.specs.model import ModelSpec
    from apexsim.specs.workload import Requests

# More seats, or tokens of a step, than these make buffers that no device holds.
MOST_SEATS, MOST_TOKENS = 1 << 16, 1 << 20
TINY = Path(__file__).parent / "models" / "tiny.yaml"


@dataclass(frozen=True)
class ModelFlags:
    """The model and where it runs."""

    model: Annotated[str, typer.Option(help="Model name or YAML; its weights are random.")] = str(TINY)
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda"
    dtype: Annotated[str, typer.Option(help="bf16 or fp32: weights, activations and KV cache.")] = "bf16"
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU; else one.")] = None

    def place(self) -> torch.Tensor:
        """An empty tensor of that dtype, on that device."""
        import torch

        from kernels_profiling.machine import set_threads, torch_device

        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
        if self.dtype not in dtypes:
            raise BadInput(nearest(self.dtype, dtypes), where="--dtype", got=self.dtype)
        device = torch_device(self.device)
        set_threads(device, self.threads)
        return torch.empty(0, dtype=dtypes[self.dtype], device=device)

    def spec(self) -> ModelSpec:
        """The shape of the model."""
        from apexsim import catalog

        return catalog.load("model", self.model)


@dataclass(frozen=True)
class LoadFlags:
    """The requests."""

    workload: Annotated[str, typer.Option(help="Workload name or request file.")] = "chat"
    rate_per_s: Annotated[float | None, typer.Option(help="Rescale arrivals to this mean rate.")] = None
    concurrency: Annotated[int | None, typer.Option(help="Closed loop of so many clients.")] = None
    requests: Annotated[int | None, typer.Option(help="How many: drawn, or the first of a file.")] = None
    seed: Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")] = 0

    def read(self) -> Requests:
        """The requests that these flags describe."""
        from apexsim.io.requests import resolve_workload

        return resolve_workload(
            self.workload,
            rate_per_s=self.rate_per_s,
            concurrency=self.concurrency,
            requests=self.requests,
            seed=self.seed,
        )
