"""What the `think` queue's worker does: a user's thought, thought before it is asked for, with the service's own parts.

One bundle and engine a process, made at the first task: whatever `current` names, at the present epoch of the
catalogue. Histories, prompt, engine and cache are those of the read path, so that the next request finds its thought.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import structlog
from redis.asyncio import Redis

from semantic_ids.bundle import Bundle, current_id
from semantic_ids.filters import ItemFilter
from service.engine.base import DecodeRequest, Engine, Think, sid_program
from service.histories import Histories, connect
from service.item_store import ItemStore
from service.live_catalog import LiveCatalog
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

Outcome: TypeAlias = Literal["thought", "known", "cannot_think", "no_history", "history_unavailable", "not_kept"]


@dataclass
class _Loaded:
    """A bundle as published, at an epoch, and its engine."""

    base: Bundle
    at_epoch: Bundle
    engine: Engine
    live: LiveCatalog


class Thinker:
    """Thinks for one user after the other, on an event loop of its own."""

    def __init__(self, settings: Settings, make_engine: Callable[[Bundle, Settings, Metrics], Engine]) -> None:
        self._settings = settings
        self._make_engine = make_engine
        self._metrics = Metrics()
        self._runner = asyncio.Runner()
        self._redis: Redis | None = None
        self._embedded: EmbeddedRedis | None = None
        self._loaded: _Loaded | None = None

    def think(self, tenant: str, user_id: str) -> Outcome:
        """Think for a user, unless the thought is there; what came of it."""
        return self._runner.run(self._think(tenant, user_id))

    def close(self) -> None:
        """Stop the engine and leave Redis."""
        self._runner.run(self._close())
        self._runner.close()

    async def _think(self, tenant: str, user_id: str) -> Outcome:
        redis = self._redis = self._redis or await self._connected()
        await forget_asked(redis, tenant, user_id)  # events from here on ask again
        loaded = await self._current(redis)
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

    async def _current(self, redis: Redis) -> _Loaded:
        """What `current` names now, at the epoch that is stored now; another bundle's engine is stopped first."""
        named = await asyncio.to_thread(current_id, self._settings.bundles)
        if self._loaded is None or self._loaded.base.bundle_id != named:
            await self._unload()
            base = await asyncio.to_thread(Bundle.load, self._settings.bundles / named)
            engine = self._make_engine(base, self._settings, self._metrics)
            live = LiveCatalog(ItemStore(redis, timeout_s=self._settings.redis_timeout_s), self._metrics)
            if base.renderer.thinking is not None:
                await engine.start()
            self._loaded = _Loaded(base, base, engine, live)
            log.info("thinking_with", bundle=named)
        if await self._loaded.live.catch_up():
            self._loaded.at_epoch = await self._loaded.live.bundle_at_epoch(self._loaded.base)
        return self._loaded

    async def _unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            await loaded.engine.stop()

    async def _close(self) -> None:
        await self._unload()
        if self._redis is not None:
            await self._redis.aclose()
        if self._embedded is not None:
            await self._embedded.stop()
