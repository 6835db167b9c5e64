"""Simulated users, many experiments at once. `python -m tests.service.experiments.simulation` prints docs/ab-tests.md's
numbers.

A user has an activity (log-normal: few are heavy) and a click probability (beta), arrives at one of the looks, and
comes back at every later one. So exposures of a user are alike, and what a look adds is not independent of what was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from service.experiments import statistics
from service.experiments.config import Experiment, Variant, VariantOverrides
from service.experiments.exposures import VariantTally
from service.experiments.report import ExperimentReport, make_report
from service.experiments.statistics import Estimate, RatioSums

SPREAD = 1.0
"""Of the log-activity: what a look adds to a user is Poisson, its mean exp(N(-SPREAD²/2, SPREAD²)), on average 1."""
CONCENTRATION = 10.0
"""Of the beta distribution of click probabilities: at a rate of .1 their standard deviation is .09."""


@dataclass(frozen=True)
class Counts:
    """What one arm's users did up to a look: one row per experiment, one column per user."""

    clicks: NDArray[np.float64]
    exposures: NDArray[np.float64]

    @property
    def sums(self) -> RatioSums:
        """What the service keeps."""
        return RatioSums.of(self.clicks, self.exposures)


def arm(
    rng: np.random.Generator, rate: float, experiments: int, users: int, looks: int = 1, spread: float = SPREAD
) -> Iterator[Counts]:
    """Cumulative counts at each look."""
    shape = experiments, users
    activity = rng.lognormal(-(spread**2) / 2, spread, shape)
    probability = rng.beta(CONCENTRATION * rate, CONCENTRATION * (1 - rate), shape)
    arrival = rng.integers(0, looks, shape)
    clicks, exposures = np.zeros(shape), np.zeros(shape)
    for look in range(looks):
        new = rng.poisson(activity) * (arrival <= look) + (arrival == look)
        exposures += new
        clicks += rng.binomial(new, probability)
        yield Counts(clicks.copy(), exposures.copy())


def variance_of_rate(rate: float, users: int, spread: float = SPREAD) -> float:
    """Of clicks / exposures after one look, from the distributions themselves.

    With n = 1 + Poisson(a), E a = 1, E a² = exp(spread²): E n = 2, E n² = 1 + 2 E a + (E a + E a²) = 4 + exp(spread²).
    A residual clicks - rate n has the variance E n E[p(1 - p)] + E n² Var p.
    """
    variance_of_p = rate * (1 - rate) / (CONCENTRATION + 1)
    mean_n, mean_nn = 2.0, 4.0 + np.exp(spread**2)
    of_residual = mean_n * (rate * (1 - rate) - variance_of_p) + mean_nn * variance_of_p
    return float(of_residual / (users * mean_n**2))


def variance_of_log_lift(rate: float, lift: float, users: int) -> float:
    """Of log(treatment / control) after one look."""
    treated = rate * (1 + lift)
    return variance_of_rate(treated, users) / treated**2 + variance_of_rate(rate, users) / rate**2


def log_lifts(
    rng: np.random.Generator, rate: float, lift: float, experiments: int, users: int, looks: int = 1
) -> Iterator[Estimate]:
    """At each look, of `users` in each arm."""
    control = arm(rng, rate, experiments, users, looks)
    treatment = arm(rng, rate * (1 + lift), experiments, users, looks)
    for treated, untreated in zip(treatment, control, strict=True):
        yield statistics.log_lift(statistics.ratio(treated.sums), statistics.ratio(untreated.sums))


@dataclass(frozen=True)
class Rejections:
    """Share of the experiments in which p < .05."""

    at_the_end: float
    at_any_look: float
    always_valid: float
    """At any look, by the always-valid p-value."""


def rejections(
    rng: np.random.Generator, rate: float, lift: float, experiments: int, users: int, looks: int, minimum_lift: float
) -> Rejections:
    """What three ways of reading the same experiments conclude."""
    fixed, sequential = [], []
    for estimate in log_lifts(rng, rate, lift, experiments, users, looks):
        fixed.append(np.asarray(statistics.p_value(estimate)) < 0.05)
        sequential.append(np.asarray(statistics.always_valid_p_value(estimate, np.log1p(minimum_lift))) < 0.05)
    return Rejections(
        float(fixed[-1].mean()), float(np.any(fixed, axis=0).mean()), float(np.any(sequential, axis=0).mean())
    )


@dataclass(frozen=True)
class Coverage:
    """Share of the experiments whose interval holds the true rate."""

    delta_method: float
    naive: float
    """Wald's, as if exposures were independent."""


def coverage(rng: np.random.Generator, rate: float, experiments: int, users: int, spread: float) -> Coverage:
    """Of 95 % intervals of clicks per exposure."""
    (counts,) = arm(rng, rate, experiments, users, spread=spread)
    clustered = statistics.ratio(counts.sums)
    exposures = counts.exposures.sum(-1)
    naive = Estimate(clustered.value, clustered.value * (1 - clustered.value) / exposures)
    held = []
    for estimate in (clustered, naive):
        bounds = statistics.interval(estimate)
        held.append(float(np.mean((bounds.low <= rate) & (rate <= bounds.high))))
    return Coverage(*held)


