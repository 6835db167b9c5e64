"""Experiments in force: the configuration that is followed, who is in which variant of it, and what came of that.

The configuration is a YAML file (`SIDREC_EXPERIMENTS`), or, without one, what the admin API wrote into Redis. Either is
looked at every few seconds, so every replica follows. A new one must keep its promises to the users of the old one
(`ExperimentsConfig.check_follows`); one that does not, or is no configuration, is logged, and the old one stays.

An experiment is in force only while every one of its variants can be had here: until then nobody is assigned to it, in
whatever variant, so that no variant is counted more often than it was dealt.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias, TypeVar

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, WatchError

from service.experiments.assignment import Assigner
from service.experiments.config import Experiment, ExperimentsConfig, ExperimentsConfigError
from service.experiments.exposures import (
    Exposure,
    ExposureLog,
    ExposureSettings,
    ExposuresUnavailableError,
    Outcome,
    deployment_unit_key,
)
from service.experiments.report import ExperimentReport, make_report
from service.experiments.treatment import UNTREATED, Treatment, leaves_open
from service.redis_keys import experiments_config_key
from service.schemas import ExperimentInfo, RecommendResponse, RerankResponse, UserRequest

log = structlog.get_logger(__name__)

A = TypeVar("A", RecommendResponse, RerankResponse)

_Change: TypeAlias = Callable[[ExperimentsConfig], ExperimentsConfig]


class ExperimentsFileError(Exception):
    """The admin API was asked to change what a file decides."""


class UnknownExperimentError(LookupError):
    """There is no experiment of that name."""


@dataclass(frozen=True)
class ServedBundles:
    """What this replica serves, so far as it matters to experiments."""

    current: str
    can_think: Mapping[str, bool]
    """By id, of every bundle that takes requests."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """By id: why a bundle that an experiment names does not."""


def unit_of(tenant: str, user_id: str) -> str:
    """Who is randomised: users of different tenants are different, whatever their ids."""
    return f"{tenant}/{user_id}"


class Experiments:
    """What the read path and the routes ask of experiments."""

    def __init__(
        self,
        redis: Redis,
        path: Path | None,
        settings: ExposureSettings | None = None,
        on_dropped: Callable[[int], None] | None = None,
        on_waiting: Callable[[Collection[str]], None] | None = None,
    ) -> None:
        """`on_dropped` hears how many exposures were lost, `on_waiting` which experiments are not in force."""
        self._redis = redis
        self._path = path
        self._settings = settings
        self._on_dropped = on_dropped
        self._on_waiting = on_waiting
        self._log: ExposureLog | None = None  # None until Redis has answered once: nobody is assigned before
        self._config = ExperimentsConfig()
        self._bundles: ServedBundles | None = None
        self._waiting: dict[str, str] = {}
        self._assigner = Assigner(self._config)
        self._refused = ""

    @property
    def config(self) -> ExperimentsConfig:
        """The one that is followed."""
        return self._config

    @property
    def waiting(self) -> Mapping[str, str]:
        """The running experiments that are not in force here, by name: what they wait for."""
        return self._waiting

    def bundles(self) -> frozenset[str]:
        """The bundles that running experiments name."""
        return frozenset().union(*(one.bundles() for layer in self._config.layers for one in layer.running()))

    def serve_from(self, bundles: ServedBundles) -> None:
        """These bundles take requests from now on; the next request is assigned accordingly."""
        self._bundles = bundles
        self._decide()

    async def start(self) -> None:
        """Read the configuration; `ExperimentsConfigError` if a file is none. Without Redis it starts all the same."""
        if self._path is not None:
            self._adopt(await asyncio.to_thread(ExperimentsConfig.load, self._path))
        await self.reload()

    async def stop(self) -> None:
        """Write what waits."""
        if self._log is not None:
            await self._log.stop()

    async def follow(self, every_s: float) -> None:
        """Adopt every new configuration."""
        while True:
            await asyncio.sleep(every_s)
            await self.reload()

    async def reload(self) -> None:
        """Adopt the configuration as it is now; what cannot be read or adopted is said once, and changes nothing."""
        try:
            await self._open_log()
            config = await self._read()
            if config != self.config:
                config.check_follows(self.config)
                self._adopt(config)
            self._refused = ""
        except (ExperimentsConfigError, ExposuresUnavailableError, RedisError, OSError) as error:
            if str(error) != self._refused:
                log.warning("experiments_unchanged", error=str(error))
            self._refused = str(error)

    async def put(self, layer: str, experiment: Experiment) -> None:
        """Add or change an experiment, here and on every replica."""
        await self._edit(lambda config: config.with_experiment(layer, experiment))

    async def remove(self, name: str) -> None:
        """Remove an experiment; what was counted of it stays until it expires."""
        await self._edit(lambda config: config.without(name))

    def treatment(self, request: UserRequest, tenant: str) -> Treatment:
        """The variants of the request's user; none for an anonymous request, nor for one that has a wish of its own."""
        if request.user_id is None or not leaves_open(request):
            return UNTREATED
        return self._treatment_of(request.user_id, tenant)

    def thinking_bundle(self, user_id: str, tenant: str) -> str | None:
        """Whose thought the user may get: the bundle of a variant that shows or follows thoughts, else None: that of
        whoever asks for one is the current one's.
        """
        overrides = self._treatment_of(user_id, tenant).overrides
        return overrides.bundle if overrides.thinks or overrides.rationale else None

    def exposed(self, answer: A, tenant: str, treatment: Treatment) -> A:
        """The answer with its experiment; its exposure is noted."""
        if self._log is None or not treatment.assignments or answer.user_id is None:
            return answer
        self._log.record_exposure(
            Exposure(
                answer.recommendation_id,
                unit_of(tenant, answer.user_id),
                treatment.assignments,
                time.time(),
                answer.timings_ms["total"],
                answer.degraded,
                len(answer.items),
            )
        )
        first = treatment.assignments[0]
        return answer.model_copy(update={"experiment": ExperimentInfo(name=first.experiment, variant=first.variant)})

    def outcome(self, recommendation_id: str | None, unit: str, event_type: str) -> None:
        """A new event of a user; it counts if it is a click or purchase that names a recommendation."""
        kind: Outcome | None = "click" if event_type == "click" else "purchase" if event_type == "purchase" else None
        if recommendation_id is not None and kind is not None and self._log is not None:
            self._log.record_outcome(recommendation_id, unit, kind)

    async def erase(self, unit: str) -> None:
        """Forget a unit in every experiment. `ExposuresUnavailableError`."""
        await (await self._open_log()).erase(unit)

    async def report(self, name: str) -> ExperimentReport:
        """What an experiment shows. `UnknownExperimentError`, `ExposuresUnavailableError`."""
        experiment = self.config.experiment(name)
        if experiment is None:
            raise UnknownExperimentError(f"there is no experiment {name!r}")
        tallies = await (await self._open_log()).tallies(name)
        return await asyncio.to_thread(make_report, experiment, tallies, datetime.fromtimestamp(time.time(), UTC))

    def _treatment_of(self, user_id: str, tenant: str) -> Treatment:
        return UNTREATED if self._log is None else Treatment(self._assigner.assign(unit_of(tenant, user_id)))

    async def _open_log(self) -> ExposureLog:
        if self._log is None:
            unit_key = await deployment_unit_key(self._redis)
            log_ = ExposureLog(self._redis, unit_key, self._settings, self._on_dropped)
            await log_.start()
            self._log = log_
        return self._log

    async def _read(self) -> ExperimentsConfig:
        if self._path is not None:
            return await asyncio.to_thread(ExperimentsConfig.load, self._path)
        stored = await self._redis.get(experiments_config_key())
        return ExperimentsConfig() if stored is None else ExperimentsConfig.parse(str(stored))

    async def _edit(self, change: _Change) -> None:
        if self._path is not None:
            raise ExperimentsFileError(f"experiments come from the file {self._path}: change it there")
        with _typed_failure():
            async with self._redis.pipeline(transaction=True) as pipeline:
                while True:
                    try:
                        await pipeline.watch(experiments_config_key())
                        stored = await pipeline.get(experiments_config_key())
                        before = ExperimentsConfig() if stored is None else ExperimentsConfig.parse(str(stored))
                        after = change(before)
                        pipeline.multi()  # type: ignore[no-untyped-call]
                        pipeline.set(experiments_config_key(), after.model_dump_json())
                        await pipeline.execute()
                        break
                    except WatchError:  # another administrator was faster: change what is there now
                        continue
        self._adopt(after)

    def _adopt(self, config: ExperimentsConfig) -> None:
        self._config = config
        log.info("experiments", running=[one.name for layer in config.layers for one in layer.running()])
        self._decide()

    def _decide(self) -> None:
        """Which experiments are in force, as configuration and bundles are now; what has changed is said."""
        if self._bundles is None:  # nobody asks yet
            return
        before, self._waiting = self._waiting, _waiting(self._config, self._bundles)
        self._assigner = Assigner(self._config, self._waiting)
        for name, reason in self._waiting.items():
            if before.get(name) != reason:
                log.warning("experiment_waits", experiment=name, waiting_for=reason)
        running = {one.name for layer in self._config.layers for one in layer.running()}
        for name in (before.keys() & running) - self._waiting.keys():
            log.info("experiment_in_force", experiment=name)
        if self._on_waiting is not None:
            self._on_waiting(self._waiting.keys())


