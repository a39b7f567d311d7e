"""``apexsim search``: judge every plan on the devices given, and rank them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import (
    AllowPluginsFlag,
    JsonFlag,
    check_targets,
    emit_json,
    keeping,
    parse_engine_options,
    progress_bar,
    table_console,
    with_flags,
)

if TYPE_CHECKING:
    from rich.table import Table

    from apexsim.search.question import Question
    from apexsim.search.study import Study

_QUESTION, _RUN = "Question", "Run"


@dataclass(frozen=True)
class SearchFlags:
    """Flags that say what is asked; None = not given, so that the search file's value or the default holds."""

    model: Annotated[str | None, typer.Option(help="Model name or YAML.", rich_help_panel=_QUESTION)] = None
    devices: Annotated[str | None, typer.Option(help="As 8xh100-sxm.", rich_help_panel=_QUESTION)] = None
    workload: Annotated[str | None, typer.Option(help="Workload name or request file.", rich_help_panel=_QUESTION)] = (
        None
    )
    objective: Annotated[
        str | None,
        typer.Option(help="latency, throughput, goodput, energy, cost or devices.", rich_help_panel=_QUESTION),
    ] = None
    slo: Annotated[str | None, typer.Option(help="As ttft_s=0.5,tpot_s=0.05.", rich_help_panel=_QUESTION)] = None
    requests: Annotated[
        int | None, typer.Option(help="So many; else as many as it takes.", rich_help_panel=_QUESTION)
    ] = None
    rate_per_s: Annotated[
        float | None, typer.Option(help="Rescale arrivals to this mean rate.", rich_help_panel=_QUESTION)
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop of so many clients.", rich_help_panel=_QUESTION)
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of all that is random; 0.", rich_help_panel=_QUESTION)] = None
    allow_idle: Annotated[
        bool | None, typer.Option("--allow-idle", help="Plans that use fewer devices too.", rich_help_panel=_QUESTION)
    ] = None
    engine: Annotated[str | None, typer.Option(help="As vllm@0.19.0, or profile.", rich_help_panel=_QUESTION)] = None
    engine_option: Annotated[
        list[str] | None, typer.Option(help="Engine field, key=value (repeatable).", rich_help_panel=_QUESTION)
    ] = None
    router: Annotated[
        str | None, typer.Option(help="How requests spread over replicas.", rich_help_panel=_QUESTION)
    ] = None
    weights: Annotated[str | None, typer.Option(help="Dtype of the weights.", rich_help_panel=_QUESTION)] = None
    moe_weights: Annotated[str | None, typer.Option(help="Dtype of expert weights.", rich_help_panel=_QUESTION)] = None
    kv_cache: Annotated[str | None, typer.Option(help="Dtype of the KV cache.", rich_help_panel=_QUESTION)] = None
    sampling: Annotated[
        str | None, typer.Option(help="greedy, or top_p (top-p, top-k).", rich_help_panel=_QUESTION)
    ] = None
    prompts: Annotated[
        str | None, typer.Option(help="text, or random_tokens (MoE: fewer experts).", rich_help_panel=_QUESTION)
    ] = None

    bill: Annotated[
        str | None,
        typer.Option(help="Devices paid for: used, node (whole ones of 8) or fleet.", rich_help_panel=_QUESTION),
    ] = None

    def choices(self) -> dict[str, Any]:
        """The flags given, as keys of a search file."""
        from apexsim.specs.slo import SLO

        given = {key: value for key, value in vars(self).items() if value is not None}
        given["engine_options"] = parse_engine_options(given.pop("engine_option", ()))
        if "slo" in given:
            given["slo"] = SLO.parse(given["slo"])
        return given


@dataclass(frozen=True)
class RunFlags:
    """Flags that say how to run the search; none of them changes the answer."""

    out: Annotated[Path | None, typer.Option(help="Folder for best.yaml and all plans.", rich_help_panel=_RUN)] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.", rich_help_panel=_RUN)] = (
        False
    )
    jobs: Annotated[int | None, typer.Option(help="Processes; the cores at hand.", min=1, rich_help_panel=_RUN)] = None
    executor: Annotated[str, typer.Option(help="local, or ray (extra \\[ray]).", rich_help_panel=_RUN)] = "local"
    allow_plugins: AllowPluginsFlag = False
    top: Annotated[int | None, typer.Option(help="Show only so many plans.", min=1, rich_help_panel=_RUN)] = None
    json: JsonFlag = None


