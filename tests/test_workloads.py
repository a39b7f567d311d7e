"""Laws of length and arrival, `Requests`, and the shipped generators against their published statistics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, spearmanr

from apexsim import catalog
from apexsim.errors import BadInput
from apexsim.io.request_files import read_requests
from apexsim.specs.base import parse_spec
from apexsim.specs.laws import (
    ExponentialLength,
    FixedLength,
    GammaArrivals,
    GammaLength,
    LengthLaw,
    LognormalLength,
    OnOffArrivals,
    PoissonArrivals,
    QuantileLength,
    RenewalArrivals,
    UniformLength,
)
from apexsim.specs.workload import LengthStatistics, Requests, Workload

TRACES = {
    "chat": "azure-conv-2023",
    "code": "azure-code-2023",
    "creation": "apex-creation-llama",
    "reasoning": "servegen-deepseek-r1-sampled",
    "summarization": "apex-summarization-mistral",
}
SAMPLES = 200_000


def toy(**changes: Any) -> Workload:
    data: dict[str, Any] = {
        "name": "toy",
        "prompt_tokens": {"kind": "lognormal", "log_mean": 5.0, "log_sd": 1.0},
        "output_tokens": {"kind": "exponential", "mean_tokens": 200},
        "arrivals": {"kind": "poisson", "rate_per_s": 4.0},
    }
    return parse_spec(Workload, data | changes, "toy.yaml")


def rows(count: int = 4, **changes: Any) -> Requests:
    columns: dict[str, Any] = {
        "prompt_tokens": np.arange(1, count + 1),
        "output_tokens": np.full(count, 7),
        "arrival_s": np.arange(count) * 0.5,
    }
    return Requests(name="rows", **(columns | changes))


def refusal(**changes: Any) -> str:
    with pytest.raises(BadInput) as caught:
        rows(**changes)
    return str(caught.value)


# ---- shipped generators


def test_the_five_workloads_ship_and_name_what_they_rest_on() -> None:
    assert catalog.names("workload") == tuple(sorted(TRACES))
    for name in TRACES:
        workload = catalog.load("workload", name)
        assert workload.name == name
        assert all((workload.source, workload.licence, workload.citation, workload.statistic, workload.limits))
        assert workload.published is not None


def assert_lengths(tokens: np.ndarray, said: LengthStatistics, slack: float = 0.03) -> None:
    assert tokens.mean() == pytest.approx(said.mean, rel=slack)
    assert np.quantile(tokens, [0.5, 0.9]) == pytest.approx([said.p50, said.p90], rel=slack)


@pytest.mark.parametrize("name", TRACES)
def test_a_generator_meets_its_published_statistics(name: str) -> None:
    workload = catalog.load("workload", name)
    said = workload.published
    drawn = workload.sample(SAMPLES, seed=7)
    assert said is not None
    assert_lengths(drawn.prompt_tokens, said.prompt_tokens)
    assert_lengths(drawn.output_tokens, said.output_tokens)
    ranks = spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic
    assert ranks == pytest.approx(said.rank_correlation, abs=0.02)
    gaps = np.diff(drawn.arrival_s)
    # Three standard errors of a mean of independent gaps (a tenth of the value for the bursty code), 2 % at least.
    assert drawn.rate_per_s == pytest.approx(said.rate_per_s, rel=max(0.02, 3 * said.gap_cv / math.sqrt(SAMPLES)))
    assert gaps.std() / gaps.mean() == pytest.approx(said.gap_cv, rel=0.1 if name == "code" else 0.02)


@pytest.mark.parametrize("name", TRACES)
def test_a_generator_resembles_the_trace_it_names(name: str, data: Path) -> None:
    trace = read_requests(data / "traces" / f"{TRACES[name]}.parquet")
    drawn = catalog.load("workload", name).sample(SAMPLES, seed=3)
    for column in ("prompt_tokens", "output_tokens"):
        real, made = getattr(trace, column), getattr(drawn, column)
        assert made.mean() == pytest.approx(real.mean(), rel=0.03)
        levels = np.quantile(real, [0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
        assert np.quantile(made, [0.1, 0.25, 0.5, 0.75, 0.9, 0.99]) == pytest.approx(levels, rel=0.05, abs=1)
    assert trace.arrival_s is not None
    real, made = np.diff(trace.arrival_s), np.diff(drawn.arrival_s)
    cv = real.std() / real.mean()
    assert drawn.rate_per_s == pytest.approx(trace.rate_per_s, rel=0.03 + 2 * cv / math.sqrt(len(real)))
    assert made.std() / made.mean() == pytest.approx(cv, rel=0.1)
    typical = np.quantile(real, [0.75, 0.9, 0.95])
    # The tables of 512 and 1,039 drawn gaps scatter themselves; the code law is a law, not the table of its gaps.
    assert np.quantile(made, [0.75, 0.9, 0.95]) == pytest.approx(typical, rel=0.25)


def test_code_arrives_in_bursts_and_a_gamma_law_of_its_variation_would_not_do() -> None:
    law = catalog.load("workload", "code").arrivals
    assert isinstance(law, OnOffArrivals)
    gaps = np.diff(law.draw_s(np.random.default_rng(0), SAMPLES))
    assert gaps[gaps > 2].sum() / gaps.sum() == pytest.approx(law.pause_time_share, rel=0.1)
    gamma = np.diff(GammaArrivals(rate_per_s=law.rate_per_s, cv=13.15).draw_s(np.random.default_rng(0), SAMPLES))
    assert np.median(gamma) < 1e-9
    assert 0.01 < np.median(gaps) < 0.1


# ---- sampling


def test_same_seed_same_requests_and_another_seed_others() -> None:
    first, again, other = (toy().sample(100, seed=seed) for seed in (1, 1, 2))
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(first, column), getattr(again, column))
        assert not np.array_equal(getattr(first, column), getattr(other, column))


@pytest.mark.parametrize("name", TRACES)
def test_a_longer_sample_begins_with_the_shorter_one(name: str) -> None:
    workload = catalog.load("workload", name)
    short, long = workload.sample(50, seed=5), workload.sample(500, seed=5).head(50)
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(short, column), getattr(long, column))


def test_streams_are_independent_so_changing_one_law_leaves_the_other_columns() -> None:
    base = toy().sample(500, seed=3)
    changed = toy(output_tokens={"kind": "fixed", "tokens": 9}, arrivals={"kind": "gamma", "rate_per_s": 4, "cv": 3})
    drawn = changed.sample(500, seed=3)
    assert np.array_equal(base.prompt_tokens, drawn.prompt_tokens)
    assert not np.array_equal(base.arrival_s, drawn.arrival_s)
    large = toy().sample(SAMPLES, seed=3)
    gaps = np.diff(large.arrival_s)
    for pair in (
        (gaps, large.prompt_tokens[1:]),
        (gaps, large.output_tokens[1:]),
        (large.prompt_tokens, large.output_tokens),
    ):
        assert abs(spearmanr(*pair).statistic) < 4 / math.sqrt(SAMPLES)


@pytest.mark.parametrize("wanted", [-0.8, 0.0, 0.71, 1.0])
def test_rank_correlation_is_met_and_leaves_both_laws_alone(wanted: float) -> None:
    plain, tied = toy().sample(SAMPLES), toy(rank_correlation=wanted).sample(SAMPLES)
    assert spearmanr(tied.prompt_tokens, tied.output_tokens).statistic == pytest.approx(wanted, abs=0.01)
    assert np.array_equal(plain.prompt_tokens, tied.prompt_tokens)
    assert tied.output_tokens.mean() == pytest.approx(plain.output_tokens.mean(), rel=0.02)


def test_default_count_all_at_once_and_closed_loop() -> None:
    assert len(toy(requests=17).sample()) == 17
    burst = toy(arrivals={"kind": "all_at_once"}).sample(5)
    assert burst.arrival_s is not None
    assert burst.arrival_s.tolist() == [0.0] * 5
    assert burst.rate_per_s == math.inf
    loop = toy(arrivals={"kind": "closed_loop", "concurrency": 3, "turnaround_s": 0.5}).sample(5)
    assert (loop.arrival_s, loop.concurrency, loop.turnaround_s, len(loop)) == (None, 3, 0.5, 5)
    assert math.isnan(loop.rate_per_s)


@pytest.mark.parametrize(("count", "seed", "word"), [(0, 0, "requests"), (2.5, 0, "requests"), (1, -1, "seed")])
def test_bad_counts_and_seeds_are_refused(count: Any, seed: Any, word: str) -> None:
    with pytest.raises(BadInput, match=rf"toy: {word}: got .*whole number of at least"):
        toy().sample(count, seed=seed)


# ---- laws


LAWS: list[tuple[LengthLaw, float, float]] = [  # law, mean, standard deviation
    (FixedLength(tokens=42), 42, 0),
    (UniformLength(low=1000, high=3000), 2000, 2001 / math.sqrt(12)),
    (LognormalLength(log_mean=7, log_sd=0.5), math.exp(7.125), math.exp(7.125) * math.sqrt(math.exp(0.25) - 1)),
    (ExponentialLength(mean_tokens=900), 900, 900),
    (GammaLength(mean_tokens=900, cv=0.7), 900, 630),
]


@pytest.mark.parametrize(("law", "mean", "sd"), LAWS)
def test_length_laws_have_their_mean_and_spread(law: LengthLaw, mean: float, sd: float) -> None:
    drawn = law.draw(np.random.default_rng(1).standard_normal(SAMPLES))
    assert drawn.dtype == np.int64
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.std() == pytest.approx(sd, rel=0.02)


def test_uniform_reaches_both_ends_evenly() -> None:
    drawn = UniformLength(low=3, high=5).draw(np.random.default_rng(1).standard_normal(30_000))
    assert np.unique(drawn).tolist() == [3, 4, 5]
    assert np.bincount(drawn)[3:] == pytest.approx([10_000] * 3, rel=0.04)


@given(score=st.lists(st.floats(-12, 12), min_size=1, max_size=50), cap=st.integers(1, 5000))
def test_every_draw_is_a_positive_count_below_the_cap_and_rises_with_the_score(score: list[float], cap: int) -> None:
    table = QuantileLength(probabilities=(0, 0.5, 1), tokens=(1, 80, 5000))
    for law in (*(law for law, _, _ in LAWS), table):
        drawn = law.model_copy(update={"max_tokens": cap}).draw(np.sort(score))
        assert drawn.min() >= 1
        assert drawn.max() <= cap
        assert (np.diff(drawn) >= 0).all()


def test_quantile_table_returns_its_own_quantiles() -> None:
    law = QuantileLength(probabilities=(0, 0.25, 0.5, 0.9, 1), tokens=(10, 100, 300, 2000, 9000))
    drawn = law.draw(np.random.default_rng(2).standard_normal(SAMPLES))
    assert np.quantile(drawn, [0.25, 0.5, 0.9]) == pytest.approx([100, 300, 2000], rel=0.02)
    assert (drawn.min(), drawn.max()) == (10, pytest.approx(9000, rel=0.01))


@pytest.mark.parametrize(
    ("law", "cv"),
    [
        (PoissonArrivals(rate_per_s=5), 1.0),
        (GammaArrivals(rate_per_s=5, cv=0.3), 0.3),
        (GammaArrivals(rate_per_s=5, cv=2.5), 2.5),
        # E[gap^2] by hand: bursts 0.9 x (0.5 / 0.9)^2 x 2, pauses 0.1 x (0.5 / 0.1)^2 x 2, mean 1.
        (OnOffArrivals(rate_per_s=5, pause_share=0.1, pause_time_share=0.5), math.sqrt(0.5**2 * 2 / 0.9 + 5 - 1)),
    ],
)
def test_arrival_laws_have_their_rate_and_variation(law: RenewalArrivals, cv: float) -> None:
    arrival_s = law.draw_s(np.random.default_rng(4), SAMPLES)
    gaps = np.diff(arrival_s)
    assert arrival_s[0] == 0
    assert 1 / gaps.mean() == pytest.approx(5, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_poisson_gaps_are_exponential_and_a_rate_only_stretches_time() -> None:
    slow, fast = (PoissonArrivals(rate_per_s=rate).draw_s(np.random.default_rng(0), 5000) for rate in (1, 8))
    assert kstest(np.diff(slow), "expon").pvalue > 0.01
    assert np.array_equal(slow / 8, fast)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reqests": 3}, "toy.yaml: reqests: unknown key; did you mean requests?"),
        (
            {"prompt_tokens": {"kind": "lognormal", "log_mean": 5, "log_sdd": 1}},
            "toy.yaml: prompt_tokens.lognormal.log_sdd: unknown key; did you mean log_sd",
        ),
        (
            {"prompt_tokens": {"kind": "lognorml"}},
            "toy.yaml: prompt_tokens.kind: got 'lognorml'; did you mean lognormal",
        ),
        ({"arrivals": {"rate_per_s": 3}}, "toy.yaml: arrivals.kind: is missing; known: poisson, gamma, on_off"),
        ({"arrivals": {"kind": "poisson", "rate_per_s": -1}}, "toy.yaml: arrivals.poisson.rate_per_s: got -1"),
        ({"arrivals": {"kind": "gamma", "rate_per_s": 1, "cv": math.nan}}, "arrivals.gamma.cv: got nan"),
        ({"arrivals": {"kind": "closed_loop", "concurrency": 0}}, "arrivals.closed_loop.concurrency: got 0"),
        ({"prompt_tokens": {"kind": "uniform", "low": 9, "high": 3}}, "low (9) must not exceed high (3)"),
        (
            {"prompt_tokens": {"kind": "quantiles", "probabilities": [0, 1], "tokens": [5, 4]}},
            "tokens must not fall as probability rises",
        ),
        (
            {"prompt_tokens": {"kind": "quantiles", "probabilities": [0, 0.5], "tokens": [4, 5]}},
            "probabilities must rise from 0 to 1",
        ),
        (
            {"prompt_tokens": {"kind": "quantiles", "probabilities": [0, 1], "tokens": [4]}},
            "give as many probabilities as tokens",
        ),
        ({"rank_correlation": 1.5}, "toy.yaml: rank_correlation: got 1.5"),
    ],
)
def test_a_bad_workload_file_is_refused_in_one_teaching_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        toy(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- Requests


def test_columns_are_copied_typed_and_read_only() -> None:
    mine = np.array([3.0, 4.0])
    made = Requests(name="r", prompt_tokens=mine, output_tokens=[1, 2], arrival_s=[0, 1])  # type: ignore[arg-type]
    mine[0] = 99
    assert made.prompt_tokens.tolist() == [3, 4]
    assert made.prompt_tokens.dtype == np.int64
    assert made.arrival_s is not None
    assert made.arrival_s.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        made.prompt_tokens[0] = 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": [0, math.nan, 1, 2]}, "rows: arrival_s, row 2 (the first data row is 1): got nothing"),
        ({"arrival_s": [0, 1, math.inf, 2]}, "row 3 (the first data row is 1): got inf"),
        ({"arrival_s": [-0.5, 0, 1, 2]}, "row 1 (the first data row is 1): got -0.5"),
        ({"arrival_s": [0, 1, 1.7e12, 1.8e12]}, "row 3"),
        ({"arrival_s": [0, 2, 1, 3]}, "row 3 (the first data row is 1): got 1.0; is earlier than row 2 at 2.0; sort"),
        ({"prompt_tokens": [1, 0, 2, 3]}, "prompt_tokens, row 2 (the first data row is 1): got 0; give a whole number"),
        ({"output_tokens": [1, 2, 3, -4]}, "output_tokens, row 4 (the first data row is 1): got -4"),
        ({"output_tokens": [1, 2.5, 3, 4]}, "row 2 (the first data row is 1): got 2.5"),
        ({"output_tokens": [1, math.nan, 3, 4]}, "row 2 (the first data row is 1): got nothing"),
        ({"prompt_tokens": [1, 2, 3, 2**40]}, "row 4"),
        ({"prompt_tokens": ["a", "b", "c", "d"]}, "give a column of numbers"),
        ({"prompt_tokens": []}, "holds no request"),
        ({"prompt_tokens": [1, 2]}, "columns must have one length"),
        ({"extra": {"turn": np.arange(3)}}, "columns must have one length"),
        ({"arrival_s": None}, "give either arrival_s or the concurrency"),
        ({"concurrency": 2}, "give either arrival_s or the concurrency"),
        ({"arrival_s": None, "concurrency": 0}, "concurrency: got 0"),
        ({"arrival_s": None, "concurrency": 2, "turnaround_s": -1.0}, "turnaround_s: got -1.0"),
    ],
)
def test_bad_columns_are_refused_with_their_row(change: dict[str, Any], message: str) -> None:
    assert message in refusal(**change)


def test_head_cuts_every_column_and_says_when_there_are_fewer() -> None:
    four = rows(extra={"turn": np.arange(4)}, notes=("before",))
    two = four.head(2)
    assert (len(two), two.extra["turn"].tolist(), two.notes) == (2, [0, 1], ("before",))
    assert four.head(4) is four
    assert four.head(9).notes == ("before", "9 requests were asked for; rows holds 4")
    with pytest.raises(BadInput, match="requests: got 0"):
        four.head(0)


@given(rate=st.floats(1e-3, 1e4), first=st.floats(0, 100), count=st.integers(2, 50))
@settings(max_examples=50)
def test_at_rate_has_the_rate_and_keeps_first_arrival_and_shape(rate: float, first: float, count: int) -> None:
    arrival_s = first + np.sqrt(np.arange(count))
    scaled = rows(count, arrival_s=arrival_s).at_rate(rate)
    assert scaled.arrival_s is not None
    assert scaled.arrival_s[0] == first
    assert scaled.rate_per_s == pytest.approx(rate, rel=1e-3)
    shape = (scaled.arrival_s - first) / (scaled.arrival_s[-1] - first)
    assert shape == pytest.approx((arrival_s - first) / (arrival_s[-1] - first), abs=1e-3)


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf, True, "4"])
def test_a_bad_rate_is_refused(rate: Any) -> None:
    with pytest.raises(BadInput, match=r"rate_per_s: got .*requests per second"):
        rows().at_rate(rate)


def test_arrivals_can_be_replaced_by_others() -> None:
    assert rows().all_at_once().arrival_s.tolist() == [0.0] * 4  # type: ignore[union-attr]
    loop = rows().closed_loop(2, 0.25)
    assert (loop.arrival_s, loop.concurrency, loop.turnaround_s) == (None, 2, 0.25)
    with pytest.raises(BadInput, match="no spread of arrival times"):
        loop.at_rate(2.0)
    drawn = loop.arriving(PoissonArrivals(rate_per_s=2.0), seed=1)
    assert drawn.concurrency is None
    assert drawn.arrival_s is not None
    assert drawn.arrival_s.tolist() == PoissonArrivals(rate_per_s=2.0).draw_s(_arrival_stream(1), 4).tolist()
    assert "arrival times drawn: PoissonArrivals(rate_per_s=2.0" in drawn.notes[0]


def _arrival_stream(seed: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, 1)).spawn(3)[0])
