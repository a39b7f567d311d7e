"""A server that always holds the same number of requests: its steps without a clock.

With B requests in flight of P prompt and O output tokens each, every request is somewhere in its output, and a new one
comes for every one that ends: B/O prompts a step. So a cycle of steps with decodes at the mean context and the chunks
of the prompts that arrive in it stands for the whole run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.steps import StepCost
from apexsim.costs.work import Columns, Work, work_of

# A cycle is about so many steps, or as many as it takes until a prompt arrives.
CYCLE_STEPS = 16


class SteadyLoad(NamedTuple):
    """``batch`` requests in flight, of ``prompt_tokens`` and ``output_tokens`` each on average."""

    batch: float
    prompt_tokens: float
    output_tokens: float

    @property
    def mean_context(self) -> float:
        """Tokens a decoding request attends to, on average over its output."""
        return self.prompt_tokens + (self.output_tokens + 1) / 2


class SteadyState(NamedTuple):
    """The work of a cycle of ``steps`` steps, told in ``rows`` rows; ``step_s`` is the mean time of a step."""

    work: tuple[Work, ...]
    rows: int
    steps: int
    step_s: float


def steady_state(cost: StepCost, load: SteadyLoad) -> SteadyState:
    """Work through one cycle of a steady load on one replica."""
    steps, chunks = steady_columns(cost, load)
    work = tuple(work_of(cost, steps, chunks))
    count = int(steps["repeats"].sum())
    device_s = sum(each.total(each.seconds) for each in work)
    # Stages of a pipeline work on other batches at the same time, so that one batch's step takes their sum.
    return SteadyState(work, len(steps["repeats"]), count, device_s / count / cost.lowered.stage_devices)


def steady_columns(cost: StepCost, load: SteadyLoad) -> tuple[Columns, Columns]:
    """The cycle as recorded columns: the steps with prompts one by one, those without as one run."""
    arrivals = load.batch / load.output_tokens
    count = max(1, round(CYCLE_STEPS * arrivals))
    cycle = max(1, round(count / arrivals))
    prompts = np.diff(np.arange(cycle + 1) * count // cycle)
    prompts = prompts[prompts > 0]
    plain = cycle - len(prompts)
    rows = np.append(prompts, np.zeros(min(plain, 1), dtype=np.int64))
    repeats = np.append(np.ones(len(prompts), dtype=np.int64), [plain] if plain else []).astype(np.int64)
    chunk_tokens = max(1, round(load.prompt_tokens))
    decodes = np.maximum(round(load.batch) - rows, 0)
    contexts = np.maximum(1, np.rint(load.mean_context - (repeats - 1) / 2)).astype(np.int64)
    steps = {
        "decodes": decodes,
        "context": decodes * contexts,
        "chunk_tokens": rows * chunk_tokens,
        "survivors": decodes + rows,
        "repeats": repeats,
        **_windowed(cost, load, decodes, contexts),
    }
    where = np.repeat(np.arange(len(rows)), rows)
    ones = np.ones(len(where), dtype=np.int64)
    return steps, {"step": where, "tokens": chunk_tokens * ones, "history": 0 * ones}


def _windowed(
    cost: StepCost, load: SteadyLoad, decodes: NDArray[np.int64], contexts: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Sum of min(context, window) for every window, over contexts spread evenly along the outputs, and who still grows.

    A batch whose mean context fills a window no longer grows; before, all of it does.
    """
    windows = dict.fromkeys(attention.window for attention in cost.attentions)
    ages = load.prompt_tokens + np.arange(1, round(load.output_tokens) + 1)
    seen = {window: float(np.minimum(ages, window).mean()) for window in windows if window}
    columns = {}
    for window, mean in seen.items():
        attended = columns[f"window_context_{window}"] = decodes * np.minimum(max(1, round(mean)), contexts)
        columns[f"window_growing_{window}"] = np.where(attended != decodes * window, decodes, 0)
    return columns
