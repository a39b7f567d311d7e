"""``apexsim simulate``: one deployment, one workload, every figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import (
    AllowPluginsFlag,
    DeploymentFlags,
    JsonFlag,
    WorkloadFlags,
    check_targets,
    deployment_from_flags,
    emit_json,
    progress_bar,
    table_console,
    with_flags,
)
from apexsim.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table

    from apexsim.results import SimulationResult

_LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end", "queue_s": "queueing"}
# A steady figure of a short window is not shown where its relative half-width is more.
_WIDEST_SHOWN = 0.3
_UTILIZATION = {
    "mfu": "FLOPs",
    "mbu": "memory bandwidth",
    "busy": "busy",
    "kv_cache_mean": "KV cache mean",
    "kv_cache_peak": "peak",
}


@dataclass(frozen=True)
class OutputFlags:
    """Where the findings go, beside the table."""

    json: JsonFlag = None
    requests_out: Annotated[Path | None, typer.Option(help="One row a request, parquet.", rich_help_panel="Output")] = (
        None
    )
    out: Annotated[
        Path | None, typer.Option(help="Folder for the whole result; apexsim.load reads it.", rich_help_panel="Output")
    ] = None
    timeline: Annotated[
        Path | None, typer.Option(help="Steps of every replica, Chrome trace JSON.", rich_help_panel="Output")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Figure: PNG, PDF or SVG.", rich_help_panel="Output")] = None

    def check(self) -> None:
        """Refuse files that could not be written, before any work."""
        from apexsim.atomic import make_folder
        from apexsim.plots import check_plot_path
        from apexsim.result_files import FILES

        targets = {"--json": self.json, "--requests-out": self.requests_out, "--timeline": self.timeline}
        check_targets({**targets, "--plot": self.plot})
        if self.out:
            make_folder(self.out, files=FILES)
            _check_unused(self.out)
        if self.plot:
            check_plot_path(self.plot, where="--plot")
        if self.requests_out and self.requests_out.suffix != ".parquet":
            raise BadInput("end the name in .parquet", where="--requests-out", got=str(self.requests_out))

    def write(self, result: SimulationResult) -> None:
        """Write every file that was asked for."""
        if self.requests_out:
            from apexsim.tables import write_table

            write_table(self.requests_out, result.request_columns)
        if self.out:
            result.save(self.out)
        if self.timeline:
            from apexsim.io.timeline import write_timeline

            write_timeline(self.timeline, result)
        if self.plot:
            from apexsim.plots import plot_simulation

            plot_simulation(result, self.plot)
        if self.json:
            emit_json(result.summary(), self.json)


def _check_unused(folder: Path) -> None:
    """Refuse a folder that holds the result of a simulation, a search or a sweep."""
    from apexsim.io.search_files import STUDY_FILES
    from apexsim.result_files import FILES
    from apexsim.search.journal import FILE_NAME
    from apexsim.sweep import TABLE

    there = [name for name in dict.fromkeys((*FILES, *STUDY_FILES, TABLE, FILE_NAME)) if (folder / name).exists()]
    if there:
        raise BadInput(f"{folder} holds results; give another --out", where="--out", got=", ".join(there))


@with_flags
def simulate(
    deployment_flags: DeploymentFlags,
    workload_flags: WorkloadFlags,
    output_flags: OutputFlags,
    deployment: Annotated[
        Path | None, typer.Argument(help="Deployment YAML; flags outweigh it.", metavar="[DEPLOYMENT.yaml]")
    ] = None,
    exact_steps: Annotated[bool, typer.Option("--exact-steps", help="Simulate every step singly (slow).")] = False,
    allow_plugins: AllowPluginsFlag = False,
) -> None:
    """Serve a workload with one deployment: latencies, throughput, SLO, energy, cost and utilization."""
    output_flags.check()
    slo = workload_flags.read_slo()
    served = deployment_from_flags(deployment, deployment_flags, allow_plugins=allow_plugins)
    requests = workload_flags.read()

    from rich.text import Text

    from apexsim.serving.simulator import simulate as run

    with progress_bar("simulating") as progress:
        result = run(served, requests, slo=slo, seed=workload_flags.seed, exact_steps=exact_steps, progress=progress)
    output_flags.write(result)
    console = table_console(output_flags.json)
    for table in summary_tables(result):
        console.print(table)
    for note in result.notes:
        console.print(Text(f"note: {note}", style="dim"))


def summary_tables(result: SimulationResult) -> list[Table]:
    """The summary of a run for a person: latencies, then everything else."""
    from apexsim.plots import describe

    summary = result.summary()
    return [_latency_table(summary, describe(result)), _figure_table(summary, result)]


def _latency_table(summary: dict[str, Any], title: str) -> Table:
    from rich.table import Table

    from apexsim.units import format_seconds

    columns = list(summary["ttft_s"])
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("latency")
    for column in columns:
        table.add_column(column, justify="right")
    for key, name in _LATENCIES.items():
        table.add_row(name, *(format_seconds(summary[key][column]) for column in columns))
    return table


def _figure_table(summary: dict[str, Any], result: SimulationResult) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, said in _figures(summary, result):
        table.add_row(name, said)
    return table


def _figures(summary: dict[str, Any], result: SimulationResult) -> list[tuple[str, str]]:
    counts, rates, slo = summary["requests"], summary["throughput"], summary["slo"]
    used, steady = summary["utilization"], summary["steady"]
    others = "".join(f", {counts[verdict]:,} {verdict}" for verdict in ("rejected", "unfinished") if counts[verdict])
    duration = f"{summary['duration_s']:,.1f} s"
    return [
        ("requests", f"{counts['finished']:,} of {counts['total']:,} finished{others} in {duration}"),
        (
            "throughput",
            f"{_figure(rates['requests_per_s'])} requests/s, {_figure(rates['output_tokens_per_s'])} output tokens/s, "
            f"{_figure(rates['total_tokens_per_s'])} tokens/s",
        ),
        ("SLO", _slo_line(result, slo)),
        ("steady", _steady_line(steady)),
        ("energy", _energy_line(summary["energy"], steady)),
        ("cost", _cost_line(summary["cost"], steady)),
        ("memory", memory_line(summary["memory"])),
        ("utilization", ", ".join(f"{name} {_percent(used[key])}" for key, name in _UTILIZATION.items())),
        ("preemptions", f"{summary['preemptions']:,}"),
        ("device time", _evidence_line(summary["provenance"])),
    ]


def memory_line(memory: dict[str, Any]) -> str:
    """Memory of a replica for a person."""
    from apexsim.units import format_bytes

    possible = memory["kv_tokens_range"]
    tokens = f"{memory['kv_tokens']:,} tokens" + (f" ({possible[0]:,} to {possible[1]:,})" if possible else "")
    most = f"{_figure(memory['max_concurrency_at_context'])} requests of {memory['max_model_len']:,} tokens"
    bytes_of = {name: format_bytes(memory[f"{name}_bytes"]) for name in ("weights", "kv")}
    return f"{bytes_of['weights']} of weights a replica, {bytes_of['kv']} of KV cache: {tokens}, {most}"


def _steady_line(steady: dict[str, Any]) -> str:
    """Where the steady part lies, and why it may decide nothing."""
    if steady["kind"] == "all_at_once" or steady["window_s"] is None:
        return f"{steady['kind'].replace('_', ' ')}: {steady['reason']}"
    window = f"{_figure(steady['from_s'])} to {_figure(steady['to_s'])} s, {_percent(steady['share'])} of the run"
    said = f"{window}, {steady['requests']:,} requests"
    return said if steady["kind"] == "steady" else f"{steady['kind']}: {said}; {steady['reason']}"


def _energy_line(energy: dict[str, Any], steady: dict[str, Any]) -> str:
    """The steady figure, then all those of the whole run together."""
    unit, told = "J/output token", _steady_figure(steady, "energy_per_output_token_j")
    around = f"with servers {_figure(energy['server']['per_output_token_j'])}"
    around += f", building {_figure(energy['facility']['per_output_token_j'])}"
    whole = f"{_figure(energy['per_output_token_j'])} {unit}, {around}; {_figure(energy['mean_power_w'])} W on average"
    return f"{told} {unit}; whole run: {whole}" if told else f"{whole} ({_whole_alone(steady)})"


def _cost_line(cost: dict[str, Any], steady: dict[str, Any]) -> str:
    key = "usd_per_million_output_tokens"
    unit, whole, told = "USD/million output tokens", _figure(cost[key]), _steady_figure(steady, key)
    figure = f"{told} {unit} (whole run {whole})" if told else f"{whole} {unit} ({_whole_alone(steady)})"
    devices = f"{cost['billed_devices']:,} billed device{'s' if cost['billed_devices'] > 1 else ''}"
    return f"{figure} at {_figure(cost['usd_per_hour'])} USD/hour for {devices}"


def _steady_figure(steady: dict[str, Any], key: str) -> str | None:
    """A steady figure with its half-width; None where there is none, or it is too wide to mean anything."""
    value, width = steady[key], steady["half_width"][key]
    if steady["kind"] == "all_at_once" or value is None:
        return None
    if steady["kind"] == "short" and (width is None or width > _WIDEST_SHOWN):
        return None
    return _figure(value) + ("" if width is None else f" +- {_figure(width * value)}")


def _whole_alone(steady: dict[str, Any]) -> str:
    """What to say of a figure of the whole run that stands alone."""
    return "whole run; too short for a steady figure" if steady["kind"] == "short" else "whole run"


def _slo_line(result: SimulationResult, slo: dict[str, float | None]) -> str:
    if result.slo is None:
        return "none given"
    limits = ", ".join(
        f"{key} <= {value:g}" for key, value in result.slo.model_dump(exclude={"target"}).items() if value
    )
    # Rounded down: 100 % must mean all of them.
    met = math.floor(1000 * (slo["attainment"] or 0.0)) / 1000
    return f"{met:.1%} meet {limits}: {_figure(slo['good_requests_per_s'])} good requests/s"


def _evidence_line(provenance: dict[str, dict[str, float]]) -> str:
    totals: dict[str, float] = {}
    for shares in provenance.values():
        for evidence, share in shares.items():
            totals[evidence] = totals.get(evidence, 0.0) + share
    return ", ".join(f"{_percent(share)} {evidence}" for evidence, share in totals.items()) or "-"


def _figure(value: float | None) -> str:
    """Three significant figures, thousands separated; ``-`` when not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
