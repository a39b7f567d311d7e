"""What is raised when a batching policy decides what no engine could carry out."""

from __future__ import annotations

from apexsim.errors import BadInput
from apexsim.serving.job import Job


class PolicyFault(BadInput):
    """A policy decided what cannot be carried out; the message says which promise it broke, and with whom."""

    def __init__(self, broke: str, job: Job | None = None) -> None:
        who = "" if job is None else f" (request {job.index})"
        super().__init__(f"the policy {broke}{who}", key="policy")
