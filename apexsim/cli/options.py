"""What the commands share: groups of flags, reading them, progress and output."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from apexsim.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from apexsim.io.words import EngineOption
    from apexsim.specs.deployment import Deployment
    from apexsim.specs.slo import SLO
    from apexsim.specs.workload import Requests

Command = TypeVar("Command", bound=Callable[..., Any])

# A bar for a moment's work is noise.
_PROGRESS_AFTER_S = 2.0
# Columns of a table that goes to a file or a pipe.
_FILE_WIDTH = 120
_DEPLOYMENT, _WORKLOAD, _OUTPUT = "Deployment", "Workload", "Output"


@dataclass(frozen=True)
class DeploymentFlags:
    """Flags that describe one deployment; None = not given, so that a YAML file's value or the default holds."""

    model: Annotated[
        str | None, typer.Option(help="Model name (apexsim list models) or YAML.", rich_help_panel=_DEPLOYMENT)
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Device name (apexsim list devices) or YAML.", rich_help_panel=_DEPLOYMENT)
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(help="As vllm@0.19.0, or profile; else vllm-v1-async.", rich_help_panel=_DEPLOYMENT),
    ] = None
    tensor: Annotated[int | None, typer.Option(help="Tensor-parallel degree.", rich_help_panel=_DEPLOYMENT)] = None
    pipeline: Annotated[int | None, typer.Option(help="Pipeline stages.", rich_help_panel=_DEPLOYMENT)] = None
    expert: Annotated[
        int | None,
        typer.Option(help="Expert degree; divides --tensor x --attention-data.", rich_help_panel=_DEPLOYMENT),
    ] = None
    attention_data: Annotated[
        int | None, typer.Option(help="Data-parallel ranks of attention (MoE).", rich_help_panel=_DEPLOYMENT)
    ] = None
    replicas: Annotated[int | None, typer.Option(help="Data-parallel replicas.", rich_help_panel=_DEPLOYMENT)] = None
    router: Annotated[
        str | None, typer.Option(help="How requests are spread over replicas.", rich_help_panel=_DEPLOYMENT)
    ] = None
    weights: Annotated[str | None, typer.Option(help="Dtype of the weights.", rich_help_panel=_DEPLOYMENT)] = None
    moe_weights: Annotated[str | None, typer.Option(help="Dtype of expert weights.", rich_help_panel=_DEPLOYMENT)] = (
        None
    )
    kv_cache: Annotated[
        str | None, typer.Option(help="Dtype of the KV cache; the engine's own.", rich_help_panel=_DEPLOYMENT)
    ] = None
    sampling: Annotated[
        str | None, typer.Option(help="greedy, or top_p (top-p, top-k).", rich_help_panel=_DEPLOYMENT)
    ] = None
    prompts: Annotated[
        str | None, typer.Option(help="text, or random_tokens (MoE: fewer experts).", rich_help_panel=_DEPLOYMENT)
    ] = None
    nodes: Annotated[int | None, typer.Option(help="Nodes of the cluster.", rich_help_panel=_DEPLOYMENT)] = None
    devices_per_node: Annotated[int | None, typer.Option(help="Devices a node.", rich_help_panel=_DEPLOYMENT)] = None
    bill: Annotated[
        str | None, typer.Option(help="Devices paid for: used, node or fleet.", rich_help_panel=_DEPLOYMENT)
    ] = None
    clock_mhz: Annotated[
        float | None, typer.Option(help="Hold devices at a lower clock (extrapolated).", rich_help_panel=_DEPLOYMENT)
    ] = None
    engine_option: Annotated[
        list[str] | None,
        typer.Option(help="Engine field, key=value (repeatable), as max_num_seqs=128.", rich_help_panel=_DEPLOYMENT),
    ] = None


