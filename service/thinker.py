"""What the `think` queue's worker does: a user's thought, thought before it is asked for, with the service's own parts.

A task names the bundle that is to answer: the current one, or an experiment's. Its engine is made at its first task,
and two at most stay, the one used last among them. Histories, prompt, engine, cache and the present epoch of the
catalogue are those of the read path, so that the next request finds its thought.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import structlog
from redis.asyncio import Redis

from semantic_ids.bundle import BUNDLE_ID, Bundle
from semantic_ids.filters import ItemFilter
from service.engine.base import DecodeRequest, Engine, Think, sid_program
from service.histories import Histories, connect
from service.item_store import ItemStore
from service.live_catalog import LiveCatalog
from service.merged_catalogs import MergedCatalogs
from service.metrics import Metrics
from service.redis_server import EmbeddedRedis
from service.schemas import RecommendRequest
from service.settings import Settings
from service.think_ahead import forget_asked
from service.thoughts import ThoughtQuestion, Thoughts
from service.user_context import UserContexts

log = structlog.get_logger(__name__)

MAX_SECONDS = 300.0
"""Longest thought when nobody waits: well within the time of a task."""
_LOAD_TIMEOUT_S = 10.0
_MAX_ENGINES = 2
"""Of the current bundle and one beside it; a third takes the place of the one that was used longest ago."""

Outcome: TypeAlias = Literal["thought", "known", "cannot_think", "no_history", "history_unavailable", "not_kept"]


@dataclass
class _Loaded:
    """A bundle as published, at an epoch, and its engine."""

    base: Bundle
    at_epoch: Bundle
    engine: Engine


class Thinker:
    """Thinks for one user after the other, on an event loop of its own."""

    def __init__(self, settings: Settings, make_engine: Callable[[Bundle, Settings, Metrics], Engine]) -> None:
        self._settings = settings
        self._make_engine = make_engine
        self._metrics = Metrics()
        self._runner = asyncio.Runner()
        self._redis: Redis | None = None
        self._embedded: EmbeddedRedis | None = None
        self._merged = MergedCatalogs(settings.catalog_cache)
        self._live: LiveCatalog | None = None
        self._loaded: dict[str, _Loaded] = {}  # by bundle, the one used last at the end

    def think(self, tenant: str, user_id: str, bundle_id: str) -> Outcome:
        """Think for a user with a bundle's model, unless the thought is there; what came of it.

        `ValueError` if it is no bundle's id, `BundleError` if there is none of that id.
        """
        if not re.fullmatch(BUNDLE_ID, bundle_id):
            raise ValueError(f"{bundle_id!r} is not a bundle id: give the name of a folder in {self._settings.bundles}")
        return self._runner.run(self._think(tenant, user_id, bundle_id))

    def close(self) -> None:
        """Stop the engines and leave Redis."""
        self._runner.run(self._close())
        self._runner.close()

    async def _think(self, tenant: str, user_id: str, bundle_id: str) -> Outcome:
        redis = self._redis = self._redis or await self._connected()
        await forget_asked(redis, tenant, user_id)  # events from here on ask again
        loaded = await self._at_present_epoch(redis, await self._served(bundle_id))
        thinking = loaded.base.renderer.thinking
        if thinking is None:
            return "cannot_think"
        catalog, renderer = loaded.at_epoch.catalog, loaded.at_epoch.renderer
        histories = Histories(redis, max_stored=self._settings.history_max_stored, ttl_s=self._settings.history_ttl_s)
        contexts = UserContexts(histories, catalog, renderer, self._metrics)
        context = await contexts.load(RecommendRequest(user_id=user_id), tenant, _LOAD_TIMEOUT_S)
        if context.history_unavailable:
            return "history_unavailable"
        if not len(context.history):
            return "no_history"
        prompt = contexts.prompt(context, thinking=True)
        max_tokens = self._settings.think_max_tokens
        question = ThoughtQuestion(tenant, user_id, context.num_events, loaded.at_epoch, prompt, max_tokens)
        thoughts = Thoughts(redis, self._metrics, ttl_s=self._settings.thought_cache_ttl_s)
        if await thoughts.get(question, _LOAD_TIMEOUT_S) is not None:
            return "known"
        program = (Think(max_tokens, MAX_SECONDS, thinking.close), *sid_program(catalog.space))
        # The items are nobody's: any will do, of the epoch that the engine has in any case.
        anything = ItemFilter.of(len(loaded.base.catalog))
        request = DecodeRequest(prompt, anything, width=1, program=program, catalog_id=loaded.base.catalog_id)
        result = await loaded.engine.decode(request)
        return "thought" if await thoughts.put(question, result) else "not_kept"

    async def _connected(self) -> Redis:
        """To the service's Redis, an embedded one too: whoever is there first has started it, the other joins."""
        url = self._settings.redis_url
        if url is None:
            self._embedded = EmbeddedRedis(self._settings.data_dir)
            url = await self._embedded.start()
        timeout_s, connections = self._settings.redis_timeout_s, self._settings.redis_max_connections
        return connect(url, timeout_s=timeout_s, max_connections=connections)

    async def _served(self, bundle_id: str) -> _Loaded:
        """The bundle on an engine that runs; where there are too many, another one is stopped first."""
        if (loaded := self._loaded.pop(bundle_id, None)) is None:
            base = await asyncio.to_thread(Bundle.load, self._settings.bundles / bundle_id)
            while len(self._loaded) >= _MAX_ENGINES:
                await self._loaded.pop(next(iter(self._loaded))).engine.stop()
            engine = self._make_engine(base, self._settings, self._metrics)
            if base.renderer.thinking is not None:
                try:
                    await engine.start()
                except BaseException:
                    await engine.stop()
                    raise
            loaded = _Loaded(base, base, engine)
            log.info("thinking_with", bundle=bundle_id)
        self._loaded[bundle_id] = loaded
        return loaded

    async def _at_present_epoch(self, redis: Redis, loaded: _Loaded) -> _Loaded:
        """The same, with the catalogue that is stored now."""
        if self._live is None:
            store = ItemStore(redis, timeout_s=self._settings.redis_timeout_s)
            self._live = LiveCatalog(store, self._metrics, self._merged)
        await self._live.catch_up()
        if loaded.at_epoch.catalog.epoch < self._live.epoch:
            loaded.at_epoch = await self._live.bundle_at_epoch(loaded.base)
        return loaded

    async def _close(self) -> None:
        for loaded in self._loaded.values():
            await loaded.engine.stop()
        await self._merged.stop()
        if self._redis is not None:
            await self._redis.aclose()
        if self._embedded is not None:
            await self._embedded.stop()
