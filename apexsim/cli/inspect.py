"""``apexsim list``, ``show`` and ``import-model``: what there is to build on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from apexsim.cli import facts
from apexsim.cli.options import with_flags
from apexsim.errors import BadInput


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


def list_names(listing: Annotated[Listing, typer.Argument(metavar="KIND", help="What to list.")]) -> None:
    """List models, devices, engines, workloads or policies, with their main figures."""
    facts.print_tables(facts.LISTINGS[listing.value]())


@dataclass(frozen=True)
class GraphFlags:
    """What ``show`` lowers a model under, to print its operators."""

    graph: Annotated[bool, typer.Option("--graph", help="Operators of the blocks of a model.")] = False
    tensor: Annotated[int, typer.Option(help="Tensor degree of the graph.")] = 1
    attention_data: Annotated[int, typer.Option(help="Attention-data ranks of the graph.")] = 1
    expert: Annotated[int, typer.Option(help="Expert degree of the graph.")] = 1
    weights: Annotated[str | None, typer.Option(help="Dtype of the weights in the graph; as published.")] = None


@with_flags
def show(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="model, device, engine or workload.")],
    name: Annotated[str, typer.Argument(help="A listed name, or a YAML file.")],
    *,
    plan: GraphFlags,
) -> None:
    """Show one model, device, engine or workload: its spec and what follows from it."""
    from apexsim import catalog
    from apexsim.io.yaml_files import format_yaml

    if plan.graph:
        if kind is not Kind.model:
            raise BadInput("only a model has a graph", where="--graph", got=kind.value)
        choices = {key: value for key, value in vars(plan).items() if key != "graph"}
        facts.print_tables(*facts.graph_tables(name, choices))
        return
    spec: Any = catalog.load(kind.value, name)
    if kind is Kind.device:
        facts.print_tables(*facts.device_tables(spec))
        return
    typer.echo(format_yaml(spec.model_dump(mode="json", exclude_defaults=True)), nl=False)
    if kind is Kind.model:
        facts.print_tables(facts.model_table(spec))


def import_model(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.json", help="config.json of a Hugging Face model.")],
    out: Annotated[Path | None, typer.Option(help="Write the model YAML here; else to stdout.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
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
