"""The laws that draw a workload: how long prompts and outputs are, and when requests arrive."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from apexsim.specs.base import Spec

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Counts of tokens are stored and summed as 64-bit integers; a longer prompt than this is a unit mistake.
MAX_TOKENS = 2**31 - 1
# More clients than requests that a run can hold.
MAX_CONCURRENCY = 10**9
# Gamma laws beyond these ratios of deviation to mean lose themselves in the rounding of floats.
_Ratio = Annotated[float, Field(ge=1e-3, le=1e2)]
# Requests per second: below lie ages of mankind, above less than the nanosecond of the simulator's clock.
MIN_RATE, MAX_RATE = 1e-9, 1e9
# Nobody thinks for longer than a day between two questions.
MAX_TURNAROUND_S = 86_400.0


class LengthLaw(Spec, ABC):
    """A distribution of token counts, as the quantile function of a standard normal score.

    One score a request is all the randomness there is, so two lengths are correlated by correlating their scores (a
    Gaussian copula) and each keeps its own distribution. Draws are rounded and cut to [1, ``max_tokens``].
    """

    max_tokens: int = Field(MAX_TOKENS, ge=1, le=MAX_TOKENS)

    def draw(self, score: Floats) -> Integers:
        """Token counts, one for each standard normal ``score``."""
        return np.clip(np.rint(self._quantile(score)), 1, self.max_tokens).astype(np.int64)

    @property
    def mean(self) -> float:
        """Mean token count of what ``draw`` gives, by integration over the score."""
        score = np.linspace(-9.0, 9.0, 18_001)
        weight = np.exp(-(score**2) / 2)
        return float(np.average(self.draw(score), weights=weight))

    @abstractmethod
    def _quantile(self, score: Floats) -> Floats: ...


class FixedLength(LengthLaw):
    """Every request has ``tokens``."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1, le=MAX_TOKENS)

    def _quantile(self, score: Floats) -> Floats:
        return np.full(len(score), float(self.tokens))