@with_flags
def search(
    search_file: Annotated[Path | None, typer.Argument(metavar="[SEARCH.yaml]", help="A search as YAML.")] = None,
    *,
    question: SearchFlags,
    run: RunFlags,
) -> None:
    """Which tensor x pipeline x replicas plan serves a workload best? Flags outweigh the file.

    Exit status 1 when no plan keeps the SLO: all plans are still shown and written, by attainment.
    """
    from apexsim.io.search_files import study_data
    from apexsim.planning import search as find

    check_targets({"--json": run.json})
    with progress_bar("Searching") as report, keeping(run.out, "plans", report) as count:
        study = find(
            search_file,
            out=run.out,
            resume=run.resume,
            jobs=run.jobs,
            executor=run.executor,
            progress=count,
            allow_plugins=run.allow_plugins,
            **question.choices(),
        )
    if run.json:
        emit_json(study_data(study), run.json)
    _show(study, run)
    if study.winner is None:
        raise typer.Exit(1)


def _show(study: Study, run: RunFlags) -> None:
    from apexsim.search.headline import headline

    console = table_console(run.json)
    ran = [record for record in study.records if record["verdict"] in ("ok", "misses_slo")]
    others = [record for record in study.records if record not in ran]
    if ran:
        console.print(_ranking(study.question, ran[: run.top]))
    for line in _not_run(others):
        console.print(line, highlight=False)
    line = headline(study)
    console.print(line[0].upper() + line[1:] + ".", highlight=False)
    if run.out:
        console.print(f"Written to {run.out}.", highlight=False)


_KEPT = "SLO\nkept"
# Heading of a column: the figure it shows and its format. The objective is put first where it is not among them.
_COLUMNS = {
    _KEPT: ("attainment", "{:.1%}"),
    "de-\nvices": ("devices_used", "{:d}"),
    "paid\nfor": ("devices_billed", "{:d}"),
    "TTFT\np90 s": ("ttft_p90_s", "{:.3f}"),
    "TPOT\np90 s": ("tpot_p90_s", "{:.4f}"),
    "e2e\np90 s": ("e2e_p90_s", "{:.2f}"),
    "tokens\n/s": ("output_tokens_per_s", "{:.0f}"),
    "power\nW": ("mean_power_w", "{:.0f}"),
    "J\n/token": ("steady_energy_per_output_token_j", "{:.3g}"),
    "USD\n/Mtoken": ("steady_usd_per_million_output_tokens", "{:.3g}"),
}


def _ranking(question: Question, records: Sequence[dict[str, Any]]) -> Table:
    """Plans that ran, best first. A star: on the Pareto front; =: ties with the best; x, dim: not good enough."""
    objective, columns = question.objective, _columns(question, records)
    table = _table("plan", "")
    for heading, (figure, _) in columns.items():
        table.add_column(heading, justify="right", style="bold" if figure == objective.column else None)
    tied = sum(record["leads"] for record in records) > 1
    for record in records:
        missed = record["verdict"] == "misses_slo"
        marks = "=" * (tied and record["leads"]) + "*" * record["front"] + "x" * missed
        figures = [_format(record[figure], form) for figure, form in columns.values()]
        if not question.slo.limited:
            figures[list(columns).index(_KEPT)] = "-"  # there is nothing to keep
        table.add_row(record["plan"], marks, *figures, style="dim" if missed else None)
    legend = {
        "= ties with the best": tied,
        "* on the Pareto front of latency, cost and energy": any(r["front"] for r in records),
        _missed_words(question, records): any(r["verdict"] == "misses_slo" for r in records),
    }
    table.caption = "; ".join(said for said, holds in legend.items() if holds) or None
    return table


def _columns(question: Question, records: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """What the table shows: the objective first where no column holds it; devices paid for where they differ."""
    objective = question.objective
    known = {figure for figure, _ in _COLUMNS.values()} | {"devices"}
    own = {} if objective.column in known else {objective.name: (objective.column, "{:.4g}")}
    beyond = any(record["devices_billed"] != record["devices_used"] for record in records)
    return own | {heading: shown for heading, shown in _COLUMNS.items() if beyond or shown[0] != "devices_billed"}


def _missed_words(question: Question, records: Sequence[dict[str, Any]]) -> str:
    """What x means of the plans that have it."""
    slo, missed = question.slo, [record for record in records if record["verdict"] == "misses_slo"]
    if not question.objective.own_rate:
        return f"x misses the SLO ({slo.target_words}) at every rate tried"
    behind = [record for record in missed if (record["attainment"] or 0.0) >= slo.target]
    kept = f"misses the SLO ({slo.target_words})" if slo.limited else f"serves less than {slo.target_words} of requests"
    return "x " + " or ".join([kept] * (len(behind) < len(missed)) + ["does not keep up"] * bool(behind))


def _not_run(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Plans that did not run, counted by verdict and reason: a line each."""
    from apexsim.reasons import counted

    for verdict in dict.fromkeys(record["verdict"] for record in records):
        reasons = [record["reason"].split("; ")[0] for record in records if record["verdict"] == verdict]
        for count, reason in counted(reasons):
            yield f"{count} plan{'s' * (count > 1)} {verdict}: {reason}"


def _table(*headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    return Table(Column(headings[0], no_wrap=True), *headings[1:], box=SIMPLE_HEAD, padding=0, pad_edge=False)


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
