"""THE READ PATH: one request from user to items.

history (Redis or inline) → prompt → engine: perhaps a thought, then, under the trie and the request's filter, items
                               └─ too late, no engine, nobody known → fallback, under the same filter

A thought gets what the deadline leaves beside the rest of the engine's work, so it is cut before the answer is late.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import structlog

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.exploration import Exploration, ExplorationError, refuse_both
from semantic_ids.diversity import mmr
from semantic_ids.filters import FilterCompiler, ItemFilter
from semantic_ids.prompt import PromptRenderer
from service.engine.base import DecodeRequest, DecodeResult, Engine, EngineError, StepProgram, Think, sid_program
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

_POOL, _MAX_POOL = 3, 500  # candidates of diversity, for each item that is shown

T = TypeVar("T")

TextListener: TypeAlias = Callable[[str], None]
"""Called on the event loop with the new text of a thought, as it comes."""


@dataclass(frozen=True)
class ThinkingLimits:
    """How long a thought may be, whatever the deadline."""

    max_tokens: int = 128
    max_seconds: float = 2.0


@dataclass(frozen=True)
class Decoded:
    """What the engine gave, or why it gave nothing."""

    result: DecodeResult | None
    reason: Reason | None


class Recommender:
    """Answers `/recommend` and `/rerank` from one bundle on one engine."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        histories: Histories,
        metrics: Metrics,
        beam_width: int,
        thinking_limits: ThinkingLimits | None = None,
    ) -> None:
        self._bundle = bundle
        self._catalog = bundle.catalog
        self._engine = engine
        self._metrics = metrics
        self._beam_width = beam_width
        self._thinking_limits = thinking_limits or ThinkingLimits()
        self._reserve = _Reserve()
        self._filters = FilterCompiler(bundle.catalog)
        self._contexts = UserContexts(histories, bundle.catalog, bundle.renderer, metrics)
        self._versions = Versions(
            bundle=bundle.bundle_id, catalog_epoch=bundle.catalog.epoch, prompt=bundle.manifest.prompt.version
        )

    async def recommend(self, request: RecommendRequest, on_thought: TextListener | None = None) -> RecommendResponse:
        """At most `num_items` eligible items, best first; never an item outside catalogue, filter and unseen.

        `on_thought` hears the thought as it is written; the pieces together are its rationale.
        """
        _refuse_unsupported(request, self._bundle)
        call = _Call(request, on_thought)
        context = await call.timed("history", self._contexts.load(request, call.left_s()))
        deny = context.excluded | (context.seen if request.exclude_seen else frozenset())
        item_filter = self._filters.compile(request.filter.spec(), deny)
        wanted = min(request.num_items, item_filter.num_eligible)
        if wanted == 0:
            decoded = Decoded(None, "filter_matches_nothing")
        else:
            # Diversity chooses among more than are shown.
            pool = min(_MAX_POOL, _POOL * request.num_items) if request.diversity else request.num_items
            exploration = Exploration.of_request(request.exploration, wanted, secrets.randbits(64))
            decoded = await self._decode(call, context, item_filter, pool, exploration)
        items = self._items(decoded, context, item_filter, wanted, request.diversity)
        return RecommendResponse(**self._answer(call, context, decoded, endpoint="recommend"), items=items)

    async def rerank(self, request: RerankRequest, on_thought: TextListener | None = None) -> RerankResponse:
        """Every candidate once, by the same score as `recommend` gives it; unknown ones last in the order given."""
        _refuse_unsupported(request, self._bundle)
        call = _Call(request, on_thought)
        context = await call.timed("history", self._contexts.load(request, call.left_s()))
        ranks, unknown = self._catalog.ranks_of(request.candidates)
        if len(ranks) == 0:
            decoded = Decoded(None, None)
        else:
            only_candidates = ItemFilter.of(len(self._catalog), allow=ranks)
            decoded = await self._decode(call, context, only_candidates, len(ranks))
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
        return RerankResponse(**self._answer(call, context, decoded, endpoint="rerank"), items=items)

    async def _decode(
        self,
        call: "_Call",
        context: UserContext,
        item_filter: ItemFilter,
        num_items: int,
        exploration: Exploration | None = None,
    ) -> Decoded:
        """Ask the engine within what is left of the deadline."""
        if context.history_unavailable and len(context.history) == 0:
            return Decoded(None, "history_unavailable")
        if len(context.history) == 0:
            return Decoded(None, "cold_start")
        think = self._think(call)
        decode_request = DecodeRequest(
            prompt=self._contexts.prompt(context, thinking=think is not None),
            item_filter=item_filter,
            width=max(self._beam_width, num_items),
            program=self._program(think),
            catalog_id=self._bundle.catalog_id,
            exploration=exploration,
        )
        left_s = call.left_s()
        try:
            async with asyncio.timeout(left_s):
                result = await call.timed("decode", self._engine.decode(decode_request, self._token_listener(call)))
        except TimeoutError:
            self._reserve.was_late(left_s - (think.max_seconds if think is not None else 0.0))
            return Decoded(None, "deadline")
        except EngineError as error:
            log.warning("engine_failed", error=str(error))
            return Decoded(None, "engine_unavailable")
        call.split_reasoning(result.think_s)
        self._reserve.was_in_time(call.stages["decode"])
        return Decoded(result, "history_unavailable" if context.history_unavailable else None)

    def _think(self, call: "_Call") -> Think | None:
        """The thought that a request may have; None where it asks for none."""
        thinking = self._bundle.renderer.thinking
        if thinking is None or not call.thinks:
            return None
        limits = self._thinking_limits
        seconds = min(limits.max_seconds, max(0.0, call.left_s() - self._reserve.seconds))
        return Think(limits.max_tokens, seconds, thinking.close)

    def _program(self, think: Think | None) -> StepProgram:
        codes = sid_program(self._catalog.space)
        return codes if think is None else (think, *codes)

    def _token_listener(self, call: "_Call") -> "_ThoughtText | None":
        return None if call.on_thought is None else _ThoughtText(self._bundle.renderer, call.on_thought)

    def _rationale(self, call: "_Call", decoded: Decoded) -> str | None:
        """The text of the thought that an answer of the model comes from, where it is asked for."""
        if decoded.result is None or not (call.thinks and call.request.include_rationale):
            return None
        return self._bundle.renderer.thought_text(decoded.result.thought)

    def _items(
        self, decoded: Decoded, context: UserContext, item_filter: ItemFilter, wanted: int, diversity: float
    ) -> list[RecommendedItem]:
        if (result := decoded.result) is not None:
            chosen = mmr(result.scores, self._catalog.codes[result.ranks], wanted, diversity)
            propensity = np.ones(len(chosen)) if result.propensity is None else result.propensity[chosen]
            shown = zip(result.ranks[chosen].tolist(), result.scores[chosen].tolist(), propensity.tolist(), strict=True)
            return [self._item(rank, place, *scored) for place, (rank, *scored) in enumerate(shown, start=1)]
        if wanted == 0:
            return []
        ranks = fallback_ranks(self._bundle, context.history, item_filter, wanted)
        return [self._item(rank, place, None) for place, rank in enumerate(ranks.tolist(), start=1)]

    def _item(self, rank: int, place: int, score: float | None, propensity: float = 1.0) -> RecommendedItem:
        return RecommendedItem(
            item_id=self._catalog.item_ids[rank],
            rank=place,
            score=score,
            sid=self._catalog.sid(rank),
            title=self._catalog.titles[rank],
            source="model" if score is not None else "fallback",
            propensity=propensity,
        )

    def _answer(self, call: "_Call", context: UserContext, decoded: Decoded, *, endpoint: str) -> dict[str, Any]:
        """The fields that both answers share."""
        source = "model" if decoded.result is not None else "fallback"
        self._metrics.answers.labels(endpoint, source, decoded.reason or "").inc()
        for stage, seconds in call.stages.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        return {
            "recommendation_id": new_ulid(),
            "user_id": call.request.user_id,
            "rationale": self._rationale(call, decoded),
            "ignored_items": context.ignored_items,
            "source": source,
            "degraded": decoded.reason is not None,
            "reason": decoded.reason,
            "experiment": None,
            "versions": self._versions,
            "timings_ms": call.timings_ms(),
        }


