"""THE READ PATH: one request from user to items.

history (Redis or inline) → prompt → engine, under the trie and the request's filter → items
                               └─ too late, no engine, nobody known → fallback, under the same filter
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from semantic_ids.bundle import Bundle
from semantic_ids.filters import FilterCompiler, ItemFilter
from service.engine.base import DecodeRequest, DecodeResult, Engine, EngineError, sid_program
from service.errors import BadRequestProblem, FieldError
from service.fallback import fallback_ranks
from service.histories import Histories
from service.metrics import Metrics
from service.schemas import (
    Reason,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    RerankedItem,
    RerankRequest,
    RerankResponse,
    UserRequest,
    Versions,
)
from service.user_context import UserContext, UserContexts

log = structlog.get_logger(__name__)

_ULID_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32

T = TypeVar("T")


@dataclass(frozen=True)
class Decoded:
    """What the engine gave, or why it gave nothing."""

    result: DecodeResult | None
    reason: Reason | None


class Recommender:
    """Answers `/recommend` and `/rerank` from one bundle on one engine."""

    def __init__(self, bundle: Bundle, engine: Engine, histories: Histories, metrics: Metrics, beam_width: int) -> None:
        self._bundle = bundle
        self._catalog = bundle.catalog
        self._engine = engine
        self._metrics = metrics
        self._beam_width = beam_width
        self._filters = FilterCompiler(bundle.catalog)
        self._contexts = UserContexts(histories, bundle.catalog, bundle.renderer, metrics)
        self._versions = Versions(
            bundle=bundle.bundle_id, catalog_epoch=bundle.catalog.epoch, prompt=bundle.manifest.prompt.version
        )

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """At most `num_items` eligible items, best first; never an item outside catalogue, filter and unseen."""
        _refuse_unsupported(request)
        clock = _Clock(request.deadline_ms)
        context = await clock.timed("history", self._contexts.load(request, clock.left_s()))
        deny = context.excluded | (context.seen if request.exclude_seen else frozenset())
        item_filter = self._filters.compile(request.filter.spec(), deny)
        wanted = min(request.num_items, item_filter.num_eligible)
        if wanted == 0:
            decoded = Decoded(None, "filter_matches_nothing")
        else:
            decoded = await self._decode(context, item_filter, request.num_items, clock)
        items = self._items(decoded, context, item_filter, wanted)
        return RecommendResponse(**self._answer(request, context, decoded, clock, endpoint="recommend"), items=items)

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        """Every candidate once, by the same score as `recommend` gives it; unknown ones last in the order given."""
        _refuse_unsupported(request)
        clock = _Clock(request.deadline_ms)
        context = await clock.timed("history", self._contexts.load(request, clock.left_s()))
        ranks, unknown = self._catalog.ranks_of(request.candidates)
        if len(ranks) == 0:
            decoded = Decoded(None, None)
        else:
            only_candidates = ItemFilter.of(len(self._catalog), allow=ranks)
            decoded = await self._decode(context, only_candidates, len(ranks), clock)
        known: list[tuple[int, float | None]]
        if decoded.result is not None:
            known = list(zip(decoded.result.ranks.tolist(), decoded.result.scores.tolist(), strict=True))
        else:  # no score: what is popular first, and equal ones as given
            known = [(rank, None) for rank in sorted(ranks.tolist(), key=lambda rank: -self._catalog.popularity[rank])]
        items = [
            RerankedItem(item_id=self._catalog.item_ids[rank], rank=place, score=score, known=True)
            for place, (rank, score) in enumerate(known, start=1)
        ]
        items += [
            RerankedItem(item_id=item_id, rank=place, score=None, known=False)
            for place, item_id in enumerate(unknown, start=len(items) + 1)
        ]
        return RerankResponse(**self._answer(request, context, decoded, clock, endpoint="rerank"), items=items)

    async def _decode(self, context: UserContext, item_filter: ItemFilter, num_items: int, clock: "_Clock") -> Decoded:
        """Ask the engine within what is left of the deadline."""
        if context.history_unavailable and len(context.history) == 0:
            return Decoded(None, "history_unavailable")
        if len(context.history) == 0:
            return Decoded(None, "cold_start")
        decode_request = DecodeRequest(
            prompt=self._contexts.prompt(context),
            item_filter=item_filter,
            width=max(self._beam_width, num_items),
            program=sid_program(self._catalog.space),
            catalog_epoch=self._catalog.epoch,
        )
        try:
            async with asyncio.timeout(clock.left_s()):
                result = await clock.timed("decode", self._engine.decode(decode_request))
        except TimeoutError:
            return Decoded(None, "deadline")
        except EngineError as error:
            log.warning("engine_failed", error=str(error))
            return Decoded(None, "engine_unavailable")
        return Decoded(result, "history_unavailable" if context.history_unavailable else None)

    def _items(
        self, decoded: Decoded, context: UserContext, item_filter: ItemFilter, wanted: int
    ) -> list[RecommendedItem]:
        if decoded.result is not None:
            scored = zip(decoded.result.ranks[:wanted].tolist(), decoded.result.scores[:wanted].tolist(), strict=True)
            return [self._item(rank, place, score) for place, (rank, score) in enumerate(scored, start=1)]
        if wanted == 0:
            return []
        ranks = fallback_ranks(self._bundle, context.history, item_filter, wanted)
        return [self._item(rank, place, None) for place, rank in enumerate(ranks.tolist(), start=1)]

    def _item(self, rank: int, place: int, score: float | None) -> RecommendedItem:
        return RecommendedItem(
            item_id=self._catalog.item_ids[rank],
            rank=place,
            score=score,
            sid=self._catalog.sid(rank),
            title=self._catalog.titles[rank],
            source="model" if score is not None else "fallback",
            propensity=1.0,
        )

    def _answer(
        self, request: UserRequest, context: UserContext, decoded: Decoded, clock: "_Clock", *, endpoint: str
    ) -> dict[str, Any]:
        """The fields that both answers share."""
        source = "model" if decoded.result is not None else "fallback"
        self._metrics.answers.labels(endpoint, source, decoded.reason or "").inc()
        for stage, seconds in clock.stages.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        return {
            "recommendation_id": new_ulid(),
            "user_id": request.user_id,
            "rationale": None,
            "ignored_items": context.ignored_items,
            "source": source,
            "degraded": decoded.reason is not None,
            "reason": decoded.reason,
            "experiment": None,
            "versions": self._versions,
            "timings_ms": clock.timings_ms(),
        }


class _Clock:
    """One request's deadline and stage times."""

    def __init__(self, deadline_ms: int) -> None:
        self._start = time.perf_counter()
        self._deadline_s = deadline_ms / 1000
        self.stages: dict[str, float] = {}

    async def timed(self, stage: str, work: Awaitable[T]) -> T:
        """Await `work` and note how long it took."""
        start = time.perf_counter()
        try:
            return await work
        finally:
            self.stages[stage] = time.perf_counter() - start

    def left_s(self) -> float:
        """What remains of the deadline."""
        return max(0.0, self._deadline_s - (time.perf_counter() - self._start))

    def timings_ms(self) -> dict[str, float]:
        """Every stage, those that did not run as 0, and the total."""
        stages = {"history": 0.0, "reasoning": 0.0, "decode": 0.0} | self.stages
        stages["total"] = time.perf_counter() - self._start
        return {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}


def new_ulid() -> str:
    """A 26-character id that sorts by time (ULID: 48 bits of milliseconds, 80 random bits)."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_ULID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def _refuse_unsupported(request: UserRequest) -> None:
    """What the contract names and this bundle or version cannot do is refused, never half done."""
    if request.reasoning == "on":
        raise BadRequestProblem(
            "reasoning 'on' needs a bundle with a reasoning model, and this one has none: use 'auto' or 'off'",
            errors=[FieldError(path="body.reasoning", message="not supported by the current bundle")],
        )
    for name in ("diversity", "exploration"):
        if getattr(request, name, 0.0):
            raise BadRequestProblem(
                f"{name} is not supported yet: leave it out or send 0",
                errors=[FieldError(path=f"body.{name}", message="must be 0")],
            )
