"""What lives as long as the application: made by `app`'s lifespan, read by `routes`."""

from dataclasses import dataclass

from redis.asyncio import Redis

from semantic_ids.bundle import Bundle
from service.admission import Admission
from service.deployments import Deployments
from service.engine.base import Engine
from service.histories import Histories
from service.metrics import Metrics
from service.security import ApiKeys


@dataclass(frozen=True)
class State:
    """The parts of a running service."""

    deployments: Deployments
    redis: Redis
    histories: Histories
    admission: Admission
    api_keys: ApiKeys
    metrics: Metrics

    @property
    def bundle(self) -> Bundle:
        """The one being served."""
        return self.deployments.current.bundle

    @property
    def engine(self) -> Engine:
        """The engine of the bundle being served."""
        return self.deployments.current.engine