class _Call:
    """One request under way: its deadline, its stage times, and who hears its thought."""

    def __init__(self, request: UserRequest, on_thought: TextListener | None) -> None:
        self.request = request
        self.on_thought = on_thought
        self._start = time.perf_counter()
        self._deadline_s = request.deadline_ms / 1000
        self.stages: dict[str, float] = {}

    @property
    def thinks(self) -> bool:
        """Whether the model is to think first."""
        return self.request.reasoning == "on"

    async def timed(self, stage: str, work: Awaitable[T]) -> T:
        """Await `work` and note how long it took."""
        start = time.perf_counter()
        try:
            return await work
        finally:
            self.stages[stage] = time.perf_counter() - start

    def split_reasoning(self, think_s: float) -> None:
        """Count so much of the stage `decode` as `reasoning`."""
        if self.thinks:
            self.stages["reasoning"] = think_s
            self.stages["decode"] -= think_s

    def left_s(self) -> float:
        """What remains of the deadline."""
        return max(0.0, self._deadline_s - (time.perf_counter() - self._start))

    def timings_ms(self) -> dict[str, float]:
        """Every stage, those that did not run as 0, and the total."""
        stages = {"history": 0.0, "reasoning": 0.0, "decode": 0.0} | self.stages
        stages["total"] = time.perf_counter() - self._start
        return {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}