@dataclass(frozen=True)
class WorkloadFlags:
    """Flags that describe the requests and what they may expect."""

    workload: Annotated[str, typer.Option(help="Workload name or request file.", rich_help_panel=_WORKLOAD)]
    rate_per_s: Annotated[
        float | None, typer.Option(help="Rescale arrivals to this mean rate.", rich_help_panel=_WORKLOAD)
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop of so many clients.", rich_help_panel=_WORKLOAD)
    ] = None
    requests: Annotated[
        int | None, typer.Option(help="How many: drawn, or the first of a file.", rich_help_panel=_WORKLOAD)
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.", rich_help_panel=_WORKLOAD)] = 0
    slo: Annotated[str | None, typer.Option(help="Limits, as ttft_s=0.5,tpot_s=0.05.", rich_help_panel=_WORKLOAD)] = (
        None
    )

    def read(self) -> Requests:
        """The requests these flags describe."""
        from apexsim.io.search_files import Traffic

        given = {key: value for key, value in vars(self).items() if key != "slo"}
        return Traffic.model_construct(**given).read()  # unchecked here: reading them names the flags

    def read_slo(self) -> SLO | None:
        """The limits, None when none is given."""
        from apexsim.specs.slo import SLO

        if self.slo is None:
            return None
        slo = SLO.parse(self.slo)
        if not slo.model_dump(exclude={"target"}, exclude_none=True):
            raise BadInput("give at least one limit, as ttft_s=0.5", where="--slo", got=self.slo)
        return slo


JsonFlag = Annotated[
    str | None, typer.Option("--json", help="Write JSON to this file, or to stdout with -.", rich_help_panel=_OUTPUT)
]

AllowPluginsFlag = Annotated[
    bool, typer.Option("--allow-plugins", help="Import code that a file names, as module:Name.")
]


def with_flags(command: Command) -> Command:
    """Let ``command`` take groups of flags: a parameter whose type is a dataclass stands for all of its fields.

    typer sees one flat function; the command gets its dataclasses, built.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        flat += (
            _flags_of(hints[parameter.name])
            if parameter.name in groups
            else [parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)]
        )

    def flattened(**given: Any) -> Any:
        built = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        return command(**given, **built)

    flattened.__doc__, flattened.__name__ = command.__doc__, command.__name__
    flattened.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return flattened  # type: ignore[return-value]


def _flags_of(kind: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(kind).parameters
    hints = get_type_hints(kind, include_extras=True)
    return [p.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY) for name, p in parameters.items()]


def deployment_from_flags(path: Path | None, flags: DeploymentFlags, *, allow_plugins: bool) -> Deployment:
    """The lawful deployment that a YAML file, flags, or both describe; a flag outweighs the file.

    Raises Unsupported, naming the file, where its pools do not run so far.
    """
    from apexsim.io.deployments import deployment_from

    choices = {key: value for key, value in vars(flags).items() if value is not None and key != "engine_option"}
    options = parse_engine_options(flags.engine_option or ())
    deployment = deployment_from(path, {**choices, "engine_options": options}, allow_plugins=allow_plugins)
    deployment.check_colocated(path)
    return deployment


def parse_engine_options(items: Iterable[str]) -> dict[str, EngineOption]:
    """Read ``key=value`` items; values become booleans, numbers, None or stay text, as in YAML."""
    options: dict[str, EngineOption] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise BadInput("give key=value, as in max_num_seqs=128", where="--engine-option", got=item)
        if key.strip() in options:
            raise BadInput("give it once", where="--engine-option", got=item)
        options[key.strip()] = _plain(value.strip())
    return options


def _plain(text: str) -> EngineOption:
    words: dict[str, EngineOption] = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def check_targets(targets: Mapping[str, Path | str | None]) -> None:
    """Refuse an output file that could not be written before any work is done; keys are the flags."""
    from apexsim.atomic import check_writable, is_stream

    taken: dict[str, str] = {}
    for flag, target in targets.items():
        if target is None or (flag == "--json" and target == "-"):
            continue
        check_writable(target, where=flag)
        if is_stream(target):
            continue
        first = taken.setdefault(os.path.realpath(target), flag)
        if first != flag:
            raise BadInput(f"is the file of {first} too; give each its own", where=flag, got=str(target))


def emit_json(data: Mapping[str, Any], target: str) -> None:
    """Write one JSON object to a file, atomically, or to stdout when ``target`` is ``-``."""
    from apexsim.atomic import json_text, write_json

    if target == "-":
        sys.stdout.write(json_text(data))
        sys.stdout.flush()
    else:
        write_json(target, data)


def table_console(json_target: str | None) -> Console:
    """Where tables go: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    # Names and reasons are text, whatever brackets stand in them.
    plain = partial(Console, stderr=json_target == "-", markup=False, emoji=False)
    console = plain()
    return console if console.is_terminal else plain(width=_FILE_WIDTH)


@contextmanager
def keeping(folder: Path | None, what: str, report: Callable[[float], None]) -> Iterator[Callable[[int, int], None]]:
    """Give a callback that takes (done, all) and reports the share; an interrupt then says what ``folder`` keeps."""
    counted = ""

    def count(done: int, total: int) -> None:
        nonlocal counted
        counted = f"{done} of {total} "
        report(done / total)

    try:
        yield count
    except KeyboardInterrupt as error:
        if folder is None:
            error.add_note(f"{counted}{what} were done and are lost: give --out to keep them")
        else:
            error.add_note(f"{counted}{what} are kept in {folder}; continue with --resume")
        raise


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float], None]]:
    """Give a callback that takes the fraction done; a terminal's stderr shows a bar after two seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    task, begun = bar.add_task(label, total=1.0), time.monotonic()

    def report(fraction: float) -> None:
        if not console.is_terminal or time.monotonic() - begun < _PROGRESS_AFTER_S:
            return
        bar.start()
        bar.update(task, completed=fraction)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
