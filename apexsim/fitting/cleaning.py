"""Rules that drop rows a fit must not see. Each is small, named and counted; the counts go into the profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

Mask = npt.NDArray[np.bool_]


class Rule(NamedTuple):
    """``keep`` answers True for the rows that stay; ``name`` says in a few words what was wrong with the others."""

    name: str
    keep: Callable[[pd.DataFrame], Mask]


def clean(frame: pd.DataFrame, rules: Sequence[Rule]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Apply ``rules`` in order; returns the rows that stay and how many each rule dropped (no zeros)."""
    dropped: dict[str, int] = {}
    for rule in rules:
        keep = np.asarray(rule.keep(frame), dtype=bool)
        if not keep.all():
            dropped[rule.name] = int((~keep).sum())
            frame = frame[keep]
    return frame.reset_index(drop=True), dropped


def faster_than(floor_s: Callable[[pd.DataFrame], npt.NDArray[np.float64]], slack: float = 1.05) -> Rule:
    """Rows that beat the roofline ``floor_s`` by more than the slack that clocks and rounding explain."""
    return Rule(
        f"faster than the roofline by over {slack - 1:.0%}",
        lambda frame: np.asarray(frame["seconds"] * slack >= floor_s(frame)),
    )


def slower_than_larger(by: Sequence[str], size: str, tolerance: float = 1.25) -> Rule:
    """Isolated slow rows: more than ``tolerance`` x the fastest of the next larger sizes (up to 2x, at least 8 more).

    A product of more rows contains the smaller one, so such a time is a hiccup or a bad kernel choice of the
    measurement. Not for kernels whose tiles make real steps (fp8_block).
    """
    return Rule(f"over {tolerance:g}x a larger {size}", lambda frame: _no_hiccups(frame, by, size, tolerance))


def _no_hiccups(frame: pd.DataFrame, by: Sequence[str], size: str, tolerance: float) -> Mask:
    order = frame.sort_values([*by, size], kind="stable").index.to_numpy()
    group = frame.groupby(list(by)).ngroup().to_numpy()[order]
    sizes, seconds = frame[size].to_numpy()[order], frame["seconds"].to_numpy()[order]
    fastest = np.full(len(frame), np.inf)
    for step in range(1, 24):
        later = np.arange(len(frame)) + step
        inside = later < len(frame)
        later = np.minimum(later, len(frame) - 1)
        inside &= (group[later] == group) & (sizes[later] <= np.maximum(2 * sizes, sizes + 8)) & (sizes[later] > sizes)
        fastest = np.where(inside, np.minimum(fastest, seconds[later]), fastest)
    keep = np.empty(len(frame), dtype=bool)
    keep[order] = seconds <= tolerance * fastest
    return keep


def slower_than_kin(kin: pd.DataFrame, by: Sequence[str], tolerance: float = 1.25) -> Rule:
    """Rows far slower than the same on a device that can only be slower (``kin``: columns ``by``, seconds)."""

    def keep(frame: pd.DataFrame) -> Mask:
        both = frame[[*by, "seconds"]].merge(kin.drop_duplicates(by), on=list(by), how="left", suffixes=("", "_kin"))
        return ~(both["seconds"] > tolerance * both["seconds_kin"]).to_numpy()

    return Rule(f"over {tolerance:g}x a lesser device", keep)


def one_query_token(column: str) -> Rule:
    """Prompts of one token run the decode kernel in a prefill table."""
    return Rule("a prompt of one token (decode kernel)", lambda frame: np.asarray(frame[column] > 1))


def thin_shards(width: str, least: int = 64) -> Rule:
    """Expert shards thinner than a kernel tile: nobody serves them, and they bend the fit."""
    return Rule(f"expert shard under {least} wide", lambda frame: np.asarray(frame[width] >= least))
