"""``apexsim list``, ``show`` and ``import-model``: what there is to build on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from apexsim.cli import facts
from apexsim.cli.options import (
    AllowPluginsFlag,
    DeploymentFlags,
    JsonFlag,
    check_targets,
    deployment_from_flags,
    emit_json,
    table_console,
    with_flags,
)
from apexsim.errors import BadInput, InfeasiblePlan

if TYPE_CHECKING:
    from apexsim import catalog
    from apexsim.specs.deployment import Deployment


class Listing(StrEnum):
    """What can be listed."""

    models = "models"
    devices = "devices"
    engines = "engines"
    workloads = "workloads"
    policies = "policies"


class Kind(StrEnum):
    """What can be shown."""

    model = "model"
    device = "device"
    engine = "engine"
    workload = "workload"
    memory = "memory"


def list_names(listing: Annotated[Listing, typer.Argument(metavar="KIND", help="What to list.")]) -> None:
    """List models, devices, engines, workloads or policies, with their main figures."""
    facts.print_tables(facts.LISTINGS[listing.value]())


@with_flags
def show(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="model, device, engine, workload, or memory.")],
    name: Annotated[
        str | None, typer.Argument(help="A listed name, or a YAML file; of memory a deployment YAML.")
    ] = None,
    *,
    plan: DeploymentFlags,
    graph: Annotated[bool, typer.Option("--graph", help="Operators of the blocks of a model.")] = False,
    json: JsonFlag = None,
    allow_plugins: AllowPluginsFlag = False,
) -> None:
    """Show one model, device, engine or workload: its spec and what follows from it.

    memory: what a replica of a deployment holds, and whether its engine would start.
    """
    given = {key: value for key, value in vars(plan).items() if value is not None}
    if kind is Kind.memory:
        check_targets({"--json": json})
        _show_memory(deployment_from_flags(Path(name) if name else None, plan, allow_plugins=allow_plugins), json)
        return
    if name is None:
        raise BadInput(f"give the name of a {kind.value}", where="show")
    if json is not None:
        raise BadInput("only memory is written as JSON", where="--json", got=kind.value)
    if graph:
        if kind is not Kind.model:
            raise BadInput("only a model has a graph", where="--graph", got=kind.value)
        facts.print_tables(*facts.graph_tables(name, _layout_choices(given)))
        return
    if given:
        raise BadInput("describes a deployment: give it with memory or --graph", where=_flag(next(iter(given))))
    _show_spec(cast("catalog.Kind", kind.value), name)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _layout_choices(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that a graph depends on; ``BadInput`` on any other."""
    known = ("tensor", "attention_data", "expert", "weights")
    for key in given:
        if key not in known:
            raise BadInput(f"a graph depends on {', '.join(map(_flag, known))} alone", where=_flag(key))
    return given


def _show_spec(kind: catalog.Kind, name: str) -> None:
    from apexsim import catalog
    from apexsim.io.yaml_files import format_yaml

    spec: Any = catalog.load(kind, name)
    if kind == "device":
        facts.print_tables(*facts.device_tables(spec))
        return
    typer.echo(format_yaml(spec.model_dump(mode="json", exclude_defaults=True)), nl=False)
    if kind == "model":
        facts.print_tables(facts.model_table(spec))


def _show_memory(deployment: Deployment, json: str | None) -> None:
    """Whether the engine would start, and its memory, device by device; ``InfeasiblePlan`` where it would not."""
    from apexsim.cli.memory import memory_table, refused_table, whether_it_starts
    from apexsim.costs.starting import start

    console, asked = table_console(json), deployment.colocated_server()
    try:
        engine = start(asked)
    except InfeasiblePlan as error:
        console.print(f"starts: no; {error}", soft_wrap=True, highlight=False)
        console.print(refused_table(asked))
        raise
    figures = engine.memory.figures(engine.server.context_limit)
    starts = whether_it_starts(asked, engine)
    if json:
        emit_json({"starts": starts, "memory": figures, "notes": list(engine.notes)}, json)
    console.print(f"starts: {starts}", soft_wrap=True, highlight=False)
    console.print(memory_table(engine.server, figures))
    for note in engine.notes:
        typer.echo(f"note: {note}", err=json == "-")


def import_model(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.json", help="config.json of a Hugging Face model.")],
    out: Annotated[Path | None, typer.Option(help="Write the model YAML here; else to stdout.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; else that of the file, or of the folder of a config.json.")
    ] = None,
) -> None:
    """Turn a Hugging Face config.json into a model YAML."""
    from apexsim.atomic import check_writable
    from apexsim.io.hf_config import import_model as read
    from apexsim.io.yaml_files import format_yaml, write_yaml

    if out:
        check_writable(out, where="--out")
    spec = read(config, name=name)
    data = spec.model_dump(mode="json", exclude_defaults=True)
    if out:
        write_yaml(out, data)
        weights = f"; weights {spec.checkpoint.described}" if spec.checkpoint else ""
        typer.echo(f"{spec.name}: written to {out}: {spec.source}{weights}", err=True)
    else:
        typer.echo(format_yaml(data), nl=False)
