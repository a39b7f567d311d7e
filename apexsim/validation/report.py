"""Everything that a validation found, as plain data: what ``apexsim validate`` prints and writes as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apexsim.atomic import without_nan
from apexsim.validation import decisions
from apexsim.validation.replay import OK
from apexsim.validation.scores import BY_CLASS, BY_ENGINE, BY_UNIT, ERRORS, PARTS, ahead_of_peer, score

if TYPE_CHECKING:
    import pandas as pd

_REQUEST_ERRORS = ("predicted_request_ttft_error_percent", "predicted_request_tpot_error_percent",
                   "predicted_request_e2e_error_percent")  # fmt: skip


def report(table: pd.DataFrame) -> dict[str, Any]:
    """Scores by class, by engine and device, and by model; decisions; per-request errors; statuses; assumptions.

    ``table`` is that of ``scores.with_parts``. In the scores a group names its ``rows``, how many were ``predicted``,
    and under ``figures`` the errors of each measured figure.
    """
    by_unit, decided = score(table, BY_UNIT), decisions.decisions(table)
    found = {
        "rows": len(table),
        "predicted": int((table["status"] == OK).sum()),
        "by_class": _grouped(table, score(table, BY_CLASS), BY_CLASS),
        "by_engine": _grouped(table, score(table, BY_ENGINE), BY_ENGINE),
        "by_model": _grouped(table, by_unit, BY_UNIT),
        "ahead_of_peer": ahead_of_peer(by_unit),
        "decisions": decisions.summary(decided).to_dict("records"),
        "decisions_by_model": decisions.summary_by_model(decided).to_dict("records"),
        "requests": _requests(table),
        "statuses": _counted(table["status"]),
        "assumed": _counted(note for notes in table["assumed"] for note in notes.split("; ") if note),
    }
    plain: dict[str, Any] = without_nan(found)
    return plain


def _grouped(table: pd.DataFrame, scores: pd.DataFrame, by: Sequence[str]) -> list[dict[str, Any]]:
    """One record a group, in the order of sets and parts; the errors of its figures inside."""
    records = []
    counted = table.assign(predicted=table["status"] == OK).groupby(list(by), sort=True)["predicted"]
    for names, predicted in counted:
        mine = scores[(scores[list(by)] == list(names)).all(axis=1)]
        figures = {row["figure"]: {key: row[key] for key in ERRORS} for row in mine.to_dict("records")}
        group = dict(zip(by, names, strict=True))
        records.append({**group, "rows": len(predicted), "predicted": int(predicted.sum()), "figures": figures})
    return sorted(records, key=lambda record: (record["set"], PARTS.index(record["part"])))


def _requests(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Errors over the requests of runs that were measured request by request."""
    columns = [name for name in _REQUEST_ERRORS if name in table]
    rows = table.dropna(subset=columns, how="all") if columns else table.head(0)
    return [
        {"run_id": row["run_id"], **{name.removeprefix("predicted_request_"): row[name] for name in columns}}
        for row in rows.to_dict("records")
    ]


def _counted(items: Any) -> dict[str, int]:
    """How often each occurs, most frequent first."""
    return dict(Counter(items).most_common())
