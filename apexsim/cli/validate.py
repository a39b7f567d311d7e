"""``apexsim validate``: simulated beside measured, run by run, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from apexsim.cli.options import (
    AllowPluginsFlag,
    JsonFlag,
    check_targets,
    emit_json,
    progress_bar,
    table_console,
    with_flags,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from apexsim.validation.runs import MeasuredRun

Itl = Literal["predicted", "measured"]
_ROWS, _OUTPUT = "Rows", "Output"


@dataclass(frozen=True)
class RowFlags:
    """Flags that choose among the rows of the files."""

    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows whose column has this value, as model=qwen3-32b (repeatable).", rich_help_panel=_ROWS
        ),
    ] = None
    sample: Annotated[
        int | None, typer.Option(help="Only so many rows of each file, drawn.", min=1, rich_help_panel=_ROWS)
    ] = None
    seed: Annotated[
        int, typer.Option(help="Seed of lengths that are drawn, and of --sample.", rich_help_panel=_ROWS)
    ] = 0
    allow_plugins: AllowPluginsFlag = False

    def read(self, files: Sequence[Path]) -> list[MeasuredRun]:
        """The rows asked for, in the order of the files."""
        from apexsim.validation.runs import read_runs, sampled, selected

        chosen = [selected(read_runs(file, allow_plugins=self.allow_plugins), self.where or (), file) for file in files]
        return [run for runs in chosen for run in (sampled(runs, self.sample, self.seed) if self.sample else runs)]


@dataclass(frozen=True)
class OutputFlags:
    """Where the results go, beside the tables."""

    out: Annotated[
        Path | None, typer.Option(help="CSV: every input column, predicted_*, status.", rich_help_panel=_OUTPUT)
    ] = None
    json_target: JsonFlag = None
    plot: Annotated[
        Path | None, typer.Option(help="Figure: predicted over measured, errors.", rich_help_panel=_OUTPUT)
    ] = None


@with_flags
def validate(
    runs: Annotated[list[Path], typer.Argument(help="runs.csv files: one measured run a row.")],
    rows: RowFlags,
    output: OutputFlags,
    itl: Annotated[
        Itl, typer.Option(help="Step times for energy: predicted, or rescaled to the measured ITL.")
    ] = "predicted",
    jobs: Annotated[int | None, typer.Option(help="Processes; default all cores.", min=1)] = None,
) -> None:
    """Simulate measured runs as they were run, and say how wrong the simulator is."""
    from apexsim.plots import check_plot_path, plot_validation
    from apexsim.validation.replay import run_rows
    from apexsim.validation.report import report
    from apexsim.validation.scores import with_parts

    check_targets({"--out": output.out, "--json": output.json_target, "--plot": output.plot})
    if output.plot:
        check_plot_path(output.plot, where="--plot")
    chosen = rows.read(runs)
    with progress_bar("validate") as progress:
        table = run_rows(chosen, itl=itl, seed=rows.seed, jobs=jobs, progress=progress)
    if output.out:
        _write_csv(table, output.out)
    parted = with_parts(table)
    found = report(parted)
    _print_tables(table_console(output.json_target), found)
    if output.json_target:
        emit_json(found, output.json_target)
    if output.plot:
        plot_validation(parted, output.plot)


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    from apexsim.atomic import atomic_path

    with atomic_path(path) as scratch:
        table.to_csv(scratch, index=False)


def _print_tables(console: Console, found: dict[str, Any]) -> None:
    for title, key in (("model kind", "by_class"), ("engine and device", "by_engine"), ("model", "by_model")):
        _print_scores(console, title, found[key])
    console.print(
        "\n* on the rows that have a peer; for power and energy without one, constant power of each device and kind"
    )
    for figure, (ahead, groups) in found["ahead_of_peer"].items():
        console.print(f"ahead of the peer in {ahead} of {groups} groups on {figure}", highlight=False)
    _print_records(console, "Decisions: most output tokens/s per device under a TPOT limit (%)", found["decisions"])
    _print_records(console, "Decisions by model, most regret in all first (%)", found["decisions_by_model"])
    _print_records(console, "Requests one by one (%)", found["requests"])
    for title, key in (("What became of the rows", "statuses"), ("What the rows left open", "assumed")):
        console.print(f"\n{title}", style="bold")
        for said, count in found[key].items():
            console.print(f"  {count:5d}  {said}", highlight=False, markup=False)


def _print_scores(console: Console, title: str, groups: Sequence[dict[str, Any]]) -> None:
    """A table a set and part: a line for each figure of each group; labels that repeat those above are left out."""
    for name, part in dict.fromkeys((group["set"], group["part"]) for group in groups):
        mine = [group for group in groups if (group["set"], group["part"]) == (name, part)]
        labels = [key for key in mine[0] if key not in ("set", "part", "rows", "predicted", "figures")]
        above, lines = dict.fromkeys(labels, ""), []
        for group in mine:
            for figure, errors in (group["figures"] or {"nothing measured": group}).items():
                shown = ["" if group[key] == above[key] else str(group[key]) for key in labels]
                numbers = [_number(errors.get(key), form) for key, form in _NUMBERS.items()]
                lines.append([*shown, _FIGURES.get(figure, figure), *numbers])
                above = group
        _print_lines(console, f"{name}, {part}: errors in % by {title}", [*labels, "figure", *_NUMBERS], lines)


# How each column of a score is written.
_NUMBERS = {
    "rows": "{:d}", "predicted": "{:d}", "mape": "{:.1f}", "median": "{:.1f}", "bias": "{:+.1f}",
    "on_peer_rows": "{:.1f}", "peer_mape": "{:.1f}",
}  # fmt: skip
_FIGURES = {
    "ttft_mean_s": "TTFT", "tpot_mean_s": "TPOT", "itl_mean_s": "ITL", "itl_p50_s": "ITL median", "e2e_mean_s": "e2e",
    "output_tokens_per_s": "tokens/s", "power_w": "power", "energy_per_output_token_j": "J/token",
}  # fmt: skip
_HEADINGS = {
    "model_kind": "kind", "predicted": "pred.", "mape": "MAPE", "on_peer_rows": "ours*", "peer_mape": "peer*",
}  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _print_records(console: Console, title: str, records: Sequence[dict[str, Any]]) -> None:
    if records:
        lines = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in record.values()] for record in records]
        _print_lines(console, title, list(records[0]), lines)


def _print_lines(console: Console, title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(_HEADINGS.get(heading, heading.replace("_", " ")), no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table)
