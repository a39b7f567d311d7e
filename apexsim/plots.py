"""Figures of results, fit for print. matplotlib is imported when one is drawn, and needs no display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from apexsim.atomic import atomic_path
from apexsim.errors import BadInput
from apexsim.metrics import binned_level, ratio
from apexsim.units import NS_PER_S

if TYPE_CHECKING:
    from apexsim.results import SimulationResult

FORMATS = (".png", ".pdf", ".svg")
_BINS = 300
# Okabe and Ito (2008): eight colours that everyone can tell apart.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    # Text stays text in SVG, with element names that do not change from run to run.
    "svg.fonttype": "none",
    "svg.hashsalt": "apexsim",
}


def check_plot_path(path: Path | str, *, where: object) -> None:
    """Refuse a file name whose ending is no format that can be drawn."""
    if Path(path).suffix.lower() not in FORMATS:
        raise BadInput(f"end the name in one of {', '.join(FORMATS)}", where=where, got=str(path))


def plot_simulation(result: SimulationResult, path: Path | str) -> None:
    """Draw a run: TTFT and TPOT of its requests with their limits, and its load and KV cache over time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    check_plot_path(path, where=path)
    with mpl.rc_context(_STYLE), atomic_path(path) as scratch:
        figure = Figure(figsize=(7.2, 5.0), dpi=200, layout="constrained")
        panels = figure.subplots(2, 2)
        slo = result.slo
        _draw_cdf(panels[0][0], result, "ttft_s", slo.ttft_s if slo else None)
        _draw_cdf(panels[0][1], result, "tpot_s", slo.tpot_s if slo else None)
        _draw_load(panels[1][0], result)
        _draw_cache(panels[1][1], result)
        figure.suptitle(describe(result), fontsize=9)
        dated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        figure.savefig(scratch, metadata=dated.get(Path(path).suffix.lower()))


def describe(result: SimulationResult) -> str:
    """One line: model, devices, plan, engine, workload."""
    deployment, pool = result.deployment, result.deployment.pools[0]
    cluster = deployment.cluster
    plan = f"{pool.plan.name} x {pool.replicas}"
    return (
        f"{deployment.model.name} ({deployment.weights}) on {cluster.devices} x {cluster.device.name}, {plan}, "
        f"{deployment.engine.name}, {result.workload_name}"
    )


def _draw_cdf(axes: Any, result: SimulationResult, key: str, limit_s: float | None) -> None:
    name = key.removesuffix("_s").upper()
    values = result.request_columns[key][result.finished]
    values = np.sort(values[np.isfinite(values)])
    axes.set(title=f"{name} of finished requests", xlabel=f"{name} (s)", ylabel="share of requests", ylim=(0, 1.02))
    if len(values):
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=_BLUE, lw=1.3)
        if values[0] > 0 and values[-1] > 20 * values[0]:
            axes.set_xscale("log")
    if limit_s is not None:
        met = ratio(int((values <= limit_s).sum()), len(values))
        axes.axvline(limit_s, color=_RED, lw=1, ls="--", label=f"limit {limit_s:g} s: {met:.1%} meet it")
        axes.legend(loc="lower right")


def _draw_load(axes: Any, result: SimulationResult) -> None:
    for key, colour in (("running", _GREEN), ("waiting", _ORANGE)):
        middle_s, level = _over_time(result, key)
        axes.plot(middle_s, level, color=colour, lw=1, label=key)
    axes.set(title="Requests in the system", xlabel="time since first arrival (s)", ylabel="requests")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def _draw_cache(axes: Any, result: SimulationResult) -> None:
    middle_s, blocks = _over_time(result, "kv_blocks")
    total = result.kv_blocks * sum(pool.replicas for pool in result.deployment.pools)
    axes.fill_between(middle_s, 100 * blocks / total, color=_BLUE, alpha=0.35, lw=0)
    axes.plot(middle_s, 100 * blocks / total, color=_BLUE, lw=1)
    axes.set(title="KV cache", xlabel="time since first arrival (s)", ylabel="blocks held (%)", ylim=(0, 102))


def _over_time(result: SimulationResult, key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Middle of each time bin, and the mean over it of a step column summed over replicas."""
    parts = [result.steps_of(replica) for pool in result.deployment.pools for replica in range(pool.replicas)]
    start, level = (np.concatenate([steps[column] for steps, _ in parts]) for column in ("start_ns", key))
    held = np.concatenate([held for _, held in parts])
    if not len(start):
        return np.zeros(0), np.zeros(0)
    begin_ns = (result.end_s - result.duration_s) * NS_PER_S
    edges = np.linspace(begin_ns, result.end_s * NS_PER_S, _BINS + 1)
    return (edges[:-1] + edges[1:]) / 2 / NS_PER_S - begin_ns / NS_PER_S, binned_level((start, held), level, edges)
