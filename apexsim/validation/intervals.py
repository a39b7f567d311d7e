"""Residuals of measured runs by class, and how often a run of a group left out lies where the others say.

The arithmetic of ``apexsim.uncertainty``, over the rows that ``validate`` predicted and scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from apexsim.errors import BadInput
from apexsim.reading import check_regular
from apexsim.uncertainty import ANY, FIGURES, Coverage, Figure, IntervalTable, Residuals
from apexsim.validation.scores import SCORED, UNVERSIONED, with_parts

if TYPE_CHECKING:
    import pandas as pd

# |r - median| is kept at these probabilities, straight lines between.
PROBABILITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0)
LEVELS = (0.8, 0.9)
GROUP = ("model", "device", "engine")

COLUMNS: dict[Figure, str] = {
    "ttft_s": "ttft_mean_s",
    "tpot_s": "tpot_mean_s",
    "e2e_s": "e2e_mean_s",
    "output_tokens_per_s": "output_tokens_per_s",
    "energy_per_output_token_j": "energy_per_output_token_j",
}
_NEEDED = ("set", *GROUP, "model_kind", "version_known", "status")
# Columns that may be empty throughout, which a reader of CSV would take for numbers.
_TEXTS = ("task", "exclude", "exclude_ttft")
_DIGITS = 4

Floats = npt.NDArray[np.float64]


class Group(NamedTuple):
    """ln(measured / predicted) of one figure in the runs of one model on one device under one engine."""

    engine: str
    model_kind: str
    device: str
    residuals: Floats


def read_rows(path: Path) -> pd.DataFrame:
    """The rows that ``validate --out`` wrote; BadInput for anything else."""
    import pandas as pd

    check_regular(path)
    try:
        table = pd.read_csv(path, low_memory=False, dtype=dict.fromkeys(_TEXTS, str))
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, pd.errors.ParserError):
        raise BadInput("is not a CSV file; give what apexsim validate --out wrote", where=path) from None
    if missing := [name for name in _NEEDED if name not in table]:
        raise BadInput("give a file that apexsim validate --out wrote", where=path, key=missing[0])
    _check_figures(table, path)
    return table.fillna({name: "" for name in _TEXTS if name in table})


def _check_figures(table: pd.DataFrame, path: Path) -> None:
    """Raise BadInput where a measured or predicted figure is not a finite number."""
    import pandas as pd

    for name in [f"{prefix}{figure}" for figure in COLUMNS.values() for prefix in ("", "predicted_")]:
        if name in table:
            cells = table[name].dropna()
            wrong = cells[~np.isfinite(pd.to_numeric(cells, errors="coerce").astype(float))]
            if len(wrong):
                at = f"{name}, row {wrong.index[0] + 1} (the first data row is 1)"
                raise BadInput("give a finite number, or leave it empty", where=path, key=at, got=wrong.iloc[0])


def calibrate_intervals(tables: Sequence[pd.DataFrame], source: str) -> IntervalTable:
    """The table of residuals by class, with the coverage of every class's groups when each is left out.

    Raises BadInput where no row has a prediction.
    """
    import pandas as pd

    rows = pd.concat([with_parts(table) for table in tables], ignore_index=True)
    rows = rows[rows["part"].isin((SCORED, UNVERSIONED))]
    groups = {figure: groups_of(rows, figure) for figure in FIGURES}
    if not any(groups.values()):
        raise BadInput("no row is both measured and predicted", where=source)
    found = [each for figure in FIGURES for each in _classes(groups[figure], figure)]
    devices = sorted({group.device for of_figure in groups.values() for group in of_figure})
    return IntervalTable(source=source, devices=tuple(devices), probabilities=PROBABILITIES, residuals=tuple(found))


def groups_of(rows: pd.DataFrame, figure: Figure) -> list[Group]:
    """Groups in order of their names, of the rows of ``with_parts`` that have the figure measured and predicted."""
    name = COLUMNS[figure]
    if figure == "ttft_s" and "exclude_ttft" in rows:
        rows = rows[rows["exclude_ttft"].fillna("") == ""]
    rows = rows[(rows[name] > 0) & (rows[f"predicted_{name}"] > 0)]
    rows = rows.assign(residual=np.log(rows[name] / rows[f"predicted_{name}"]))
    return [
        Group(str(engine), str(of["model_kind"].iloc[0]), str(device), of["residual"].to_numpy())
        for (_, device, engine), of in rows.groupby(list(GROUP), sort=True)
    ]


def _classes(groups: Sequence[Group], figure: Figure) -> Iterator[Residuals]:
    """Every class that has groups, the narrow ones first."""
    covered = _covered(groups, figure)
    engines, kinds = sorted({group.engine for group in groups}), sorted({group.model_kind for group in groups})
    names = [(engine, kind) for engine in engines for kind in kinds] + [(ANY, kind) for kind in kinds] + [(ANY, ANY)]
    for engine, kind in names:
        mine = [
            at for at, group in enumerate(groups) if engine in (ANY, group.engine) and kind in (ANY, group.model_kind)
        ]
        if mine:
            coverage = [
                Coverage(level=level, share=round(float(shares[mine].mean()), _DIGITS), groups=len(mine))
                for level, shares in covered.items()
            ]
            fitted = residuals_of([groups[at] for at in mine], figure, engine, kind)
            yield fitted.model_copy(update={"coverage": tuple(coverage)})


def _covered(groups: Sequence[Group], figure: Figure) -> dict[float, Floats]:
    """Share of each group's rows inside the interval that all other groups give, by level; 1 where they give none.

    Nothing is said of such a run from others, so nothing wrong.
    """
    covered = {level: np.ones(len(groups)) for level in LEVELS}
    for at, left in enumerate(groups):
        others = [*groups[:at], *groups[at + 1 :]]
        table = _table_for(others, figure, left)
        for level, shares in covered.items():
            found = table.range_of(figure, level, left.engine, left.model_kind) if table else None
            if found:
                low, high = np.log(found[0]), np.log(found[1])
                shares[at] = ((left.residuals >= low) & (left.residuals <= high)).mean()
    return covered


def _table_for(groups: Sequence[Group], figure: Figure, run: Group) -> IntervalTable | None:
    """The classes that may answer for a run, from ``groups`` alone."""
    found = []
    for engine, kind in ((run.engine, run.model_kind), (ANY, run.model_kind), (ANY, ANY)):
        mine = [each for each in groups if engine in (ANY, each.engine) and kind in (ANY, each.model_kind)]
        if mine:
            found.append(residuals_of(mine, figure, engine, kind))
    return IntervalTable(source="", devices=(), probabilities=PROBABILITIES, residuals=tuple(found)) if found else None


def residuals_of(groups: Sequence[Group], figure: Figure, engine: str, model_kind: str) -> Residuals:
    """Median and spread of the residuals of ``groups``, each group weighing the same."""
    values = np.concatenate([group.residuals for group in groups])
    weights = np.concatenate([np.full(len(group.residuals), 1 / len(group.residuals)) for group in groups])
    median = round(float(weighted_quantiles(values, weights, [0.5])[0]), _DIGITS)
    spread = weighted_quantiles(np.abs(values - median), weights, PROBABILITIES)
    return Residuals(
        engine=engine,
        model_kind=model_kind,
        figure=figure,
        groups=len(groups),
        rows=len(values),
        median=median,
        spread=tuple(round(float(value), _DIGITS) for value in spread),
    )


def weighted_quantiles(values: Floats, weights: Floats, probabilities: Sequence[float]) -> Floats:
    """Least of ``values`` that, with those below it, has each share of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    at = np.searchsorted(reached, np.asarray(probabilities) - 1e-12)
    return np.asarray(values[order][np.minimum(at, len(values) - 1)])
