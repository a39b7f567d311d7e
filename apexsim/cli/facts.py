"""Tables of ``apexsim list`` and ``apexsim show``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apexsim.specs.base import Spec

if TYPE_CHECKING:
    from rich.table import Table

    from apexsim.specs.device import DeviceProfile
    from apexsim.specs.layers import LayerKind
    from apexsim.specs.model import ModelSpec

Row = tuple[str, ...]


def print_tables(*tables: Table) -> None:
    """Print tables to stdout."""
    from rich.console import Console

    # In a file or a pipe rows stay whole, for grep and awk.
    console = Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 250)
    for table in tables:
        console.print(table)


def table(header: Row, rows: Iterable[Row], title: str | None = None) -> Table:
    """A table of text; columns of numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, title=title, title_justify="left", header_style="bold", padding=(0, 2, 0, 0))
    rows = list(rows)
    for index, name in enumerate(header):
        numbers = all(row[index][:1].isdigit() or row[index] in ("-", "") for row in rows)
        table.add_column(name, justify="right" if numbers and index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _models() -> Table:
    from apexsim import catalog

    specs = [catalog.load("model", name) for name in catalog.names("model")]
    header = ("model", "kind", "parameters", "active", "layers", "heads", "KV heads", "experts", "context")
    rows = [
        (
            spec.name,
            spec.kind,
            f"{spec.params / 1e9:.1f}e9",
            f"{spec.active_params / 1e9:.1f}e9",
            str(spec.layers),
            str(spec.heads),
            str(spec.kv_heads),
            str(spec.moe.experts) if spec.moe else "-",
            f"{spec.max_context:,}",
        )
        for spec in specs
    ]
    return table(header, rows)


def _devices() -> Table:
    from apexsim import catalog
    from apexsim.units import format_bytes

    specs = [catalog.load("device", name) for name in catalog.names("device")]
    header = ("device", "memory", "memory/s", "bf16 FLOP/s", "power", "USD/hour")
    rows = [
        (
            spec.name,
            format_bytes(spec.datasheet.memory_bytes),
            format_bytes(spec.datasheet.memory_bytes_per_s),
            f"{spec.datasheet.flops_per_s['bf16']:.3g}",
            f"{spec.datasheet.tdp_w:g} W",
            f"{spec.price.usd_per_hour:g}",
        )
        for spec in specs
    ]
    return table(header, rows)


def _engines() -> Table:
    from apexsim import catalog

    specs = [catalog.load("engine", name) for name in catalog.names("engine")]
    rows = [(s.name, f"{s.engine} {_span(s.versions)}", s.scheduler.policy, s.evidence) for s in specs]
    return table(("engine", "versions", "policy", "evidence"), rows)


def _span(versions: tuple[str, ...]) -> str:
    return f"{versions[0]} to {versions[-1]}" if len(versions) > 4 else ", ".join(versions)


def _workloads() -> Table:
    from apexsim import catalog

    rows = [(name, catalog.load("workload", name).source or "-") for name in catalog.names("workload")]
    return table(("workload", "source"), rows)


def _policies() -> Table:
    from apexsim.io.engines import policy_classes

    rows = [
        (name, kind, (cls.__doc__ or "").strip().splitlines()[0].replace("`", ""))
        for kind, classes in policy_classes().items()
        for name, cls in sorted(classes.items())
    ]
    return table(("policy", "kind", "what it does"), rows)


LISTINGS: dict[str, Callable[[], Table]] = {
    "models": _models,
    "devices": _devices,
    "engines": _engines,
    "workloads": _workloads,
    "policies": _policies,
}


def model_table(model: ModelSpec) -> Table:
    """What follows from a model's spec."""
    from apexsim.units import format_bytes

    dtype = model.published_dtype
    experts = model.expert_dtype(dtype)
    of_experts = f" (experts {experts})" if model.moe else ""
    kv_bytes = sum(group.bytes_per_token("bf16") for group in model.kv_groups)
    rows = [
        ("parameters", f"{model.params:,}"),
        ("active parameters", f"{model.active_params:,}"),
        (f"weights, {dtype}{of_experts}", format_bytes(model.weight_bytes(dtype, experts))),
        ("KV cache of a token, bf16", format_bytes(kv_bytes)),
        *(
            [("state of a sequence", format_bytes(model.state_bytes_of(range(model.layers))))]
            if model.recurrent
            else []
        ),
        ("FLOPs of a token at context 1", f"{model.flops_per_token(1):.4g}"),
    ]
    return table(("", model.name), rows)


def device_tables(device: DeviceProfile) -> list[Table]:
    """Datasheet, price and power of a device, then how well each of its operators is known."""
    sheet = device.datasheet.model_dump(exclude={"flops_per_s", "nccl_bytes", "source"})
    facts = [(key, f"{value:,}") for key, value in sheet.items()]
    facts += [(f"flops_per_s.{dtype}", f"{rate:.4g}") for dtype, rate in device.datasheet.flops_per_s.items()]
    facts += [("datasheet source", device.datasheet.source)]
    price = device.price
    facts += [("price", f"{price.usd_per_hour:g} USD/hour ({price.source}, {price.date})")]
    sustained = device.sustained
    slower = f"products up to {max(sustained.factors):g} x slower ({sustained.evidence}; {sustained.source})"
    facts += [("sustained load", slower)]
    facts += [("profile made", f"{device.provenance.date} by {device.provenance.tool}")]
    return [table(("", device.name), facts), _power_table(device), _operator_table(device), _quality_table(device)]


def _power_table(device: DeviceProfile) -> Table:
    """Every coefficient of power with its evidence, then how far watts are off where they were measured."""
    power = device.power
    names = ("limit_w", "idle_w", "active_w", "comm_w", "gap_w", "j_per_byte")
    rows: list[tuple[str, str, str]] = [(name, f"{getattr(power, name):.4g}", power.evidence[name]) for name in names]
    rows += [
        (f"j_per_flop.{dtype}", f"{j:.4g}", power.evidence[f"j_per_flop.{dtype}"])
        for dtype, j in power.j_per_flop.items()
    ]
    for kind, own in power.operators.items():
        if own.active_w is not None:
            rows.append((f"{kind}.active_w", f"{own.active_w:.4g}", own.evidence))
        rows += [(f"{kind}.j_per_flop.{d}", f"{j:.4g}", own.evidence) for d, j in own.j_per_flop.items()]
    if power.clock:
        clock = power.clock
        law = f"{clock.nominal_mhz:g} MHz; voltage {clock.least_voltage:g} up to {clock.knee_mhz:g} MHz, then linear"
        rows.append(("clock", law, clock.evidence))
    for scored, error in power.quality.items():
        rows.append((f"error: {scored}", f"{error.mean:.1%}, bias {error.bias:+.1%}", f"{error.rows:,} rows"))
    return table(("power", "", "evidence"), [*rows, ("source", power.source, "")], "Power")


def _operator_table(device: DeviceProfile) -> Table:
    header = ("operator", "key", "evidence", "rows used", "dropped", "source")
    rows = [
        (kind, key, op.evidence, f"{op.rows_used:,}", f"{sum(op.rows_dropped.values()):,}", op.source)
        for kind, by_key in device.operators.items()
        for key, op in by_key.items()
    ]
    return table(header, rows, "Operators")


def _quality_table(device: DeviceProfile) -> Table:
    header = ("operator", "key", "hold-out", "median", "p90", "rows scored")
    rows = [
        (kind, key, name, f"{held_out.median:.1%}", f"{held_out.p90:.1%}", f"{held_out.rows:,}")
        for kind, by_key in device.operators.items()
        for key, op in by_key.items()
        for name, held_out in op.quality.items()
    ]
    return table(header, rows, "Fit quality: error on rows that were held out of the fit")


def graph_tables(name: str, plan: dict[str, Any]) -> list[Table]:
    """The operators of each kind of block of a model under a plan, with the shapes that one rank runs."""
    from apexsim import catalog
    from apexsim.costs.lowering import lower
    from apexsim.io.deployments import DeploymentFile, check_lawful, resolve_deployment
    from apexsim.specs.base import parse_spec

    # Shapes depend on the model and the plan alone: any device will do.
    device = catalog.names("device")[0]
    deployment = resolve_deployment(
        parse_spec(DeploymentFile, {"model": name, "device": device, **plan}, "show"), "show"
    )
    check_lawful(deployment, "show")
    lowered = lower(deployment.colocated_server())
    tables = []
    for block in lowered.blocks:
        layers = sum(count for stage in lowered.stages for found, count in stage.blocks if found is block)
        title = f"{layers} layers: {', '.join(_parts(block.kind))}"
        tables.append(table(("operator", "kind", "shape of one rank", "feeds"), _graph_rows(block.graph), title))
    return tables


def _parts(kind: LayerKind) -> list[str]:
    """What a kind of layer is made of."""
    mixers = {"attention": f"window of {kind.window}" if kind.window else "full attention", "recurrent": "recurrent"}
    ffn = ["experts" if kind.moe else "dense"] if kind.ffn else []
    return [*([mixers[kind.mixer]] if kind.mixer else []), *ffn]


def _graph_rows(graph: Any) -> list[Row]:
    rows: list[Row] = []
    for name, data in graph.nodes(data=True):
        operator = data["operator"]
        rows.append((name, operator.kind, ", ".join(_shape(operator)), ", ".join(graph.successors(name))))
    return rows


def _shape(operator: Any) -> list[str]:
    """Sizes of an operator, those of a shape inside it among them."""
    said = []
    for key, value in asdict(operator).items():
        if isinstance(value, tuple | Spec):
            inside = value.model_dump() if isinstance(value, Spec) else value._asdict()  # type: ignore[attr-defined]
            said += [f"{inner} {size}" for inner, size in inside.items() if size is not None]
        elif key not in ("name", "kind"):
            said.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return said
