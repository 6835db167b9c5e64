"""`service.experiments.report`: what is said of given counts."""

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from scipy import stats

from service.experiments.config import Experiment
from service.experiments.exposures import VariantTally
from service.experiments.report import ExperimentReport, make_report

NOW = datetime(2026, 11, 22, tzinfo=UTC)
EXPERIMENT = Experiment.model_validate(
    {
        "name": "wide-beam",
        "traffic": [0.0, 0.5],
        "minimum_lift": 0.2,
        "variants": [{"name": "control", "control": True}, {"name": "wide", "overrides": {"beam_width": 50}}],
    }
)


def tally(clicks: np.ndarray, exposures: np.ndarray, **more: Any) -> VariantTally:
    """What is counted of users with these clicks and exposures."""
    return VariantTally(
        units=len(clicks),
        exposures=int(exposures.sum()),
        clicks=int(clicks.sum()),
        exposures_squared=int((exposures**2).sum()),
        clicks_squared=int((clicks**2).sum()),
        clicks_times_exposures=int((clicks * exposures).sum()),
        **{"latency_ms": {20.0: int(exposures.sum())}} | more,
    )


def once(good: int, users: int, **more: Any) -> VariantTally:
    """Users with one exposure each, `good` of which clicked, and bought."""
    clicks = np.array([1] * good + [0] * (users - good))
    return tally(clicks, np.ones(users, int), **{"conversions": good, "purchases": good} | more)


class Read(dict[str, Any]):
    """A JSON object whose fields are attributes."""

    __getattr__ = dict.__getitem__


def report(control: VariantTally, wide: VariantTally, experiment: Experiment = EXPERIMENT) -> Any:
    """As a client reads it."""
    made = make_report(experiment, {"control": control, "wide": wide}, NOW)
    return json.loads(made.model_dump_json(), object_hook=Read)


def wide_of(found: Any) -> Any:
    return found.variants[1]


def test_a_report_by_hand():
    """100 of 1,000 against 150 of 1,000: lift .5; log lift .405 with variance .9/99.9 + .85/149.85, so z = 3.44."""
    found = report(once(100, 1_000), once(150, 1_000))
    wide = wide_of(found)
    assert (wide.units, wide.exposures, wide.clicks, wide.conversions) == (1_000, 1_000, 150, 150)
    assert wide.ctr.value == 0.15
    lift = wide.ctr.lift
    assert lift.value == pytest.approx(0.5)
    standard_error = np.sqrt(0.9 / 99.9 + 0.85 / 149.85)
    assert lift.p_value == pytest.approx(2 * stats.norm.sf(np.log(1.5) / standard_error), rel=1e-6)
    assert lift.interval.low == pytest.approx(1.5 * np.exp(-1.959964 * standard_error) - 1, rel=1e-5)
    assert lift.interval.high == pytest.approx(1.5 * np.exp(1.959964 * standard_error) - 1, rel=1e-5)
    assert lift.detectable == pytest.approx(np.exp(2.801585 * standard_error) - 1, rel=1e-5)
    assert lift.always_valid_interval.low < lift.interval.low
    assert lift.p_value < lift.always_valid_p_value < 0.05
    assert found.variants[0].ctr.lift is None
    assert found.warnings == []
    assert (found.name, found.primary_metric, found.generated_at) == ("wide-beam", "ctr", "2026-11-22T00:00:00Z")


def test_conversion_is_of_users_and_has_wilson_s_interval():
    found = wide_of(report(once(100, 1_000), once(150, 1_000, conversions=30))).conversion
    expected = stats.binomtest(30, 1_000).proportion_ci(method="wilson")
    assert found.value == 0.03
    assert (found.interval.low, found.interval.high) == (expected.low, expected.high)
    assert found.lift.value == pytest.approx(-0.7)


def test_heavy_users_widen_the_interval():
    """The same 1,000 exposures and 100 clicks of 1,000 users, or of 100 with ten each, of whom ten always click."""
    spread_out = wide_of(report(once(100, 1_000), once(100, 1_000))).ctr
    clustered = tally(np.array([10] * 10 + [0] * 90), np.full(100, 10))
    heavy = wide_of(report(once(100, 1_000), clustered)).ctr
    assert spread_out.value == heavy.value == 0.1
    widths = [one.interval.high - one.interval.low for one in (spread_out, heavy)]
    assert widths[1] == pytest.approx(np.sqrt(10) * widths[0], rel=0.01)


def test_before_any_data_nothing_is_claimed():
    found = make_report(EXPERIMENT, {}, NOW)
    for variant in found.variants:
        assert variant.units == 0
        for measured in (variant.ctr, variant.conversion, variant.p95_latency_ms, variant.degraded_share):
            assert (measured.value, measured.interval) == (None, None)
    assert found.sample_ratio.p_value is None
    assert found.warnings == []
    assert ExperimentReport.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("few", [0, 1, 19])
def test_few_events_make_no_claim_about_a_lift(few):
    found = wide_of(report(once(few, 100), once(50, 100))).ctr.lift
    assert found.interval is found.p_value is found.always_valid_p_value is None
    assert (found.value is None) == (few == 0)


def test_everybody_converting_is_no_division_by_zero():
    found = wide_of(report(once(100, 100), once(100, 100))).conversion
    assert found.value == 1.0
    assert found.lift.value == 0.0
    assert found.lift.p_value is None


def test_uneven_users_are_called_off():
    found = report(once(100, 4_800), once(100, 5_200))
    assert found.sample_ratio.mismatch
    assert "sample ratio mismatch" in found.warnings[0]
    assert not report(once(100, 4_950), once(100, 5_050)).sample_ratio.mismatch


def test_weights_are_what_users_should_fall_by():
    variants = [{"name": "control", "control": True, "weight": 9}, {"name": "wide"}]
    uneven = Experiment.model_validate(EXPERIMENT.model_dump() | {"variants": variants})
    found = report(once(100, 9_000), once(20, 1_000), uneven)
    assert found.sample_ratio.p_value == 1.0


def test_users_in_two_variants_are_told():
    found = report(once(100, 1_000, crossed=2), once(100, 1_000, crossed=1))
    assert "3 exposures or outcomes were left out" in found.warnings[0]


def test_a_slower_and_a_more_often_degraded_variant_breaches_its_guardrails():
    slow = {20.0: 900, 80.0: 100}
    found = report(once(100, 1_000), once(100, 1_000, latency_ms=slow, degraded=40))
    wide = wide_of(found)
    assert (wide.p95_latency_ms.value, wide.p95_latency_ms.breached) == (80.0, True)
    assert (wide.degraded_share.value, wide.degraded_share.breached) == (0.04, True)
    assert [warning.split(" ")[4] for warning in found.warnings] == ["p95_latency_ms:", "degraded_share:"]
    control = found.variants[0]
    assert not control.p95_latency_ms.breached


def test_latencies_of_few_answers_have_an_open_interval_and_breach_nothing():
    few = once(10, 30, latency_ms={500.0: 30})
    found = wide_of(report(once(10, 30), few)).p95_latency_ms
    assert found.value == 500.0
    assert found.interval.high is None
    assert not found.breached
