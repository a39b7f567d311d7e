"""Timelines of a run in the Chrome trace event format, for ``chrome://tracing`` or Perfetto.

One process a replica, one bar a step (or run of decode steps). The batches of a pipeline overlap in time: each goes
to the first lane that is free. Counters show running and waiting requests and the KV blocks held.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apexsim.atomic import atomic_path
from apexsim.columns import Columns
from apexsim.results import SimulationResult

_US_PER_NS = 1e-3


def write_timeline(path: Path | str, result: SimulationResult) -> None:
    """Write the timeline of every replica, atomically; times in microseconds, as the format wants."""
    with atomic_path(path) as scratch, scratch.open("w", encoding="utf-8") as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[')
        for index, event in enumerate(timeline_events(result)):
            out.write(",\n" if index else "\n")
            out.write(json.dumps(event, separators=(",", ":")))
        out.write("\n]}\n")


def timeline_events(result: SimulationResult) -> Iterator[dict[str, Any]]:
    """The trace events of a run, replica by replica, each in order of time."""
    for pool in result.deployment.pools:
        for replica in result.deployment.replicas_of(pool.name):
            yield {"ph": "M", "pid": replica, "name": "process_name", "args": {"name": f"{pool.name} {replica}"}}
            steps, _ = result.steps_of(replica)
            yield from _step_events(replica, steps)


def _step_events(replica: int, steps: Columns) -> Iterator[dict[str, Any]]:
    free_ns: list[int] = []
    names = [name for name in steps if name not in ("start_ns", "end_ns", "replica")]
    rows = zip(*(steps[name].tolist() for name in ("start_ns", "end_ns", *names)), strict=True)
    for start_ns, end_ns, *rest in rows:
        step = dict(zip(names, rest, strict=True))
        lane = next((lane for lane, free in enumerate(free_ns) if free <= start_ns), len(free_ns))
        free_ns[lane : lane + 1] = [end_ns]
        place = {"pid": replica, "ts": start_ns * _US_PER_NS}
        bar = {"ph": "X", "name": _kind(step), "tid": lane, "dur": (end_ns - start_ns) * _US_PER_NS, "args": step}
        yield {**bar, **place}
        yield {"ph": "C", "name": "requests", "args": {key: step[key] for key in ("running", "waiting")}, **place}
        yield {"ph": "C", "name": "kv_blocks", "args": {"held": step["kv_blocks"]}, **place}


def _kind(step: dict[str, int]) -> str:
    if not step["chunk_tokens"]:
        return "decode"
    return "mixed" if step["decodes"] else "prefill"
