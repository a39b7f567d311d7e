"""Results: every figure of a summary against arithmetic by hand, and what is written to files."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apexsim import catalog
from apexsim.atomic import atomic_path, json_text, without_nan, write_json
from apexsim.errors import BadInput
from apexsim.metrics import binned_level, distribution, held_ns, weighted_distribution
from apexsim.replicas import Union
from apexsim.results import SimulationResult
from apexsim.specs.base import parse_spec
from apexsim.specs.cluster import Cluster
from apexsim.specs.deployment import Bill, Deployment
from apexsim.specs.device import DeviceProfile
from apexsim.specs.engine import EngineProfile
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.slo import SLO
from apexsim.specs.workload import Offered
from apexsim.steady import Steady
from apexsim.testing import made_up_memory

NS = 1_000_000_000


def device() -> DeviceProfile:
    """A device with round figures: 1000 bf16 GFLOP/s, 100 GB/s, 10 W idle, 3.6 USD an hour."""
    power = {"limit_w": 100, "idle_w": 10, "active_w": 20, "comm_w": 30, "gap_w": 15, "j_per_byte": 0}
    links = dict.fromkeys(("intra_node_bytes_per_s", "inter_node_bytes_per_s", "pcie_bytes_per_s"), 1e9)
    data: dict[str, Any] = {
        "name": "toy",
        "datasheet": {
            "memory_bytes": 10**9,
            "memory_bytes_per_s": 100e9,
            "flops_per_s": {"bf16": 1000e9},
            "l2_bytes": 1024,
            "sms": 1,
            "tdp_w": 100,
            "nccl_bytes": {2: 1},
            "source": "made up",
            **links,
        },
        "price": {"usd_per_hour": 3.6, "source": "made up", "date": "2025-01-01"},
        "power": {**power, "j_per_flop": {}, "evidence": dict.fromkeys(power, "kernel"), "source": "made up"},
        "sustained": {"evidence": "estimated", "source": "made up"},
        "operators": {},
        "provenance": {"tool": "test", "date": "2025-01-01", "tables": []},
    }
    return parse_spec(DeviceProfile, data, "toy")


def engine() -> EngineProfile:
    data = {"name": "toy", "engine": "toy", "versions": [], "host": {}, "scheduler": {"policy": "chunked_prefill"}}
    return parse_spec(
        EngineProfile, {**data, "memory": {}, "communication": {}, "evidence": "prior", "source": ""}, "toy"
    )


def deployment(*, bill: Bill = "fleet", devices_per_node: int = 4, replicas: int = 2) -> Deployment:
    return Deployment(
        model=catalog.load("model", "llama-3.1-8b"),
        cluster=Cluster(device=device(), devices_per_node=devices_per_node, nodes=4 // devices_per_node),
        engine=engine(),
        pools=(Pool(plan=Plan(), replicas=replicas),),
        bill=bill,
    )


REQUESTS = {
    # 0 and 1 finish, 2 has one token, 3 is rejected, 4 never finishes.
    "request": np.arange(5),
    "replica": np.array([0.0, 1.0, 0.0, np.nan, 1.0]),
    "arrival_s": np.array([1.0, 2.0, 3.0, 4.0, 5.0]),
    "scheduled_s": np.array([1.0, 2.5, 3.0, np.nan, 6.0]),
    "first_token_s": np.array([1.5, 3.0, 4.0, np.nan, np.nan]),
    "last_token_s": np.array([5.5, 11.0, 4.0, np.nan, np.nan]),
    "prompt_tokens": np.array([100, 200, 300, 400, 500]),
    "output_tokens": np.array([5, 9, 1, 7, 8]),
    "preemptions": np.array([0, 2, 0, 0, 1]),
    "status": np.array(["finished", "finished", "finished", "rejected", "unfinished"], dtype=object),
    "reason": np.array(["", "", "", "too long", "stopped"], dtype=object),
}
STEPS = {
    # Replica 0 works from 1 to 6 (two overlapping steps) and from 8 to 9; replica 1 from 2 to 11.
    "start_ns": np.array([1, 4, 8, 2]) * NS,
    "end_ns": np.array([5, 6, 9, 11]) * NS,
    "replica": np.array([0, 0, 0, 1]),
    "repeats": np.array([3, 1, 1, 9]),
    "decodes": np.array([1, 1, 1, 1]),
    "kv_blocks": np.array([10, 20, 30, 40]),
    "kv_blocks_peak": np.array([12, 20, 30, 60]),
    "running": np.array([1, 1, 1, 1]),
    "waiting": np.array([0, 0, 0, 0]),
    "energy_j": np.array([200.0, 100.0, 50.0, 150.0]),
    "working_s": np.array([4.0, 2.0, 1.0, 8.0]),
}
ACCOUNTING = SimpleNamespace(
    energy_j={"gemm": 300.0, "attention": 200.0},
    flops=4000e9,
    bytes_moved=500e9,
    seconds={("gemm", "fitted"): 6.0, ("gemm", "extrapolated"): 3.0, ("attention", "estimated"): 6.0},
    energy_range_j=None,
    spread_s={"gemm": 0.4, "attention": 0.3},
)


def result(**changed: Any) -> SimulationResult:
    run: dict[str, Any] = {
        "deployment": deployment(),
        "workload": SimpleNamespace(name="five", offered=Offered(1.0, 300.0, 6.0), concurrency=None),
        "slo": SLO(ttft_s=1.0, tpot_s=1.0),
        "requests": [REQUESTS],
        "itl": (np.array([1 * NS, 2 * NS]), np.array([11, 1])),
        "steps": STEPS,
        "accounting": {"serve": ACCOUNTING},
        "worked_s": {"serve": 15.0},
        "block_ns": [103 * NS, 450 * NS, 0, 0],
        "memory": {"serve": made_up_memory(100)},
        "timing": {"wall_s": 0.25},
        "notes": ("column x was left out",),
    }
    return SimulationResult.from_run(**{**run, **changed})


MARKS = {"mean", "p50", "p90", "p95", "p99", "max"}
SECTIONS = {
    "requests": {"total", "finished", "rejected", "unfinished"},
    "duration_s": None,
    "throughput": {"requests_per_s", "output_tokens_per_s", "total_tokens_per_s"},
    **dict.fromkeys(("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s"), MARKS),
    "slo": {"attainment", "good_requests_per_s"},
    "energy": {
        *("total_j", "per_output_token_j", "per_total_token_j", "mean_power_w"),
        *("idle_j", "range_j", "server", "facility"),
    },
    "cost": {"billed_devices", "usd_per_hour", "usd_per_million_output_tokens"},
    "steady": set(Steady.__dataclass_fields__),
    "memory": {
        *("weights_bytes", "kv_bytes", "kv_tokens", "kv_tokens_range"),
        *("max_model_len", "max_concurrency_at_context", "device"),
    },
    "utilization": {"mfu", "mbu", "busy", "kv_cache_mean", "kv_cache_peak"},
    "preemptions": None,
    "prefix_hit_rate": None,
    "provenance": {"gemm", "attention"},
    "uncertainty": {
        *("level", "device_time_spread", "tpot_s", "ttft_s", "e2e_s"),
        *("output_tokens_per_s", "energy_per_output_token_j"),
    },
    "notes": None,
    "timing": {"wall_s"},
}


def test_summary_has_the_agreed_keys_in_their_order() -> None:
    summary = result().summary()
    assert list(summary) == list(SECTIONS)
    for key, inner in SECTIONS.items():
        assert inner is None or set(summary[key]) == inner, key


def test_counts_duration_and_throughput() -> None:
    summary = result().summary()
    assert summary["requests"] == {"total": 5, "finished": 3, "rejected": 1, "unfinished": 1}
    assert summary["duration_s"] == 10.0  # from the first arrival at 1 to the last token at 11
    assert summary["throughput"] == {"requests_per_s": 0.3, "output_tokens_per_s": 1.5, "total_tokens_per_s": 61.5}
    assert summary["preemptions"] == 3


def test_latencies_are_of_finished_requests_and_tpot_skips_single_tokens() -> None:
    summary = result().summary()
    assert summary["ttft_s"]["mean"] == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert summary["ttft_s"]["p50"] == 1.0
    assert summary["tpot_s"]["mean"] == pytest.approx((4 / 4 + 8 / 8) / 2)
    assert summary["e2e_s"]["max"] == 9.0
    assert summary["queue_s"]["max"] == 0.5


def test_itl_weighs_every_token() -> None:
    itl_s = result().summary()["itl_s"]
    assert itl_s["mean"] == pytest.approx(13 / 12)
    assert (itl_s["p50"], itl_s["max"]) == (1.0, 2.0)
    assert itl_s["p95"] == pytest.approx(np.quantile([1.0] * 11 + [2.0], 0.95))


def test_rejected_and_unfinished_requests_miss_the_slo() -> None:
    assert result().summary()["slo"] == {"attainment": 3 / 5, "good_requests_per_s": 0.3}
    strict = result(slo=SLO(e2e_s=5.0)).summary()["slo"]
    assert strict["attainment"] == 2 / 5
    # The single-token request has no TPOT and cannot miss that limit.
    assert list(result(slo=SLO(tpot_s=0.1)).requests["good"]) == [False, False, True, False, False]


def test_without_an_slo_its_figures_are_unknown() -> None:
    assert result(slo=None).summary()["slo"] == {"attainment": None, "good_requests_per_s": None}
    assert "good" not in result(slo=None).requests


def test_energy_counts_idle_devices() -> None:
    # 4 devices for 10 s, 15 device seconds worked: 25 of idling at 10 W beside the 500 J of work.
    energy = result().summary()["energy"]
    assert {key: energy[key] for key in ("total_j", "per_output_token_j", "mean_power_w", "idle_j")} == {
        "total_j": 750.0,
        "per_output_token_j": 50.0,
        "mean_power_w": 75.0,
        "idle_j": 250.0,
    }


def test_servers_and_buildings_draw_more_than_devices() -> None:
    # 1.1 x 750 J and 200 W in each of 4 slots for 10 s; then 1.2 times that.
    energy = result().summary()["energy"]
    assert energy["server"]["total_j"] == pytest.approx(1.1 * 750 + 200 * 4 * 10)
    assert energy["facility"]["total_j"] == pytest.approx(1.2 * energy["server"]["total_j"])
    assert energy["server"]["per_output_token_j"] == pytest.approx(energy["server"]["total_j"] / 15)
    assert energy["per_total_token_j"] < energy["per_output_token_j"]
    assert energy["range_j"] is None


def test_cost_counts_idle_devices() -> None:
    cost = result().summary()["cost"]
    assert (cost["billed_devices"], cost["usd_per_hour"]) == (4, pytest.approx(4 * 3.6))
    assert cost["usd_per_million_output_tokens"] == pytest.approx(4 * 0.001 * 10 / 15 * 1e6)


@pytest.mark.parametrize(("bill", "per_node", "replicas", "billed"), [
    ("used", 2, 1, 1),
    ("used", 2, 3, 3),
    ("node", 2, 1, 2),
    ("node", 2, 2, 2),
    ("node", 2, 3, 4),
    ("fleet", 2, 1, 4),
])  # fmt: skip
def test_one_rule_says_which_devices_are_billed(bill: Bill, per_node: int, replicas: int, billed: int) -> None:
    """Rent, idle joules, server joules and utilization are all of the billed devices."""
    found = result(deployment=deployment(bill=bill, devices_per_node=per_node, replicas=replicas))
    summary = found.summary()
    assert found.deployment.billed_devices == summary["cost"]["billed_devices"] == billed
    assert summary["cost"]["usd_per_hour"] == pytest.approx(3.6 * billed)
    idle_j = 10 * max(0, billed * 10 - 15)
    assert summary["energy"]["idle_j"] == pytest.approx(idle_j)
    assert summary["energy"]["server"]["total_j"] == pytest.approx(1.1 * (500 + idle_j) + 200 * billed * 10)
    assert summary["utilization"]["mfu"] == pytest.approx(4000 / (10 * billed * 1000))


def test_utilization() -> None:
    used = result().summary()["utilization"]
    assert used["mfu"] == pytest.approx(4000 / (10 * 4 * 1000))
    assert used["mbu"] == pytest.approx(500 / (10 * 4 * 100))
    assert used["busy"] == pytest.approx((0.6 + 0.9) / 2)
    # Of 100 blocks replica 0 holds 103 block seconds in 10 s, replica 1 450.
    assert used["kv_cache_mean"] == pytest.approx((103 / 1000 + 450 / 1000) / 2)
    assert used["kv_cache_peak"] == 0.6


def test_provenance_shares_add_up_and_notes_say_what_is_estimated() -> None:
    summary = result().summary()
    assert summary["provenance"] == {
        "attention": {"estimated": 0.4},
        "gemm": {"extrapolated": 0.2, "fitted": 0.4},
    }
    assert any("2 of 4 devices stand idle" in note for note in summary["notes"])
    assert summary["notes"][0] == "column x was left out"


def test_an_injected_cost_model_leaves_energy_unknown() -> None:
    steps = {key: values for key, values in STEPS.items() if key not in ("energy_j", "working_s")}
    summary = result(steps=steps, accounting={}).summary()
    energy = summary["energy"]
    around = [energy.pop("server"), energy.pop("facility")]
    assert {value for part in (energy, *around) for value in part.values()} == {None}
    assert summary["utilization"]["mfu"] is None
    assert summary["provenance"] == {}


def test_when_all_are_rejected_every_key_is_there() -> None:
    none = {"replica": np.full(5, np.nan), "scheduled_s": np.full(5, np.nan)}
    none |= {key: np.full(5, np.nan) for key in ("first_token_s", "last_token_s")}
    rejected = {**REQUESTS, **none, "status": np.array(["rejected"] * 5, dtype=object)}
    empty = {key: values[:0] for key, values in STEPS.items()}
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    summary = result(requests=[rejected], steps=empty, itl=nothing, accounting={}).summary()
    assert list(summary) == list(SECTIONS)
    assert summary["requests"]["rejected"] == 5
    assert summary["duration_s"] == 4.0
    assert summary["slo"]["attainment"] == 0.0
    assert set(summary["ttft_s"].values()) == set(summary["itl_s"].values()) == {None}
    assert summary["cost"]["usd_per_million_output_tokens"] is None
    json.loads(json_text(summary), parse_constant=pytest.fail)


def test_tables() -> None:
    found = result()
    assert found.requests["ttft_s"][1] == 1.0
    assert list(found.steps["start_s"]) == [1.0, 4.0, 8.0, 2.0]
    assert not [name for name in found.steps if str(name).endswith("_ns")]
    assert list(found.pools["requests"]) == [2, 2]
    assert list(found.pools["output_tokens"]) == [6, 9]
    assert list(found.pools["steps"]) == [5, 9]


def test_save_and_load_give_the_same_result(tmp_path: Any) -> None:
    first = result()
    first.save(tmp_path / "run")
    again = SimulationResult.load(tmp_path / "run")
    assert again.summary() == first.summary()
    assert again.requests.equals(first.requests)
    assert again.steps.equals(first.steps)
    assert again.deployment == first.deployment


def test_equal_runs_write_equal_bytes_but_for_timing(tmp_path: Any) -> None:
    result().save(tmp_path / "a")
    result(timing={"wall_s": 9.0}).save(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["gaps.parquet", "requests.parquet", "result.json", "steps.parquet", "timing.json"]
    differ = [name for name in names if (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()]
    assert differ == ["timing.json"]


def test_loading_something_else_says_what_would_do(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="give a folder that SimulationResult"):
        SimulationResult.load(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 50)), max_size=30))
def test_weighted_distribution_equals_the_written_out_one(pairs: list[tuple[int, int]]) -> None:
    values, counts = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    mine = weighted_distribution(values, counts, scale=1e-9)
    whole = distribution(lambda: [np.repeat(values, counts) * np.float64(1e-9)])
    assert list(mine) == list(whole)
    for key, expected in whole.items():
        assert mine[key] == pytest.approx(expected, rel=1e-12, abs=1e-15, nan_ok=True)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=12))
def test_held_time_sums_to_the_union_of_intervals(spans: list[tuple[int, int]]) -> None:
    spans = sorted((start, start + length) for start, length in spans)
    start, end = (np.array([span[i] for span in spans], dtype=np.int64) for i in (0, 1))
    held = held_ns(start, end)
    assert int(held.sum()) == len({tick for low, high in spans for tick in range(low, high)})
    assert (held >= 0).all()


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=12))
def test_binned_level_is_the_mean_of_what_is_in_force(spans: list[tuple[int, int, int]]) -> None:
    start, held, level = (np.array([span[i] for span in spans], dtype=np.int64) for i in range(3))
    means = binned_level((start, held), level, np.array([0.0, 10.0, 50.0]))
    ticks = [sum(v for s, h, v in spans if s <= tick < s + h) for tick in range(50)]
    assert means == pytest.approx([np.mean(ticks[:10]), np.mean(ticks[10:])])


def test_distribution_of_nothing_is_unknown_and_json_says_null() -> None:
    empty = distribution(lambda: [np.array([math.nan])])
    assert all(math.isnan(value) for value in empty.values())
    assert set(json.loads(json_text(empty)).values()) == {None}
    assert without_nan({"a": [np.float64(1.5), math.inf, np.int64(3)]}) == {"a": [1.5, None, 3]}


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old_file(tmp_path: Any) -> None:
    target = tmp_path / "out.json"
    write_json(target, {"a": 1})
    with pytest.raises(UnicodeEncodeError), atomic_path(target) as scratch:
        scratch.write_text("half of it \ud800")
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(BadInput, match="folder does not exist"):
        write_json(tmp_path / "no" / "out.json", {})


@pytest.mark.parametrize("kind", ["spread", "tied", "one", "tailed"])
def test_percentiles_of_values_in_parts_are_those_of_numpy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apexsim.quantiles.FEW", 100)
    rng = np.random.default_rng(8)
    values = {
        "spread": rng.uniform(1, 2, 5_000),
        "tied": rng.integers(0, 3, 5_000) * 0.1,
        "one": np.full(5_000, 0.3),
        "tailed": rng.pareto(0.4, 5_000),
    }[kind]
    values[::50] = math.nan
    found = distribution(lambda: np.array_split(values, 7))
    known = values[np.isfinite(values)]
    assert [found[key] for key in ("p50", "p90", "p95", "p99")] == np.quantile(known, [0.5, 0.9, 0.95, 0.99]).tolist()
    assert found["max"] == known.max()
    assert found["mean"] == pytest.approx(known.mean(), rel=1e-12)


def test_the_union_of_steps_is_the_same_in_parts_and_nearly_in_order() -> None:
    rng = np.random.default_rng(4)
    for _ in range(5):
        end = np.cumsum(rng.integers(0, 20, 3_000))
        start = np.maximum(0, end - rng.integers(0, 60, 3_000))
        nearly = np.argsort(np.arange(3_000) + rng.uniform(0, 60, 3_000))
        start, end, by_start = start[nearly], end[nearly], np.argsort(start[nearly], kind="stable")
        union, cuts = Union(), np.sort(rng.integers(0, 3_000, 9))
        for part in reversed(np.split(np.stack((start, end)), cuts, axis=1)):
            union.add(*part)
        assert union.length() == held_ns(start[by_start], end[by_start]).sum()
