#!/usr/bin/env python3
"""Errors by kind of model when the terms of an engine were fitted without the row's own (model, device).

apexsim validate $APEXSIM_DATA/ground_truth/silicon/runs.csv --out rows.csv
python scripts/leave_group_out.py rows.csv $APEXSIM_DATA/ground_truth/{silicon,apex_h100,vllm_runs}/runs.csv

``rows.csv`` has the predictions of groups that no fit saw. Rows whose engine version is known are scored, in percent.
Terms alone are fitted again: recipes and routing exponents stay as they are.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

import pandas as pd

from apexsim import catalog
from apexsim.calibration import Group, calibrate, drawn_groups
from apexsim.search.executors import available_cores, run_local
from apexsim.specs.engine import EngineProfile
from apexsim.validation import scores
from apexsim.validation.cases import kind_of
from apexsim.validation.replay import OK, Replayed, replay
from apexsim.validation.runs import MeasuredRun, read_runs

CHUNK = 12
FIGURES = ("ttft_mean_s", "tpot_mean_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="what apexsim validate --out wrote of the first file of runs")
    parser.add_argument("runs", type=Path, nargs="+", help="runs.csv files the profiles were calibrated on")
    options = parser.parse_args()
    read = [read_runs(path) for path in options.runs]
    table = scores.with_parts(pd.read_csv(options.rows, low_memory=False))
    scored = {at: run for at, run in enumerate(read[0]) if table["part"].iloc[at] == scores.SCORED}
    for name in catalog.names("engine"):
        profile = catalog.load("engine", name)
        if profile.calibration:
            score_left_out(table, scored, [run for runs in read for run in runs], profile)
    found = scores.score(table, scores.BY_CLASS)
    shown = found[(found["part"] == scores.SCORED) & found["figure"].isin(FIGURES)][
        ["model_kind", "figure", "predicted", "mape", "median", "bias"]
    ]
    print(shown.round(1).to_string(index=False))


def score_left_out(
    table: pd.DataFrame, scored: dict[int, MeasuredRun], runs: list[MeasuredRun], profile: EngineProfile
) -> None:
    """Put into ``table`` what the profile predicts of every calibrated group's scored rows when fitted without it."""
    assert profile.calibration is not None
    most = int(re.findall(r"at most (\d+) rows a group", profile.source)[0])
    groups = [group for group in drawn_groups(runs, profile, most, 0) if group.name in profile.calibration.left_out]
    for group in groups:
        mine = [at for at, run in scored.items() if is_of(run, profile, group)]
        if mine:
            terms = terms_without(profile, [other for other in groups if other is not group])
            predict(table, {at: scored[at] for at in mine}, terms)
            print(f"{profile.name}: {group.name}, {len(mine)} rows", flush=True)


def is_of(run: MeasuredRun, profile: EngineProfile, group: Group) -> bool:
    """Whether this profile answers for a run, and the run is of the group."""
    answers = catalog.engine_for(run.row.engine, run.row.engine_version).profile
    return answers == profile.name and f"{run.row.model} on {run.row.device}" == group.name


def terms_without(profile: EngineProfile, others: list[Group]) -> dict[str, float]:
    """The profile's terms fitted on the ``others``; those of experts stay where they began if nobody has any."""
    assert profile.calibration is not None
    experts = any(kind_of(group.runs[0].row.model) in ("moe", "mla") for group in others)
    seen = [term for term in profile.calibration.terms if experts or not term.startswith("expert_")]
    fitted = calibrate(profile, others, terms=seen).calibration
    assert fitted is not None
    began = {term: each.began for term, each in profile.calibration.terms.items()}
    return began | {term: each.value for term, each in fitted.terms.items()}


def predict(table: pd.DataFrame, runs: dict[int, MeasuredRun], terms: dict[str, float]) -> None:
    """Put the figures of ``runs`` (by row of ``table``) under ``terms`` into it."""
    places = list(runs)
    chunks = [places[at : at + CHUNK] for at in range(0, len(places), CHUNK)]
    work = partial(replayed, terms=terms)
    for number, results in run_local(work, [[runs[at] for at in chunk] for chunk in chunks], available_cores()):
        for at, result in zip(chunks[number], results or [], strict=True):
            assert result.status == OK, result.status
            for figure in FIGURES:
                table.loc[at, f"predicted_{figure}"] = result.figures[figure]


def replayed(runs: list[MeasuredRun], *, terms: dict[str, float]) -> list[Replayed]:
    """The runs under these terms."""
    return [replay(run, engine_options=terms) for run in runs]


if __name__ == "__main__":
    main()
