"""The summary of a run: what each figure means, in one place.

Latencies are over finished requests; percentiles interpolate linearly. A figure that does not exist is None.

The parts of ``timing``, in seconds of the wall clock:

wall_s       all of the run
build_s      drawing requests, planning memory and filling the tables of costs of whole prompts
simulate_s   the clock from the first event to the last, and the costs that a step asks for first
account_s    columns, joules and operators
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from apexsim.atomic import without_nan
from apexsim.metrics import distribution, ratio, weighted_distribution
from apexsim.quantiles import Floats
from apexsim.tables import blocks, rows_of
from apexsim.uncertainty import intervals
from apexsim.units import NS_PER_S

if TYPE_CHECKING:
    import pandas as pd

    from apexsim.results import SimulationResult
    from apexsim.specs.device import Datasheet

_LATENCIES = "ttft_s", "tpot_s", "e2e_s", "queue_s"


def summarise(result: SimulationResult) -> dict[str, Any]:
    """Every figure of a run as nested plain data, in a fixed order of keys.

    ``itl_s``: gaps between tokens; every token counts once, whatever its request.
    ``energy`` and ``cost``: of the whole run.
    ``steady``: what a token costs once the system has filled (see ``steady.py``).
    ``memory``: that of a replica (see ``MemoryPlan.figures``); of several pools by name.
    ``pools``: of several pools, what the devices that each uses did (see ``_pools``).
    ``preemptions`` and ``prefix_hit_rate``: of the whole run.
    ``provenance``: of each operator, which share of the devices' working time rests on which evidence.
    ``uncertainty``: where mean latencies, the rate of tokens and joules a token may lie (see ``uncertainty.py``).
    ``timing``: seconds of the wall clock, by part (see the module).
    """
    latencies = {key: distribution(partial(_of_finished, result, key)) for key in _LATENCIES}
    counts = _counts(result)
    outputs, prompts = counts["output_tokens"], counts["prompt_tokens"]
    summary: dict[str, Any] = {
        "requests": {verdict: counts[verdict] for verdict in ("total", "finished", "rejected", "unfinished")},
        "duration_s": result.duration_s,
        "throughput": _throughput(result, counts),
        "ttft_s": latencies["ttft_s"],
        "tpot_s": latencies["tpot_s"],
        "itl_s": weighted_distribution(*result.gaps, scale=1 / NS_PER_S),
        "e2e_s": latencies["e2e_s"],
        "queue_s": latencies["queue_s"],
        "slo": _slo(result, counts),
        "energy": _energy(result, outputs, prompts),
        "cost": _cost(result, outputs),
        "steady": asdict(result.steady),
        "memory": _memory(result),
        "utilization": _utilization(result),
        "preemptions": counts["preemptions"],
        "prefix_hit_rate": None,  # no prefix cache is simulated
        "provenance": result.usage.shares,
    }
    summary |= {"pools": _pools(result)} if len(result.of_pools) > 1 else {}
    summary["uncertainty"] = intervals(result, summary)
    summary |= {"notes": result.notes, "timing": result.timing}
    plain: dict[str, Any] = without_nan(summary)
    return plain


def _of_finished(result: SimulationResult, key: str) -> Iterator[Floats]:
    """A column of the requests that finished, so many rows at a time."""
    for values, status in blocks(result.request_columns, key, "status"):
        yield values[status == "finished"]


def _counts(result: SimulationResult) -> Counter[str]:
    """Requests by verdict, and the ``good`` ones; tokens of those that finished; preemptions of all."""
    counts: Counter[str] = Counter(total=rows_of(result.request_columns), good=0)
    columns = "status", "prompt_tokens", "output_tokens", "preemptions"
    for status, prompts, outputs, preemptions in blocks(result.request_columns, *columns):
        done = status == "finished"
        counts["finished"] += int(done.sum())
        counts["rejected"] += int((status == "rejected").sum())
        counts["unfinished"] += int((status == "unfinished").sum())
        counts["prompt_tokens"] += int(prompts[done].sum())
        counts["output_tokens"] += int(outputs[done].sum())
        counts["preemptions"] += int(preemptions.sum())
    if result.slo is not None:
        counts["good"] = sum(int(good.sum()) for (good,) in blocks(result.request_columns, "good"))
    return counts


def _throughput(result: SimulationResult, counts: Counter[str]) -> dict[str, float]:
    """Finished requests and their tokens over the duration; prompt tokens count in the total."""
    return {
        "requests_per_s": ratio(counts["finished"], result.duration_s),
        "output_tokens_per_s": ratio(counts["output_tokens"], result.duration_s),
        "total_tokens_per_s": ratio(counts["output_tokens"] + counts["prompt_tokens"], result.duration_s),
    }


def _slo(result: SimulationResult, counts: Counter[str]) -> dict[str, float]:
    """Share of *all* requests that met every limit: rejected and unfinished ones missed. Unknown without an SLO."""
    if result.slo is None:
        return {"attainment": math.nan, "good_requests_per_s": math.nan}
    good = counts["good"]
    return {"attainment": good / counts["total"], "good_requests_per_s": ratio(good, result.duration_s)}


def _energy(result: SimulationResult, output_tokens: int, prompt_tokens: int) -> dict[str, Any]:
    """Joules of the billed devices: working ones by operator, every other device second at idle power.

    Top level: devices alone. ``server`` and ``facility`` add what stands around them (``Overhead`` of the cluster).
    ``idle_j`` is the part of devices that had nothing to do. ``range_j``: least and most joules of the devices at a
    clock that was not measured; None at the measured one.
    """
    deployment, usage = result.deployment, result.usage
    overhead, device_s = deployment.cluster.overhead, deployment.billed_devices * result.duration_s
    known = bool(usage.seconds)
    idle_j = deployment.idle_j(result.duration_s, result.working_s) if known else math.nan
    working_j = math.fsum(usage.energy_j.values()) if known else math.nan
    server_j = overhead.server_j(working_j + idle_j, device_s)

    def figures(total_j: float) -> dict[str, float]:
        return {
            "total_j": total_j,
            "per_output_token_j": ratio(total_j, output_tokens),
            "per_total_token_j": ratio(total_j, output_tokens + prompt_tokens),
            "mean_power_w": ratio(total_j, result.duration_s),
        }

    possible = usage.energy_range_j
    return {
        **figures(working_j + idle_j),
        "idle_j": idle_j,
        "range_j": [working + idle_j for working in possible] if possible else None,
        "server": figures(server_j),
        "facility": figures(overhead.pue * server_j),
    }


def _cost(result: SimulationResult, output_tokens: int) -> dict[str, float]:
    """Rent of the billed devices, idle ones too, over the duration."""
    deployment = result.deployment
    spent_usd = deployment.usd_per_s * result.duration_s
    return {
        "billed_devices": deployment.billed_devices,
        "usd_per_hour": deployment.usd_per_hour,
        "usd_per_million_output_tokens": ratio(spent_usd * 1e6, output_tokens),
    }


def _memory(result: SimulationResult) -> dict[str, Any]:
    """What a replica holds, by pool where there are several."""
    by_pool = {name: record.memory for name, record in result.of_pools.items()}
    return by_pool if len(by_pool) > 1 else next(iter(by_pool.values()))


def _pools(result: SimulationResult) -> dict[str, Any]:
    """Figures of the devices that each pool uses. Billed devices that no pool uses count in the sums alone."""
    replicas, figures = result.pools, dict[str, Any]()
    for pool, server in zip(result.deployment.pools, result.servers, strict=True):
        usage, sheet = result.of_pools[pool.name].usage, server.device.datasheet
        device_s, mine = pool.devices * result.duration_s, replicas[replicas["pool"] == pool.name]
        known = bool(usage.seconds)
        working_j = math.fsum(usage.energy_j.values()) if known else math.nan
        idle_j = server.device.power.idle_w * max(0.0, device_s - usage.working_s) if known else math.nan
        figures[pool.name] = {
            "phases": list(pool.phases),
            "devices": pool.devices,
            "requests": int(mine["requests"].sum()),
            "energy": {"total_j": working_j + idle_j, "idle_j": idle_j},
            "cost": {"usd_per_hour": server.device.price.usd_per_hour * pool.devices},
            "utilization": {
                "mfu": ratio(usage.flops, device_s * _peak(sheet, server.weights)),
                "mbu": ratio(usage.bytes_moved, device_s * sheet.memory_bytes_per_s),
                **_cache_and_busy(mine),
            },
        }
    return figures


def _peak(sheet: Datasheet, dtype: str) -> float:
    """FLOP/s of products in a dtype of weights; in bf16 where weights are only stored in less."""
    return sheet.flops_per_s.get(dtype, sheet.flops_per_s["bf16"])


def _cache_and_busy(replicas: pd.DataFrame) -> dict[str, float]:
    return {
        "busy": float(replicas["busy"].mean()),
        "kv_cache_mean": float(replicas["kv_cache_mean"].mean()),
        "kv_cache_peak": float(replicas["kv_cache_peak"].max()),
    }


def _utilization(result: SimulationResult) -> dict[str, float]:
    """Shares of what the billed devices could do in the whole duration, pauses between requests included.

    ``mfu``: FLOPs done over the peak FLOPs of the weights' dtype (of bf16 where weights are only stored in less).
    ``mbu``: bytes moved over the peak bytes of device memory. ``busy``: share of a replica's time with a step in
    flight. ``kv_cache_mean``: share of blocks held, weighted with time; ``kv_cache_peak``: of the fullest replica.
    """
    deployment, servers = result.deployment, result.servers
    flops, bytes_moved = 0.0, 0.0
    for group in deployment.cluster.groups:
        sheet, device_s = group.device.datasheet, result.duration_s * deployment.billed(group)
        dtypes = [server.weights for server in servers if server.group is group] or [deployment.weights]
        flops += device_s * max(_peak(sheet, dtype) for dtype in dtypes)
        bytes_moved += device_s * sheet.memory_bytes_per_s
    return {
        "mfu": ratio(result.usage.flops, flops),
        "mbu": ratio(result.usage.bytes_moved, bytes_moved),
        **_cache_and_busy(result.pools),
    }
