"""What a client asked for, and what it saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apexsim.serving.job import Job


class Request:
    """``prompt_tokens`` sent at ``arrival_ns``, ``output_tokens`` wanted back: one row of results.

    ``index`` is its row in the workload. ``deadline_ns`` is when its first token is due; None where nobody said.
    ``job`` is the latest of its jobs. What became of those that ended is what the client saw: None where it saw nothing
    yet. All but what was asked is written by ``flow``.
    """

    __slots__ = (
        "arrival_ns", "deadline_ns", "first_token_ns", "index", "job", "last_token_ns", "output_tokens", "preemptions",
        "prompt_tokens", "replica", "scheduled_ns",
    )  # fmt: skip

    def __init__(self, index: int, prompt_tokens: int, output_tokens: int) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrival_ns = 0
        self.deadline_ns: int | None = None
        self.job: Job | None = None
        self.replica: int | None = None
        self.scheduled_ns: int | None = None
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.preemptions = 0

    @property
    def total(self) -> int:
        """Tokens of prompt and output."""
        return self.prompt_tokens + self.output_tokens

    @property
    def finished(self) -> bool:
        """Whether its last job has its last token."""
        return self.job is not None and self.job.finished

    def __repr__(self) -> str:
        return f"Request({self.index}: {self.prompt_tokens}+{self.output_tokens})"
