"""What is raised when a batching policy decides what no engine could carry out."""

from __future__ import annotations

from apexsim.errors import BadInput
from apexsim.serving.request import Request


class PolicyFault(BadInput):
    """A policy decided what cannot be carried out; the message says which promise it broke, and with whom."""

    def __init__(self, broke: str, request: Request | None = None) -> None:
        who = "" if request is None else f" (request {request.index})"
        super().__init__(f"the policy {broke}{who}", key="policy")
