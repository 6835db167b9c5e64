"""What lives as long as the application: made by `app`'s lifespan, read by `routes`."""

from dataclasses import dataclass

from redis.asyncio import Redis
from starlette.requests import HTTPConnection

from semantic_ids.bundle import Bundle
from service.admission import Admission
from service.deployments import Deployments
from service.engine.base import Engine
from service.experiments.runtime import Experiments
from service.histories import Histories
from service.items import Items
from service.live_catalog import LiveCatalog
from service.metrics import Metrics
from service.rate_limits import RateLimits
from service.security import ApiKeys
from service.served_log import ServedLog


@dataclass(frozen=True)
class State:
    """The parts of a running service."""

    deployments: Deployments
    live: LiveCatalog
    items: Items
    redis: Redis
    histories: Histories
    experiments: Experiments
    served: ServedLog
    admission: Admission
    api_keys: ApiKeys
    rate_limits: RateLimits
    metrics: Metrics

    @property
    def bundle(self) -> Bundle:
        """The one being served."""
        return self.deployments.current.bundle

    @property
    def engine(self) -> Engine:
        """The engine of the bundle being served."""
        return self.deployments.current.engine


def state_of(request: HTTPConnection) -> State:
    """The application's, there from start-up on. No dependency of FastAPI's: one costs 50 µs a request."""
    state: State = request.app.state.sidrec
    return state
