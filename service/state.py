"""What lives as long as the application: made by `app`'s lifespan, read by `routes`."""

from dataclasses import dataclass

from redis.asyncio import Redis

from semantic_ids.bundle import Bundle
from service.admission import Admission
from service.engine.base import Engine
from service.histories import Histories
from service.metrics import Metrics
from service.recommender import Recommender
from service.security import ApiKeys


@dataclass(frozen=True)
class State:
    """The parts of a running service."""

    bundle: Bundle
    engine: Engine
    redis: Redis
    histories: Histories
    recommender: Recommender
    admission: Admission
    api_keys: ApiKeys
    metrics: Metrics
