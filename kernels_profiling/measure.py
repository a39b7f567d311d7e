"""``measure``: time every operator of a device into a folder of tables, from where a run before this one stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexsim.cli.options import progress_bar, with_flags
from apexsim.errors import BadInput, nearest
from kernels_profiling.serving_flags import TINY

if TYPE_CHECKING:
    from kernels_profiling.points import Rank, Scale

# Models whose shapes are measured where none is named, and their tensor degrees.
MODELS: dict[str, tuple[str | Path, ...]] = {"cuda": ("llama-3.1-8b", "qwen3-32b", "qwen3-30b-a3b"), "cpu": (TINY,)}
DEGREES = {"cuda": (1, 2, 4, 8), "cpu": (1,)}


@dataclass(frozen=True)
class Wanted:
    """What to measure."""

    model: Annotated[
        list[str] | None, typer.Option(help="Model whose shapes are measured (repeatable): a name or a YAML.")
    ] = None
    tensor: Annotated[list[int] | None, typer.Option(min=1, help="Tensor degree of the shapes (repeatable).")] = None
    only: Annotated[str | None, typer.Option(help="Tables to measure, by comma; else all.")] = None
    quick: Annotated[bool, typer.Option("--quick", help="Small grids, short timings: a minute on a CPU.")] = False

    held_s: Annotated[
        float | None, typer.Option(min=0, max=3600, help="Seconds that sustained rows are held: 5; none with --quick.")
    ] = None

    def scale(self, device: str) -> Scale:
        """The grids for a device."""
        from kernels_profiling import points

        usual = points.CUDA if device == "cuda" else points.CPU
        scale = points.QUICK if self.quick else usual
        return scale if self.held_s is None else scale._replace(held_s=self.held_s)

    def ranks(self, device: str) -> list[Rank]:
        """The models at their tensor degrees."""
        from apexsim import catalog
        from kernels_profiling.points import check_measured, ranks

        models = [catalog.load("model", name) for name in self.model or MODELS[device]]
        for model in models:
            check_measured(model)
        found = ranks(models, self.tensor or DEGREES[device])
        if not found:
            raise BadInput("it divides no model's heads, vocabulary and FFN", where="--tensor", got=self.tensor)
        return found

    def tables(self) -> tuple[str, ...]:
        """Names of the tables asked for."""
        from kernels_profiling.tables import SIZES

        names = tuple(name.strip() for name in self.only.split(",")) if self.only is not None else tuple(SIZES)
        if unknown := [name for name in names if name not in SIZES]:
            raise BadInput(nearest(unknown[0], SIZES), where="--only", got=unknown[0])
        return names


@dataclass(frozen=True)
class Limits:
    """How long, on how many cores, over how many ranks."""

    budget_s: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds; run again to go on.")] = (
        None
    )
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on a CPU; else one.")] = None
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that collectives run over (NCCL; gloo on a CPU).")] = 1


@with_flags
def measure(
    out: Annotated[Path, typer.Option(help="Folder of the tables; a run that was cut short goes on there.")],
    wanted: Wanted,
    limits: Limits,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    """Time the operators of a device with torch: tables for ``apexsim fit TABLES --device NAME --out FILE``."""
    from kernels_profiling.machine import rig_of, set_threads, torch_device
    from kernels_profiling.points import all_points
    from kernels_profiling.session import Session
    from kernels_profiling.tables import Tables

    where = torch_device(device)
    set_threads(where, limits.threads)
    names = wanted.tables()
    of = wanted.ranks(device)
    points = [point for point in all_points(wanted.scale(device), of, limits.ranks) if point[0] in names]
    session = Session(Tables(out), rig_of(where), wanted.scale(device).point_s)
    with progress_bar(f"measuring into {out}") as report:
        left = session.run(points, report, limits.budget_s)
    typer.echo(session.summary(left), err=True)
