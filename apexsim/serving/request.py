"""The one mutable noun: a request on its way through a replica."""

from __future__ import annotations


class Request:
    """Tokens a request wants computed, tokens that are, and the times at which things happened to it.

    How its counters relate (a request of 5 prompt and 3 output tokens after its first decode step was composed)::

        |<--------- prompt_tokens ---------->|<----- output_tokens ---->|
        [  p0   p1   p2   p3   p4  |   o0   |   o1   |   (o2)           ]
        |<------------- computed ----------->|                           KV entries that exist or are being computed
        |<------------------ known ------------------>|                  prompt + tokens sampled or being sampled
        |<------------------------- total ---------------------------->|

    ``computed`` and ``known`` move when a step is composed, so that a scheduler may compose the next one before the
    device has finished; ``pending`` counts the sampled tokens still in flight. A request is ``decoding`` once it has
    sampled from all it knows, and until it is preempted: it then always lacks exactly the token sampled last.
    While a request marches in a ``Cohort``, these counters stand still and the cohort's apply (``base``, ``joined``).
    Tokens that are handed to the client several at a time are first seen once ``known`` has reached ``shown``, at
    ``shown_ns``; where each is handed over as it comes, ``shown`` is 0. ``deadline_ns`` is when the first is due; None
    where nobody said.
    """

    __slots__ = (
        "arrival_ns",
        "base",
        "blocks",
        "capacity",
        "computed",
        "deadline_ns",
        "decoding",
        "first_token_ns",
        "index",
        "joined",
        "known",
        "last_token_ns",
        "pending",
        "preemptions",
        "prompt_tokens",
        "replica",
        "scheduled_ns",
        "shown",
        "shown_ns",
        "total",
    )

    def __init__(self, index: int, prompt_tokens: int, output_tokens: int, *, stream_interval: int = 1) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.total = prompt_tokens + output_tokens
        self.shown = prompt_tokens + min(stream_interval, output_tokens) if stream_interval > 1 else 0
        self.known = prompt_tokens
        self.computed = 0
        self.decoding = False
        self.pending = 0
        self.blocks = 0
        self.capacity = 0
        self.base = 0
        self.joined = 0
        self.preemptions = 0
        self.arrival_ns = 0
        self.deadline_ns: int | None = None
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
        """Tokens the request generates before it stops."""
        return self.total - self.prompt_tokens

    def __repr__(self) -> str:
        return f"Request({self.index}: {self.computed}/{self.known}/{self.total})"
