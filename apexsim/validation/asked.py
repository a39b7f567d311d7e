"""What the requests of a measured run were besides their lengths: what they are made of, how they ask for tokens.

Benchmarks with synthetic prompts send random tokens and decode greedily. The tasks that keep a server full are those of
ML.ENERGY, whose client asks for top_p 0.95, a temperature of 0.8 and a repetition penalty of 1.1, whatever the model
(ml-energy/benchmark, mlenergy/benchmark/llm/benchmark.py at c1d6557: the defaults of ``Args``, and the payload).
"""

from __future__ import annotations

from apexsim.specs.server import Prompts, TokenChoice
from apexsim.validation.runs import RunRow


def sampling_of(row: RunRow) -> TokenChoice:
    """As the row says; else ``top_p`` where a full server got the requests of a task, ``greedy`` otherwise."""
    if row.sampling:
        return row.sampling
    return "top_p" if row.workload == "saturated" and row.task else "greedy"


def prompts_of(row: RunRow) -> Prompts:
    """As the row says; else ``random_tokens`` for prompts that a closed loop draws by nominal length, or ``text``."""
    if row.prompts:
        return row.prompts
    return "random_tokens" if row.workload == "closed_loop" and not row.requests_file else "text"
