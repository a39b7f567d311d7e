"""Service-level objectives."""

from __future__ import annotations

import math

from pydantic import Field

from apexsim.errors import BadInput, nearest
from apexsim.specs.base import Spec, parse_spec


class SLO(Spec):
    """Latency limits that one request must meet, all of them; ``None`` = no limit.

    ``target`` is the share of requests that must meet them for a search to take a deployment as good enough; a
    single simulation reports the share and judges nothing.
    """

    ttft_s: float | None = Field(None, gt=0)
    tpot_s: float | None = Field(None, gt=0)
    e2e_s: float | None = Field(None, gt=0)
    target: float = Field(0.9, gt=0, le=1)

    @property
    def limited(self) -> bool:
        """Whether there is a limit to keep."""
        return (self.ttft_s, self.tpot_s, self.e2e_s) != (None, None, None)

    @property
    def target_words(self) -> str:
        """The target for a person: ``90%``."""
        return f"{100 * self.target:g}%"

    def missed(self, attainment: float) -> str:
        """What is wrong with a share of requests that is below the target; empty where it is not.

        Without a limit, requests that are served keep it.
        """
        if attainment >= self.target:
            return ""
        # Rounded down, so that no share reads as the target that it misses.
        share = math.floor(1000 * attainment) / 1000
        return f"{share:.1%} of requests {'keep the SLO' if self.limited else 'are served'}, {self.target_words} wanted"

    @classmethod
    def parse(cls, text: str, where: object = "--slo") -> SLO:
        """Read ``ttft_s=0.5,tpot_s=0.05``."""
        data: dict[str, float] = {}
        if not text.strip():
            raise BadInput("name at least one limit, as in ttft_s=0.5", where=where, got=text)
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = item.partition("=")
            if key not in cls.model_fields:
                raise BadInput(f"unknown limit; {nearest(key, cls.model_fields)}", where=where, got=key)
            try:
                data[key] = float(value)
            except ValueError:
                raise BadInput("give seconds as in ttft_s=0.5", where=where, key=key, got=value or equals) from None
        return parse_spec(cls, data, where)
