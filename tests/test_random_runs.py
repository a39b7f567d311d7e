"""Random runs of shipped engines and models: macro-steps leave the records of single steps, to the last bit.

The first difference ends a test and comes with a script of its own that shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import apexsim
from apexsim import catalog
from apexsim.errors import ApexsimError, InfeasiblePlan, Unsupported
from apexsim.io.deployments import DeploymentFile, resolve_deployment
from apexsim.serving.fast.one_stage import OneStage
from apexsim.serving.fast.pipeline import InTurn
from apexsim.serving.simulator import How, set_up
from apexsim.specs.workload import Requests
from apexsim.testing import KeptRun, check_run, check_same

SEED, FEW, MANY = 2026, 200, 3_000
# Kinds of models, and plans of each.
PLANS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"model": "llama-3.1-8b"}),
    ("dense", {"model": "llama-3.1-70b", "tensor": 2, "pipeline": 2, "weights": "fp8"}),
    ("dense", {"model": "opt-30b", "tensor": 2, "weights": "int4_wo", "device": "a100-sxm"}),
    ("experts", {"model": "mixtral-8x7b", "tensor": 2}),
    ("experts", {"model": "qwen3-30b-a3b", "pipeline": 3}),
    ("experts", {"model": "mixtral-8x7b", "attention_data": 4, "expert": 4}),
    ("windows", {"model": "gpt-oss-20b"}),
    ("windows", {"model": "gpt-oss-20b", "pipeline": 2}),
    ("windows", {"model": "gemma-3-12b"}),
    ("recurrent", {"model": "nvidia-nemotron-nano-9b-v2"}),
    ("recurrent", {"model": "qwen3-next-80b-a3b", "tensor": 4}),
    ("latent", {"model": "deepseek-v3", "tensor": 8, "weights": "fp8"}),
]
# What the draws must reach, each many times over: otherwise they compare single steps with single steps.
MECHANISMS = {
    "stretch", "stretch cut", "gone on after somebody left", "dissolved",
    "pipeline stretch", "pipeline stretch cut", "left out of a batch", "pipeline dissolved",
    "preemption", "windows", "refused",
}  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """A deployment, and the columns of its load."""

    kind: str
    file: dict[str, Any]
    load: dict[str, Any]

    def runs(self) -> tuple[KeptRun, KeptRun]:
        """With macro-steps, and step by step."""
        requests = Requests(**self.load)
        deployment = resolve_deployment(DeploymentFile(**self.file), where="draw")
        engine, cost = set_up(deployment, requests)
        made = []
        for exact_steps in (False, True):
            how = How(slo=apexsim.SLO(ttft_s=0.2), exact_steps=exact_steps)
            made.append(KeptRun(deployment.as_run([engine.server]), requests, cost=cost, memory=engine.memory, how=how))
            made[-1].go()
        return made[0], made[1]

    def script(self) -> str:
        """A program that shows what this draw shows."""
        load = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in self.load.items()}
        return f"""import apexsim
