"""What a refactoring must not change, as hashes by stable keys: ``python benchmarks/identity.py [--against REVISION]``.

Hashed is what does not depend on where stretches end: request records, gaps between tokens, summaries without timing,
and per replica the totals of steps, tokens and time. Rows of steps are hashed for one stage without windows.

Without ``--against`` the hashes are printed as JSON. With it, the same cases run on this tree and on that of the
revision, and the keys that differ are named. Exit status 1 where one does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
DRAWN_CASES = 30

# The deployments of tests/test_exactness.py, on H100: every kind of layer, policy and axis of a plan.
FITTED: dict[str, dict[str, Any]] = {
    "dense": {"model": "llama-3.1-8b"},
    "two-replicas": {"model": "llama-3.1-8b", "engine": "vllm-v1-sync", "replicas": 2, "router": "least_loaded"},
    "pipeline": {"model": "llama-3.1-70b", "tensor": 2, "pipeline": 2},
    "windows": {"model": "gpt-oss-120b", "tensor": 2},
    "windows-pipeline": {"model": "gpt-oss-20b", "pipeline": 2, "engine": "sglang-0.5"},
    "whole-prompts": {"model": "mixtral-8x7b", "tensor": 2, "engine": "trtllm-1.0"},
    "prefill-first": {"model": "llama-3.1-70b", "tensor": 8, "engine": "vllm-0.6"},
    "hybrid": {"model": "nvidia-nemotron-nano-9b-v2"},
    "hybrid-experts": {"model": "qwen3-next-80b-a3b", "tensor": 4, "engine": "sglang-0.5"},
    "sliding": {"model": "gemma-3-12b"},
    "attention-data": {"model": "mixtral-8x7b", "attention_data": 4, "expert": 4},
    "all-axes": {"model": "gpt-oss-20b", "tensor": 2, "attention_data": 2, "pipeline": 2, "engine": "sglang-0.5"},
}
SWEEP = {
    "base": {"device": "h100-sxm", "workload": "chat", "requests": 40, "slo": {"ttft_s": 0.5, "tpot_s": 0.05}},
    "grid": {"model": ["llama-3.1-8b", "llama-3.1-70b"], "tensor": [1, 2], "rate_per_s": [2, 6]},
}
RECORDED = (
    "index", "replica", "arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "shown_ns", "prompt_tokens",
    "total", "known", "computed", "pending", "blocks", "preemptions",
)  # fmt: skip
_COUNTS = "computed", "pending", "blocks", "preemptions"
TIMES = "timing", "wall_s", "build_s", "simulate_s", "account_s", "jobs"


def fitted_hashes() -> dict[str, str]:
    """Hashes that rest on fitted costs, whose last bits depend on numpy and the processor."""
    hashes: dict[str, str] = {}
    for name, file in FITTED.items():
        hashes |= {f"fitted/{name}/{part}": value for part, value in _result_hashes(_fitted_run(file)).items()}
    return hashes | {"search": _search_hash(), "sweep": _sweep_hash()}


def integer_hashes() -> dict[str, str]:
    """Hashes that rest on integers alone: the same on any machine."""
    hashes = {}
    for index, case in enumerate(_drawn_cases()):
        run = case.run(exact_steps=False)
        for part, value in _run_hashes(run).items():
            hashes[f"drawn/{index:02d}/{part}"] = value
    return hashes


def machine() -> str:
    """What fitted hashes depend on beside the code: numpy's version and the processor's vector instructions."""
    features = np._core._multiarray_umath.__cpu_features__
    return f"numpy {np.__version__}, {_digest(sorted(name for name, there in features.items() if there))[:12]}"


def _fitted_run(file: dict[str, Any]) -> Any:
    from apexsim.io.deployments import DeploymentFile, resolve_deployment
    from apexsim.serving.simulator import simulate
    from apexsim.specs.workload import Requests

    rng = np.random.default_rng(11)
    requests = Requests(
        name="busy",
        arrival_s=np.cumsum(rng.exponential(0.08, 60)),
        prompt_tokens=rng.integers(1, 3000, 60),
        output_tokens=rng.integers(1, 150, 60),
    )
    return simulate(resolve_deployment(DeploymentFile(device="h100-sxm", **file), where="identity"), requests)


def _result_hashes(result: Any) -> dict[str, str]:
    summary = {key: value for key, value in result.summary().items() if key != "timing"}
    stages = max(pool.plan.pipeline for pool in result.deployment.pools)
    parts = {
        "requests": _digest(result.requests),
        "gaps": _digest([column.tolist() for column in result.gaps]),
        "summary": _digest(summary),
        "totals": _digest(_totals(result.steps, stages=stages)),
    }
    if stages == 1 and not result.deployment.model.windows:
        parts["steps"] = _digest(result.steps)
    return parts


def _totals(steps: pd.DataFrame, *, stages: int) -> list[list[float]]:
    """Per replica: steps, decode tokens, prompt tokens, the time from start to end of its steps, and the last end.

    In a pipeline rows overlap, by how stretches are cut: there the time is left out.
    """
    table = pd.DataFrame({
        "replica": steps["replica"],
        "steps": steps["repeats"],
        "decodes": steps["decodes"] * steps["repeats"],
        "prompt": steps["chunk_tokens"],
        "time_ns": np.rint((steps["end_s"] - steps["start_s"]) * 1e9).astype(np.int64) if stages == 1 else 0,
    })  # fmt: skip
    totals = table.groupby("replica").sum().to_numpy().tolist()
    ends = steps.groupby("replica")["end_s"].max().tolist()
    return [[*total, end] for total, end in zip(totals, ends, strict=True)]


def _run_hashes(run: Any) -> dict[str, str]:
    steps = run.recorder.steps()
    frame = pd.DataFrame({key: steps[key] for key in ("replica", "repeats", "decodes", "chunk_tokens")})
    frame["decodes"] *= frame["repeats"]
    totals = frame.groupby("replica").sum().to_numpy().tolist()
    gaps = [column.tolist() for column in run.recorder.inter_token_gaps()]
    return {
        "requests": _digest([_record(request) for request in run.requests]),
        "gaps": _digest(gaps),
        "totals": _digest(totals),
    }


def _record(request: Any) -> list[Any]:
    """What is known of a request; of one that was refused, and has no job, what it asked for."""
    asked = {"index": request.index, "arrival_ns": request.arrival_ns, "prompt_tokens": request.prompt_tokens}
    refused = {"total": request.total, "known": request.prompt_tokens} | dict.fromkeys(_COUNTS, 0)
    job = getattr(request, "job", request)
    return [
        asked.get(name, refused.get(name)) if job is None else getattr(job, name, asked.get(name)) for name in RECORDED
    ]


def _drawn_cases() -> Iterator[Any]:
    """Small, busy cases full of ties, drawn here so that they stay the same when tests draw others."""
    from apexsim.testing import Case

    for stream in np.random.SeedSequence(2026).spawn(DRAWN_CASES):
        rng = np.random.default_rng(stream)
        count = int(rng.integers(5, 60))
        pick: Callable[..., Any] = lambda *values, rng=rng: values[int(rng.integers(len(values)))]  # noqa: E731
        yield Case(
            arrivals_ns=sorted(int(tick) * 500_000 for tick in rng.integers(0, 80, count)),
            lengths=[(int(p), int(o)) for p, o in rng.integers(1, [200, 60], (count, 2))],
            policy=pick("chunked_prefill", "prefill_first"),
            chunked=pick(True, True, False),
            token_budget=pick(64, 256, 2048),
            seats=pick(2, 8, 64),
            blocks=pick(30, 60, 4_000),
            full_admission=pick(False, False, True),
            lookahead=pick(0, 1),
            stages=pick(1, 1, 2, 3),
            balanced=pick(False, True),
            replicas=pick(1, 2, 3),
            router=pick("round_robin", "least_loaded"),
            frontend_ns=pick(0, 300_000),
            concurrency=pick(None, None, 5),
            prefix_caching=pick(False, True),
            stream_interval=pick(1, 7),
            window=pick(None, None, 40),
            step_ns=pick(500_000, 700_001),
        )


def _search_hash() -> str:
    import apexsim

    study = apexsim.search(
        model="llama-3.1-8b",
        devices="4xh100-sxm",
        workload="chat",
        requests=60,
        slo={"ttft_s": 0.5, "tpot_s": 0.05},
        objective="latency",
        jobs=1,
    )
    return _digest([{k: v for k, v in record.items() if k not in TIMES} for record in study.records])


def _sweep_hash() -> str:
    from apexsim.sweep import sweep

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "sweep.yaml"
        path.write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
        return _digest(sweep(path, out=Path(scratch) / "out", jobs=1))


def _digest(value: Any) -> str:
    """SHA-256 of plain data; floats count with every bit."""
    if isinstance(value, pd.DataFrame):
        value = {str(name): value[name].tolist() for name in value.columns}
    text = json.dumps(value, default=_plain, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def hashes_of(tree: Path) -> dict[str, str]:
    """All hashes, of the package in another tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=tree, check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)["hashes"]
    return found


def against(revision: str) -> int:
    """Compare this tree with a revision of it; prints the keys that differ."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
        try:
            theirs = hashes_of(tree)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    ours = hashes_of(ROOT)
    differ = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    print(f"{len(ours) - len(differ)} of {len(ours)} hashes are those of {revision}")
    print("".join(f"differs: {key}\n" for key in differ), end="")
    return 1 if differ else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="What a refactoring must not change, as hashes.")
    parser.add_argument("--against", metavar="REVISION", help="a git revision to compare this tree with")
    revision = parser.parse_args().against
    if revision:
        return against(revision)
    print(json.dumps({"machine": machine(), "hashes": integer_hashes() | fitted_hashes()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
