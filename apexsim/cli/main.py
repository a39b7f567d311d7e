"""The ``apexsim`` command: which commands there are, and how a run ends.

Exit status: 0 done, 1 nothing feasible, 2 bad input (one line that says what would do), 3 internal error,
130 and 143 ended by Ctrl-C and SIGTERM.
A command's module is imported only when the command is asked for, so that ``apexsim --help`` is quick.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from apexsim.errors import ApexsimError, BadInput, InfeasiblePlan, nearest, printable

# Name of a command: the function that it is. Its module must stay light: heavy imports belong inside the function.
COMMANDS = {
    "simulate": "apexsim.cli.simulate:simulate",
    "search": "apexsim.cli.search:search",
    "sweep": "apexsim.cli.sweep:sweep",
    "validate": "apexsim.cli.validate:validate",
    "calibrate": "apexsim.cli.calibrate:calibrate",
    "calibrate-intervals": "apexsim.cli.intervals:calibrate_intervals",
    "list": "apexsim.cli.inspect:list_names",
    "show": "apexsim.cli.inspect:show",
    "import-model": "apexsim.cli.inspect:import_model",
    "fit": "apexsim.cli.fit:fit",
    "device": "apexsim.cli.device:device",
}

# Every fault in the use of flags is one of these, in all releases of typer.
_UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, so that scratch files and workers go and what is kept is said."""


class _InterruptedRun(Exception):
    """Raised from a KeyboardInterrupt."""


class LazyGroup(TyperGroup):
    """The commands of a table like the one above, each imported when it is first asked for."""

    table: Mapping[str, str] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.table:
            return None
        if cmd_name not in self.commands:
            module, function = self.table[cmd_name].split(":")
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(getattr(importlib.import_module(module), function))
            self.commands[cmd_name] = typer.main.get_command(single)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.table:
            raise BadInput(f"unknown command; {nearest(args[0], self.table)}", got=args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would end with 130 and say nothing
            raise _InterruptedRun from error


app = typer.Typer(cls=LazyGroup, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _print_version(asked: bool) -> None:
    if asked:
        from apexsim import __version__

        typer.echo(f"apexsim {__version__}")
        raise typer.Exit


@app.callback()
def apexsim(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Which deployment of a model serves a workload within its SLO at the least cost, energy or hardware?"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` when ``args`` is None) and return its exit status."""
    return run_line(app, list(sys.argv[1:] if args is None else args), "apexsim")


def run_line(commands: typer.Typer, given: Sequence[str], name: str) -> int:
    """Run one command line of the program ``name`` and return its exit status; a fault is one line on stderr."""
    try:
        with _terminable():
            status = int(commands(given or ["--help"], prog_name=name, standalone_mode=False) or 0)
            sys.stdout.flush()
        return status
    except (BrokenPipeError, SystemExit) as error:
        # The reader of our output left (``| head``): not a fault, and nothing more can be said to it. typer turns
        # a broken pipe that it meets itself into SystemExit.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_stdout()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status, line = _verdict(error, name)
        if isinstance(error, OSError):  # it may be stdout that is full, and the rest of it would be tried again
            _drop_stdout()
        if status == 3 and os.environ.get("APEXSIM_TRACEBACK"):
            raise
        typer.echo(f"{name}: {line}", err=True)
        return status


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated`` meanwhile; elsewhere than in the main thread there is no way to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the clearing up
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _verdict(error: BaseException, name: str) -> tuple[int, str]:
    """Exit status of a failed run, and its one line."""
    if isinstance(error, InfeasiblePlan):
        return 1, printable(f"infeasible: {error}")
    if isinstance(error, ApexsimError | _UsageError):
        return 2, printable(str(error) if isinstance(error, ApexsimError) else _usage_line(error, name))
    if isinstance(error, KeyboardInterrupt | _InterruptedRun | typer.Abort):
        return _interrupted(error.__cause__ or error)
    if isinstance(error, MemoryError):
        return 2, "there is not enough memory for this; give fewer requests or a smaller file"
    said = printable(str(error))
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder taken away
        return 2, said
    return 3, f"internal error: {type(error).__name__}: {said}; set APEXSIM_TRACEBACK=1 to see where"


def _interrupted(error: BaseException) -> tuple[int, str]:
    status, what = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
    return status, "; ".join([what, *getattr(error, "__notes__", ("no file is left half-written",))])


def _usage_line(error: Any, name: str) -> str:
    command = error.ctx.command_path.removeprefix(name).strip() if error.ctx else ""
    said = " ".join(error.format_message().split())
    if would_do := _word_for(getattr(error, "option_name", None)):
        said = f"no such option: {error.option_name}; say {would_do}"
    return f"{command}: {said}" if command else said


def _word_for(option: str | None) -> str | None:
    """What a flag of an engine is called here; None for other options, and where it is no option that is at fault."""
    from apexsim.io.words import FLAGS

    return FLAGS.get((option or "").lstrip("-").replace("-", "_"))


def run() -> None:
    """Entry point of the console script."""
    # Policies and routers named module:Name are looked for here too, last, as with ``python -m``.
    sys.path.append(os.getcwd())
    sys.exit(main())


if __name__ == "__main__":
    run()
