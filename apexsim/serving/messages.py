"""What replicas hear, and what others see of them.

One law keeps many steps at once exact. A replica hears of others, and is looked at by them, only in events of rank 0,
at least 1 ns after their cause. Its blocks change only in its own compositions. At equal times an event of rank 0 comes
before any step ends: it finds the same whether or not the ends in between were simulated singly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from apexsim.serving.job import Job

if TYPE_CHECKING:
    from apexsim.serving.replica import Replica


class Arrive(NamedTuple):
    """A job comes and joins the queue."""

    job: Job


class Loaded(NamedTuple):
    """The KV entries that a job has fetched are here."""

    job: Job


class Fetched(NamedTuple):
    """The KV entries that a job of this replica has left have been fetched: its blocks are free."""

    job: Job


Message = Arrive | Loaded | Fetched
"""The only way into a replica: see ``Replica.deliver``. Each is read when the replica composes its next step."""


class View:
    """What a router or a controller may see of one replica, at this moment; looking changes nothing.

    ``unfinished``: jobs that were sent there and are not done, kept by whoever sends them.
    """

    __slots__ = ("_replica", "unfinished")

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.unfinished = 0

    @property
    def replica(self) -> int:
        """Its number."""
        return self._replica.index

    @property
    def waiting(self) -> int:
        """Jobs in its queue."""
        return self._replica.in_queue

    @property
    def running(self) -> int:
        """Jobs that hold a seat."""
        return self._replica.seated

    @property
    def kv_blocks(self) -> int:
        """KV blocks in use."""
        return self._replica.kv_blocks

    @property
    def kv_blocks_total(self) -> int:
        """KV blocks that there are."""
        return self._replica.kv_blocks_total

    def __repr__(self) -> str:
        return f"View(replica {self.replica}: {self.unfinished} unfinished, {self.kv_blocks} KV blocks in use)"
