"""The requests of a measured run, as it was loaded: a trace, a closed loop, or a server kept full."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from apexsim.io.request_files import read_requests
from apexsim.specs.workload import Requests
from apexsim.validation.runs import MeasuredRun, RunRow

# A closed loop whose number of requests is not known runs so many for every one in flight (InferenceX's own rule).
REQUESTS_PER_CLIENT = 10
# Requests sent to a full server besides the first ones, at least: enough for a mean batch, context and step time. Large
# servers get as many again as they hold: the first ones come one by one, and some have ended when the last has come.
STEADY_REQUESTS = 256
# Prompts of the ML.ENERGY tasks are unpublished; these are the means that the reference data suggest. lm-arena-chat: by
# how much the mean gap between tokens exceeds the median one, the median of five dense models on H100 is 310
# (scripts/infer_prompt_lengths.py: 357, 310, 335, 238, 309).
_PROMPT_TOKENS = {"gpqa": 250, "lm-arena-chat": 310, "sourcegraph-fim": 800}
_DEFAULT_PROMPT_TOKENS = 250

Integers = npt.NDArray[np.int64]


def requests_of(run: MeasuredRun, *, longest: int, seed: int) -> tuple[Requests, list[str]]:
    """The requests of a run, and what was assumed about them.

    Lengths are drawn from ``seed`` and the run's name; what a run's file does not hold exactly is cut to ``longest``
    tokens of prompt and output.
    """
    row = run.row
    if row.workload == "trace":
        return read_requests(run.beside / str(row.requests_file)), []
    if row.workload == "closed_loop" and row.requests_file and row.concurrency:
        sent = read_requests(run.beside / row.requests_file, lengths_will_do=True)
        return replace(sent, name=row.run_id, notes=()).closed_loop(row.concurrency), []
    random = np.random.default_rng([seed, zlib.crc32(row.run_id.encode())])
    return _closed_loop(row, random) if row.workload == "closed_loop" else _saturated(row, longest, random)


def _closed_loop(row: RunRow, random: np.random.Generator) -> tuple[Requests, list[str]]:
    """``concurrency`` clients, all starting at once, until ``num_requests`` have run.

    Lengths are uniform in [``length_range_ratio``, 1] x the nominal ones; fixed where the ratio is 1 or not known.
    """
    assert row.concurrency is not None, "the reader asks for it"
    assert row.prompt_tokens is not None, "the reader asks for it"
    assert row.output_tokens is not None, "the reader asks for it"
    notes = []
    count, ratio = row.num_requests, row.length_range_ratio
    if count is None:
        count = REQUESTS_PER_CLIENT * row.concurrency
        notes.append(f"num_requests not known: {REQUESTS_PER_CLIENT} for every request in flight")
    if ratio is None:
        notes.append("length_range_ratio not known: fixed lengths")
    lengths = [_uniform(nominal, ratio or 1.0, count, random) for nominal in (row.prompt_tokens, row.output_tokens)]
    return _closed(row, lengths, row.concurrency), notes


def _uniform(nominal: float, ratio: float, count: int, random: np.random.Generator) -> Integers:
    most = max(1, round(nominal))
    return random.integers(max(1, int(nominal * ratio)), most, size=count, endpoint=True)


def prompt_tokens_of(row: RunRow) -> int:
    """Mean prompt of a row: as it says, else what is assumed for its task."""
    return row.prompt_tokens or _PROMPT_TOKENS.get(row.task, _DEFAULT_PROMPT_TOKENS)


def _saturated(row: RunRow, longest: int, random: np.random.Generator) -> tuple[Requests, list[str]]:
    """A server that always has ``max_num_seqs`` requests, from the middle of its life on.

    Every output has the row's mean length: the batches that were measured hold no wider law, whose longer contexts
    would not have fitted in memory. The first requests are found at any age; each brings its age as prompt.
    """
    assert row.max_num_seqs is not None, "the reader asks for it"
    assert row.output_tokens is not None, "the reader asks for it"
    full = row.max_num_seqs
    prompt = prompt_tokens_of(row)
    notes = ["outputs of a full server all have their mean length"]
    if row.prompt_tokens is None:
        notes.append(f"prompt lengths not known: {prompt} tokens ({row.task or 'no task named'})")
    prompt = min(prompt, longest - 1)
    output = min(round(row.output_tokens), longest - prompt)
    age = random.integers(0, output, size=full)
    count = full + max(full, STEADY_REQUESTS)
    prompts = np.full(count, prompt, dtype=np.int64)
    outputs = np.full(count, output, dtype=np.int64)
    prompts[:full] += age
    outputs[:full] -= age
    return _closed(row, [prompts, outputs], full), notes


def _closed(row: RunRow, lengths: Sequence[Integers], concurrency: int) -> Requests:
    prompts, outputs = lengths
    return Requests(name=row.run_id, prompt_tokens=prompts, output_tokens=outputs, concurrency=concurrency)
