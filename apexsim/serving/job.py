"""The one mutable noun of the engine: one phase of a request at one replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from apexsim.serving.request import Request


class Group(Protocol):
    """Jobs that decode together, as one of them sees it."""

    in_flight: bool
    """Whether the latest step of its jobs is on its way, so that none of them can be given a token."""


class Job:
    """Tokens that are wanted, tokens that are computed, and the times at which things happened.

    How the counters relate (a job of 5 prompt and 3 output tokens after its first decode step was composed)::

        |<--------- prompt_tokens ---------->|<----- output_tokens ---->|
        [  p0   p1   p2   p3   p4  |   o0   |   o1   |   (o2)           ]
        |<------------- computed ----------->|                           KV entries that exist or are being computed
        |<------------------ known ------------------>|                  prompt + tokens sampled or being sampled
        |<------------------------- total ---------------------------->|

    ``computed`` and ``known`` move when a step is composed, so that a scheduler may compose the next one before the
    device has finished; ``pending`` counts the sampled tokens still in flight. A job is ``decoding`` once it has
    sampled from all it knows, and until it is preempted: it then always lacks exactly the token sampled last.

    While it decodes in a ``group`` (see ``fast``; None on the plain path) these counters stand still: the group counts
    for all of its jobs, and brings a job up to date when it goes. ``base``, ``joined`` and ``place`` are its notes.

    ``stop`` is its place in the itinerary of its request (see ``flow``). What it has computed is ``kept`` in its blocks
    when it has ended, where another stop needs it. ``fetch``, where set, has the KV entries that other replicas keep
    for it sent to its own: ``computed`` counts them from the start, and it may run once they have come.

    ``blocks`` and ``capacity`` are the KV blocks held and the tokens they have room for. Tokens that a client is handed
    several at a time are first seen once ``known`` has reached ``shown``, at ``shown_ns``; where each is handed over as
    it comes, ``shown`` is 0.

    Written by: this module the counters and the times of tokens, the KV cache ``blocks`` and ``capacity``, the
    scheduler ``scheduled_ns``, the replica ``replica``, the group its notes, ``flow`` what it says of stops.
    """

    __slots__ = (
        "base",
        "blocks",
        "capacity",
        "computed",
        "decoding",
        "fetch",
        "first_token_ns",
        "group",
        "index",
        "joined",
        "kept",
        "known",
        "last_token_ns",
        "pending",
        "place",
        "preemptions",
        "prompt_tokens",
        "replica",
        "request",
        "scheduled_ns",
        "shown",
        "shown_ns",
        "stop",
        "total",
    )

    def __init__(self, request: Request, *, stream_interval: int = 1) -> None:
        """All of a request: its prompt, then its output, handed over ``stream_interval`` tokens at a time."""
        prompt, output = request.prompt_tokens, request.output_tokens
        self.request = request
        self.stop = 0
        self.kept = False
        self.fetch: Callable[[Job], None] | None = None
        self.index = request.index
        self.prompt_tokens = prompt
        self.total = prompt + output
        self.shown = prompt + min(stream_interval, output) if stream_interval > 1 else 0
        self.known = prompt
        self.computed = 0
        self.decoding = False
        self.pending = 0
        self.blocks = 0
        self.capacity = 0
        self.group: Group | None = None
        self.base = 0
        self.joined = 0
        self.place = 0
        self.preemptions = 0
        self.replica: int | None = None
        self.scheduled_ns: int | None = None
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.shown_ns: int | None = None

    @property
    def finished(self) -> bool:
        """Whether every token exists."""
        return self.known == self.total and not self.pending

    @property
    def output_tokens(self) -> int:
        """Tokens the job generates before it stops."""
        return self.total - self.prompt_tokens

    @property
    def deadline_ns(self) -> int | None:
        """When the first token is due; None where nobody said."""
        return self.request.deadline_ns

    def only_prefill(self) -> None:
        """It ends with the first token, which is handed over at once."""
        self.total = self.prompt_tokens + 1
        self.shown = 0

    def follow(self, before: Job) -> None:
        """It goes on where another job of the request has ended, whose KV entries it finds or fetches."""
        self.computed = before.computed
        self.known = before.known
        self.last_token_ns = before.last_token_ns
        self.shown = 0

    def load(self) -> None:
        """The KV entries it has fetched are here: it decodes."""
        self.fetch = None
        self.decoding = True

    def compute(self, tokens: int) -> bool:
        """Tokens are being computed; true if they are all it knows, and its next token is being sampled."""
        self.computed += tokens
        if self.computed < self.known:
            return False
        self.known += 1
        self.pending += 1
        self.decoding = True
        return True

    def emit(self, end_ns: int) -> int | None:
        """The oldest token in flight exists; returns when the one before came, None where it is the first."""
        self.pending -= 1
        before_ns, self.last_token_ns = self.last_token_ns, end_ns
        if before_ns is None:
            self.first_token_ns = end_ns
        return before_ns

    def show(self, end_ns: int) -> None:
        """The client is handed its first tokens."""
        self.shown_ns = end_ns

    def lose(self) -> None:
        """It is preempted: what it has computed is gone."""
        self.computed = 0
        self.decoding = False
        self.preemptions += 1

    def resume(self, tokens: int) -> None:
        """It runs again and finds so many tokens computed."""
        self.computed = tokens

    def sample(self) -> None:
        """A token is being sampled that its group has counted, and that ends singly."""
        self.pending += 1

    def catch_up(self, computed: int, last_token_ns: int | None) -> None:
        """It leaves its group: so many tokens are computed, and its latest one came then (None: as it knows)."""
        self.computed = computed
        self.known = computed + 1
        if last_token_ns is not None:
            self.last_token_ns = last_token_ns

    def end(self, end_ns: int) -> None:
        """Its last token, which its group has counted, exists."""
        self.last_token_ns = end_ns

    def __repr__(self) -> str:
        return f"Job({self.index}: {self.computed}/{self.known}/{self.total})"
