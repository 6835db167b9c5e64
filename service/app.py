"""The composition root: settings in, a running application out. Nothing else decides what is wired to what."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from typing import Any, TypeAlias

import structlog
from fastapi import FastAPI

from semantic_ids.bundle import Bundle, current_id
from service import errors, routes
from service.admission import Admission
from service.deployments import Deployments
from service.engine.base import Engine
from service.histories import Histories, connect
from service.metrics import Metrics
from service.middleware import Instrumented
from service.recommender import Recommender, ThinkingLimits
from service.redis_server import EmbeddedRedis, check_durability
from service.security import ApiKeys
from service.settings import Settings
from service.state import State

log = structlog.get_logger(__name__)

EngineFactory: TypeAlias = Callable[[Bundle, Settings, Metrics], Engine]


def make_engine(bundle: Bundle, settings: Settings, metrics: Metrics) -> Engine:
    """The engine that the settings name. Imported here, so that the rest of the service needs no torch."""
    if settings.engine == "vllm" or (settings.engine == "auto" and find_spec("vllm") is not None):
        from service.engine.vllm_engine import VllmEngine, VllmEngineConfig

        return VllmEngine(
            bundle,
            VllmEngineConfig(
                replicas=settings.vllm_replicas,
                max_batch=settings.max_batch,
                dtype=settings.dtype,
                kv_cache_gib=settings.vllm_kv_cache_gib,
                threads=settings.decode_threads,
                engine_args=settings.vllm_args,
            ),
            metrics,
        )
    from service.engine.local import LocalEngine, LocalEngineConfig

    return LocalEngine(bundle, LocalEngineConfig(settings.decode_threads, settings.max_batch, settings.dtype), metrics)


def create_app(
    settings: Settings,
    *,
    engine_factory: EngineFactory = make_engine,
) -> FastAPI:
    """The application; its lifespan loads the bundle, joins or starts Redis, and warms the engine up."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                state = await _start(settings, metrics, engine_factory, stack)
            except Exception as error:
                app.state.startup_error = error
                raise
            app.state.sidrec = state
            log.info("ready", bundle=state.bundle.bundle_id, engine=state.engine.name, items=len(state.bundle.catalog))
            yield
            log.info("stopping")

    app = FastAPI(
        title="sidrec",
        version=routes.service_version(),
        summary="Generative recommendation with Semantic IDs",
        lifespan=lifespan,
        docs_url="/docs",
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.startup_error = None
    errors.install(app)
    app.include_router(routes.api)
    app.include_router(routes.admin)
    app.include_router(routes.operations)
    app.add_middleware(Instrumented, metrics=metrics)
    return app


async def _start(settings: Settings, metrics: Metrics, engine_factory: EngineFactory, stack: AsyncExitStack) -> State:
    """Start every part, its stop on the stack: what started is stopped, in reverse, even if a later one fails."""
    await asyncio.to_thread(current_id, settings.bundles)  # nothing published is said before Redis is started
    redis_url = settings.redis_url or await _start_embedded_redis(settings, stack)
    redis = connect(redis_url, timeout_s=settings.redis_timeout_s, max_connections=settings.redis_max_connections)
    stack.push_async_callback(redis.aclose)
    if settings.redis_url is not None and (warning := await check_durability(redis)) is not None:
        log.warning("redis_durability", detail=warning)
    histories = Histories(redis, max_stored=settings.history_max_stored, ttl_s=settings.history_ttl_s)
    limits = ThinkingLimits(settings.think_max_tokens, settings.think_max_seconds)
    deployments = Deployments(
        settings.bundles,
        lambda bundle: engine_factory(bundle, settings, metrics),
        lambda bundle, engine: Recommender(bundle, engine, histories, metrics, settings.beam_width, limits),
        metrics,
    )
    stack.push_async_callback(deployments.stop)
    await deployments.start()
    _run_in_background(deployments.follow(settings.follow_bundles_s), "follow-bundles", stack)
    return State(
        deployments=deployments,
        redis=redis,
        histories=histories,
        admission=Admission(settings.max_in_flight, metrics),
        api_keys=ApiKeys(settings.api_key_hashes, settings.admin_key_hashes),
        metrics=metrics,
    )


async def _start_embedded_redis(settings: Settings, stack: AsyncExitStack) -> str:
    server = EmbeddedRedis(settings.data_dir)
    url = await server.start()
    stack.push_async_callback(server.stop)
    _run_in_background(server.supervise(), "embedded-redis", stack)
    return url


def _run_in_background(work: Coroutine[Any, Any, None], name: str, stack: AsyncExitStack) -> None:
    """Run `work` until the application stops."""
    task = asyncio.create_task(work, name=name)

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)
