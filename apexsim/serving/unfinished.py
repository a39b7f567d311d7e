"""Why requests of a run were not served: refused at the door, or left when it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from apexsim.reasons import counted
from apexsim.serving.replica import Replica

MOST_REASONS = 3


def why_rejected(reasons: Mapping[str, int]) -> Iterator[str]:
    """Sentences on the requests refused at the door by kind of reason, the most frequent first.

    ``reasons`` says how many requests were refused for each.
    """
    kinds = counted(reasons)
    for count, reason in kinds[:MOST_REASONS]:
        yield f"{count} rejected: {reason}"
    if rest := sum(count for count, _ in kinds[MOST_REASONS:]):
        yield f"{rest} more rejected, for {len(kinds) - MOST_REASONS} other reasons"


def why_unfinished(replicas: Sequence[Replica], *, asked: int, unsent: int, stuck: int) -> str | None:
    """A sentence on the requests that neither finished nor were refused: how many, and what they waited for.

    None where there are none. Of ``asked`` requests so many were never sent, and so many are stuck in the replicas of
    a run that has come to its end: no event is left that could free anything.
    """
    if not unsent + stuck:
        return None
    parts = [*_stuck(replicas), *([f"{unsent} were never sent: no client was free"] if unsent else [])]
    return f"{unsent + stuck} of {asked} requests are unfinished: {'; '.join(parts)}"


def _stuck(replicas: Sequence[Replica]) -> Iterator[str]:
    """What stands still in each replica."""
    for replica in replicas:
        if replica.running:
            yield f"{len(replica.running)} in replica {replica.index} held seats and were given no tokens"
        if replica.waiting:
            head = replica.waiting[0]
            first = f"request {head.index} with {head.known} tokens to compute"
            lacks = replica.lacks(head)
            yield f"{len(replica.waiting)} waited in replica {replica.index}, the first ({first}) for {lacks}"
