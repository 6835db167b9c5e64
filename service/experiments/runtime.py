"""Experiments in force: the configuration that is followed, who is in which variant of it, and what came of that.

The configuration is a YAML file (`SIDREC_EXPERIMENTS`), or, without one, what the admin API wrote into Redis. Either is
looked at every few seconds, so every replica follows. A new one must keep its promises to the users of the old one
(`ExperimentsConfig.check_follows`); one that does not, or is no configuration, is logged, and the old one stays.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, WatchError

from service.experiments.assignment import Assigner, Assignment
from service.experiments.config import ConfigProblem, Experiment, ExperimentsConfig, ExperimentsConfigError
from service.experiments.exposures import (
    Exposure,
    ExposureLog,
    ExposureSettings,
    ExposuresUnavailableError,
    Outcome,
    deployment_unit_key,
)
from service.experiments.report import ExperimentReport, make_report
from service.redis_keys import experiments_config_key

log = structlog.get_logger(__name__)

UNSUPPORTED = {
    "bundle": "a bundle beside the current one is not served yet",
    "rerank": "no bundle has a re-ranking model yet",
}


_Change: TypeAlias = Callable[[ExperimentsConfig], ExperimentsConfig]


class ExperimentsFileError(Exception):
    """The admin API was asked to change what a file decides."""


class UnknownExperimentError(LookupError):
    """There is no experiment of that name."""


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
    ) -> None:
        self._redis = redis
        self._path = path
        self._settings = settings
        self._on_dropped = on_dropped
        self._log: ExposureLog | None = None  # None until Redis has answered once: nobody is assigned before
        self._assigner = Assigner(ExperimentsConfig())
        self._refused = ""

    @property
    def config(self) -> ExperimentsConfig:
        """The one in force."""
        return self._assigner.config

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

    def assign(self, unit: str | None) -> tuple[Assignment, ...]:
        """The variants of a unit; nothing for an anonymous request."""
        return self._assigner.assign(unit) if self._log is not None else ()

    def exposed(self, exposure: Exposure) -> None:
        """Note an answer that a user got under experiments."""
        if self._log is not None:
            self._log.record_exposure(exposure)

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

    async def _open_log(self) -> ExposureLog:
        if self._log is None:
            unit_key = await deployment_unit_key(self._redis)
            log_ = ExposureLog(self._redis, unit_key, self._settings, self._on_dropped)
            await log_.start()
            self._log = log_
        return self._log

    async def _read(self) -> ExperimentsConfig:
        if self._path is not None:
            return _supported(await asyncio.to_thread(ExperimentsConfig.load, self._path))
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
                        after = _supported(change(before))
                        pipeline.multi()  # type: ignore[no-untyped-call]
                        pipeline.set(experiments_config_key(), after.model_dump_json())
                        await pipeline.execute()
                        break
                    except WatchError:  # another administrator was faster: change what is there now
                        continue
        self._adopt(after)

    def _adopt(self, config: ExperimentsConfig) -> None:
        self._assigner = Assigner(_supported(config))
        running = [one.name for layer in config.layers for one in layer.running()]
        log.info("experiments", running=running)


def _supported(config: ExperimentsConfig) -> ExperimentsConfig:
    """Refuse what would assign users to a variant that is none."""
    problems = [
        ConfigProblem(f"{layer.name}.{one.name}.{field}", why)
        for layer in config.layers
        for one in layer.experiments
        for field, why in UNSUPPORTED.items()
        if field in one.overridden_fields()
    ]
    if problems:
        raise ExperimentsConfigError("experiments", problems)
    return config


@contextmanager
def _typed_failure() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise ExposuresUnavailableError(f"Redis does not answer ({type(error).__name__})") from error
