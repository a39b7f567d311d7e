"""Deployments of several pools: valid specs, a server for each, figures by pool and together, and what does not run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from apexsim import catalog
from apexsim.cli.main import main
from apexsim.costs.accounting import RunningAccount, worked_s
from apexsim.costs.memory import MemoryPlan
from apexsim.costs.starting import start
from apexsim.costs.steps import build_step_cost
from apexsim.errors import BadInput, InfeasiblePlan, Unsupported
from apexsim.io.deployments import load_deployment, read_deployment, write_deployment
from apexsim.io.yaml_files import write_yaml
from apexsim.planning import deployment, search
from apexsim.result_files import write_sealed
from apexsim.results import SimulationResult
from apexsim.search.space import SearchSpace
from apexsim.serving.simulator import Run, simulate
from apexsim.specs.base import parse_spec
from apexsim.specs.cluster import Cluster, NodeGroup
from apexsim.specs.deployment import Deployment
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.server import Load
from apexsim.specs.workload import Requests

spec: Any = cache(catalog.load)
PREFILL = Pool(name="prefill", phases=("prefill",), plan=Plan(tensor=2), replicas=1, device="fast")
DECODE = Pool(name="decode", phases=("decode",), replicas=3, device="cheap", weights="int4_wo")


def cluster() -> Cluster:
    fast = NodeGroup(name="fast", device=spec("device", "h100-sxm"), devices_per_node=4)
    return Cluster(groups=(fast, NodeGroup(name="cheap", device=spec("device", "a100-sxm"), devices_per_node=8)))


def deployed(*pools: Pool, **fields: Any) -> Deployment:
    return Deployment(
        model=spec("model", "llama-3.1-8b"),
        cluster=cluster(),
        engine=spec("engine", "vllm-v1-async"),
        pools=pools or (PREFILL, DECODE),
        **fields,
    )


# -- servers -----------------------------------------------------------------------------------------------------------


def test_every_pool_has_a_server_with_every_question_settled() -> None:
    sglang = spec("engine", "sglang-0.5")
    small = DECODE.model_copy(update={"kv_cache": "fp8"})
    prefill, decode = deployed(PREFILL.model_copy(update={"engine": sglang}), small).servers()
    assert (prefill.pool, prefill.phases, prefill.device.name, prefill.engine) == (
        *("prefill", ("prefill",), "h100-sxm"),
        sglang,
    )
    assert (prefill.weights, prefill.kv_cache, prefill.plan.tensor) == ("bf16", "bf16", 2)
    assert (decode.device.name, decode.engine.name, decode.weights) == ("a100-sxm", "vllm-v1-async", "int4_wo")
    assert (decode.expert_weights, decode.kv_cache) == ("int4_wo", "fp8")
    # Settings of the scheduler follow each pool's own device.
    assert decode.scheduler.token_budget == 2048


def test_a_token_budget_that_follows_a_rule_is_each_pools_own() -> None:
    engine = spec("engine", "vllm-v1-async")
    ruled = engine.model_copy(
        update={"scheduler": engine.scheduler.model_copy(update={"token_budget_rule": "one_prompt"})}
    )
    asked = deployed(PREFILL.model_copy(update={"engine": ruled}), DECODE)
    prefill, decode = asked.servers(Load(1024, 64))
    assert (prefill.scheduler.token_budget, decode.scheduler.token_budget) == (1152, 2048)
    ran = asked.as_run((prefill, decode))
    assert ran.servers() == (prefill, decode)


def test_where_a_pool_cannot_be_laid_out_servers_say_so() -> None:
    with pytest.raises(InfeasiblePlan, match="the replicas of decode use 9 devices, cheap has 8"):
        deployed(PREFILL, DECODE.model_copy(update={"replicas": 9})).servers()
    with pytest.raises(InfeasiblePlan, match="tensor degree 3 does not divide the 32 attention heads"):
        deployed(PREFILL.model_copy(update={"plan": Plan(tensor=3)}), DECODE).servers()


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        ((PREFILL, PREFILL, DECODE), "several are called prefill"),
        ((PREFILL,), "no pool serves decode: add it to the phases of a pool"),
        ((PREFILL, DECODE.model_copy(update={"device": "slow"})), "pool decode: .*no such node group"),
        ((PREFILL, DECODE.model_copy(update={"device": None})), "pool decode: the cluster has several node groups"),
    ],
)
def test_pools_that_do_not_fit_together_are_refused(pools: tuple[Pool, ...], said: str) -> None:
    data = {"model": spec("model", "llama-3.1-8b"), "cluster": cluster(), "engine": spec("engine", "vllm-v1-async")}
    with pytest.raises(BadInput, match=said) as caught:
        parse_spec(Deployment, {**data, "pools": pools}, "here")
    assert "\n" not in str(caught.value)


def test_a_pool_without_phases_is_refused() -> None:
    with pytest.raises(BadInput, match="phases"):
        parse_spec(Pool, {"phases": ()}, "here")


# -- what does not run so far ------------------------------------------------------------------------------------------


def requests_of(count: int = 4) -> Requests:
    tokens = np.full(count, 100, dtype=np.int64)
    return Requests(name="few", arrival_s=np.arange(float(count)), prompt_tokens=tokens, output_tokens=tokens // 10)


def test_several_pools_do_not_run_so_far_and_one_line_says_so() -> None:
    with pytest.raises(Unsupported) as caught:
        simulate(deployed(), requests_of())
    assert str(caught.value) == (
        "pools: pool prefill serves prefill, pool decode serves decode; "
        "what runs so far is one pool that serves prefill and decode: give that"
    )
    both = Pool(device="cheap")
    encode = both.model_copy(update={"name": "see", "phases": ("encode", "prefill", "decode")})
    for pools in ((both, both.model_copy(update={"name": "more"})), (encode,)):
        with pytest.raises(Unsupported, match="one pool that serves prefill and decode"):
            simulate(deployed(*pools), requests_of())


def test_one_pool_on_one_of_several_groups_runs() -> None:
    pool = Pool(device="cheap")
    result = simulate(deployed(pool), requests_of())
    assert [server.device.name for server in result.servers] == ["a100-sxm"]
    assert repr(result.deployment) == "<Deployment llama-3.1-8b, 1 x a100-sxm, tp1-pp1-dp1, vllm-v1-async>"
    alone = simulate(deployed(pool).model_copy(update={"cluster": Cluster(groups=cluster().groups[1:])}), requests_of())
    here, there = result.summary(), alone.summary()
    for figures in (here, there):
        figures.pop("timing")
        figures.pop("notes")
    assert here == there


# -- devices, price and idle power ------------------------------------------------------------------------------------


def test_devices_are_billed_group_by_group() -> None:
    fast, cheap = (group.device.price.usd_per_hour for group in cluster().groups)
    for bill, counts in (("used", (2, 3)), ("node", (4, 8)), ("fleet", (4, 8))):
        asked = deployed(bill=bill)
        assert tuple(asked.billed(group) for group in asked.cluster.groups) == counts
        assert asked.usd_per_hour == pytest.approx(counts[0] * fast + counts[1] * cheap)
        assert asked.billed_devices == sum(counts)


def test_idle_power_is_that_of_each_groups_devices() -> None:
    fast, cheap = (group.device.power.idle_w for group in cluster().groups)
    # Of 2 and 3 devices over 10 s, 5 and 40 seconds of work: the second group has nothing idle, and lends nothing.
    assert deployed().idle_j(10.0, {"prefill": 5.0, "decode": 40.0}) == pytest.approx(15.0 * fast)
    assert deployed().idle_j(10.0, {"prefill": 20.0, "decode": 10.0}) == pytest.approx(20.0 * cheap)


# -- results by pool ---------------------------------------------------------------------------------------------------


def _alone(pool: Pool) -> tuple[Deployment, MemoryPlan, Run, Any]:
    """One pool of the two as if it served all by itself."""
    asked = deployed(pool.model_copy(update={"phases": ("prefill", "decode")}))
    engine = start(asked.colocated_server())
    cost = build_step_cost(engine.server)
    run = Run(asked, requests_of(), cost=cost, memory=engine.memory)
    run.go()
    return asked, engine.memory, run, cost


def two_pools() -> SimulationResult:
    """A run of both pools, put together from one of each: replica 0 is of the first pool, 1 to 3 of the second."""
    (_, first, left, cost), (_, second, right, other) = _alone(PREFILL), _alone(DECODE)
    parts = [run.recorder.steps() for run in (left, right)]
    parts[1]["replica"] = parts[1]["replica"] + 1
    accounting, worked = {}, {}
    for at, (name, each, run) in enumerate(zip(("prefill", "decode"), (cost, other), (left, right), strict=True)):
        running = RunningAccount(each)
        parts[at] = running.add(parts[at], run.recorder.chunks())
        accounting[name], worked[name] = running.total, worked_s(each, parts[at], 0)
    return SimulationResult.from_run(
        deployment=deployed(),
        workload=requests_of(),
        slo=None,
        requests=right.rows.blocks(0),
        itl=right.recorder.inter_token_gaps(),
        steps={key: np.concatenate([part[key] for part in parts]) for key in parts[0]},
        accounting=accounting,
        worked_s=worked,
        block_ns=[replica.block_ns for run in (left, right) for replica in run.replicas],
        memory={"prefill": first, "decode": second},
        timing={},
        notes=(),
    )


def test_figures_are_by_pool_and_together() -> None:
    result = two_pools()
    summary, pools = result.summary(), result.summary()["pools"]
    assert list(pools) == list(summary["memory"]) == ["prefill", "decode"]
    # Only the devices used are billed, so the sums are those of the pools.
    for section, key in (("energy", "total_j"), ("energy", "idle_j"), ("cost", "usd_per_hour")):
        assert sum(each[section][key] for each in pools.values()) == pytest.approx(summary[section][key])
    usages = [record.usage for record in result.of_pools.values()]
    assert result.usage.flops == pytest.approx(sum(usage.flops for usage in usages))
    assert result.usage.working_s == pytest.approx(sum(usage.working_s for usage in usages))
    assert sum(result.usage.energy_j.values()) == pytest.approx(
        sum(joules for usage in usages for joules in usage.energy_j.values())
    )
    sheets = [server.device.datasheet for server in result.servers]
    least = sum(u.flops for u in usages) / (
        result.duration_s * (2 * sheets[0].flops_per_s["bf16"] + 3 * sheets[1].flops_per_s["bf16"])
    )
    assert summary["utilization"]["mfu"] == pytest.approx(least)
    assert pools["prefill"]["devices"] == 2
    assert pools["decode"]["phases"] == ["decode"]
    # No run of two pools was measured: the interval is that of kernels alone.
    assert "too few measured runs" in summary["uncertainty"]["tpot_s"]["basis"]


def test_rows_of_steps_carry_the_joules_of_their_own_pool() -> None:
    result = two_pools()
    for name, record in result.of_pools.items():
        rows = np.isin(result.step_columns["replica"], result.deployment.replicas_of(name))
        assert result.step_columns["energy_j"][rows].sum() == pytest.approx(sum(record.usage.energy_j.values()))
    assert result.pools["pool"].tolist() == ["prefill", *["decode"] * 3]
    assert result.pools["replica"].tolist() == [0, 1, 2, 3]


def test_a_result_of_two_pools_is_saved_and_read(tmp_path: Path) -> None:
    result = two_pools()
    result.save(tmp_path / "two")
    read = SimulationResult.load(tmp_path / "two")
    assert read.summary() == result.summary()
    assert read.servers == result.servers


# -- pools in a deployment file ----------------------------------------------------------------------------------------


def written(tmp_path: Path, **keys: Any) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump({"model": "llama-3.1-8b", "device": "h100-sxm", **keys}))
    return path


TWO: list[dict[str, Any]] = [
    {"name": "prefill", "phases": ["prefill"], "tensor": 2, "engine": "sglang-0.5"},
    {"name": "decode", "phases": ["decode"], "replicas": 3, "engine_options": {"max_num_seqs": 64}},
]


def test_pools_of_a_file_are_those_of_its_deployment(tmp_path: Path) -> None:
    path = written(tmp_path, pools=TWO, engine_options={"max_num_seqs": 32, "block_size": 32})
    prefill, decode = load_deployment(path).servers()
    assert (prefill.phases, prefill.plan.name, prefill.engine.name) == (("prefill",), "tp2-pp1", "sglang-0.5")
    assert (decode.phases, decode.plan.name, decode.engine.name) == (("decode",), "tp1-pp1", "vllm-v1-async")
    # Options of the deployment hold in every pool that says nothing else.
    assert [each.scheduler.max_num_seqs for each in (prefill, decode)] == [32, 64]
    assert [each.engine.scheduler.block_size for each in (prefill, decode)] == [32, 32]
    assert load_deployment(path).cluster.devices == 5
    file = read_deployment(path)
    write_deployment(path, file)
    assert read_deployment(path) == file
    assert load_deployment(path).servers() == (prefill, decode)


FAST, CHEAP = {"name": "fast", "device": "h100-sxm"}, {"name": "cheap", "device": "a100-sxm"}


@pytest.mark.parametrize(
    "keys",
    [
        {"pools": [{**TWO[0], "device": "h100-sxm"}, {**TWO[1], "device": "a100-sxm"}]},
        {"groups": [FAST, CHEAP], "pools": [{**TWO[0], "device": "fast"}, {**TWO[1], "device": "cheap"}]},
    ],
)
def test_a_deployment_whose_parts_name_their_devices_needs_none(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = tmp_path / "parts.yaml"
    write_yaml(path, {"model": "llama-3.1-8b", **keys})
    found = load_deployment(path)
    assert [server.device.name for server in found.servers()] == ["h100-sxm", "a100-sxm"]
    assert found == deployment(model="llama-3.1-8b", **keys) == load_deployment(written(tmp_path, **keys))
    write_deployment(path, read_deployment(path))
    assert "\ndevice" not in path.read_text()
    assert load_deployment(path) == found


@pytest.mark.parametrize(
    ("keys", "would_do"),
    [
        ({}, "give it"),
        ({"pools": [{**TWO[0], "device": "h100-sxm"}, TWO[1]]}, "give it, or a device in every pool"),
        ({"groups": [FAST, {"name": "cheap"}], "pools": TWO}, "give it, or a device in every group"),
    ],
)
def test_a_device_that_nobody_names_is_asked_for(tmp_path: Path, keys: dict[str, Any], would_do: str) -> None:
    path = tmp_path / "parts.yaml"
    write_yaml(path, {"model": "llama-3.1-8b", **keys})
    with pytest.raises(BadInput) as caught:
        load_deployment(path)
    assert str(caught.value) == f"{path}: device: {would_do}"


def test_a_flat_file_is_one_pool(tmp_path: Path) -> None:
    flat = load_deployment(written(tmp_path, tensor=2, replicas=2))
    assert flat.pools == (Pool(plan=Plan(tensor=2), replicas=2),)
    listed = load_deployment(written(tmp_path, pools=[{"name": "serve", "tensor": 2, "replicas": 2}]))
    assert listed == flat


def test_pools_lie_on_groups_or_on_devices_of_their_own(tmp_path: Path) -> None:
    pools = [TWO[0], {**TWO[1], "device": "a100-sxm"}]
    found = load_deployment(written(tmp_path, pools=[{**pools[0], "device": "h100-sxm"}, pools[1]]))
    assert [(group.name, group.devices) for group in found.cluster.groups] == [("h100-sxm", 2), ("a100-sxm", 3)]
    groups = [{"name": "fast", "nodes": 2}, {"name": "cheap", "device": "a100-sxm"}]
    pools = [{**TWO[0], "device": "fast"}, {**TWO[1], "device": "cheap"}]
    found = load_deployment(written(tmp_path, pools=pools, groups=groups))
    assert [server.group.name for server in found.servers()] == ["fast", "cheap"]
    assert repr(found).startswith("<Deployment llama-3.1-8b, 2 x h100-sxm + 3 x a100-sxm, ")


def test_a_pool_may_name_files_beside_the_deployment(tmp_path: Path) -> None:
    write_yaml(tmp_path / "mine.yaml", spec("device", "a100-sxm").model_dump(mode="json", exclude_defaults=True))
    write_yaml(tmp_path / "own.yaml", spec("engine", "vllm-0.6").model_dump(mode="json", exclude_defaults=True))
    (server,) = load_deployment(
        written(tmp_path, pools=[{"name": "serve", "device": "mine.yaml", "engine": "own.yaml"}])
    ).servers()
    assert (server.device.name, server.engine.name) == ("a100-sxm", "vllm-0.6")


def test_the_kv_dtype_that_an_engine_takes_by_itself_is_each_pools_own(tmp_path: Path) -> None:
    pools = [TWO[0], {**TWO[1], "engine": "trtllm"}]
    prefill, decode = load_deployment(written(tmp_path, pools=pools, weights="fp8")).servers()
    assert (prefill.kv_cache, decode.kv_cache) == ("bf16", "fp8")
    prefill, decode = load_deployment(written(tmp_path, pools=pools, weights="fp8", kv_cache="bf16")).servers()
    assert (prefill.kv_cache, decode.kv_cache) == ("bf16", "bf16")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pools": TWO, "tensor": 2}, "tensor: every pool has its own: leave it out, or the pools"),
        ({"pools": TWO[:1]}, "no pool serves decode: add it to the phases of a pool"),
        ({"pools": [TWO[0], TWO[0], TWO[1]]}, "pools have names of their own; several are called prefill"),
        ({"pools": [{"phases": ["prefill"]}]}, "pools.0.name: is missing and has no default"),
        ({"pools": [{**TWO[0], "phases": []}]}, "pools.0.phases: got []; give at least one of prefill, decode"),
        ({"pools": []}, "pools: got []; give at least one, or leave it out"),
        (
            {"pools": [{"name": "serve", "policy": "deadline"}]},
            "pools.0.policy: unknown key; did you mean engine_options: {policy: ...}?",
        ),
        ({"max_num_seqs": 8}, "max_num_seqs: unknown key; did you mean engine_options: {max_num_seqs: ...}?"),
        ({"pools": [{**TWO[0], "phases": ["prefil"]}]}, "pools.0.phases.0: got 'prefil'; "),
        ({"pools": [{**TWO[0], "stages": ["prefill"]}]}, "pools.0.stages: unknown key; did you mean "),
        ({"pools": [{"name": "serve", "weights": "fp9"}]}, "pool serve: weights: got 'fp9'; did you mean fp8"),
        ({"pools": [{"name": "serve", "engine": "vlm"}]}, "pool serve: engine: got 'vlm'; "),
        ({"pools": [{"name": "serve", "engine_options": {"seats": 1}}]}, "pool serve: got 'seats'; unknown engine "),
        ({"pools": [{"name": "serve", "device": "h1000"}]}, "device: got 'h1000'; unknown device; did you mean "),
        ({"pools": [{"name": "serve", "tensor": 3}]}, "tensor degree 3 does not divide the 32 attention heads"),
        (
            {"pools": [{**TWO[0], "device": "a100-sxm"}, TWO[1]], "nodes": 2},
            "nodes: the pools use 2 kinds of devices: give groups",
        ),
        (
            {"groups": [{"name": "one"}, {"name": "two"}]},
            "groups: got 2; give pools, each with the device that it lies on; or one group",
        ),
        (
            {"groups": [{"name": "one"}, {"name": "two"}], "pools": [{"name": "serve"}]},
            "pool serve: the cluster has several node groups: name one of one, two",
        ),
        (
            {
                "groups": [{"name": "one"}, {"name": "two"}],
                "pools": [{"name": "serve", "device": "one", "replicas": 9}],
            },
            "the replicas use 9 devices, one has 8",
        ),
    ],
)
def test_bad_pools_are_refused_in_one_line(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises((BadInput, InfeasiblePlan)) as caught:
        load_deployment(written(tmp_path, **keys))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_that_a_pool_names_is_imported_only_when_allowed(tmp_path: Path) -> None:
    pools = [{"name": "serve", "engine_options": {"policy": "mypol:Mine"}}]
    with pytest.raises(BadInput, match=r"pools.0.engine_options.policy: got 'mypol:Mine'; the file names code"):
        load_deployment(written(tmp_path, pools=pools))


def test_the_commands_refuse_several_pools_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, pools=TWO))
    for arguments in (["simulate", path, "--workload", "chat"], ["show", "memory", path]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        said = f"{path}: pools: pool prefill serves prefill, pool decode serves decode; what runs so far is one pool"
        assert said in line
    with pytest.raises(BadInput, match="a search lays out one pool that serves prefill and decode: leave pools out"):
        search(model="llama-3.1-8b", devices="2xh100-sxm", workload="chat", pools=TWO)
    with pytest.raises(Unsupported, match="what runs so far is one pool"):
        SearchSpace(base=load_deployment(path))


# -- files of earlier versions -----------------------------------------------------------------------------------------

# As a search of version 0.1 wrote it, before pools had names in files.
BEST = """\
model: llama-3.1-8b
device: h100-sxm
nodes: 1
devices_per_node: 2
engine: vllm-v1-async
tensor: 2
pipeline: 1
replicas: 1
"""


def test_a_best_yaml_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(BEST)
    assert load_deployment(path).pools == (Pool(plan=Plan(tensor=2)),)
    write_deployment(path, read_deployment(path))
    assert path.read_text() == BEST


def test_the_identity_of_one_pool_on_one_group_holds_nothing_new(tmp_path: Path) -> None:
    """Journals of searches and sweeps know runs by it: what is new has a default, and defaults are left out."""
    data = load_deployment(written(tmp_path, tensor=2)).model_dump(mode="json", exclude_defaults=True)
    assert data["pools"] == [{"plan": {"tensor": 2}}]
    assert data["cluster"].keys() == {"device", "devices_per_node"}
    assert data.keys() == {"model", "cluster", "engine", "pools"}


def test_a_deployment_with_the_stages_of_an_earlier_version_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput) as caught:
        parse_spec(Pool, {"name": "serve", "stages": ["prefill", "decode"]}, "here")
    assert str(caught.value) == "here: stages: unknown key; did you mean phases?"


def test_a_result_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    simulate(deployed(Pool(device="cheap")), requests_of()).save(tmp_path / "result")
    path = tmp_path / "result" / "result.json"
    record = json.loads(path.read_text())
    record["format"] = 1
    record["deployment"]["pools"][0]["stages"] = record["deployment"]["pools"][0].pop("phases")
    record |= record.pop("pools")["serve"]
    del record["sha256"]
    write_sealed(path, record)
    with pytest.raises(BadInput) as caught:
        SimulationResult.load(tmp_path / "result")
    assert str(caught.value).endswith(
        "format: got 1; another version of apexsim saved this; this one reads format 2: run it again"
    )
