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
    import pandas as pd

    from apexsim.results import SimulationResult

FORMATS = (".png", ".pdf", ".svg")
_BINS = 300
# Okabe and Ito (2008): eight colours that everyone can tell apart.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_KIND_COLOURS = {"dense": _BLUE, "moe": _ORANGE, "mla": _GREEN, "hybrid": _RED, "unknown": "#CC79A7"}
_VALIDATED = ("ttft_mean_s", "tpot_mean_s", "itl_mean_s", "itl_p50_s", "power_w", "energy_per_output_token_j")
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


def plot_validation(table: pd.DataFrame, path: Path | str) -> None:
    """Draw replayed runs: for each measured figure, predicted over measured and the shares of errors, by model kind.

    ``table`` has the columns of ``validation.scores.with_parts``; excluded rows are left out.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    check_plot_path(path, where=path)
    drawn = [name for name in _VALIDATED if (table[f"predicted_{name}"] * table[name] > 0).any()]
    with mpl.rc_context(_STYLE), atomic_path(path) as scratch:
        figure = Figure(figsize=(2.6 * max(1, len(drawn)), 5.0), dpi=200, layout="constrained")
        panels = figure.subplots(2, max(1, len(drawn)), squeeze=False)
        for (parity, errors), name in zip(panels.T, drawn, strict=False):
            _draw_parity(parity, errors, table[table["part"] != "excluded"], name)
        dated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        figure.savefig(scratch, metadata=dated.get(Path(path).suffix.lower()))


def plot_fit(rows: pd.DataFrame, path: Path | str, *, title: str, size: str) -> None:
    """Draw a fit: ``predicted_s`` over ``measured_s`` of ``rows``, and errors over their column ``size``."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    check_plot_path(path, where=path)
    percent = 100 * (rows["predicted_s"] / rows["measured_s"] - 1)
    with mpl.rc_context(_STYLE), atomic_path(path) as scratch:
        figure = Figure(figsize=(7.2, 3.2), dpi=150, layout="constrained")
        parity, errors = figure.subplots(1, 2)
        parity.scatter(rows["measured_s"], rows["predicted_s"], s=2, lw=0, alpha=0.3, color=_BLUE, rasterized=True)
        ends = [rows["measured_s"].min(), rows["measured_s"].max()]
        parity.plot(ends, ends, color="black", lw=0.7)
        parity.set(xscale="log", yscale="log", xlabel="measured (s)", ylabel="predicted (s)")
        errors.scatter(rows[size], percent, s=2, lw=0, alpha=0.3, color=_BLUE, rasterized=True)
        middle = percent.groupby(rows[size]).median()
        errors.plot(middle.index, middle, color=_RED, lw=1, label="median")
        errors.axhline(0, color="black", lw=0.7)
        errors.set(xscale="log", xlabel=size, ylabel="error (%)", ylim=(-60, 60))
        errors.legend(loc="upper right")
        figure.suptitle(title, fontsize=9)
        dated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        figure.savefig(scratch, metadata=dated.get(Path(path).suffix.lower()))


def _draw_parity(parity: Any, errors: Any, table: pd.DataFrame, name: str) -> None:
    """Predicted over measured on log scales, and below it the distribution of relative errors."""
    rows = table[(table[f"predicted_{name}"] > 0) & (table[name] > 0)]
    for kind, group in rows.groupby("model_kind"):
        colour = _KIND_COLOURS[str(kind)]
        predicted, measured = group[f"predicted_{name}"], group[name]
        parity.scatter(measured, predicted, s=4, lw=0, alpha=0.5, color=colour, label=f"{kind} ({len(group)})")
        percent = np.sort(100 * (predicted / measured - 1))
        errors.step(percent, np.arange(1, len(percent) + 1) / len(percent), where="post", color=colour, lw=1.2)
    if len(rows):
        ends = [rows[[name, f"predicted_{name}"]].min().min(), rows[[name, f"predicted_{name}"]].max().max()]
        parity.plot(ends, ends, color="black", lw=0.7)
    parity.set(xscale="log", yscale="log", title=name, xlabel="measured", ylabel="predicted")
    for axis in (parity.xaxis, parity.yaxis):  # labels between the decades run into each other
        axis.set_minor_formatter("")
    parity.legend(loc="upper left")
    errors.axvline(0, color="black", lw=0.7)
    errors.set(xlim=(-100, 100), ylim=(0, 1), xlabel="error (%)", ylabel="share of runs")


def describe(result: SimulationResult) -> str:
    """One line: model, devices, plan, engine, workload."""
    deployment = result.deployment
    pools = ", ".join(pool.described for pool in deployment.pools)
    engines = " + ".join(dict.fromkeys(server.engine.name for server in result.servers))
    return (
        f"{deployment.model.name} ({deployment.weights}) on {deployment.devices_named}, {pools}, "
        f"{engines}, {result.workload_name}"
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
    total = sum(pool.replicas * result.of_pools[pool.name].kv_blocks for pool in result.deployment.pools)
    axes.fill_between(middle_s, 100 * blocks / total, color=_BLUE, alpha=0.35, lw=0)
    axes.plot(middle_s, 100 * blocks / total, color=_BLUE, lw=1)
    axes.set(title="KV cache", xlabel="time since first arrival (s)", ylabel="blocks held (%)", ylim=(0, 102))


def _over_time(result: SimulationResult, key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Middle of each time bin, and the mean over it of a step column summed over replicas."""
    parts = [result.steps_of(replica) for replica in range(len(result.block_ns))]
    start, level = (np.concatenate([steps[column] for steps, _ in parts]) for column in ("start_ns", key))
    held = np.concatenate([held for _, held in parts])
    if not len(start):
        return np.zeros(0), np.zeros(0)
    begin_ns = (result.end_s - result.duration_s) * NS_PER_S
    edges = np.linspace(begin_ns, result.end_s * NS_PER_S, _BINS + 1)
    return (edges[:-1] + edges[1:]) / 2 / NS_PER_S - begin_ns / NS_PER_S, binned_level((start, held), level, edges)
