"""What an experiment shows, from its configuration and its counts: the body of `/experiments/{name}/report`.

Read the warnings first. Where the sample ratio is off, something other than chance decided who was counted, and no
lift of the report can be believed.
"""

from collections.abc import Mapping
from datetime import datetime
from math import isfinite, log1p
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, Field

from service.experiments import statistics
from service.experiments.config import Experiment, Metric, Variant
from service.experiments.exposures import VariantTally
from service.experiments.statistics import Bounds, Estimate, Numbers, RatioSums

MIN_EVENTS = 20
"""Of each arm, before a lift gets intervals and p-values: the normal approximation of a log rate needs some events."""
SAMPLE_RATIO_ALARM = 0.001
"""Kohavi, Tang, Xu: Trustworthy Online Controlled Experiments (2020), ch. 21."""


class Interval(BaseModel):
    """Ends of an interval; null is open."""

    low: float | None
    high: float | None


class Measured(BaseModel):
    """A number and its 95 % interval; null where there is no data."""

    value: float | None
    interval: Interval | None


class Lift(BaseModel):
    """variant / control - 1. Without intervals and p-values until both have enough events."""

    value: float | None
    interval: Interval | None = Field(None, description="95 %, right if read once, when the planned data are in")
    p_value: float | None = Field(None, description="of that reading; two-sided")
    always_valid_interval: Interval | None = Field(None, description="95 %, right at every look")
    always_valid_p_value: float | None = Field(None, description="may be acted on at any time")
    detectable: float | None = Field(None, description="the lift that these data find with 80 % power, if read once")


class Rate(Measured):
    """A metric of one variant; `lift` is null for the control."""

    lift: Lift | None


class Guardrail(Measured):
    """A number that must not get worse; `breached` if its interval lies above the control's."""

    breached: bool


class VariantReport(BaseModel):
    """One arm. A unit is a user."""

    name: str
    control: bool
    units: int
    exposures: int
    clicks: int
    conversions: int = Field(description="units with a purchase")
    ctr: Rate = Field(description="clicks per exposure; intervals by the delta method, clustered by unit")
    conversion: Rate = Field(description="conversions per unit; Wilson's interval")
    p95_latency_ms: Guardrail
    degraded_share: Guardrail


class SampleRatio(BaseModel):
    """Whether units fell into the variants by the weights."""

    p_value: float | None
    mismatch: bool


class ExperimentReport(BaseModel):
    """What an experiment shows so far."""

    name: str
    status: Literal["running", "stopped"]
    primary_metric: Metric
    minimum_lift: float
    started_at: AwareDatetime | None
    generated_at: AwareDatetime
    variants: list[VariantReport]
    sample_ratio: SampleRatio
    warnings: list[str]


def make_report(
    experiment: Experiment, tallies: Mapping[str, VariantTally], generated_at: datetime
) -> ExperimentReport:
    """The report of `experiment` from what was counted of its variants; a variant without a tally has no units yet."""
    found = {variant.name: tallies.get(variant.name, VariantTally()) for variant in experiment.variants}
    control = found[experiment.control.name]
    variants = [_variant_report(variant, found[variant.name], control, experiment) for variant in experiment.variants]
    sample_ratio = _sample_ratio(experiment, found)
    return ExperimentReport(
        name=experiment.name,
        status=experiment.status,
        primary_metric=experiment.primary_metric,
        minimum_lift=experiment.minimum_lift,
        started_at=experiment.started_at,
        generated_at=generated_at,
        variants=variants,
        sample_ratio=sample_ratio,
        warnings=_warnings(sample_ratio, variants, found),
    )


def _variant_report(
    variant: Variant, tally: VariantTally, control: VariantTally, experiment: Experiment
) -> VariantReport:
    latency, control_latency = _p95(tally), _p95(control)
    degraded, control_degraded = _degraded(tally), _degraded(control)
    ctr, conversion = statistics.ratio(_click_sums(tally)), statistics.ratio(_conversion_sums(tally))
    ctr_lift = conversion_lift = None
    if not variant.control:
        scale = log1p(experiment.minimum_lift)
        enough = min(tally.clicks, control.clicks) >= MIN_EVENTS
        ctr_lift = _lift(ctr, statistics.ratio(_click_sums(control)), scale, enough)
        enough = min(tally.conversions, control.conversions) >= MIN_EVENTS
        conversion_lift = _lift(conversion, statistics.ratio(_conversion_sums(control)), scale, enough)
    return VariantReport(
        name=variant.name,
        control=variant.control,
        units=tally.units,
        exposures=tally.exposures,
        clicks=tally.clicks,
        conversions=tally.conversions,
        ctr=Rate(value=_number(ctr.value), interval=_rate_interval(ctr), lift=ctr_lift),
        conversion=Rate(**_share(tally.conversions, tally.units).model_dump(), lift=conversion_lift),
        p95_latency_ms=Guardrail(**latency.model_dump(), breached=_lies_above(latency, control_latency)),
        degraded_share=Guardrail(**degraded.model_dump(), breached=_lies_above(degraded, control_degraded)),
    )


