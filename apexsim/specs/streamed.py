"""Requests too many to be held: read a part at a time, each time anew from where they are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from apexsim.errors import BadInput
from apexsim.specs.laws import MAX_CONCURRENCY, Floats, Integers, RenewalArrivals
from apexsim.specs.workload import Offered, Requests, check_count, check_rate, check_turnaround

Read = Callable[[], Iterator[Requests]]


class Figures(NamedTuple):
    """What must be known of all requests before the first is served.

    ``prompts`` are the distinct prompt lengths, ascending; the tokens are those of all prompts and outputs.
    ``columns`` are the names of optional columns, the same in every part.
    """

    requests: int
    prompts: Integers
    prompt_tokens: int
    output_tokens: int
    first_s: float
    last_s: float
    columns: frozenset[str]

    @classmethod
    def of(cls, parts: Iterator[Requests]) -> Figures:
        """Read all parts once. BadInput where one begins before the one before it ends, or has other columns."""
        count = prompt_tokens = output_tokens = 0
        prompts, columns, first_s, last_s = np.empty(0, dtype=np.int64), frozenset[str](), math.inf, 0.0
        for part in parts:
            assert part.arrival_s is not None
            columns = columns if count else part.columns
            if part.columns != columns or part.arrival_s[0] < last_s:
                raise BadInput("its parts do not follow one another", where=part.name)
            first_s, last_s = min(first_s, float(part.arrival_s[0])), float(part.arrival_s[-1])
            count += len(part)
            prompts = np.union1d(prompts, part.prompt_tokens)
            prompt_tokens += int(part.prompt_tokens.sum())
            output_tokens += int(part.output_tokens.sum())
        return cls(count, prompts, prompt_tokens, output_tokens, first_s, last_s, columns)


class StreamedRequests(Requests):
    """Requests that ``read`` gives part by part, in order of arrival: what must be known of them all are ``figures``.

    Parts have arrival times, whatever the loop: those of a closed loop are left out as they are asked for. A column of
    all requests is read when it is asked for, and not kept. Whatever draws new arrivals holds all requests.
    """

    _read: Read
    _figures: Figures

    def __init__(self, name: str, read: Read, figures: Figures, notes: tuple[str, ...] = (), **loop: Any) -> None:
        usual = {"concurrency": None, "turnaround_s": 0.0, "waves": False, "law": None}
        mine = {"name": name, "_read": read, "_figures": figures, "notes": notes, **usual, **loop}
        for key, value in mine.items():
            object.__setattr__(self, key, value)

    def __repr__(self) -> str:
        return f"<StreamedRequests {self.name}, {len(self):,} rows>"

    def __len__(self) -> int:
        return self._figures.requests

    def parts(self) -> Iterator[Requests]:
        for part in self._read():
            yield part if self.concurrency is None else part.closed_loop(self.concurrency)

    @property
    def prompt_tokens(self) -> Integers:
        return np.concatenate([part.prompt_tokens for part in self._read()])

    @property
    def output_tokens(self) -> Integers:
        return np.concatenate([part.output_tokens for part in self._read()])

    @property
    def arrival_s(self) -> Floats | None:
        if self.concurrency is not None:
            return None
        return np.concatenate([part.arrival_s for part in self._read() if part.arrival_s is not None])

    @property
    def extra(self) -> dict[str, npt.NDArray[Any]]:
        parts = [part.extra for part in self._read()]
        return {name: np.concatenate([part[name] for part in parts]) for name in sorted(self.columns)}

    @property
    def columns(self) -> frozenset[str]:
        return self._figures.columns

    @property
    def distinct_prompts(self) -> Integers:
        return self._figures.prompts

    @property
    def span_s(self) -> float:
        return math.nan if self.concurrency is not None else self._figures.last_s - self._figures.first_s

    @property
    def offered(self) -> Offered:
        count, tokens = self._figures.requests, (self._figures.prompt_tokens, self._figures.output_tokens)
        rate_per_s = None if self.concurrency is not None else self.rate_per_s
        return Offered(rate_per_s, *(each / count for each in tokens))

    # -- other requests made of them ----------------------------------------------------------------------------------

    def whole(self) -> Requests:
        """The same, all held."""
        columns = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        loop = {"concurrency": self.concurrency, "turnaround_s": self.turnaround_s, "waves": self.waves}
        return Requests(name=self.name, **columns, arrival_s=self.arrival_s, extra=self.extra, notes=self.notes, **loop)  # type: ignore[arg-type]

    def head(self, count: int) -> Requests:
        check_count(count, "requests", self.name)
        if count >= len(self):
            note = f"{count} requests were asked for; {self.name} holds {len(self)}"
            return self if count == len(self) else self._like(notes=(*self.notes, note))
        read = partial(_head, self._read, count)
        return self._like(read=read, figures=Figures.of(read()))

    def at_rate(self, rate_per_s: float) -> Requests:
        check_rate(rate_per_s, where=self.name)
        if not self.span_s > 0:
            return self.whole().at_rate(rate_per_s)  # which says why not
        first_s, times = self._figures.first_s, self.rate_per_s / rate_per_s
        return self._like(
            read=partial(_stretched, self._read, first_s, times),
            figures=self._figures._replace(last_s=first_s + self.span_s * times),
        )

    def closed_loop(self, concurrency: int, turnaround_s: float = 0.0, *, waves: bool = False) -> Requests:
        check_count(concurrency, "concurrency", self.name, most=MAX_CONCURRENCY)
        check_turnaround(turnaround_s, self.name)
        return self._like(concurrency=concurrency, turnaround_s=turnaround_s, waves=waves)

    def repeated(self, count: int) -> Requests:
        return self if count <= len(self) else self.whole().repeated(count)

    def arriving(self, process: RenewalArrivals, *, seed: int = 0) -> Requests:
        return self.whole().arriving(process, seed=seed)

    def all_at_once(self) -> Requests:
        return self.whole().all_at_once()

    def _like(self, **changed: Any) -> StreamedRequests:
        loop = {"concurrency": self.concurrency, "turnaround_s": self.turnaround_s, "waves": self.waves}
        mine: dict[str, Any] = {"name": self.name, "read": self._read, "figures": self._figures, "notes": self.notes}
        return StreamedRequests(**{**mine, **loop, **changed})


def _head(read: Read, count: int) -> Iterator[Requests]:
    """The first ``count`` rows of parts."""
    for part in read():
        yield part.head(min(count, len(part)))
        count -= len(part)
        if count <= 0:
            return


def _stretched(read: Read, first_s: float, times: float) -> Iterator[Requests]:
    """Parts whose arrivals after ``first_s`` come so many times as late."""
    for part in read():
        assert part.arrival_s is not None
        yield replace(part, arrival_s=first_s + (part.arrival_s - first_s) * times)
