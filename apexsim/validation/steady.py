"""The steady part of a run that keeps a server full."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apexsim.columns import Columns, joined
from apexsim.costs.accounting import account
from apexsim.costs.starting import start
from apexsim.costs.steps import build_step_cost
from apexsim.errors import Unsupported
from apexsim.metrics import weighted_distribution
from apexsim.serving.simulator import How, Run
from apexsim.specs.deployment import Deployment
from apexsim.specs.workload import Requests
from apexsim.units import NS_PER_S, to_ns
from apexsim.usage import Usage


def steady_figures(
    deployment: Deployment, requests: Requests, *, measured_itl_s: float | None = None
) -> dict[str, float | None]:
    """Inter-token latency, throughput, batch, power and energy of a closed loop of requests in its steady part.

    With ``measured_itl_s`` every step takes as much longer as makes the mean inter-token latency the measured one.
    Raises ``Unsupported`` where requests are refused or nothing is steady.
    """
    engine = start(deployment.colocated_server())
    deployment, cost = deployment.as_run([engine.server]), build_step_cost(engine.server)
    # Gaps between tokens are told from rows of steps: those of a pipeline are in order where each is one step.
    run = Run(deployment, requests, cost=cost, memory=engine.memory, how=How(exact_steps=cost.stages > 1))
    run.go()
    if refused := run.rows.rejected:
        raise Unsupported(f"{refused.total()} of {len(requests)} requests were not served; {next(iter(refused))}")
    last_ns = to_ns(float(joined(run.rows.blocks(0))["arrival_s"].max()))
    steps, chunks = _steady_part(run.recorder.steps(), run.recorder.chunks(), last_ns)
    gaps = _gaps_ns(steps)
    itl = weighted_distribution(gaps, steps["survivors"] * steps["repeats"], scale=1 / NS_PER_S)
    scale = measured_itl_s / itl["mean"] if measured_itl_s else 1.0
    tokens = int((steps["survivors"] * steps["repeats"]).sum())
    window_s = int(steps["end_ns"].max() - steps["start_ns"].min()) / NS_PER_S * scale
    usage = Usage.of(account(cost, steps, chunks, time_scale=scale))
    energy_j = sum(usage.energy_j.values()) + deployment.idle_j(window_s, {engine.server.pool: usage.working_s})
    length = steps["end_ns"] - steps["start_ns"]
    return {
        "itl_mean_s": itl["mean"] * scale,
        "itl_p50_s": itl["p50"] * scale,
        "tpot_mean_s": itl["mean"] * scale,
        "output_tokens_per_s": tokens / window_s,
        "power_w": energy_j / window_s,
        "energy_per_output_token_j": energy_j / tokens,
        "mean_batch": float((steps["running"] * length).sum() / length.sum()),
        "estimated_share": usage.estimated_share,
    }


def _steady_part(steps: Columns, chunks: Columns, last_arrival_ns: int) -> tuple[Columns, Columns]:
    """The rows of steps, and of their chunks, while the server is full.

    They begin when it runs, but for a twentieth, as many requests as it ever does (requests come through the frontend
    one by one, and not all may fit), and end with the last arrival.
    """
    settled = np.flatnonzero(steps["running"] >= 0.95 * steps["running"].max())
    begin = int(settled[0]) if len(settled) else len(steps["end_ns"])
    end = int(np.searchsorted(steps["end_ns"], last_arrival_ns, side="right"))
    if end - begin < 1:
        raise Unsupported("no steady part: the last request comes before all of the first have begun")
    inside = (chunks["step"] >= begin) & (chunks["step"] < end)
    kept = {name: values[inside] for name, values in chunks.items()}
    kept["step"] = kept["step"] - begin
    return {name: values[begin:end] for name, values in steps.items()}, kept


def _gaps_ns(steps: Columns) -> npt.NDArray[np.int64]:
    """Time from one step's end to the next one's, for each row of ``repeats`` steps."""
    ends = steps["end_ns"]
    before = np.concatenate(([steps["start_ns"][0]], ends[:-1]))
    gaps: npt.NDArray[np.int64] = (ends - before) // np.maximum(steps["repeats"], 1)
    return gaps
