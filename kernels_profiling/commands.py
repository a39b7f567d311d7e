"""The command line: which commands there are; each is imported when it is asked for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import typer

from apexsim.cli.main import LazyGroup, run_line
from apexsim.errors import BadInput

# Name of a command: the function that it is. Its module must stay light: torch belongs inside the function.
COMMANDS = {
    "measure": "kernels_profiling.measure:measure",
    "live": "kernels_profiling.live:live",
    "prove": "kernels_profiling.prove:prove",
    "swiftkv": "kernels_profiling.swiftkv:swiftkv",
    "second-engine": "kernels_profiling.second_engine:second_engine",
}
NAME = "kernels_profiling"
EXTRA = "pip install 'apexsim[profiling]'"


class ProfilingGroup(LazyGroup):
    """The commands above; asking for one without torch says which extra brings it."""

    table = COMMANDS

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in self.table and "--help" not in args:
            check_torch()
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=ProfilingGroup, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def profiling() -> None:
    """Measure the operators of a device with torch, and serve on it for real."""


def check_torch() -> None:
    """Raise BadInput, saying which extra to install, where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise BadInput(f"torch is not installed; {EXTRA}")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` when ``args`` is None) and return its exit status."""
    return run_line(app, list(sys.argv[1:] if args is None else args), NAME)