from apexsim.specs.workload import Requests
deployment = apexsim.deployment(**{self.file!r})
load = Requests(**{load!r})
slo = apexsim.SLO(ttft_s=0.2)
fast, exact = (apexsim.simulate(deployment, load, slo=slo, exact_steps=each) for each in (False, True))
print("identical:", fast.requests.equals(exact.requests) and fast.block_ns == exact.block_ns)
"""


def draw(rng: np.random.Generator, engines: list[str]) -> Draw:
    """Small, busy and full of ties: few seats, small budgets, a cache that is short of blocks more often than not."""
    kind, plan = PLANS[rng.integers(len(PLANS))]
    options: dict[str, Any] = {
        "max_num_seqs": int(rng.choice([1, 2, 8, 64])),
        "max_num_batched_tokens": int(rng.choice([1, 16, 64, 512, 2048])),
        "max_chunk_tokens": int(rng.choice([8, 100])),
        "kv_blocks": int(rng.choice([rng.integers(30, 120), 4_000])),
        "policy": str(rng.choice(["chunked_prefill", "prefill_first", "shortest_first", "deadline"])),
        "stream_interval": int(rng.choice([1, 7])),
        "receive_interval": int(rng.choice([1, 4])),
        "prefix_caching": bool(rng.integers(2)),
        "lookahead_steps": int(rng.integers(2)),
        "chunked_prefill": bool(rng.integers(2)),
        "pipeline_split": str(rng.choice(["greedy", "balanced"])),
        "admission": str(rng.choice(["prompt", "prompt", "full"])),
    }
    kept = {key: value for key, value in options.items() if rng.random() < 0.5 or key == "kv_blocks"}
    replicas = {"replicas": int(rng.integers(1, 6)), "router": str(rng.choice(["round_robin", "least_loaded"]))}
    file = {"device": "h100-sxm", "engine": engines[rng.integers(len(engines))], **plan, **replicas}
    return Draw(kind, {**file, "engine_options": kept}, draw_load(rng))


def draw_load(rng: np.random.Generator) -> dict[str, Any]:
    count = int(rng.integers(2, 40))
    longest = int(rng.choice([8, 80, 500]))
    load: dict[str, Any] = {
        "name": "drawn",
        "prompt_tokens": rng.integers(1, longest, count),
        "output_tokens": np.maximum(1, rng.geometric(1 / int(rng.choice([2, 40, 150, 150])), count)).clip(max=600),
    }
    if rng.random() < 0.5:
        turnaround_s = float(rng.choice([0.0, 0.003, 0.01, 0.05, 0.3]))
        return {
            **load,
            "concurrency": int(rng.integers(1, 12)),
            "turnaround_s": turnaround_s,
            "waves": rng.random() < 0.3,
        }
    gaps_s = rng.exponential(float(rng.choice([0.001, 0.02, 0.3])), count)
    return {**load, "arrival_s": np.round(np.cumsum(gaps_s), int(rng.choice([2, 9])))}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each mechanism is reached in here."""
    seen: Counter[str] = Counter()
    just_left: set[Any] = set()  # those of which a stretch ended with somebody's last token

    def counting(name: str, method: Any, *, if_true: bool = False) -> Any:
        def counts(self: Any, *arguments: Any) -> Any:
            result = method(self, *arguments)
            seen[name] += bool(result) if if_true else 1
            if name == "stretch" and result:
                just_left.add(self)
            if name == "going on":
                seen["gone on after somebody left"] += bool(result) and self in just_left
                just_left.discard(self)
            return result

        return counts

    with pytest.MonkeyPatch.context() as patch:
        for kind, prefix in ((OneStage, ""), (InTurn, "pipeline ")):
            patch.setattr(kind, "_settle", counting(f"{prefix}stretch", kind._settle))
            patch.setattr(kind, "cut", counting(f"{prefix}stretch cut", kind.cut, if_true=True))
            patch.setattr(kind, "_dissolve", counting(f"{prefix}dissolved", kind._dissolve))
        patch.setattr(OneStage, "go_on", counting("going on", OneStage.go_on, if_true=True))
        patch.setattr(InTurn, "_leave_out", counting("left out of a batch", InTurn._leave_out))
        yield seen


def compare(count: int, scripts: Path) -> tuple[Counter[str], Counter[str]]:
    """Compare so many draws; what they reached, and how many there were of each kind and engine."""
    engines = sorted(catalog.names("engine"))
    drawn: Counter[str] = Counter()
    with counted() as seen:
        for stream in np.random.SeedSequence(SEED).spawn(count):
            rng = np.random.default_rng(stream)
            while True:
                one = draw(rng, engines)
                try:
                    fast, exact = one.runs()
                    break
                except (InfeasiblePlan, Unsupported):
                    drawn["not possible"] += 1
            try:
                check_run(fast)
                check_same(fast, exact)
            except AssertionError as error:
                script = scripts / "fast_path_differs.py"
                script.write_text(one.script(), encoding="utf-8")
                pytest.fail(f"{error}\n{script}:\n{one.script()}")
            drawn.update(
                (one.kind, one.file["engine"], one.file.get("engine_options", {}).get("policy", "its own policy"))
            )
            drawn["think time"] += bool(one.load.get("turnaround_s"))
            seen["preemption"] += sum(request.preemptions for request in fast.requests)
            seen["windows"] += one.kind == "windows"
            seen["refused"] += len(fast.rejected)
    return seen, drawn


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
def test_macro_steps_equal_single_steps(count: int, tmp_path: Path) -> None:
    seen, drawn = compare(count, tmp_path)
    assert {name for name in MECHANISMS if seen[name] < count // 20} == set(), f"hardly reached: {seen}"
    wanted = {*catalog.names("engine"), *(kind for kind, _ in PLANS), "think time"}
    assert {name for name in wanted if not drawn[name]} == set(), f"never drawn: {drawn}"


def test_a_draw_can_be_run_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        one = draw(rng, ["vllm-v1-sync"])
        try:
            one.runs()
        except ApexsimError:
            continue
        exec(compile(one.script(), "script", "exec"), {})
        assert capsys.readouterr().out == "identical: True\n"
        return
    pytest.fail("no draw was possible")