def _click_sums(tally: VariantTally) -> RatioSums:
    return RatioSums(
        *map(
            np.float64,
            (
                tally.units,
                tally.clicks,
                tally.exposures,
                tally.clicks_squared,
                tally.exposures_squared,
                tally.clicks_times_exposures,
            ),
        )
    )


def _conversion_sums(tally: VariantTally) -> RatioSums:
    """Of 0 or 1 by unit: squares are the numbers themselves."""
    converted, units = np.float64(tally.conversions), np.float64(tally.units)
    return RatioSums(units, converted, units, converted, units, converted)


def _lift(rate: Estimate, control: Estimate, scale: float, enough: bool) -> Lift:
    log_lift = statistics.log_lift(rate, control)
    if not enough or not (isfinite(log_lift.variance) and log_lift.variance > 0):
        return Lift(value=_lift_number(log_lift.value))
    return Lift(
        value=_lift_number(log_lift.value),
        interval=_lift_interval(statistics.interval(log_lift)),
        p_value=_number(statistics.p_value(log_lift)),
        always_valid_interval=_lift_interval(statistics.always_valid_interval(log_lift, scale)),
        always_valid_p_value=_number(statistics.always_valid_p_value(log_lift, scale)),
        detectable=_lift_number(statistics.detectable(log_lift.variance)),
    )


def _p95(tally: VariantTally) -> Measured:
    if not tally.latency_ms:
        return Measured(value=None, interval=None)
    values, counts = sorted(tally.latency_ms), [count for _, count in sorted(tally.latency_ms.items())]
    p95, bounds = statistics.quantile_bounds(np.asarray(values, np.float64), np.asarray(counts, np.int64), 0.95)
    return Measured(value=p95, interval=_interval(bounds))


def _degraded(tally: VariantTally) -> Measured:
    return _share(tally.degraded, sum(tally.latency_ms.values()))


def _share(successes: int, trials: int) -> Measured:
    if trials == 0:
        return Measured(value=None, interval=None)
    return Measured(value=successes / trials, interval=_interval(statistics.wilson(successes, trials)))


def _lies_above(one: Measured, other: Measured) -> bool:
    if one.interval is None or other.interval is None or one.interval.low is None or other.interval.high is None:
        return False
    return one.interval.low > other.interval.high


def _sample_ratio(experiment: Experiment, found: Mapping[str, VariantTally]) -> SampleRatio:
    units = [found[variant.name].units for variant in experiment.variants]
    if sum(units) == 0:
        return SampleRatio(p_value=None, mismatch=False)
    p_value = statistics.sample_ratio_p_value(units, [variant.weight for variant in experiment.variants])
    return SampleRatio(p_value=p_value, mismatch=p_value < SAMPLE_RATIO_ALARM)


def _warnings(sample_ratio: SampleRatio, variants: list[VariantReport], found: Mapping[str, VariantTally]) -> list[str]:
    warnings = []
    if sample_ratio.mismatch:
        warnings.append(
            f"sample ratio mismatch (p = {sample_ratio.p_value:.2g}): users are not in the variants by their weights, "
            "so the variants do not compare; find the cause before reading any lift"
        )
    crossed = sum(tally.crossed for tally in found.values())
    if crossed:
        warnings.append(
            f"{crossed} exposures or outcomes were left out because their user was in another variant before: salt, "
            "layer or variants changed under this name"
        )
    for variant in variants:
        warnings += [
            f"{variant.name!r} breaches the guardrail {name}: its interval lies above the control's"
            for name in ("p95_latency_ms", "degraded_share")
            if getattr(variant, name).breached
        ]
    return warnings


def _rate_interval(rate: Estimate) -> Interval | None:
    """Of a rate, so never below 0."""
    if not isfinite(rate.variance):
        return None
    bounds = statistics.interval(rate)
    return _interval(Bounds(max(0.0, float(bounds.low)), bounds.high))


def _lift_interval(bounds: Bounds) -> Interval:
    return Interval(low=_lift_number(bounds.low), high=_lift_number(bounds.high))


def _interval(bounds: Bounds) -> Interval:
    return Interval(low=_number(bounds.low), high=_number(bounds.high))


def _lift_number(log_lift: Numbers) -> float | None:
    with np.errstate(over="ignore"):
        return _number(np.expm1(log_lift))


def _number(number: Numbers) -> float | None:
    """JSON has neither infinities nor NaN."""
    return float(number) if isfinite(number) else None
