"""The error rates that a report promises, on simulated users. Seeds are fixed; ranges hold 998 times in 1,000."""

import numpy as np
import pytest

from service.experiments import statistics
from service.experiments.assignment import Assigner
from service.experiments.config import Experiment, ExperimentsConfig, Layer, Variant
from service.experiments.statistics import RatioSums
from tests.service.experiments.simulation import (
    arm,
    binomial_range,
    coverage,
    log_lifts,
    mismatch_alarms,
    rejections,
    variance_of_log_lift,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_an_a_a_test_read_once_is_significant_as_often_as_promised(rng):
    (estimate,) = log_lifts(rng, rate=0.1, lift=0.0, experiments=1_000, users=1_000)
    low, high = binomial_range(0.05, 1_000)
    assert low <= np.mean(statistics.p_value(estimate) < 0.05) <= high


def test_intervals_of_the_lift_hold_the_true_one_as_often_as_promised(rng):
    (estimate,) = log_lifts(rng, rate=0.1, lift=0.2, experiments=1_000, users=1_000)
    bounds = statistics.interval(estimate)
    low, high = binomial_range(0.95, 1_000)
    assert low <= np.mean((bounds.low <= np.log(1.2)) & (np.log(1.2) <= bounds.high)) <= high


@pytest.mark.parametrize("minimum_lift", [0.1, 0.5])
def test_an_a_a_test_read_twenty_times_deceives_a_naive_p_value_but_not_the_always_valid_one(rng, minimum_lift):
    found = rejections(rng, rate=0.1, lift=0.0, experiments=600, users=500, looks=20, minimum_lift=minimum_lift)
    _, high = binomial_range(0.05, 600)
    assert found.at_the_end <= high
    assert found.at_any_look > 0.15
    assert found.always_valid <= 0.05


def test_the_always_valid_interval_holds_the_true_lift_at_all_of_twenty_looks(rng):
    scale, lift = np.log1p(0.3), 0.3
    held = np.ones(600, bool)
    for estimate in log_lifts(rng, rate=0.1, lift=lift, experiments=600, users=500, looks=20):
        bounds = statistics.always_valid_interval(estimate, scale)
        # where there are no clicks yet there is no interval, and nothing is claimed
        held &= ~((np.log1p(lift) < bounds.low) | (np.log1p(lift) > bounds.high))
    assert held.mean() >= 0.95


@pytest.mark.parametrize("lift", [0.1, 0.2, 0.3])
def test_a_true_lift_is_found_with_the_computed_power(rng, lift):
    (estimate,) = log_lifts(rng, rate=0.1, lift=lift, experiments=1_000, users=1_000)
    computed = float(statistics.power(np.log1p(lift), variance_of_log_lift(0.1, lift, 1_000)))
    low, high = binomial_range(computed, 1_000)
    assert low - 0.01 <= np.mean(statistics.p_value(estimate) < 0.05) <= high + 0.01


def test_the_always_valid_test_finds_a_true_lift_before_the_end(rng):
    found = rejections(rng, rate=0.1, lift=0.4, experiments=300, users=1_000, looks=20, minimum_lift=0.4)
    assert found.at_the_end > 0.95
    assert found.always_valid > 0.9


def test_the_variance_of_a_rate_is_the_one_between_users(rng):
    (counts,) = arm(rng, rate=0.1, experiments=2_000, users=1_000)
    estimate = statistics.ratio(counts.sums)
    assert np.mean(estimate.variance) == pytest.approx(np.var(estimate.value), rel=0.08)


def test_heavy_users_make_naive_intervals_too_narrow_and_ours_not(rng):
    found = coverage(rng, rate=0.1, experiments=1_500, users=1_000, spread=1.5)
    low, high = binomial_range(0.95, 1_500)
    assert low <= found.delta_method <= high
    assert found.naive < 0.92


def test_a_split_of_52_to_48_is_called_off_and_an_even_one_is_not(rng):
    assert mismatch_alarms(rng, 0.5, experiments=1_000, users=20_000) <= 0.005
    assert mismatch_alarms(rng, 0.52, experiments=1_000, users=20_000) > 0.97


def test_the_service_s_own_assignment_gives_the_promised_rate_on_one_population(rng):
    """The users and what they do stay; only the salt changes. No hash may favour some users with a variant."""
    (counts,) = arm(rng, rate=0.1, experiments=1, users=1_000)
    clicks, exposures = counts.clicks[0], counts.exposures[0]
    treated = np.array([_treated(salt, users=1_000) for salt in range(500)])
    estimate = statistics.log_lift(
        statistics.ratio(RatioSums.of(clicks * treated, exposures * treated)),
        statistics.ratio(RatioSums.of(clicks * ~treated, exposures * ~treated)),
    )
    low, high = binomial_range(0.05, 500)
    assert low <= np.mean(statistics.p_value(estimate) < 0.05) <= high


def _treated(salt: int, users: int) -> list[bool]:
    variants = (Variant(name="control", control=True), Variant(name="same"))
    experiment = Experiment(name="aa", salt=f"salt-{salt}", traffic=(0.0, 1.0), variants=variants)
    assigner = Assigner(ExperimentsConfig(layers=(Layer(name="only", experiments=(experiment,)),)))
    return [assigner.assign(f"user-{user}")[0].variant == "same" for user in range(users)]
