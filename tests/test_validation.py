"""Simulated against served: runs of vLLM 0.6.0 on 8 x H100, host terms fitted on other loads than those held here.

What device profiles report of their own fits is held in ``test_device_profiles.py``.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "validate_apex_h100.py"))


@pytest.fixture(scope="module")
def scores(data: Path) -> pd.DataFrame:
    """Every run of the loads that have bars, with host terms fitted on the creation runs, and without host time."""
    runs = SCRIPT["served_runs"](data)
    loads = {load for _, load in SCRIPT["BARS"]}
    return SCRIPT["score"]([run for run in runs if SCRIPT["load_of"](run) in loads], SCRIPT["fitted_terms"](runs))


def test_the_runs_are_the_measured_ones(scores: pd.DataFrame) -> None:
    means = scores.groupby(["model", "tensor"])["measured_itl"].mean()
    assert means["llama-3.1-70b"].round(4).to_dict() == {8: 0.0140, 4: 0.0204, 2: 0.0322}
    assert means["mistral-large-2407"].round(4).to_dict() == {8: 0.0169, 4: 0.0213, 2: 0.0309}
    assert not scores["fitted"].any()


def test_inter_token_latency_of_unseen_loads_and_models(scores: pd.DataFrame) -> None:
    assert SCRIPT["missed_bars"](scores) == []


def test_a_missed_bar_is_told(scores: pd.DataFrame) -> None:
    spoilt = scores.assign(error_itl=7.0)
    assert len(SCRIPT["missed_bars"](spoilt)) == 3  # Llama on 8, 4 and 2 devices


def test_kernels_alone_are_faster_than_what_was_measured(scores: pd.DataFrame) -> None:
    for key in ("itl", "ttft", "e2e"):
        assert (scores[f"kernels_{key}"] < scores[f"measured_{key}"]).all()
        assert (scores[f"kernels_{key}"] < scores[f"simulated_{key}"]).all()
