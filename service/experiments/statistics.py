"""What counts show: rates, lifts, and how sure one may be. Pure functions of sums; arrays of experiments work as one.

The user is what is randomised, so the user is the unit. A rate such as clicks per exposure is a ratio of two sums over
users; one user's exposures are alike, and to count them as independent would make intervals too narrow. The delta
method takes the variance between users (Deng, Knoblich, Lu: Applying the Delta Method in Metric Analytics, KDD 2018,
arXiv:1803.06336).

Lifts are compared on the log scale, log(treatment / control), and given as treatment / control - 1.

Two kinds of interval and p-value:

- *Fixed horizon*: right if read once, at a time fixed beforehand.
- *Always valid*: right however often one looks and whenever one stops. The mixture sequential probability ratio test
  with a normal mixture (Johari, Koomen, Pekelis, Walsh: Always Valid Inference, Operations Research 2022,
  arXiv:1512.04922) on a clock of information, 1 / variance; its inversion is the asymptotic confidence sequence of
  Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (Time-uniform central limit theory and asymptotic confidence sequences,
  Annals of Statistics 2024, arXiv:2103.06476). The promise is asymptotic and for estimates that gain information
  independently from look to look. Users who come back resemble themselves, so looks resemble each other more than
  that; the simulations have such users and stay on the safe side (docs/ab-tests.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = float | NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class RatioSums:
    """Sums over units of a numerator x (clicks) and a denominator n (exposures): all that a ratio's variance needs."""

    units: Numbers
    x: Numbers
    n: Numbers
    xx: Numbers
    nn: Numbers
    xn: Numbers

    @classmethod
    def of(cls, x: NDArray[Any], n: NDArray[Any]) -> "RatioSums":
        """From one row per experiment, one column per unit; a unit without exposure (n = 0) is none."""
        x, n = x.astype(np.float64), n.astype(np.float64)
        return cls(
            (n > 0).sum(-1).astype(np.float64), x.sum(-1), n.sum(-1), (x * x).sum(-1), (n * n).sum(-1), (x * n).sum(-1)
        )


@dataclass(frozen=True)
class Estimate:
    """A number and its sampling variance; NaN where there is too little to say."""

    value: Numbers
    variance: Numbers


@dataclass(frozen=True)
class Bounds:
    """An interval, ends included."""

    low: Numbers
    high: Numbers


def ratio(sums: RatioSums) -> Estimate:
    """Σx / Σn, and its variance by the delta method, clustered by unit; needs two units."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.divide(sums.x, sums.n)
        squared_residuals = sums.xx - 2 * value * sums.xn + value**2 * sums.nn  # Σ (x - value n)²
        variance = np.maximum(squared_residuals, 0.0) / np.square(sums.n) * np.divide(sums.units, sums.units - 1.0)
    return Estimate(value, variance)


def log_lift(treatment: Estimate, control: Estimate) -> Estimate:
    """log(treatment / control): independent rates, by the delta method."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(np.divide(treatment.value, control.value))
        variance = treatment.variance / np.square(treatment.value) + control.variance / np.square(control.value)
    return Estimate(value, variance)


def interval(estimate: Estimate, confidence: float = CONFIDENCE) -> Bounds:
    """Fixed-horizon, normal."""
    margin = _stats().norm.isf((1 - confidence) / 2) * np.sqrt(estimate.variance)
    return Bounds(estimate.value - margin, estimate.value + margin)


def p_value(estimate: Estimate) -> Numbers:
    """Fixed-horizon, normal, two-sided, of the hypothesis that the estimated number is 0."""
    p: Numbers = 2 * _stats().norm.sf(np.abs(estimate.value) / np.sqrt(estimate.variance))
    return p


def always_valid_interval(estimate: Estimate, scale: float, confidence: float = CONFIDENCE) -> Bounds:
    """The numbers that `always_valid_p_value` does not reject; narrowest, for its time, where `scale` is detectable."""
    variance, mixed = estimate.variance, scale**2
    log_terms = np.log1p(mixed / variance) - 2 * np.log(1 - confidence)
    margin = np.sqrt(variance * (variance + mixed) / mixed * log_terms)
    return Bounds(estimate.value - margin, estimate.value + margin)


def always_valid_p_value(estimate: Estimate, scale: float) -> Numbers:
    """One over the likelihood ratio of N(0, scale²) mixed over the true number against 0, at most 1.

    `scale` is the size of the number that the experiment is to see, and must be fixed before its data.
    """
    variance, mixed = estimate.variance, scale**2
    log_ratio = np.square(estimate.value) * mixed / (2 * variance * (variance + mixed)) - np.log1p(mixed / variance) / 2
    p: Numbers = np.exp(-np.maximum(log_ratio, 0.0))
    return p


def power(true_value: float, variance: Numbers, alpha: float = 1 - CONFIDENCE) -> Numbers:
    """How often the fixed-horizon test rejects 0 where the number is `true_value` and is estimated with `variance`."""
    shift = true_value / np.sqrt(variance)
    critical = _stats().norm.isf(alpha / 2)
    probability: Numbers = _stats().norm.sf(critical - shift) + _stats().norm.cdf(-critical - shift)
    return probability


def detectable(variance: Numbers, alpha: float = 1 - CONFIDENCE, wanted_power: float = 0.8) -> Numbers:
    """The smallest number above 0 that the fixed-horizon test finds with `wanted_power`."""
    found: Numbers = (_stats().norm.isf(alpha / 2) + _stats().norm.ppf(wanted_power)) * np.sqrt(variance)
    return found


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Bounds:
    """Interval of a share of independent trials (Wilson, 1927)."""
    found = _stats().binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Bounds(float(found.low), float(found.high))


def sample_ratio_p_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Chi-square: how often units fall into variants as unevenly as `counts`, where they should fall by `weights`."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    return float(_stats().chisquare(counts, np.sum(counts) * shares).pvalue)


def quantile_bounds(
    values: NDArray[np.float64], counts: NDArray[np.int64], quantile: float, confidence: float = CONFIDENCE
) -> tuple[float, Bounds]:
    """A quantile of a histogram (ascending values and how often each), and its interval by order statistics.

    Distribution-free for independent draws: the number of draws below the true quantile is binomial. An end that the
    draws are too few for is infinite.
    """
    total = int(counts.sum())
    below, above = (_stats().binom.ppf(tail, total, quantile) for tail in ((1 - confidence) / 2, (1 + confidence) / 2))
    ends = counts.cumsum()

    def draw(place: float) -> float:  # the place-th smallest, from 1 on
        if place < 1:
            return -np.inf
        return float(values[np.searchsorted(ends, place)]) if place <= total else np.inf

    return draw(np.ceil(quantile * total)), Bounds(draw(below), draw(above + 1))


def _stats() -> ModuleType:
    """scipy.stats, loaded by the first report: it takes most of a second, and nothing else of the service needs it."""
    from scipy import stats  # noqa: PLC0415

    return stats
