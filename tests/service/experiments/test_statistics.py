"""`service.experiments.statistics` against numbers derived by hand, and against scipy's own ways."""

from math import exp, log, sqrt
from typing import Any

import numpy as np
import pytest
from scipy import stats

from service.experiments import statistics
from service.experiments.statistics import Bounds, Estimate, RatioSums


def test_a_ratio_and_its_variance_by_hand():
    """Clicks 1, 0, 3 of exposures 2, 2, 4: rate 4/8 = .5; residuals 0, -1, 1; variance 2 / 8² · 3/2 = 3/64."""
    found = statistics.ratio(RatioSums.of(np.array([1, 0, 3]), np.array([2, 2, 4])))
    assert found.value == 0.5
    assert found.variance == pytest.approx(3 / 64)


def test_one_exposure_a_unit_has_the_binomial_variance():
    """p(1 - p) / (k - 1): 3 of 10 gives .21 / 9."""
    found = statistics.ratio(RatioSums.of(np.array([1] * 3 + [0] * 7), np.ones(10)))
    assert found.variance == pytest.approx(0.21 / 9)


def test_a_unit_without_exposure_is_none():
    with_absent = statistics.ratio(RatioSums.of(np.array([1, 0, 3, 0]), np.array([2, 2, 4, 0])))
    assert with_absent.variance == pytest.approx(3 / 64)


def test_nothing_is_not_a_number():
    found = statistics.ratio(RatioSums.of(np.zeros(0), np.zeros(0)))
    assert np.isnan(found.value)
    assert np.isnan(found.variance)


def test_a_log_lift_by_hand():
    """.3 against .2, each with standard error .02: log 1.5, and (.02/.3)² + (.02/.2)²."""
    found = statistics.log_lift(Estimate(0.3, 0.0004), Estimate(0.2, 0.0004))
    assert found.value == pytest.approx(log(1.5))
    assert found.variance == pytest.approx(0.04 / 9 + 0.01)


def test_the_log_lift_of_shares_is_katz_s():
    """scipy's relative risk has Katz's interval; ours differs by k / (k - 1) of each arm."""
    treated, control = (np.array([1] * good + [0] * bad) for good, bad in ((60, 1940), (40, 1960)))
    rates = [statistics.ratio(RatioSums.of(one, np.ones_like(one))) for one in (treated, control)]
    bounds = statistics.interval(statistics.log_lift(rates[0], rates[1]))
    katz = stats.contingency.relative_risk(60, 2_000, 40, 2_000).confidence_interval(0.95)
    assert (exp(bounds.low), exp(bounds.high)) == pytest.approx((katz.low, katz.high), rel=1e-3)


def test_an_estimate_of_1_96_standard_errors_is_just_significant():
    estimate = Estimate(1.959964 * 0.3, 0.09)
    assert statistics.p_value(estimate) == pytest.approx(0.05, abs=1e-6)
    assert statistics.interval(estimate).low == pytest.approx(0.0, abs=1e-6)


def test_the_always_valid_p_value_by_hand():
    """Variance 1, scale 1: likelihood ratio exp(z²/4) / √2. At z = 4: exp(4) / √2."""
    assert statistics.always_valid_p_value(Estimate(4.0, 1.0), 1.0) == pytest.approx(sqrt(2) / exp(4))
    assert statistics.always_valid_p_value(Estimate(1.0, 1.0), 1.0) == 1.0


@pytest.mark.parametrize("variance", [1e-4, 0.01, 3.0])
@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0])
def test_the_always_valid_interval_holds_just_what_the_p_value_does_not_reject(variance, scale):
    bounds = statistics.always_valid_interval(Estimate(0.5, variance), scale)
    for end in (bounds.low, bounds.high):
        assert statistics.always_valid_p_value(Estimate(0.5 - end, variance), scale) == pytest.approx(0.05)
    assert bounds.low < statistics.interval(Estimate(0.5, variance)).low


def test_power_at_the_detectable_lift_is_what_was_wanted():
    assert statistics.power(float(statistics.detectable(0.01)), 0.01) == pytest.approx(0.8, abs=1e-5)
    assert statistics.power(0.0, 0.01) == pytest.approx(0.05)


def test_wilson_by_hand():
    """0 of n: from 0 to z² / (n + z²)."""
    z_squared = stats.norm.isf(0.025) ** 2
    found = statistics.wilson(0, 10)
    assert found.low == pytest.approx(0.0, abs=1e-12)
    assert found.high == pytest.approx(z_squared / (10 + z_squared))


def test_the_sample_ratio_by_hand():
    """520 and 480 of 1,000 planned as halves: chi-square 2 · 20²/500 = 1.6."""
    assert statistics.sample_ratio_p_value([520, 480], [1, 1]) == pytest.approx(stats.chi2.sf(1.6, 1))
    assert statistics.sample_ratio_p_value([900, 100], [9, 1]) == 1.0


@pytest.mark.parametrize("number", [100, 1_000, 5_001])
def test_a_histogram_s_quantile_and_bounds_are_the_sample_s(number: int):
    sample = np.random.default_rng(0).permutation(number).astype(np.float64)
    value, bounds = statistics.quantile_bounds(np.arange(number, dtype=np.float64), np.ones(number, np.int64), 0.95)
    assert value == np.quantile(sample, 0.95, method="inverted_cdf")
    expected: Any = stats.quantile_test(sample, q=0, p=0.95).confidence_interval(0.95)
    # both are distribution-free, and may differ by an order statistic
    in_order = np.concatenate([np.sort(sample), [np.inf]])
    for ours, scipys in ((bounds.low, expected.low), (bounds.high, expected.high)):
        assert ours in in_order[np.abs(np.arange(number + 1) - np.searchsorted(in_order, scipys)) <= 2]


def test_bounds_of_a_quantile_that_the_sample_is_too_small_for_are_open():
    """All of 20 lie below the 95th percentile with probability .95²⁰ = .36."""
    _, bounds = statistics.quantile_bounds(np.arange(20, dtype=np.float64), np.ones(20, np.int64), 0.95)
    assert bounds == Bounds(16.0, np.inf)


def test_bounds_of_a_quantile_hold_it_as_often_as_promised():
    rng = np.random.default_rng(0)
    true = stats.expon.ppf(0.95)
    held = 0
    for _ in range(1_000):
        sample = np.sort(rng.exponential(1.0, (300,)))
        _, bounds = statistics.quantile_bounds(sample, np.ones(300, np.int64), 0.95)
        held += bool(bounds.low <= true <= bounds.high)
    assert held >= stats.binom.ppf(0.001, 1_000, 0.95)
