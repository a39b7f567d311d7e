"""Whether a machine was quiet enough while it was measured for a fit to say anything."""

from __future__ import annotations

import numpy as np

from kernels_profiling.tables import SIZES, Tables

# Rounds are a while apart. Where half of all points took over twice as long in one as in another, a fit says more of
# what else the machine did than of the machine.
MOST_BETWEEN_ROUNDS = 2.0


class TooNoisyError(Exception):
    """A measurement that nothing can be fitted to; the message says why."""


def check_quiet(tables: Tables) -> None:
    """Raise ``TooNoisyError`` where the rounds of a measurement do not agree; nothing is said of a single round."""
    ratios = between_rounds(tables)
    if len(ratios) and (middle := float(np.median(ratios))) > MOST_BETWEEN_ROUNDS:
        said = f"half of the {len(ratios)} points took {middle:.1f} times as long, or more, in one round as in another"
        raise TooNoisyError(said)


def between_rounds(tables: Tables) -> list[float]:
    """The longest time over the shortest of every point that was measured in several rounds."""
    found: list[float] = []
    for name, sizes in SIZES.items():
        frame = tables.read(name)
        if frame is not None:
            seconds = frame[frame["status"] == "ok"].groupby(list(sizes), dropna=False)["latency_s"]
            several = seconds.agg(["min", "max", "count"]).query("count > 1")
            found += (several["max"] / several["min"]).tolist()
    return found
