#!/usr/bin/env python3
"""Put the figures of ``apexsim validate`` and of the calibrated engine profiles into the tables of docs/validation.md.

G=$APEXSIM_DATA/ground_truth
apexsim validate $G/{silicon,apex_h100,vllm_runs,energy_h100_b200}/runs.csv --json scores.json
apexsim validate $G/energy_h100_b200/runs.csv --itl measured --json energy.json
python scripts/update_validation.py scores.json energy.json

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apexsim import catalog

PAGE = Path(__file__).resolve().parents[1] / "docs" / "validation.md"
FIGURES = {
    "ttft_mean_s": "TTFT", "tpot_mean_s": "TPOT", "itl_mean_s": "ITL", "itl_p50_s": "ITL median", "e2e_mean_s": "e2e",
    "output_tokens_per_s": "tokens/s", "power_w": "power", "energy_per_output_token_j": "J/token",
}  # fmt: skip
SCORES = ("rows", "MAPE", "median", "bias", "ours there", "peer")
Record = dict[str, Any]


def main(scores: str, energy: str) -> None:
    found, given = (json.loads(Path(name).read_text(encoding="utf-8")) for name in (scores, energy))
    served = [each for each in found["by_class"] if not each["set"].startswith("energy")]
    power = [each for each in found["by_class"] if each["set"].startswith("energy")]
    models = [each for each in found["by_model"] if each["set"] == "silicon"]
    tables: dict[str, Callable[[], Iterator[str]]] = {
        "served runs": lambda: errors(served, ("set", "part", "model_kind")),
        "served runs by model": lambda: errors(models, ("part", "engine", "device", "model"), {"TTFT", "TPOT"}),
        "decisions": lambda: decisions(found["decisions"]),
        "decisions by model": lambda: decisions_by_model(found["decisions_by_model"]),
        "energy": lambda: errors(power, ("part", "model_kind")),
        "energy at measured steps": lambda: errors(given["by_class"], ("part", "model_kind"), {"power", "J/token"}),
        "calibrated terms": terms,
        "groups left out": left_out,
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = "\n".join(table())
        page, count = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", page)
        assert count == 1, f"{PAGE.name} has {count} places for the table {name!r}"
    PAGE.write_text(page, encoding="utf-8")


def errors(records: list[Record], keys: tuple[str, ...], only: set[str] | None = None) -> Iterator[str]:
    """Errors by ``keys``, a figure a row; excluded rows and those with images or video are left out."""
    yield from head(*(name.replace("model_kind", "kind") for name in keys), "figure", *SCORES)
    for record in records:
        if record["part"] not in ("scored", "version not known"):
            continue
        for name, score in record["figures"].items():
            if FIGURES[name] in (only or FIGURES.values()) and score["predicted"]:
                numbers = [f"{score['mape']:.1f}", f"{score['median']:.1f}", f"{score['bias']:+.1f}"]
                peer = [one(score["on_peer_rows"]), one(score["peer_mape"])]
                covered = f"{score['predicted']} of {score['rows']}"
                yield row(*(record[key] for key in keys), FIGURES[name], covered, *numbers, *peer)


def decisions(records: list[Record]) -> Iterator[str]:
    yield from head("chooser", "questions", "right", "mean regret", "p90 regret")
    for each in records:
        yield row(each["chooser"], each["questions"], *(one(each[k]) for k in ("right", "mean_regret", "p90_regret")))


def decisions_by_model(records: list[Record]) -> Iterator[str]:
    yield from head("kind", "engine", "device", "model", "questions", "right", "mean regret", "p90 regret")
    for each in records:
        names = (each[key] for key in ("model_kind", "engine", "device", "model", "questions"))
        yield row(*names, *(one(each[key]) for key in ("right", "mean_regret", "p90_regret")))


def terms() -> Iterator[str]:
    reports = calibrated()
    names = list(dict.fromkeys(term for report in reports.values() for term in report.terms))
    yield from head("term (ms)", *(f"`{name}`" for name in reports))
    for name in names:
        found = [report.terms.get(name) for report in reports.values()]
        yield row(f"`{name}`", *(f"{1e3 * t.value:.3g} +- {1e3 * t.standard_error:.2g}" if t else "-" for t in found))
    yield row("rows", *(report.rows for report in reports.values()))


def left_out() -> Iterator[str]:
    yield from head("engine profile", "rows left out", "TPOT (bias)", "TTFT (bias)")
    for name, report in calibrated().items():
        for group, error in report.left_out.items():
            pairs = [(error.tpot_mape, error.tpot_bias), (error.ttft_mape, error.ttft_bias)]
            yield row(
                f"`{name}`", group, *("-" if mape is None else f"{mape:.1f} ({bias:+.1f})" for mape, bias in pairs)
            )


def calibrated() -> dict[str, Any]:
    """Calibration reports by engine profile."""
    profiles = [catalog.load("engine", name) for name in catalog.names("engine")]
    return {profile.name: profile.calibration for profile in profiles if profile.calibration}


def head(*names: str) -> Iterator[str]:
    yield row(*names)
    yield "|" + "---|" * len(names)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def one(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
