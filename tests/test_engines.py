"""Engines: versions to profiles, defaults that depend on device, weights and load, and what each setting does."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from apexsim import catalog
from apexsim.columns import joined
from apexsim.costs.steps import BatchStats, build_step_cost
from apexsim.errors import BadInput
from apexsim.io.deployments import deployment_from
from apexsim.serving.job import Job
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.messages import View
from apexsim.serving.policies import ChunkedPrefill
from apexsim.serving.request import Request
from apexsim.serving.simulator import simulate
from apexsim.specs.engine import SchedulerDefaults, token_budget
from apexsim.specs.server import Load
from apexsim.specs.workload import Requests
from apexsim.testing import Case, KeptRun, check_case
from apexsim.units import NS_PER_S

ENGINES = [catalog.load("engine", name) for name in catalog.names("engine")]


@pytest.mark.parametrize(
    ("asked", "profile"),
    [
        ("vllm@0.6.0", "vllm-0.6"),
        ("vllm@0.11.1", "vllm-v1-sync"),
        ("vllm@0.19.0", "vllm-v1-async"),
        ("vllm@nightly-5b8c30d62b754b57", "vllm-v1-async"),
        ("vllm", "vllm-v1-async"),
        ("sglang@0.4.4.post2", "sglang-0.4"),
        ("sglang@0.5.1.post1", "sglang-0.5"),
        ("sglang@", "sglang-0.5"),
        ("trtllm@1.0.0rc3", "trtllm-1.0"),
        ("trtllm@1.3.0rc5", "trtllm-1.1"),
        ("vllm-v1-sync", "vllm-v1-sync"),
    ],
)
def test_an_engine_is_named_by_version_wherever_a_profile_is(asked: str, profile: str) -> None:
    assert catalog.load("engine", asked).name == profile
    made = deployment_from(None, {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": asked})
    assert made.engine == catalog.load("engine", asked)
    shipped = catalog.load("engine", profile)
    assert made.engine.model_copy(update={"memory": shipped.memory}) == shipped


@pytest.mark.parametrize(
    ("asked", "copies"),
    [("vllm@0.8.0", 2.5), ("vllm@0.8.5.post1", 2.5), ("vllm@0.11.0", 9.5), ("vllm-v1-sync", 9.5),
     ("vllm@0.14.1", 9.5), ("vllm@0.19.0", 3.5), ("vllm-v1-async", 3.5), ("vllm@0.25.1", 0.5), ("vllm", 0.5),
     ("vllm@nightly-1", 0.5)],
)  # fmt: skip
def test_memory_terms_follow_the_version(asked: str, copies: float) -> None:
    assert catalog.load("engine", asked).memory.sampler_logit_copies == copies


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("vllm@0.3.1", "no profile lists it; known: 0.4, 0.5, 0.6, "),
        ("vllm@9.0", "no profile lists it; known: 0.4, 0.5, 0.6, "),
        ("vlm@0.11", "did you mean vllm"),
        ("vlm", "did you mean vllm-0.6"),
    ],
)
def test_unknown_versions_are_refused_with_the_known_ones(tmp_path: Path, asked: str, told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: llama-3.1-8b\ndevice: h100-sxm\nengine: {asked}\n")
    with pytest.raises(BadInput) as refused:
        deployment_from(file, {})
    assert str(refused.value).startswith(f"{file}: engine: ")
    assert told in str(refused.value)


def test_the_docs_name_every_profile_with_its_versions() -> None:
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    for profile in ENGINES:
        (row,) = re.findall(rf"^\| `{re.escape(profile.name)}` \|.*$", page, re.MULTILINE)
        assert profile.versions[0] in row
        assert profile.versions[-1] in row


def test_every_engine_has_few_profiles() -> None:
    assert {profile.engine for profile in ENGINES} == {"vllm", "sglang", "trtllm", "reference", "transformers"}
    assert len(ENGINES) <= 9


@pytest.mark.parametrize(
    ("engine", "device", "budget", "seats"),
    [
        ("vllm-v1-async", "h100-sxm", 8192, 1024),
        ("vllm-v1-sync", "a100-sxm", 2048, 256),
        ("vllm-0.6", "h100-sxm", 512, 256),
    ],
)
def test_scheduler_defaults_follow_device_and_context(engine: str, device: str, budget: int, seats: int) -> None:
    scheduler = (
        deployment_from(None, {"model": "llama-3.1-8b", "device": device, "engine": engine})
        .colocated_server()
        .scheduler
    )
    assert (scheduler.token_budget, scheduler.max_num_seqs) == (budget, seats)


def test_small_devices_take_a_smaller_step() -> None:
    sheet = catalog.load("device", "h100-sxm").datasheet
    small = sheet.model_copy(update={"memory_bytes": 48 << 30})
    profile = catalog.load("engine", "vllm-v1-async")
    assert profile.scheduler_for(4096, "l40s", small).token_budget == 2048
    assert profile.scheduler_for(4096, "rtx-pro-6000", sheet).token_budget == 8192


def test_what_is_asked_for_outweighs_what_an_engine_does_by_itself() -> None:
    choices = {"model": "llama-3.1-8b", "device": "a100-sxm", "engine_options": {"max_num_batched_tokens": 4096}}
    scheduler = deployment_from(None, choices).colocated_server().scheduler
    assert (scheduler.token_budget, scheduler.max_num_seqs) == (4096, 256)


def test_kv_dtype_is_the_engines_unless_asked_for() -> None:
    hopper = catalog.load("device", "h100-sxm").datasheet
    blackwell = hopper.model_copy(update={"flops_per_s": hopper.flops_per_s | {"nvfp4": 9e15}})
    vllm, trtllm, sglang = (catalog.load("engine", name) for name in ("vllm", "trtllm", "sglang"))
    assert [vllm.kv_dtype_for(("fp8", "fp8"), sheet) for sheet in (hopper, blackwell)] == ["bf16", "fp8"]
    assert vllm.kv_dtype_for(("bf16", "mxfp4"), blackwell) == "fp8"
    assert vllm.kv_dtype_for(("bf16", "int4_wo"), blackwell) == "bf16"
    assert vllm.kv_dtype_for(("fp8_block", "fp8_block"), blackwell) == "bf16"
    assert trtllm.kv_dtype_for(("fp8", "fp8"), hopper) == "fp8"
    assert trtllm.kv_dtype_for(("bf16", "bf16"), hopper) == "bf16"
    assert sglang.kv_dtype_for(("fp8", "fp8"), blackwell) == "bf16"
    choices = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "trtllm", "weights": "fp8"}
    assert deployment_from(None, choices).kv_cache == "fp8"
    assert deployment_from(None, choices | {"kv_cache": "bf16"}).kv_cache == "bf16"


def test_token_budgets_of_benchmark_recipes() -> None:
    assert token_budget(prompt_tokens=1024, sequences=64) == 1152
    assert token_budget(prompt_tokens=1024, sequences=4) == 1152
    choices = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "trtllm"}
    plain = deployment_from(None, choices)
    assert plain.colocated_server(Load(1024, 64)) == plain.colocated_server()
    ruled = deployment_from(None, choices | {"engine_options": {"token_budget_rule": "one_prompt"}})
    assert ruled.colocated_server().scheduler.token_budget == 8192
    assert ruled.colocated_server(Load(1024, 64)).scheduler.token_budget == 1152
    assert ruled.colocated_server(Load(1024, None)).scheduler.token_budget == 1024 + 2048 + 64
    small = deployment_from(
        None,
        {"model": "llama-3.1-8b", "device": "a100-sxm", "engine_options": {"token_budget_rule": "one_prompt"}},
    )
    assert small.colocated_server(Load(5000, 8)).scheduler.token_budget == 5120


class RememberedBlocks(RuleBasedStateMachine):
    """What a preempted job finds again, against a queue of blocks that is really kept."""

    SIZE = 4

    @initialize(total=st.integers(8, 40), each=st.sampled_from([1, 2]))
    def open(self, total: int, each: int) -> None:
        self.manager = BlockManager(total * each, self.SIZE, lambda n: each * -(-n // self.SIZE), remembers=True)
        self.each = each
        self.queue = deque(range(total * each))
        self.jobs = [Job(Request(index, 30, 60)) for index in range(4)]
        self.held: list[list[int]] = [[] for _ in self.jobs]
        self.old: list[list[int]] = [[] for _ in self.jobs]

    @rule(who=st.integers(0, 3), tokens=st.integers(1, 12))
    def go_on(self, who: int, tokens: int) -> None:
        """Seat or grow a job; one that was preempted recovers what it finds first."""
        job, held = self.jobs[who], self.held[who]
        found = self.manager.cached(job, self.manager.free) if not job.computed else 0
        after = job.computed + found + tokens
        if after >= job.known or self.manager.missing(job, after) > self.manager.free:
            return
        if not job.computed:
            assert found == min(len(self.old[who]) // self.each, (job.known - 1) // self.SIZE) * self.SIZE
            held += self.old[who][: found // self.SIZE * self.each]
            self.queue = deque(block for block in self.queue if block not in held)
            self.manager.recover(job, found)
        self.manager.grow(job, after)
        job.resume(after)
        while len(held) < job.blocks:
            held.append(self.queue.popleft())
            for old in self.old:  # whoever had it before finds it and what came after it no more
                if held[-1] in old:
                    del old[old.index(held[-1]) :]

    @rule(who=st.integers(0, 3), preempted=st.booleans())
    def give_back(self, who: int, preempted: bool) -> None:
        job, held = self.jobs[who], self.held[who]
        if not job.computed:
            return
        self.old[who] = held[: job.computed // self.SIZE * self.each] if preempted else []
        (self.manager.preempt if preempted else self.manager.release)(job)
        self.queue.extend(reversed(held))
        held.clear()
        job.resume(0)

    @invariant()
    def free_blocks_are_those_in_the_queue(self) -> None:
        if hasattr(self, "manager"):
            assert self.manager.free == len(self.queue)


TestRememberedBlocks = RememberedBlocks.TestCase
TestRememberedBlocks.settings = settings(max_examples=200, deadline=None, stateful_step_count=40)


def served(**case: Any) -> KeptRun:
    made = Case(**case)
    check_case(made)
    return made.run(exact_steps=False)


def jobs_of(run: KeptRun) -> list[Job]:
    return [request.job for request in run.requests if request.job is not None]


def test_a_preempted_request_computes_less_where_its_blocks_are_remembered() -> None:
    tight = {"arrivals_ns": [0] * 6, "lengths": [(100, 120)] * 6, "blocks": 60, "token_budget": 256}
    computed = {}
    for caching in (False, True):
        run = served(**tight, prefix_caching=caching)
        assert sum(request.preemptions for request in run.requests) > 0
        computed[caching] = run.recorder.steps()["chunk_tokens"].sum()
    assert computed[True] < computed[False]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_client_is_handed_its_first_tokens_together(stages: int) -> None:
    case = {"arrivals_ns": [0, 0, 0], "lengths": [(64, 40), (64, 3), (64, 1)], "stages": stages, "context_ns": 0}
    plain, slow = served(**case), served(**case, stream_interval=20)
    for one, other in zip(jobs_of(plain), jobs_of(slow), strict=True):
        assert (one.first_token_ns, one.last_token_ns) == (other.first_token_ns, other.last_token_ns)
    long, short, single = jobs_of(slow)
    assert (short.shown_ns, single.shown_ns) == (short.last_token_ns, single.last_token_ns)
    gaps = (long.last_token_ns or 0) - (long.first_token_ns or 0)
    assert (long.shown_ns or 0) - (long.first_token_ns or 0) == pytest.approx(gaps * 19 / 39, rel=0.01)
    shown_s = joined(slow.rows.blocks(0))["first_token_s"]
    assert shown_s.tolist() == [(job.shown_ns or 0) / 1e9 for job in jobs_of(slow)]


def test_a_scheduler_looks_for_requests_every_so_many_decode_steps() -> None:
    case = {"arrivals_ns": [0, 3_500_000], "lengths": [(10, 60), (10, 5)], "step_ns": 1_000_000, "token_ns": 0}
    waited = []
    for interval in (1, 20):
        first, second = served(**case, context_ns=0, receive_interval=interval).requests
        assert first.scheduled_ns == 0
        waited.append((second.scheduled_ns or 0) // 1_000_000)
    assert waited == [4, 21]
    alone = served(arrivals_ns=[0, 90_000_000], lengths=[(10, 5)] * 2, receive_interval=20).requests[1]
    assert alone.scheduled_ns == 90_000_000


def test_clients_in_waves_send_together() -> None:
    case = {"arrivals_ns": [0] * 6, "lengths": [(10, 5), (10, 50), (10, 20)] * 2, "concurrency": 3}
    sent = [request.arrival_ns for request in served(**case, waves=True).requests]
    assert len(set(sent)) == 2
    assert len({request.arrival_ns for request in served(**case).requests}) == 4


@pytest.mark.parametrize("key", ["policy", "router"])
def test_a_class_that_cannot_be_built_is_bad_input(key: str) -> None:
    name = f"{__name__}:Demanding"
    choices = {"model": "llama-3.1-8b", "device": "h100-sxm"}
    given = {"engine_options": {"policy": name}} if key == "policy" else {"router": name}
    load = Requests(name="one", arrival_s=np.zeros(1), prompt_tokens=np.array([9]), output_tokens=np.array([9]))
    with pytest.raises(BadInput, match=f"{key}: got .*cannot be built.*missing"):
        simulate(deployment_from(None, choices | given), load)


class Demanding(ChunkedPrefill):
    """A policy and a router that ask for more than they are given."""

    def __init__(self, scheduler: SchedulerDefaults, more: int) -> None:
        super().__init__(scheduler)
        self.more = more

    def choose(self, job: Job, views: Sequence[View]) -> int:
        return self.more % len(views)


def stage_s(options: dict[str, object], stats: BatchStats, **choices: object) -> list[float]:
    """Seconds of a step on every stage of Llama-3.1-8B."""
    given = {"model": "llama-3.1-8b", "device": "h100-sxm", "engine": "vllm@0.11", "engine_options": options}
    made = deployment_from(None, {**given, **choices})
    return [ns / NS_PER_S for ns in build_step_cost(made.colocated_server()).stage_ns(stats)]


NO_HOST = {"step_s": 0.0, "per_sequence_s": 0.0, "exposed_step_s": 0.0, "launch_s": 0.0}
DECODES = BatchStats(4, 4000, (), (), 4)


def test_a_step_that_no_graph_replays_waits_for_its_launches() -> None:
    """Llama-3.1-8B: 10 kernels a layer (norm, QKV, rope, cache write, attention, O, norm, gate/up, activation, down),
    embedding, last norm, LM head and sampling."""
    launches = 32 * 10 + 4
    slow = {**NO_HOST, "launch_s": 1e-3}
    (step,) = stage_s({**slow, "cuda_graphs": False}, DECODES)
    assert step == pytest.approx(launches * 1e-3)
    assert stage_s(slow, DECODES) == stage_s(NO_HOST, DECODES)
    (first, second) = stage_s({**slow, "cuda_graphs": False}, DECODES, pipeline=2)
    assert first + second == pytest.approx((launches + 1) * 1e-3)  # one more to send


def test_graphs_replay_prompts_up_to_a_number_of_tokens() -> None:
    slow = {**NO_HOST, "launch_s": 1e-3, "graph_tokens": 256}
    short, long = BatchStats(0, 0, (), ((256, 0),), 1), BatchStats(0, 0, (), ((257, 0),), 1)
    assert stage_s(slow, short) == stage_s(NO_HOST, short)
    assert stage_s(slow, long)[0] > 0.3 > stage_s(NO_HOST, long)[0]


def test_launches_hide_behind_kernels_that_take_longer() -> None:
    long = BatchStats(0, 0, (), ((8000, 0),), 1)
    assert stage_s({**NO_HOST, "launch_s": 20e-6}, long) == stage_s(NO_HOST, long)