class _Reserve:
    """What is kept of a deadline for all that the engine does beside a thought: wait, prompt and beam. Learnt."""

    _MARGIN = 2.0  # times what it took of late
    _SMOOTHING = 0.2  # about the last five answers count
    _LEAST_S = 0.05  # a busy machine is late by as much

    def __init__(self) -> None:
        self.seconds = 2 * self._LEAST_S

    def was_in_time(self, beside_s: float) -> None:
        """An answer took so long beside its thought."""
        wanted_s = max(self._LEAST_S, self._MARGIN * beside_s)
        self.seconds += self._SMOOTHING * (wanted_s - self.seconds)

    def was_late(self, beside_s: float) -> None:
        """An answer would have taken longer than this beside its thought."""
        self.seconds = max(self.seconds, self._MARGIN * beside_s)


class _ThoughtText:
    """Hears the tokens of a thought and tells their text."""

    def __init__(self, renderer: PromptRenderer, on_text: TextListener) -> None:
        self._renderer = renderer
        self._on_text = on_text
        self._token_ids: list[int] = []
        self._num_told = 0  # characters

    def __call__(self, token_ids: Sequence[int]) -> None:
        self._token_ids += token_ids
        text = self._renderer.thought_text(self._token_ids)
        if len(text) > self._num_told:
            self._on_text(text[self._num_told :])
            self._num_told = len(text)


def new_ulid() -> str:
    """A 26-character id that sorts by time (ULID: 48 bits of milliseconds, 80 random bits)."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_ULID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def _refuse_unsupported(request: UserRequest, bundle: Bundle) -> None:
    """What the contract names and this bundle or version cannot do is refused, never half done."""
    if request.reasoning == "on" and bundle.renderer.thinking is None:
        raise BadRequestProblem(
            "reasoning 'on' needs a bundle with a reasoning model, and this one has none: use 'auto' or 'off'",
            errors=[FieldError(path="body.reasoning", message="not supported by the current bundle")],
        )
    if isinstance(request, RecommendRequest):
        try:
            refuse_both(request.diversity, request.exploration)
        except ExplorationError as error:
            raise BadRequestProblem(
                str(error), errors=[FieldError(path="body.exploration", message="not together with diversity")]
            ) from error
