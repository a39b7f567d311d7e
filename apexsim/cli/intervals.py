"""``apexsim calibrate-intervals``: the table of residuals behind the intervals of results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apexsim.errors import BadInput

if TYPE_CHECKING:
    from apexsim.uncertainty import IntervalTable, Residuals


def calibrate_intervals(
    rows: Annotated[list[Path], typer.Argument(help="Files that apexsim validate --out wrote.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the table; else the shipped one is replaced.")] = None,
) -> None:
    """Work out prediction intervals from measured runs, and how often groups left out lie inside."""
    from importlib import resources

    from apexsim.atomic import atomic_path, check_writable
    from apexsim.cli.facts import print_tables, table
    from apexsim.uncertainty import TABLE
    from apexsim.validation.intervals import calibrate_intervals as calibrated
    from apexsim.validation.intervals import read_rows

    target = out or Path(str(resources.files("apexsim"))) / TABLE
    check_writable(target, where="--out")
    if len(set(rows)) < len(rows):
        raise BadInput("give every file once", where="ROWS")
    read = [read_rows(path) for path in rows]
    sets = sorted({name for each in read for name in each["set"]})
    found = calibrated(read, f"apexsim calibrate-intervals on the sets {', '.join(sets)}")
    with atomic_path(target) as scratch:
        scratch.write_text(_text(found), encoding="utf-8")
    typer.echo(f"written to {target}", err=True)
    header = ("engine", "kind", "figure", "groups", "rows", "80 %", "covered", "90 %", "covered")
    print_tables(table(header, _lines(found), "Intervals around a prediction, and the share of runs left out inside"))


def _text(found: IntervalTable) -> str:
    """JSON with one class a line."""
    import json

    data = found.model_dump(mode="json")
    lines = ",\n  ".join(json.dumps(each) for each in data.pop("residuals"))
    return json.dumps(data)[:-1] + ', "residuals": [\n  ' + lines + "\n]}\n"


def _lines(found: IntervalTable) -> Iterator[tuple[str, ...]]:
    for each in found.residuals:
        shown = [each.engine, each.model_kind, each.figure, str(each.groups), str(each.rows)]
        for coverage in each.coverage:
            shown += [_range(found, each, coverage.level), f"{coverage.share:.0%}"]
        yield tuple(shown)


def _range(found: IntervalTable, each: Residuals, level: float) -> str:
    factors = found.range_of(each.figure, level, each.engine, each.model_kind)
    return "-" if factors is None else f"{factors[0] - 1:+.0%} to {factors[1] - 1:+.0%}"
