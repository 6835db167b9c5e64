"""The composition root: settings in, a running application out. Nothing else decides what is wired to what."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog
from fastapi import FastAPI
from redis.asyncio import Redis

from semantic_ids.bundle import Bundle, current_id
from service import console_routes, errors, experiment_routes, item_routes, openapi, routes
from service.admission import Admission, EarlyGate
from service.background import ended
from service.breaker import Breaker, GuardedHistories
from service.deployments import Deployments
from service.engine.base import Engine
from service.experiments.runtime import Experiments
from service.fallback import AnswerCache
from service.histories import connect
from service.item_store import ItemStore, ItemStoreError
from service.items import Items
from service.last_known import LastKnown
from service.live_catalog import LiveCatalog
from service.memory import collect_new, collections_told, keep_giving_back
from service.merged_catalogs import MergedCatalogs
from service.metrics import Metrics
from service.middleware import Instrumented
from service.paths import EncodedPaths
from service.rate_limits import RateLimits
from service.recommender import Recommender, ThinkingLimits
from service.redis_server import EmbeddedRedis, check_durability
from service.request_limits import RequestLimits
from service.security import ApiKeys
from service.served_log import ServedLog, ServedLogSettings
from service.settings import Settings
from service.state import State
from service.thoughts import Thoughts
from service.tracing import Traced
from service.turns import Turns

if TYPE_CHECKING:
    from service.think_ahead import ThinkAhead

log = structlog.get_logger(__name__)

EngineFactory: TypeAlias = Callable[[Bundle, Settings, Metrics], Engine]


def make_engine(bundle: Bundle, settings: Settings, metrics: Metrics) -> Engine:
    """The engine that the settings name. Imported here, so that the rest of the service needs no torch."""
    is_for_vllm = find_spec("vllm") is not None and not bundle.renderer.fed_back
    if settings.engine == "vllm" or (settings.engine == "auto" and is_for_vllm):
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

    return LocalEngine(
        bundle,
        LocalEngineConfig(
            threads=settings.decode_threads,
            max_batch=settings.max_batch,
            dtype=settings.dtype,
            prompt_cache_mb=settings.prompt_cache_mb,
        ),
        metrics,
    )


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
    app.include_router(routes.engine)
    app.include_router(routes.api)
    app.include_router(routes.admin)
    app.include_router(item_routes.router)
    app.include_router(experiment_routes.router)
    app.include_router(routes.operations)
    app.include_router(console_routes.router)
    openapi.install(app)
    app.add_middleware(RequestLimits, max_body_bytes=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s)
    app.add_middleware(EarlyGate)
    app.add_middleware(Instrumented, metrics=metrics, logs_requests=settings.request_log)
    app.add_middleware(Traced)
    app.add_middleware(EncodedPaths)
    return app


async def _start(settings: Settings, metrics: Metrics, engine_factory: EngineFactory, stack: AsyncExitStack) -> State:
    """Start every part, its stop on the stack: what started is stopped, in reverse, even if a later one fails."""
    await asyncio.to_thread(current_id, settings.bundles)  # nothing published is said before Redis is started
    redis_url = settings.redis_url or await _start_embedded_redis(settings, stack)
    redis = connect(redis_url, timeout_s=settings.redis_timeout_s, max_connections=settings.redis_max_connections)
    stack.push_async_callback(redis.aclose)
    if settings.redis_url is not None and (warning := await check_durability(redis)) is not None:
        log.warning("redis_durability", detail=warning)
    histories = GuardedHistories(
        Breaker("redis", metrics, threshold=settings.redis_breaker_failures, open_s=settings.redis_breaker_open_s),
        redis,
        max_stored=settings.history_max_stored,
        ttl_s=settings.history_ttl_s,
        last_known=LastKnown(settings.answer_cache_size, settings.answer_cache_ttl_s),
    )
    answers = AnswerCache(settings.answer_cache_size, settings.answer_cache_ttl_s)
    experiments = Experiments(
        redis, settings.experiments, on_dropped=metrics.exposures_dropped.inc, on_waiting=metrics.experiments_wait
    )
    stack.push_async_callback(experiments.stop)
    await experiments.start()
    _run_in_background(experiments.follow(settings.follow_experiments_s), "follow-experiments", stack)
    kept = ServedLogSettings(settings.served_log_length, settings.served_log_days * 86_400)
    served = ServedLog(redis, kept, on_dropped=metrics.served_log_dropped.inc)
    stack.push_async_callback(served.stop)
    await served.start()
    limits = ThinkingLimits(settings.think_max_tokens, settings.think_max_seconds)
    ahead = _think_ahead(settings, redis, metrics, stack) if settings.think_ahead else None
    thoughts = Thoughts(redis, metrics, ttl_s=settings.thought_cache_ttl_s, ahead=ahead)
    stack.push_async_callback(thoughts.stop)
    merged = MergedCatalogs(settings.catalog_cache)
    stack.push_async_callback(merged.stop)
    live = LiveCatalog(ItemStore(redis, timeout_s=settings.redis_timeout_s), metrics, merged)
    with suppress(ItemStoreError):  # not ready then, and read as soon as Redis answers
        await live.load()
    turns = Turns()
    deployments = Deployments(
        settings.bundles,
        lambda bundle: engine_factory(bundle, settings, metrics),
        lambda bundle, engine: Recommender(
            bundle,
            engine,
            histories,
            metrics,
            settings.beam_width,
            limits,
            deleted_since=live.deleted_since,
            experiments=experiments,
            answers=answers,
            served=served,
            thoughts=thoughts,
            turns=turns,
            breaker=Breaker(
                "engine",
                metrics,
                threshold=settings.breaker_failures,
                open_s=settings.breaker_open_s,
                bundle_id=bundle.bundle_id,
            ),
        ),
        metrics,
        live,
        wanted=experiments.bundles,
        on_change=experiments.serve_from,
    )
    stack.push_async_callback(deployments.stop)
    await deployments.start()
    _run_in_background(live.follow(), "follow-items", stack)
    items = Items(live, deployments)
    items.start()
    stack.push_async_callback(items.stop)
    _run_in_background(deployments.follow(settings.follow_bundles_s), "follow-bundles", stack)
    _run_in_background(deployments.follow_wanted(settings.follow_experiments_s), "follow-wanted-bundles", stack)
    admission = Admission(settings.max_in_flight, metrics)
    stack.enter_context(collections_told(metrics.gc_pauses.add))
    _run_in_background(admission.watch(turns, when_idle=collect_new), "admission", stack)
    _run_in_background(keep_giving_back(), "memory", stack)
    return State(
        deployments=deployments,
        live=live,
        items=items,
        redis=redis,
        histories=histories,
        experiments=experiments,
        served=served,
        admission=admission,
        api_keys=ApiKeys(settings.api_key_hashes, settings.admin_key_hashes),
        rate_limits=RateLimits(redis, metrics, per_s=settings.rate_limit_per_s, burst=settings.rate_limit_burst),
        metrics=metrics,
    )


def _think_ahead(settings: Settings, redis: Redis, metrics: Metrics, stack: AsyncExitStack) -> "ThinkAhead":
    """Asks Celery's workers for thoughts. Imported here: without it the service needs no Celery."""
    from service.celery_app import make_celery
    from service.think_ahead import ThinkAhead, sender

    celery = make_celery(settings)
    stack.callback(celery.close)
    ahead = ThinkAhead(redis, sender(celery), metrics)
    _run_in_background(ahead.run(), "think-ahead", stack)
    return ahead


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
        await ended(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background_task_failed", task=task.get_name(), exc_info=error)

    stack.push_async_callback(end)
