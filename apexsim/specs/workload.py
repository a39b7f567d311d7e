"""Workloads: what is asked of a deployment, as rows (`Requests`) and as the law that draws them (`Workload`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from apexsim.errors import BadInput
from apexsim.specs.base import Name, Spec
from apexsim.specs.laws import (
    MAX_CONCURRENCY,
    MAX_RATE,
    MAX_TOKENS,
    MAX_TURNAROUND_S,
    MIN_RATE,
    Arrivals,
    ClosedLoop,
    Floats,
    Integers,
    Lengths,
    RenewalArrivals,
    score_correlation,
)

# The simulator's clock is a 64-bit count of nanoseconds; stamps in milliseconds or microseconds end here.
MAX_ARRIVAL_S = 9e9
# The optional column of seconds from a request's arrival until its first token is due.
DEADLINE = "deadline_s"
# Deadlines of fewer requests may grow with the arrivals by chance; a correlation and a slope near 1 are no chance.
FEWEST_TO_COMPARE, ALIKE = 5, 0.9
# A day of 115 requests a second; from a parquet file a run of 4 million peaks at 0.3 GB (``benchmarks/memory.py``).
MAX_REQUESTS = 10**7


@dataclass(frozen=True)
class Offered:
    """What a workload asks for in the long run: requests a second, and mean tokens of one.

    ``rate_per_s`` is None in a closed loop, where the server sets the pace, and infinite when all come at once.
    """

    rate_per_s: float | None
    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Requests:
    """Requests in order of arrival, as read-only columns of one length.

    ``arrival_s`` seconds, sorted, not negative; ``None`` in a closed loop, where ``concurrency`` clients each send
    their next request ``turnaround_s`` after their last answer ended; in ``waves``, all together, after the last answer
    of all. ``prompt_tokens`` counts the whole prompt,
    ``output_tokens`` every generated token. ``extra`` holds optional columns by name; ``notes`` are sentences on what
    was done to the rows on their way here (columns ignored, arrivals drawn), for a result to repeat. ``law`` is what
    the law that drew the rows offers on average; None where the rows are all there is, as in a recorded trace.
    Raises BadInput, with the 1-based row, on a column that breaks this.
    """

    name: str
    prompt_tokens: Integers
    output_tokens: Integers
    arrival_s: Floats | None = None
    concurrency: int | None = None
    turnaround_s: float = 0.0
    waves: bool = False
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    law: Offered | None = None

    def __post_init__(self) -> None:
        if (self.arrival_s is None) == (self.concurrency is None):
            raise BadInput("give either arrival_s or the concurrency of a closed loop", where=self.name)
        columns: dict[str, npt.NDArray[Any]] = {
            "prompt_tokens": checked_counts(self.prompt_tokens, "prompt_tokens", self.name),
            "output_tokens": checked_counts(self.output_tokens, "output_tokens", self.name),
        }
        if self.arrival_s is None:
            check_count(self.concurrency, "concurrency", self.name, most=MAX_CONCURRENCY)
            check_turnaround(self.turnaround_s, self.name)
        else:
            columns["arrival_s"] = checked_arrivals(self.arrival_s, self.name)
        extra = {key: np.array(values) for key, values in self.extra.items()}
        if DEADLINE in extra:
            extra[DEADLINE] = checked_deadlines(extra[DEADLINE], self.name)
        lengths = {key: len(values) for key, values in {**columns, **extra}.items()}
        if len(set(lengths.values())) != 1:
            raise BadInput("columns must have one length", where=self.name, got=lengths)
        for values in (*columns.values(), *extra.values()):
            values.setflags(write=False)
        for key, values in columns.items():
            object.__setattr__(self, key, values)
        object.__setattr__(self, "extra", extra)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def whole(self) -> Requests:
        """The same, all held."""
        return self

    def parts(self) -> Iterator[Requests]:
        """All requests in order, some at a time."""
        yield self

    @property
    def columns(self) -> frozenset[str]:
        """Names of the optional columns."""
        return frozenset(self.extra)

    @property
    def distinct_prompts(self) -> Integers:
        """Distinct prompt lengths, ascending."""
        return np.unique(self.prompt_tokens)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last; 0 when all come at once, NaN in a closed loop."""
        return math.nan if self.arrival_s is None else float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate: gaps over span (infinite when all come at once, NaN in a closed loop)."""
        if self.arrival_s is None:
            return math.nan
        return (len(self) - 1) / self.span_s if self.span_s else math.inf

    @property
    def offered(self) -> Offered:
        """What the requests offer in the long run: by the law that drew them, else by the rows themselves."""
        law = self.law or Offered(self.rate_per_s, float(self.prompt_tokens.mean()), float(self.output_tokens.mean()))
        if self.arrival_s is None:
            return replace(law, rate_per_s=None)
        return law if self.span_s else replace(law, rate_per_s=math.inf)

    def head(self, count: int) -> Requests:
        """The first ``count`` requests, or all of them with a note when there are fewer."""
        check_count(count, "requests", self.name)
        if count >= len(self):
            note = f"{count} requests were asked for; {self.name} holds {len(self)}"
            return self if count == len(self) else self._noting(note)
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[:count],
            output_tokens=self.output_tokens[:count],
            arrival_s=None if self.arrival_s is None else self.arrival_s[:count],
            extra={key: values[:count] for key, values in self.extra.items()},
        )

    def repeated(self, count: int) -> Requests:
        """The same requests over and over until there are at least ``count``, each time whole.

        The next time begins one mean gap after the last arrival of the time before.
        """
        times = -(-count // len(self))
        if times <= 1:
            return self
        arrival_s = self.arrival_s
        if arrival_s is not None:
            period_s = self.span_s + (1 / self.rate_per_s if self.span_s else 0.0)
            arrival_s = (np.arange(times)[:, None] * period_s + arrival_s).ravel()
        return replace(
            self,
            prompt_tokens=np.tile(self.prompt_tokens, times),
            output_tokens=np.tile(self.output_tokens, times),
            arrival_s=arrival_s,
            extra={key: np.tile(values, times) for key, values in self.extra.items()},
        )._noting(f"{self.name} repeated {times} times")

    def at_rate(self, rate_per_s: float) -> Requests:
        """The same requests, time stretched about the first arrival until the mean rate is ``rate_per_s``."""
        check_rate(rate_per_s, where=self.name)
        if self.arrival_s is None or not self.span_s:
            raise BadInput("has no spread of arrival times to scale; use arriving(...) to draw some", where=self.name)
        first = self.arrival_s[0]
        arrival_s = first + (self.arrival_s - first) * (self.rate_per_s / rate_per_s)
        return replace(self, arrival_s=arrival_s, law=self.law and replace(self.law, rate_per_s=rate_per_s))

    def arriving(self, process: RenewalArrivals, *, seed: int = 0) -> Requests:
        """The same requests at times drawn from ``process``, with a note that says so."""
        arrival_s = process.draw_s(_streams(seed, self.name)[0], len(self))
        law = replace(self.offered, rate_per_s=process.rate_per_s)
        drawn = replace(self, arrival_s=arrival_s, concurrency=None, turnaround_s=0.0, waves=False, law=law)
        return drawn._noting(f"arrival times drawn: {process!r}")

    def all_at_once(self) -> Requests:
        """The same requests, all arriving at time 0."""
        return replace(self, arrival_s=np.zeros(len(self)), concurrency=None, turnaround_s=0.0, waves=False)

    def closed_loop(self, concurrency: int, turnaround_s: float = 0.0, *, waves: bool = False) -> Requests:
        """The same requests sent in order by ``concurrency`` clients, each waiting ``turnaround_s`` after an answer.

        In ``waves`` they wait for one another's answers and send together.
        """
        return replace(self, arrival_s=None, concurrency=concurrency, turnaround_s=turnaround_s, waves=waves)

    def _noting(self, note: str) -> Requests:
        return replace(self, notes=(*self.notes, note))


class LengthStatistics(Spec):
    """Statistics of a token count over all requests."""

    mean: float = Field(gt=0)
    p50: float = Field(ge=1)
    p90: float = Field(ge=1)


class PublishedStatistics(Spec):
    """What the source says of its traffic: the yardstick of a generator, never an input to it.

    ``gap_cv`` is the coefficient of variation of the gaps between arrivals, ``rank_correlation`` Spearman's between
    prompt and output length.
    """

    prompt_tokens: LengthStatistics
    output_tokens: LengthStatistics
    rank_correlation: float = Field(ge=-1, le=1)
    rate_per_s: float = Field(gt=0)
    gap_cv: float = Field(ge=0)


class Workload(Spec):
    """A generator of requests: two laws of length, their rank correlation (Spearman) and a law of arrivals.

    ``source``, ``licence``, ``citation``, ``statistic`` (which published figure each law rests on) and ``limits``
    (what it leaves out) are prose; ``requests`` is how many are drawn unless asked otherwise.
    """

    name: Name
    summary: str | None = None
    source: str | None = None
    licence: str | None = None
    citation: str | None = None
    statistic: str | None = None
    limits: str | None = None
    requests: int = Field(1024, ge=1, le=MAX_REQUESTS)
    prompt_tokens: Lengths
    output_tokens: Lengths
    rank_correlation: float = Field(0.0, ge=-1, le=1)
    arrivals: Arrivals
    published: PublishedStatistics | None = None

    def sample(self, requests: int | None = None, *, seed: int = 0) -> Requests:
        """Draw ``requests`` of them (default: the workload's own number).

        Arrivals, prompts and outputs come from independent streams of ``seed``, and a longer sample begins with the
        shorter one. Raises BadInput for a count below 1 or a seed that is not a whole number >= 0.
        """
        count = self.requests if requests is None else requests
        check_count(count, "requests", self.name, most=MAX_REQUESTS)
        arrivals, prompts, outputs = _streams(seed, self.name)
        prompt_score = prompts.standard_normal(count)
        shared = score_correlation(self.rank_correlation)
        output_score = shared * prompt_score + math.sqrt(1 - shared**2) * outputs.standard_normal(count)
        law = self.arrivals
        rows = Requests(
            name=self.name,
            prompt_tokens=self.prompt_tokens.draw(prompt_score),
            output_tokens=self.output_tokens.draw(output_score),
            arrival_s=law.draw_s(arrivals, count) if isinstance(law, RenewalArrivals) else np.zeros(count),
            law=Offered(
                rate_per_s=law.rate_per_s if isinstance(law, RenewalArrivals) else math.inf,
                prompt_tokens=self.prompt_tokens.mean,
                output_tokens=self.output_tokens.mean,
            ),
        )
        if not isinstance(law, ClosedLoop):
            return rows
        return rows.closed_loop(law.concurrency, law.turnaround_s, waves=law.waves)


def _streams(seed: int, where: object) -> list[np.random.Generator]:
    """Independent generators for arrivals, prompts and outputs."""
    check_count(seed, "seed", where, least=0)
    # The 1 keeps these streams apart from those that a simulation spawns from the same seed.
    return [np.random.default_rng(stream) for stream in np.random.SeedSequence((seed, 1)).spawn(3)]


def check_count(value: object, key: str, where: object = None, *, least: int = 1, most: int | None = None) -> None:
    """Refuse anything but a whole number of at least ``least`` and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise BadInput(f"give a whole number of at least {least}", where=where, key=key, got=value)
    if most is not None and value > most:
        raise BadInput(f"give at most {most}", where=where, key=key, got=value)


def check_rate(value: float, key: str = "rate_per_s", where: object = None) -> None:
    """Refuse a rate that is not a number from ``MIN_RATE`` to ``MAX_RATE``."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise BadInput("give requests per second, a number above 0", where=where, key=key, got=value)
    if not MIN_RATE <= value <= MAX_RATE:
        would_do = f"give requests per second, from {MIN_RATE:g} to {MAX_RATE:g}"
        raise BadInput(would_do, where=where, key=key, got=value)


def check_turnaround(value: float, where: object) -> None:
    """Refuse a turnaround that is not a number of seconds from 0 to ``MAX_TURNAROUND_S``."""
    if not _is_number(value) or not 0 <= value <= MAX_TURNAROUND_S:
        raise BadInput(f"give seconds, from 0 to {MAX_TURNAROUND_S:g}", where=where, key="turnaround_s", got=value)


def checked_counts(values: npt.ArrayLike, column: str, where: object, *, least: int = 1) -> Integers:
    """A copy of ``values`` as int64; BadInput names the first row (1-based) that is not a whole number >= ``least``."""
    array = _numbers(values, column, where)
    with np.errstate(invalid="ignore"):
        wrong = ~((array >= least) & (array <= MAX_TOKENS) & (array == np.floor(array)))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise _bad_row(f"give a whole number from {least} to {MAX_TOKENS}", where, column, row, array[row].item())
    return array.astype(np.int64)


def checked_arrivals(values: npt.ArrayLike, where: object) -> Floats:
    """A copy of ``values`` as float64; BadInput names the first row (1-based) that is not finite, >= 0 and in order."""
    array = _numbers(values, "arrival_s", where).astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = ~((array >= 0) & (array <= MAX_ARRIVAL_S))
        unsorted = np.concatenate(([False], array[1:] < array[:-1]))
    if wrong.any():
        row = int(np.argmax(wrong))
        would_do = f"give seconds from 0 to {MAX_ARRIVAL_S:.0e}, one for every row"
        raise _bad_row(would_do, where, "arrival_s", row, array[row].item())
    if unsorted.any():
        row = int(np.argmax(unsorted))
        would_do = f"is earlier than row {row} at {array[row - 1].item()!r}; sort the rows by arrival_s"
        raise _bad_row(would_do, where, "arrival_s", row, array[row].item())
    return array


def checked_deadlines(values: npt.ArrayLike, where: object) -> Floats:
    """A copy of ``values`` as float64; BadInput names the first row (1-based) that is not a number of seconds >= 0."""
    array = _numbers(values, DEADLINE, where).astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = ~((array >= 0) & (array <= MAX_ARRIVAL_S))
    if wrong.any():
        row = int(np.argmax(wrong))
        would_do = f"give seconds after the arrival, from 0 to {MAX_ARRIVAL_S:.0e}, in every row"
        raise _bad_row(would_do, where, DEADLINE, row, array[row].item())
    return array


def look_absolute(deadline_s: Floats, arrival_s: Floats) -> bool:
    """Whether deadlines grow with the arrivals, second by second, as times on the clock of the arrivals would."""
    spread_s = float(arrival_s.std())
    if len(arrival_s) < FEWEST_TO_COMPARE or not spread_s or not deadline_s.std():
        return False
    correlation = float(np.corrcoef(arrival_s, deadline_s)[0, 1])
    slope = correlation * float(deadline_s.std()) / spread_s
    return correlation > ALIKE and abs(slope - 1) < 1 - ALIKE


def _numbers(values: npt.ArrayLike, column: str, where: object) -> npt.NDArray[Any]:
    array = np.array(values)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise BadInput("give a column of numbers", where=where, key=column, got=f"{array.ndim}-d {array.dtype}")
    if not len(array):
        raise BadInput("holds no request; give at least one row", where=where, key=column)
    return array


def _bad_row(would_do: str, where: object, column: str, row: int, got: float) -> BadInput:
    key = f"{column}, row {row + 1} (the first data row is 1)"
    if math.isnan(got):  # an empty cell
        return BadInput(f"got nothing; {would_do}", where=where, key=key)
    return BadInput(would_do, where=where, key=key, got=got)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
