"""What mean prompt of an unpublished task makes the mean inter-token latency exceed its median as it was measured.

Steps that compute prompts take longer: they move the mean of a full server's gaps, hardly their median. So the ratio of
both says how many prompt tokens there were, whatever a decode step costs:

    python scripts/infer_prompt_lengths.py $APEXSIM_DATA/ground_truth/energy_h100_b200/runs.csv
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from apexsim.validation.replay import batch_itl_s, mean_itl_s, replay
from apexsim.validation.runs import MeasuredRun, read_runs

PROMPTS = (100, 200, 300, 400, 500, 600, 800)
# Larger batches compute prompts in more than half of their steps, which moves the median too.
MOST_SEATS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--task", default="lm-arena-chat")
    parser.add_argument("--device", default="h100-sxm")
    parser.add_argument("--models", default="llama-3.1-8b,qwen3-32b,gemma-3-12b,gemma-3-27b,llama-3.1-405b")
    given = parser.parse_args()
    found: dict[str, list[float]] = defaultdict(list)
    for run in read_runs(given.runs):
        row = run.row
        wanted = row.task == given.task and row.device == given.device and row.model in given.models.split(",")
        if wanted and (row.max_num_seqs or 0) <= MOST_SEATS:
            found[row.model].append(implied_prompt(run))
            tokens = found[row.model][-1]
            print(f"{row.model:16s} tensor {row.tensor} seats {row.max_num_seqs:4d}  {tokens:4.0f} tokens")
    for model, values in found.items():
        print(f"{model:16s} median of {len(values):2d} rows  {np.median(values):4.0f} tokens")
    print(f"median of {len(found)} models  {np.median([np.median(values) for values in found.values()]):.0f} tokens")


def implied_prompt(run: MeasuredRun) -> float:
    """Prompt tokens at which the simulated ratio of mean to median is the measured one; clipped to ``PROMPTS``."""
    mean_s = mean_itl_s(run.row)
    assert mean_s is not None, "a full server has one"
    assert run.row.itl_p50_s is not None, "a full server has one"
    ratios = [simulated_ratio(run, prompt) for prompt in PROMPTS]
    return float(np.interp(mean_s / run.row.itl_p50_s, np.maximum.accumulate(ratios), PROMPTS))


def simulated_ratio(run: MeasuredRun, prompt: int) -> float:
    """Mean over median inter-token latency of a run whose prompts all have this length."""
    row = run.row.model_copy(update={"prompt_tokens": prompt})
    figures = replay(MeasuredRun(run.source, run.set_name, run.number, row, run.cells)).figures
    mean_s, median_s = batch_itl_s(figures["mean_batch"], figures["output_tokens_per_s"]), figures["itl_p50_s"]
    assert mean_s is not None, "a full server has one"
    assert median_s is not None, "a full server has one"
    return mean_s / median_s


if __name__ == "__main__":
    main()
