"""How the tables of expert layers were routed: which part of a batch the device that was timed had.

The rules are those of the collector that made the tables (``collector/helper.py`` of NVIDIA aiconfigurator), written
anew. *Balanced* tokens pick experts at even distances. Under a *power law* the tokens of every expert are drawn from
x^-alpha over an interval, scaled to the picks there are, rounded, and cut to the tokens there are; picks left over go
to the experts with fewest, one each. Of the ``ep`` groups of consecutive experts the one with most tokens is timed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from apexsim.costs.forms.hardware import Array
from apexsim.costs.forms.routing import Load

# Exponents of the power laws by what tables call them.
EXPONENTS = {"balanced": 0.0, "power_law_1.01": 1.01, "power_law_1.2": 1.2}
# The collector times five draws; more of them are nearer to what it expects.
_DRAWS, _SEED = 48, 20260101
Integers = npt.NDArray[np.int64]


@lru_cache(maxsize=65536)
def timed_device(tokens: int, experts: int, topk: int, ep: int, alpha: float) -> Load:
    """Distinct experts and rows of the device that was timed, on average; ``alpha`` 0 is balanced."""
    picks = tokens * topk
    if alpha == 0:
        return Load(max(1.0, min(experts, picks) / ep), max(1.0, picks / ep))
    counts = _counts(tokens, experts, topk, alpha)
    groups = np.add.reduceat(counts, np.arange(0, experts, experts // ep), axis=1)
    fullest = groups.argmax(axis=1)
    mine = counts.reshape(_DRAWS, ep, -1)[np.arange(_DRAWS), fullest]
    return Load(float((mine > 0).sum(axis=1).mean()), float(mine.sum(axis=1).mean()))


def _counts(tokens: int, experts: int, topk: int, alpha: float) -> Integers:
    """Tokens of every expert (draws, experts); each draw sums to the picks there are."""
    random, picks = np.random.default_rng([_SEED, tokens, experts]), tokens * topk
    low, high = (1.0, 0.8 * tokens) if picks > experts else (0.01, 2.0)
    power = 1 - alpha
    drawn = (low**power + (high**power - low**power) * random.random((_DRAWS, experts))) ** (1 / power)
    wanted = np.rint(picks * drawn / drawn.sum(axis=1, keepdims=True))
    counts: Integers = np.minimum(wanted, tokens).astype(np.int64)
    for row in counts:
        _settle(row, picks - int(row.sum()), random.permutation(experts))
    return counts


def _settle(counts: Integers, missing: int, order: Integers) -> None:
    """Hand out picks that are missing, one to an expert from the emptiest on; take those too many off the fullest.

    ``order`` settles ties.
    """
    step = 1 if missing > 0 else -1
    while missing:
        ranked = order[np.argsort(counts[order], kind="stable")][::step][: abs(missing)]
        counts[ranked] += step
        missing -= step * len(ranked)


def timed_devices(rows: npt.ArrayLike, alphas: Array) -> Load:
    """The same for many rows of (tokens, experts, topk, ep)."""
    loads = [timed_device(*map(int, row), float(alpha)) for row, alpha in zip(np.asarray(rows), alphas, strict=True)]
    return Load(*(np.array(part) for part in zip(*loads, strict=True)))