class UniformLength(LengthLaw):
    """Whole numbers from ``low`` to ``high``, both included, all equally likely."""

    kind: Literal["uniform"] = "uniform"
    low: int = Field(ge=1, le=MAX_TOKENS)
    high: int = Field(ge=1, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _in_order(self) -> UniformLength:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self

    def _quantile(self, score: Floats) -> Floats:
        count = self.high - self.low + 1
        return self.low + np.minimum(np.floor(_probability(score) * count), count - 1)


class LognormalLength(LengthLaw):
    """``log_mean`` and ``log_sd`` are mean and standard deviation of the natural logarithm of the token count."""

    kind: Literal["lognormal"] = "lognormal"
    log_mean: float = Field(ge=-50, le=50)
    log_sd: float = Field(ge=0, le=50)

    def _quantile(self, score: Floats) -> Floats:
        with np.errstate(over="ignore"):
            return np.exp(self.log_mean + self.log_sd * score)


class ExponentialLength(LengthLaw):
    """Exponential with mean ``mean_tokens`` before rounding."""

    kind: Literal["exponential"] = "exponential"
    mean_tokens: float = Field(gt=0, le=MAX_TOKENS)

    def _quantile(self, score: Floats) -> Floats:
        return -self.mean_tokens * np.log(_probability(-score))  # P(X > x) = P(score below -score)


class GammaLength(LengthLaw):
    """Gamma with mean ``mean_tokens`` and coefficient of variation ``cv`` before rounding."""

    kind: Literal["gamma"] = "gamma"
    mean_tokens: float = Field(gt=0, le=MAX_TOKENS)
    cv: _Ratio

    def _quantile(self, score: Floats) -> Floats:
        from scipy.special import gammainccinv

        shape = 1 / self.cv**2
        quantile: Floats = gammainccinv(shape, _probability(-score)) * (self.mean_tokens / shape)
        return quantile


class QuantileLength(LengthLaw):
    """A table of quantiles, for lengths that no simple law fits.

    ``tokens[i]`` is the quantile at ``probabilities[i]``; the first probability is 0, the last 1. Between two of them
    the logarithm of the length is linear in probability, which keeps the mean of a heavy tail.
    """

    kind: Literal["quantiles"] = "quantiles"
    probabilities: tuple[float, ...]
    tokens: tuple[Annotated[float, Field(ge=1, le=MAX_TOKENS)], ...]

    @model_validator(mode="after")
    def _is_a_table(self) -> QuantileLength:
        p, tokens = self.probabilities, self.tokens
        if len(p) != len(tokens) or len(p) < 2:
            raise ValueError(f"give as many probabilities as tokens, two or more (now {len(p)} and {len(tokens)})")
        if (p[0], p[-1]) != (0, 1) or any(b <= a for a, b in pairwise(p)):
            raise ValueError("probabilities must rise from 0 to 1")
        if any(b < a for a, b in pairwise(tokens)):
            raise ValueError("tokens must not fall as probability rises")
        return self

    def _quantile(self, score: Floats) -> Floats:
        return np.exp(np.interp(_probability(score), self.probabilities, np.log(self.tokens)))


Lengths = Annotated[
    FixedLength | UniformLength | LognormalLength | ExponentialLength | GammaLength | QuantileLength,
    Field(discriminator="kind"),
]


class RenewalArrivals(Spec, ABC):
    """Open-loop arrivals whose gaps are independent draws of one law, ``rate_per_s`` on average.

    Another rate stretches time and changes nothing else: the gaps are drawn with mean 1.
    """

    rate_per_s: float = Field(ge=MIN_RATE, le=MAX_RATE)

    def draw_s(self, rng: np.random.Generator, count: int) -> Floats:
        """Arrival times of ``count`` requests in seconds, the first at 0. More of them begin with the same ones."""
        return np.concatenate(([0.0], np.cumsum(self._unit_gaps(rng, count - 1)))) / self.rate_per_s

    @abstractmethod
    def _unit_gaps(self, rng: np.random.Generator, count: int) -> Floats: ...


class PoissonArrivals(RenewalArrivals):
    """Exponential gaps."""

    kind: Literal["poisson"] = "poisson"

    def _unit_gaps(self, rng: np.random.Generator, count: int) -> Floats:
        return rng.standard_exponential(count)


class GammaArrivals(RenewalArrivals):
    """Gamma gaps of coefficient of variation ``cv``: 1 is Poisson, below 1 more regular, above 1 burstier."""

    kind: Literal["gamma"] = "gamma"
    cv: _Ratio

    def _unit_gaps(self, rng: np.random.Generator, count: int) -> Floats:
        return _gamma(rng, self.cv, count)


class OnOffArrivals(RenewalArrivals):
    """Bursts apart by pauses: a gap is a pause with probability ``pause_share``, else a gap within a burst.

    Pauses fill ``pause_time_share`` of the time. Both kinds are Gamma, of coefficient of variation ``pause_cv`` and
    ``burst_cv``. Gaps are independent, so bursts do not cluster any further than that.
    """

    kind: Literal["on_off"] = "on_off"
    pause_share: float = Field(gt=0, lt=1)
    pause_time_share: float = Field(gt=0, lt=1)
    burst_cv: _Ratio = 1.0
    pause_cv: _Ratio = 1.0

    def _unit_gaps(self, rng: np.random.Generator, count: int) -> Floats:
        which, burst, pause = rng.spawn(3)
        burst_gap = (1 - self.pause_time_share) / (1 - self.pause_share)
        pause_gap = self.pause_time_share / self.pause_share
        gaps = burst_gap * _gamma(burst, self.burst_cv, count)
        return np.where(which.random(count) < self.pause_share, pause_gap * _gamma(pause, self.pause_cv, count), gaps)


class AllAtOnce(Spec):
    """Every request arrives at time 0."""

    kind: Literal["all_at_once"] = "all_at_once"


class ClosedLoop(Spec):
    """``concurrency`` clients; each sends its next request ``turnaround_s`` after its last answer ended.

    In ``waves`` all of them wait for the last answer of all and send together.
    """

    kind: Literal["closed_loop"] = "closed_loop"
    concurrency: int = Field(ge=1, le=MAX_CONCURRENCY)
    turnaround_s: float = Field(0.0, ge=0, le=MAX_TURNAROUND_S)
    waves: bool = False


Arrivals = Annotated[
    PoissonArrivals | GammaArrivals | OnOffArrivals | AllAtOnce | ClosedLoop, Field(discriminator="kind")
]


def score_correlation(rank_correlation: float) -> float:
    """Correlation of two normal scores whose Spearman rank correlation is the one given (Pearson 1907)."""
    return 2 * math.sin(math.pi * rank_correlation / 6)


def _probability(score: Floats) -> Floats:
    from scipy.special import ndtr

    probability: Floats = ndtr(score)
    return probability


def _gamma(rng: np.random.Generator, cv: float, count: int) -> Floats:
    """Gamma draws of mean 1."""
    return rng.standard_gamma(1 / cv**2, count) * cv**2