def _waiting(config: ExperimentsConfig, bundles: ServedBundles) -> dict[str, str]:
    """What each running experiment that cannot be in force waits for, by name."""
    running = [(layer.name, one) for layer in config.layers for one in layer.running()]
    waiting: dict[str, str] = {}
    for _, one in running:
        if missing := sorted(one.bundles() - bundles.can_think.keys()):
            problem = bundles.problems.get(missing[0])
            waiting[one.name] = f"bundle {missing[0]} is not served here" + (f" ({problem})" if problem else " yet")
    served = [(layer_name, one) for layer_name, one in running if one.name not in waiting]
    for layer_name, one in served:
        # Whoever is in it may also be in an experiment of another layer, which chooses the bundle.
        elsewhere = [other.bundles() for other_layer, other in served if other_layer != layer_name]
        unless_named = frozenset({bundles.current}).union(*elsewhere)
        thinking = [variant.overrides for variant in one.variants if variant.overrides.thinks]
        answering = (unless_named if each.bundle is None else {each.bundle} for each in thinking)
        if unable := sorted(
            bundle_id for bundle_id in frozenset().union(*answering) if not bundles.can_think[bundle_id]
        ):
            waiting[one.name] = (
                f"a variant of it thinks, and bundle {unable[0]}, which would answer, has no reasoning model"
            )
    return waiting


@contextmanager
def _typed_failure() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise ExposuresUnavailableError(f"Redis does not answer ({type(error).__name__})") from error
