"""How the requests of a measured run asked for their tokens.

Benchmarks with synthetic prompts decode greedily. A server that gets real requests without sampling parameters takes
those of the checkpoint's ``generation_config.json`` (vLLM: ``--generation-config auto``, its default).
"""

from __future__ import annotations

from apexsim.specs.deployment import TokenChoice
from apexsim.validation.runs import RunRow

# Models whose generation_config.json, on Hugging Face, asks for top-p or top-k: meta-llama 3.1 and 4 (top_p 0.9), Qwen3
# (top_k 20, top_p 0.95 thinking or 0.8), google/gemma-3 (top_k 64, top_p 0.95), DeepSeek-R1 (top_p 0.95). That of
# gpt-oss asks for random tokens alone, which takes no search; that of Nemotron Nano v2 for nothing.
_TOP_P = (
    "llama-3.1-", "llama-4-", "qwen3-32b", "qwen3-235b-", "qwen3-coder-", "qwen3-vl-", "gemma-3-", "deepseek-r1",
)  # fmt: skip


def sampling_of(row: RunRow) -> TokenChoice:
    """``top_p`` where a full server got the requests of a task for a model that asks for it; else ``greedy``."""
    real = row.workload == "saturated" and bool(row.task)
    return "top_p" if real and row.model.startswith(_TOP_P) else "greedy"