def mismatch_alarms(rng: np.random.Generator, true_share: float, experiments: int, users: int) -> float:
    """Share of experiments, planned as halves, that the sample-ratio check calls off."""
    treated = rng.binomial(users, np.full(experiments, true_share)).tolist()
    p_values = [statistics.sample_ratio_p_value([number, users - number], [1, 1]) for number in treated]
    return float(np.mean(np.asarray(p_values) < 0.001))


def binomial_range(share: float, experiments: int) -> tuple[float, float]:
    """Where an observed share lies 998 times in 1,000."""
    low, high = (float(stats.binom.ppf(tail, experiments, share)) / experiments for tail in (0.001, 0.999))
    return low, high


def example_report() -> ExperimentReport:
    """Of 5,000 simulated users in each arm, with a true lift of .15, the variant 30 % slower."""
    rng = np.random.default_rng(42)
    experiment = Experiment(
        name="wide-beam",
        traffic=(0.0, 0.2),
        minimum_lift=0.1,
        variants=(
            Variant(name="control", control=True),
            Variant(name="wide", overrides=VariantOverrides(beam_width=50)),
        ),
    )
    tallies = {}
    for name, rate, pace in (("control", 0.1, 1.0), ("wide", 0.115, 1.3)):
        (counts,) = arm(rng, rate, 1, 5_000)
        exposures = int(counts.exposures.sum())
        latencies, numbers = np.unique(np.ceil(pace * rng.lognormal(3.0, 0.4, exposures)), return_counts=True)
        tallies[name] = VariantTally(
            units=5_000,
            exposures=exposures,
            clicks=int(counts.clicks.sum()),
            conversions=int((counts.clicks > 2).sum()),
            exposures_squared=int((counts.exposures**2).sum()),
            clicks_squared=int((counts.clicks**2).sum()),
            clicks_times_exposures=int((counts.clicks * counts.exposures).sum()),
            degraded=int(rng.binomial(exposures, 0.002)),
            latency_ms=dict(zip(latencies.tolist(), numbers.tolist(), strict=True)),
        )
    return make_report(experiment, tallies, datetime(2026, 11, 22, tzinfo=UTC))


def _main() -> None:
    rng = np.random.default_rng(0)
    lines = ["one look, A/A, 2,000 users in each arm, 4,000 experiments"]
    (once,) = log_lifts(rng, 0.1, 0.0, 4_000, 2_000)
    lines.append(f"  p < .05: {np.mean(np.asarray(statistics.p_value(once)) < 0.05):.4f}")
    lines.append(
        "20 looks, A/A, 1,000 users in each arm, 4,000 experiments: fixed at the end, at any look; always valid"
    )
    for minimum_lift in (0.05, 0.1, 0.2, 0.5, 1.0):
        found = rejections(np.random.default_rng(1), 0.1, 0.0, 4_000, 1_000, 20, minimum_lift)
        lines.append(
            f"  minimum_lift {minimum_lift}: {found.at_the_end:.4f} {found.at_any_look:.4f} {found.always_valid:.4f}"
        )
    lines.append("one look, A/B, 2,000 users in each arm, 4,000 experiments: power found, computed")
    for lift in (0.05, 0.1, 0.15, 0.2):
        (estimate,) = log_lifts(rng, 0.1, lift, 4_000, 2_000)
        found_power = np.mean(np.asarray(statistics.p_value(estimate)) < 0.05)
        computed = statistics.power(np.log1p(lift), variance_of_log_lift(0.1, lift, 2_000))
        lines.append(f"  lift {lift}: {found_power:.4f} {computed:.4f}")
    found = rejections(np.random.default_rng(2), 0.1, 0.15, 2_000, 2_000, 20, 0.15)
    lines.append(
        f"20 looks, A/B, lift .15: fixed at the end {found.at_the_end:.4f}, always valid {found.always_valid:.4f}"
    )
    lines.append("coverage of 95 % intervals, 2,000 users, 4,000 experiments: delta method, naive")
    for spread in (0.0, 1.0, 1.5):
        covered = coverage(rng, 0.1, 4_000, 2_000, spread)
        lines.append(f"  spread {spread}: {covered.delta_method:.4f} {covered.naive:.4f}")
    lines.append("sample-ratio alarms: planned 50/50, 20,000 users, 10,000 experiments")
    lines += [f"  true share {share}: {mismatch_alarms(rng, share, 10_000, 20_000):.4f}" for share in (0.5, 0.51, 0.52)]
    lines.append(example_report().model_dump_json(indent=1))
    print("\n".join(lines))  # noqa: T201 - this is what it is for


if __name__ == "__main__":
    _main()
