"""Which experts the tokens of a step reach, and what of them falls on one device.

An expert of rank r is picked with weight r^-alpha by every token on its own (alpha 0: all experts alike, spread as
evenly as they can be). Where experts lie on several devices, popular ones lie anywhere among them, and a layer lasts as
long as its fullest device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from apexsim.costs.forms.hardware import Array

# Placements that the mean over layers is taken from, and the seed of their draws: a model has dozens of such layers.
_LAYERS, _SEED = 96, 20260101
# Token counts at which loads are drawn: four an octave, beyond the largest step of any engine.
_KNOTS = 2.0 ** np.arange(0, 17.25, 0.25)


class Load(NamedTuple):
    """What a layer's routing puts on its fullest device: distinct experts, and rows (a token once for each expert)."""

    active: Any
    rows: Any


@lru_cache(maxsize=4096)
def pick_chances(experts: int, topk: int, alpha: float) -> Array:
    """Chance of every expert to be among the ``topk`` of a token, when weights fall as rank^-alpha (0: balanced).

    Chances are proportional to the weights and sum to ``topk``; an expert picked by every token is held at 1 and the
    rest share what is left.
    """
    weights = np.arange(1, experts + 1, dtype=float) ** -alpha
    certain = 0
    while certain < topk:
        chances = (topk - certain) * weights / weights[certain:].sum()
        if chances[certain] <= 1:
            break
        certain += 1
    chances[:certain] = 1.0
    return np.asarray(chances)


def touched_experts(tokens: Any, experts: int, topk: int, alpha: float) -> Array:
    """Distinct experts that ``tokens`` tokens reach: min(E, T k) when balanced, expected under a power law."""
    tokens = np.asarray(tokens, dtype=float)
    if alpha == 0:
        return np.asarray(np.minimum(float(experts), tokens * topk))
    missed = (1 - pick_chances(experts, topk, alpha)) ** tokens[..., None]
    return np.asarray((1 - missed).sum(axis=-1))


def fullest_device(tokens: Any, experts: int, topk: int, ep: int, alpha: float) -> Load:
    """Load of the fullest of ``ep`` devices, expected over layers; ``tokens`` (may be an array) of the whole group.

    Experts and rows are each those of the device that has most of them. Balanced routing fills all alike.
    """
    count = np.maximum(np.asarray(tokens, dtype=float), 1.0)
    active, rows = touched_experts(count, experts, topk, alpha), count * topk
    if ep == 1 or alpha == 0:
        return Load(np.maximum(active / ep, np.minimum(active, 1.0)), rows / ep)
    most_active, most_rows = _drawn_shares(experts, topk, ep, alpha)
    at = np.log(count), np.log(_KNOTS)
    held = np.minimum(active * np.interp(*at, most_active), experts / ep)
    return Load(np.maximum(held, np.minimum(active, 1.0)), rows * np.interp(*at, most_rows))


@lru_cache(maxsize=512)
def _drawn_shares(experts: int, topk: int, ep: int, alpha: float) -> tuple[Array, Array]:
    """At every knot, the shares of all touched experts and of all rows that the fullest device has, drawn with a seed.

    Devices hold consecutive experts of a random order; picks of different experts are taken to be independent.
    """
    random = np.random.default_rng(_SEED)
    chances = random.permuted(np.tile(pick_chances(experts, topk, alpha), (_LAYERS, 1)), axis=1)
    owner = np.arange(experts) * ep // experts
    starts = np.searchsorted(owner, np.arange(ep))
    active: list[float] = []
    rows: list[float] = []
    for tokens in _KNOTS.tolist():
        picks = random.binomial(round(tokens), np.minimum(chances, 1.0))
        for drawn, shares in ((picks > 0, active), (picks, rows)):
            held = np.add.reduceat(drawn, starts, axis=1, dtype=float)
            some = held[held.any(axis=1)]
            shares.append(float((some.max(axis=1) / some.sum(axis=1)).mean()))
    return np.array(active), np.array(rows)
