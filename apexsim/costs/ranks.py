"""A replica's sequences on its attention-data ranks, which step together: the fullest one sets the time.

An estimate: the ranks hold as much as each other, as far as whole sequences go. Decodes and logits are spread evenly;
chunks of prompts are dealt out, the longest first, each to the rank with the fewest tokens of prompts so far. A real
router knows less, so that real ranks are less even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Chunks = tuple[tuple[int, int], ...]


def share(count: Any, ranks: int) -> Any:
    """What the fullest of ``ranks`` ranks has of ``count`` things spread evenly; an integer or an array of them."""
    return -(-count // ranks)


def deal(tokens: Sequence[int], ranks: int) -> list[int]:
    """The rank of each chunk of so many tokens; rank 0 is the fullest."""
    loads, dealt = [0] * ranks, [0] * len(tokens)
    for index in sorted(range(len(tokens)), key=lambda index: -tokens[index]):
        dealt[index] = loads.index(min(loads))
        loads[dealt[index]] += tokens[index]
    order = sorted(range(ranks), key=lambda rank: -loads[rank])
    return [order.index(rank) for rank in dealt]


def fullest(chunks: Chunks, ranks: int) -> Chunks:
    """Of the (tokens, history) chunks of a step those on the fullest rank."""
    if ranks == 1 or not chunks:
        return chunks
    dealt = deal([tokens for tokens, _ in chunks], ranks)
    return tuple(chunk for chunk, rank in zip(chunks, dealt, strict=True) if rank == 0)


class OwnPart(NamedTuple):
    """What the fullest rank has of each recorded step, and of every recorded chunk its rank (0: the fullest one).

    ``launches`` is each chunk's part in the launch of its rank's kernel, which is part of decode attention where there
    are decodes.
    """

    decodes: Integers
    tokens: Integers
    survivors: Integers
    sequences: Integers
    rank: Integers
    launches: NDArray[np.float64]

    @classmethod
    def of(cls, steps: Mapping[str, Integers], chunks: Mapping[str, Integers], ranks: int) -> OwnPart:
        """Of the rows of a run (see ``work_of``) on ``ranks`` ranks."""
        count, step, rank = len(steps["repeats"]), chunks["step"], _dealt(chunks, ranks)
        together = np.bincount(step * ranks + rank, minlength=count * ranks)[step * ranks + rank]
        own, decodes = rank == 0, share(steps["decodes"], ranks)
        return cls(
            decodes=decodes,
            tokens=decodes + np.bincount(step, weights=own * chunks["tokens"], minlength=count).astype(np.int64),
            survivors=share(steps["survivors"], ranks),
            sequences=decodes + np.bincount(step[own], minlength=count),
            rank=rank,
            launches=np.where(steps["decodes"][step] > 0, 0.0, 1.0 / together),
        )


def _dealt(chunks: Mapping[str, Integers], ranks: int) -> Integers:
    """The rank of every recorded chunk; those of a step stand together."""
    step, tokens = chunks["step"], chunks["tokens"]
    if ranks == 1 or not len(step):
        return np.zeros(len(step), dtype=np.int64)
    parts = np.split(tokens, np.flatnonzero(np.diff(step)) + 1)
    return np.concatenate([np.array(deal(part.tolist(), ranks), dtype=np.int64) for part in parts])
