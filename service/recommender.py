"""THE READ PATH: one request from user to items.

history (Redis or inline) → prompt → engine: perhaps a thought, then, under the trie and the request's filter, items
                               └─ too late, no engine, nobody known → fallback, under the same filter

Where an experiment wants it, what a plain beam has retrieved is ordered anew: the engine thinks, and then scores it.

A thought gets what the deadline leaves beside the rest of the engine's work, so it is cut before the answer is late.
One that was thought before for the same prompt (`thoughts`) is taken instead. What of it is shown is `rationale`'s.
"""

import asyncio
import copy
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, repeat
from math import isfinite
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
from pydantic import TypeAdapter

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.exploration import Exploration, ExplorationError, refuse_both
from semantic_ids.diversity import mmr
from semantic_ids.filters import FilterCompiler, ItemFilter
from semantic_ids.trie import Ranks
from service import tracing
from service.admission import EngineLine, Place
from service.breaker import Breaker, BreakerOpenError
from service.catalog_titles import CatalogTitles
from service.engine.base import (
    DecodeRequest,
    DecodeResult,
    Engine,
    EngineError,
    EngineUnavailableError,
    StepProgram,
    Think,
    sid_program,
)
from service.errors import BadRequestProblem, FieldError
from service.experiments.runtime import Experiments
from service.experiments.treatment import UNTREATED, Treatment
from service.fallback import CACHE, AnswerCache, Asked, PopularByCategory, cache_key, fallback_items
from service.histories import Histories
from service.metrics import Metrics
from service.rationale import Rationale, TextListener
from service.schemas import (
    Reason,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    RerankedItem,
    RerankRequest,
    RerankResponse,
    Source,
    TracedStep,
    UserRequest,
    Versions,
)
from service.served_log import ServedLog
from service.step_trace import StepTraces
from service.thoughts import CachedThought, ThoughtQuestion, Thoughts, prompt_after
from service.turns import Turns
from service.user_context import UserContext, UserContexts

log = structlog.get_logger(__name__)

_ANSWER_SHARE, _ANSWER_MOST_S = 0.04, 0.02
"""Of a deadline: kept for the fallback and the way back, so that a late engine does not make a late answer."""

_ULID_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
_ULID_PAIRS = [high + low for high in _ULID_ALPHABET for low in _ULID_ALPHABET]

_POOL, _MAX_POOL = 3, 500  # candidates of diversity and of re-ranking, for each item that is shown

_THOUGHT_CACHE_MOST_S = 0.25  # a thought that Redis gives later than this is not worth the wait

_RECOMMENDED = TypeAdapter(list[RecommendedItem])  # ten at once take two thirds of the time of ten by themselves

T = TypeVar("T")


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
        deleted_since: Callable[[int], frozenset[str]] = lambda _epoch: frozenset(),
        experiments: Experiments | None = None,
        answers: AnswerCache | None = None,
        breaker: Breaker | None = None,
        served: ServedLog | None = None,
        thoughts: Thoughts | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._histories = histories
        self._engine = engine
        self._metrics = metrics
        self._beam_width = beam_width
        self._thinking_limits = thinking_limits or ThinkingLimits()
        self._deleted_since = deleted_since
        self._experiments = experiments
        self._served = served
        self._thoughts = thoughts
        self._turns = turns or Turns()
        self._titles = CatalogTitles(bundle.catalog)
        if bundle.renderer.thinking is not None:  # 3 s in a thread at a million items: over before the first rationale
            self._titles.prepare()
        self._reserve = _Reserve()
        self._line = EngineLine(metrics, bundle.bundle_id)
        self._answers = AnswerCache() if answers is None else answers
        self._breaker = breaker or Breaker("engine", metrics, threshold=5, open_s=2.0, bundle_id=bundle.bundle_id)
        self._use(bundle)

    def on(self, bundle: Bundle) -> "Recommender":
        """The same recommender on another epoch of its bundle's catalogue; this one goes on as it is."""
        other = copy.copy(self)
        other._use(bundle)
        return other

    def _use(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._catalog = bundle.catalog
        self._filters = FilterCompiler(bundle.catalog)
        self._popular_in = PopularByCategory(bundle)
        self._codes = sid_program(bundle.catalog.space, bundle.renderer.forced)
        self._titles = self._titles.at(bundle.catalog)
        self._step_traces = None if bundle.step_reader is None else StepTraces(bundle, bundle.step_reader)
        self._contexts = UserContexts(self._histories, bundle.catalog, bundle.renderer, self._metrics)
        self._versions = Versions(
            bundle=bundle.bundle_id, catalog_epoch=bundle.catalog.epoch, prompt=bundle.manifest.prompt.version
        )

    async def recommend(
        self,
        request: RecommendRequest,
        tenant: str,
        on_thought: TextListener | None = None,
        treatment: Treatment = UNTREATED,
    ) -> RecommendResponse:
        """At most `num_items` eligible items, best first; never an item outside catalogue, filter and unseen.

        `on_thought` hears the thought as it is written; the pieces together are its rationale. `treatment` is what
        experiments make of the request; the bundle that it names is the caller's affair.
        """
        _refuse_unsupported(request, self._bundle)
        request = treatment.applied_to(request)
        call = _Call(request, tenant, on_thought, self._turns, reranks=treatment.overrides.rerank is True)
        with self._place_in_line(call):
            answer = await self._recommend(request, tenant, call, treatment)
        if self._experiments is not None:
            answer = self._experiments.exposed(answer, tenant, treatment)
        if self._served is not None:
            self._served.answered(answer, tenant)
        return answer

    async def _recommend(
        self, request: RecommendRequest, tenant: str, call: "_Call", treatment: Treatment
    ) -> RecommendResponse:
        context = await call.timed("history", self._contexts.load(request, tenant, call.left_s()), to_engine=True)
        seen: frozenset[str] = context.seen if request.exclude_seen else frozenset()
        deny = chain(context.excluded, seen, self._deleted_since(self._catalog.epoch))
        item_filter = self._filters.compile(request.filter.spec(), deny)
        wanted = min(request.num_items, item_filter.num_eligible)
        if wanted == 0:
            decoded = Decoded(None, "filter_matches_nothing")
        else:
            overrides = treatment.overrides
            # Diversity and re-ranking choose among more than are shown.
            chooses = request.diversity > 0 or overrides.rerank is True
            pool = min(_MAX_POOL, _POOL * request.num_items) if chooses else request.num_items
            exploration = Exploration.of_request(request.exploration, wanted, secrets.randbits(64))
            decoded = await self._decode(call, context, item_filter, pool, exploration, overrides.beam_width)
            decoded = _repaired(decoded, item_filter, wanted)
            if overrides.rerank and decoded.result is not None:
                reordered = await self._reordered(call, context, decoded.result.ranks[:pool])
                decoded = decoded if reordered is None else replace(decoded, result=reordered)
            self._remember(request, tenant, context, decoded)
        items = self._items(decoded, context, item_filter, wanted, request.diversity)
        items += self._fallback(request, tenant, context, item_filter, wanted, items)
        told = await self._told(call, context, decoded, item_filter, [item.item_id for item in items])
        answer = self._answer(call, context, decoded, endpoint="recommend", source=_source_of(items))
        return RecommendResponse(**answer, items=items, rationale=told.rationale, trace=told.trace)

    async def rerank(
        self,
        request: RerankRequest,
        tenant: str,
        on_thought: TextListener | None = None,
        treatment: Treatment = UNTREATED,
    ) -> RerankResponse:
        """Every candidate once, by the same score as `recommend` gives it; unknown ones last in the order given."""
        _refuse_unsupported(request, self._bundle)
        request = treatment.applied_to(request)
        call = _Call(request, tenant, on_thought, self._turns)
        with self._place_in_line(call):
            answer = await self._rerank(request, tenant, call)
        return answer if self._experiments is None else self._experiments.exposed(answer, tenant, treatment)

    async def _rerank(self, request: RerankRequest, tenant: str, call: "_Call") -> RerankResponse:
        context = await call.timed("history", self._contexts.load(request, tenant, call.left_s()), to_engine=True)
        deleted = self._deleted_since(self._catalog.epoch)
        ranks, unknown = self._catalog.ranks_of(item for item in request.candidates if item not in deleted)
        only_candidates = ItemFilter.of(len(self._catalog), allow=ranks)
        unknown = [item for item in request.candidates if item in deleted.union(unknown)] if deleted else unknown
        if len(ranks) == 0:
            decoded = Decoded(None, None)
        else:
            decoded = await self._decode(call, context, only_candidates, len(ranks))
            decoded = _repaired(decoded, only_candidates, len(ranks))
        known: list[tuple[int, float | None]]
        if decoded.result is not None:
            known = list(zip(decoded.result.ranks.tolist(), decoded.result.scores.tolist(), strict=True))
        else:
            known = []
        # Without a score: what is popular first, and equal ones as given.
        scored = {rank for rank, _ in known}
        unscored = [rank for rank in ranks.tolist() if rank not in scored]
        known += [(rank, None) for rank in sorted(unscored, key=lambda rank: -self._catalog.popularity[rank])]
        items = [
            RerankedItem(item_id=self._catalog.item_ids[rank], rank=place, score=score, known=True)
            for place, (rank, score) in enumerate(known, start=1)
        ]
        items += [
            RerankedItem(item_id=item_id, rank=place, score=None, known=False)
            for place, item_id in enumerate(unknown, start=len(items) + 1)
        ]
        told = await self._told(call, context, decoded, only_candidates, [item.item_id for item in items])
        answer = self._answer(call, context, decoded, endpoint="rerank")
        return RerankResponse(**answer, items=items, rationale=told.rationale, trace=told.trace)

    async def _decode(
        self,
        call: "_Call",
        context: UserContext,
        item_filter: ItemFilter,
        num_items: int,
        exploration: Exploration | None = None,
        beam_width: int | None = None,
    ) -> Decoded:
        """Ask the engine within what is left of the deadline."""
        if context.history_unavailable and len(context.history) == 0:
            return Decoded(None, "history_unavailable")
        if len(context.history) == 0:
            return Decoded(None, "cold_start")
        think = self._think(call)
        question = self._thought_question(call, context)
        cached = await self._cached_thought(call, question)
        if cached is not None and question is not None:
            think, prompt = None, prompt_after(question, cached)
        elif think is not None and question is not None:
            prompt = question.prompt
        else:
            prompt = self._contexts.prompt(context, thinking=think is not None)
        if (think is not None or cached is not None) and (call.request.include_rationale or call.on_thought):
            call.rationale = Rationale(self._bundle, self._titles, context.history, self._metrics, call.on_thought)
            if cached is not None:
                call.rationale(cached.token_ids)
        decode_request = DecodeRequest(
            prompt=prompt,
            item_filter=item_filter,
            width=max(beam_width or self._beam_width, num_items),
            program=self._program(think),
            catalog_id=self._bundle.catalog_id,
            exploration=exploration,
            wants_trace=call.request.include_rationale and self._step_traces is not None,
        )
        left_s = call.left_for_engine_s()
        try:
            with self._breaker.attempt(lambda error: self._is_failure(error, call.place)):
                async with asyncio.timeout(left_s):
                    work = self._engine.decode(decode_request, self._token_listener(call, think))
                    result = await call.timed(call.stage, work)
        except BreakerOpenError:
            return Decoded(None, "engine_unavailable")
        except TimeoutError:
            call.was_late()
            self._reserve.was_late(left_s - (think.max_seconds if think is not None else 0.0))
            return Decoded(None, "deadline")
        except EngineError as error:
            log.warning("engine_failed", error=str(error))
            return Decoded(None, "engine_unavailable")
        call.was_answered(result.think_s)
        call.split_reasoning(result.think_s)
        self._reserve.was_in_time(call.stages[call.stage])
        if cached is not None:
            result = replace(result, thought=tuple(cached.token_ids), thought_end=cached.end)
        elif self._thoughts is not None and question is not None and think is not None:
            self._thoughts.put_soon(question, result)
        return Decoded(result, "history_unavailable" if context.history_unavailable else None)

    async def _reordered(self, call: "_Call", context: UserContext, ranks: Ranks) -> DecodeResult | None:
        """What was retrieved, scored and ordered anew after a thought, as `rerank` does; None: the first order stands.

        The first order is a whole answer of the model, so one that stands is not degraded.
        """
        if call.left_s() <= self._reserve.seconds:
            self._metrics.reranks.labels("no_time").inc()
            return None
        call.stage = "rerank"
        only_these = ItemFilter.of(len(self._catalog), allow=ranks)
        with self._line.place(call.left_s(), unconditional=True) as call.place:
            decoded = await self._decode(call, context, only_these, len(ranks))
        decoded = _repaired(decoded, only_these, len(ranks))
        if decoded.result is None or decoded.reason == "model_output_repaired":
            call.stage = "decode"
            self._metrics.reranks.labels(decoded.reason).inc()
            return None
        self._metrics.reranks.labels("done").inc()
        return decoded.result

    def _think(self, call: "_Call") -> Think | None:
        """The thought that a request may have; None where it asks for none."""
        thinking = self._bundle.renderer.thinking
        if thinking is None or not call.thinks:
            return None
        limits = self._thinking_limits
        seconds = min(limits.max_seconds, max(0.0, call.left_s() - self._reserve.seconds))
        return Think(limits.max_tokens, seconds, thinking.close)

    def _program(self, think: Think | None) -> StepProgram:
        return self._codes if think is None else (think, *self._codes)

    def _thought_question(self, call: "_Call", context: UserContext) -> ThoughtQuestion | None:
        """What to look the request's thought up by; None where it is to have none, or none that is kept."""
        user_id = call.request.user_id
        if self._thoughts is None or self._bundle.renderer.thinking is None or not call.may_have_thought:
            return None
        if user_id is None or call.request.inline_history() is not None or context.history_unavailable:
            return None
        prompt = self._contexts.prompt(context, thinking=True)
        max_tokens = self._thinking_limits.max_tokens
        return ThoughtQuestion(call.tenant, user_id, context.num_events, self._bundle, prompt, max_tokens)

    async def _cached_thought(self, call: "_Call", question: ThoughtQuestion | None) -> CachedThought | None:
        """The request's thought, if it was thought before; else somebody is asked to, unless the request thinks."""
        if self._thoughts is None or question is None:
            return None
        cached = await self._thoughts.get(question, min(_THOUGHT_CACHE_MOST_S, call.left_for_engine_s()))
        if cached is None and not call.thinks:
            self._thoughts.ask_ahead(question.tenant, question.user_id, self._bundle.bundle_id)
        return cached

    def _token_listener(self, call: "_Call", think: Think | None) -> Rationale | None:
        return None if think is None or call.on_thought is None else call.rationale

    async def _told(
        self, call: "_Call", context: UserContext, decoded: Decoded, item_filter: ItemFilter, item_ids: Sequence[str]
    ) -> "_Told":
        """Why the model chose these items, as far as it may be said; told to whoever listens, given where asked for."""
        if call.request.include_rationale and any(self._bundle.renderer.forced):
            outcome, told = await self._told_steps(call, context, decoded, item_filter, item_ids)
            self._metrics.step_traces.labels(outcome).inc()
            if told.rationale is not None and call.on_thought is not None:
                call.on_thought(told.rationale)
            return told
        if decoded.result is None or decoded.result.thought_end is None or call.rationale is None:
            return _NOTHING_TOLD
        ranks, _ = self._catalog.ranks_of(item_ids)
        text = await call.rationale.finished(decoded.result.thought, ranks, call.left_for_engine_s())
        return _Told(text) if call.request.include_rationale else _NOTHING_TOLD

    async def _told_steps(
        self, call: "_Call", context: UserContext, decoded: Decoded, item_filter: ItemFilter, item_ids: Sequence[str]
    ) -> tuple[str, "_Told"]:
        """What the steps before the first item meant, and the outcome for the metric."""
        if (traces := self._step_traces) is None:
            return "no_clusters", _NOTHING_TOLD
        if decoded.result is None:
            return "no_answer", _NOTHING_TOLD
        trace = decoded.result.trace
        if trace is None or self._catalog.item_ids[trace.rank] != item_ids[0]:
            return "lost", _NOTHING_TOLD
        ranks, _ = self._catalog.ranks_of(item_ids)
        try:
            async with asyncio.timeout(call.left_for_engine_s()):
                steps = await asyncio.to_thread(traces.steps, trace, item_filter)
        except Exception as error:  # the items are there, and do not wait for what explains them
            log.warning("steps_not_told", error=type(error).__name__)
            return "lost", _NOTHING_TOLD
        return "shown", _Told(traces.rationale(trace, context.history, ranks), steps)

    def _items(
        self, decoded: Decoded, context: UserContext, item_filter: ItemFilter, wanted: int, diversity: float
    ) -> list[RecommendedItem]:
        if (result := decoded.result) is None:
            return []
        chosen: npt.NDArray[np.int64] | slice = slice(wanted)
        if diversity > 0:
            chosen = mmr(result.scores, self._catalog.codes[result.ranks], wanted, diversity)
        propensities = repeat(1.0) if result.propensity is None else result.propensity[chosen].tolist()
        scores = result.scores[chosen].tolist()
        return self._recommended(result.ranks[chosen], count(1), scores, propensities, repeat("model"))

    def _fallback(
        self,
        request: RecommendRequest,
        tenant: str,
        context: UserContext,
        item_filter: ItemFilter,
        wanted: int,
        items: Sequence[RecommendedItem],
    ) -> list[RecommendedItem]:
        """What the policy adds to the items of the model, so that there are as many as are wanted."""
        if len(items) >= wanted:
            return []
        already, _ = self._catalog.ranks_of(item.item_id for item in items)
        cached = self._answers.get(cache_key(tenant, request.user_id, request.inline_history()))
        ranks_by_id = {item_id: self._catalog.rank_of(item_id) for item_id in cached}
        asked = Asked(
            self._bundle,
            context.history,
            np.array([rank for rank in ranks_by_id.values() if rank is not None], np.int64),
            self._popular_in,
        )
        added = fallback_items(asked, item_filter, wanted - len(items), already=already)
        for item in added:
            self._metrics.fallback_items.labels(item.source).inc()
        ranks = np.array([item.rank for item in added], np.int64)
        sources: Iterator[Source] = ("cache" if item.source == CACHE else "fallback" for item in added)
        return self._recommended(ranks, count(len(items) + 1), repeat(None), repeat(1.0), sources)

    def _remember(self, request: RecommendRequest, tenant: str, context: UserContext, decoded: Decoded) -> None:
        """Keep what the model answered, unless it explored, for when it cannot: unseen items, best first."""
        if decoded.result is None or decoded.result.propensity is not None:
            return
        seen, excluded = context.seen, context.excluded
        item_ids = self._catalog.item_ids.take(decoded.result.ranks)
        key = cache_key(tenant, request.user_id, request.inline_history())
        self._answers.put(key, (one for one in item_ids if one not in seen and one not in excluded))

    def _is_failure(self, error: BaseException, place: Place | None) -> bool | None:
        """Whether the engine is to blame. A timeout is its fault only if it answered nobody else meanwhile either."""
        if isinstance(error, TimeoutError):
            return True if place is not None and self._line.is_stalled_for(place) else None
        return True if isinstance(error, EngineUnavailableError) else None

    @contextmanager
    def _place_in_line(self, call: "_Call") -> Iterator[None]:
        """A place in the engine's line for a request that may need it; `UnavailableProblem` if that would be too long.

        While the engine's breaker is not closed nobody waits for it, so nobody is shed either.
        """
        if call.request.user_id is None and not call.request.history:
            yield
            return
        with self._line.place(call.left_s(), unconditional=not self._breaker.is_closed) as call.place:
            yield

    def refuse_late(self, left_s: float) -> None:
        """`UnavailableProblem` if the engine could not answer within `left_s`: what `recommend` would say later."""
        if self._breaker.is_closed:
            self._line.check(left_s)

    def history_moved(self, tenant: str, user_id: str) -> None:
        """The user's history has new events: somebody may think of them before anybody waits for that."""
        if self._thoughts is not None and self._bundle.renderer.thinking is not None:
            self._thoughts.ask_ahead(tenant, user_id, self._bundle.bundle_id)

    def withdraw(self, tenant: str, user_id: str, item_ids: Sequence[str]) -> None:
        """The user has seen or dislikes these items: no kept answer shows them, even if Redis could not tell."""
        self._answers.withdraw(cache_key(tenant, user_id, None), item_ids)

    def forget(self, tenant: str, user_id: str) -> None:
        """The user is erased: so is the kept answer."""
        self._answers.forget(cache_key(tenant, user_id, None))

    def _recommended(
        self,
        ranks: Ranks,
        places: Iterable[int],
        scores: Iterable[float | None],
        propensities: Iterable[float],
        sources: Iterable[Source],
    ) -> list[RecommendedItem]:
        """Items as an answer shows them, as many as `ranks`, (M,)."""
        item_ids, titles = self._catalog.item_ids.take(ranks), self._catalog.titles.take(ranks)
        sids = self._catalog.sids(ranks)
        shown = zip(item_ids, sids, titles, places, scores, propensities, sources, strict=False)
        return _RECOMMENDED.validate_python(
            [
                {
                    "item_id": item_id,
                    "rank": place,
                    "score": score,
                    "sid": sid,
                    "title": title,
                    "source": source,
                    "propensity": propensity,
                }
                for item_id, sid, title, place, score, propensity, source in shown
            ]
        )

    def _answer(
        self, call: "_Call", context: UserContext, decoded: Decoded, *, endpoint: str, source: Source | None = None
    ) -> dict[str, Any]:
        """The fields that both answers share; `source` where it is not simply whether the model answered."""
        if source is None:
            source = "model" if decoded.result is not None else "fallback"
        self._metrics.answers.labels(endpoint, source, decoded.reason or "").inc()
        for stage, seconds in call.stages.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        return {
            "recommendation_id": new_ulid(),
            "user_id": call.request.user_id,
            "ignored_items": context.ignored_items,
            "source": source,
            "degraded": decoded.reason is not None,
            "reason": decoded.reason,
            "experiment": None,
            "versions": self._versions,
            "timings_ms": call.timings_ms(),
        }


@dataclass(frozen=True)
class _Told:
    """Why the model chose what it did: in words, and of a model that thinks in steps as data."""

    rationale: str | None = None
    trace: list[TracedStep] | None = None


_NOTHING_TOLD = _Told()


class _Call:
    """One request under way: its deadline, its stage times, and who hears its thought."""

    def __init__(
        self,
        request: UserRequest,
        tenant: str,
        on_thought: TextListener | None,
        turns: Turns,
        *,
        reranks: bool = False,
    ) -> None:
        self.request = request
        self.tenant = tenant
        self.on_thought = on_thought
        self._turns = turns
        self.rationale: Rationale | None = None
        self._reranks = reranks
        self.place: Place | None = None
        self._start = time.perf_counter()
        self._deadline_s = request.deadline_ms / 1000
        self.stages: dict[str, float] = {}
        self.stage: Literal["decode", "rerank"] = "decode"
        """What the engine is asked for, or was last."""

    @property
    def thinks(self) -> bool:
        """Whether the model is to think first."""
        return self.request.reasoning == "on" or self.stage == "rerank"

    @property
    def may_have_thought(self) -> bool:
        """Whether a thought is wanted, if only one that is there already: never before what is ordered anew."""
        wants_rationale = self.request.reasoning == "auto" and self.request.include_rationale
        return self.thinks or (wants_rationale and not self._reranks)

    async def timed(self, stage: str, work: Awaitable[T], *, to_engine: bool = False) -> T:
        """Await `work`, and its turn to be gone on with, perhaps on the way to the engine; note how long that took."""
        start = time.perf_counter()
        try:
            with tracing.span(stage):
                result = await work
                await self._turns.take(self._start, to_engine=to_engine)
                return result
        finally:
            self.stages[stage] = time.perf_counter() - start

    def split_reasoning(self, think_s: float) -> None:
        """Count so much of the engine's stage as `reasoning`."""
        if self.thinks:
            self.stages["reasoning"] = think_s
            self.stages[self.stage] -= think_s

    def was_answered(self, thought_s: float) -> None:
        """The engine has answered: it is the next one's turn."""
        if self.place is not None:
            self.place.answered(thought_s)

    def was_late(self) -> None:
        """The engine has not answered in time."""
        if self.place is not None:
            self.place.was_late()

    def left_for_engine_s(self) -> float:
        """What remains of the deadline, less what an answer without the engine takes."""
        return max(0.0, self.left_s() - min(_ANSWER_MOST_S, _ANSWER_SHARE * self._deadline_s))

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


def _repaired(decoded: Decoded, item_filter: ItemFilter, wanted: int) -> Decoded:
    """What of the engine's answer may be shown, each item once; flagged where anything had to go or is missing."""
    if (result := decoded.result) is None or _is_sound(result, item_filter, wanted):
        return decoded
    known = (result.ranks >= 0) & (result.ranks < item_filter.num_items) & np.isfinite(result.scores)
    keep = known & item_filter.contains(np.where(known, result.ranks, 0))
    first = np.zeros(len(keep), np.bool_)
    first[np.unique(result.ranks, return_index=True)[1]] = True
    keep &= first
    log.error("model_output_repaired", num_items=len(keep), num_kept=int(keep.sum()), wanted=wanted)
    if not keep.any():
        return Decoded(None, "model_output_repaired")
    propensity = None if result.propensity is None else result.propensity[keep]
    kept = replace(result, ranks=result.ranks[keep], scores=result.scores[keep], propensity=propensity)
    return Decoded(kept, "model_output_repaired")


def _is_sound(result: DecodeResult, item_filter: ItemFilter, wanted: int) -> bool:
    """Whether all of an engine's answer may be shown, and is enough: asked of every answer, with few small arrays."""
    ranks = result.ranks.tolist()
    return (
        len(ranks) >= max(1, wanted)
        and min(ranks) >= 0
        and max(ranks) < item_filter.num_items
        and len(set(ranks)) == len(ranks)
        and all(map(isfinite, result.scores.tolist()))
        and all(item_filter.contains(result.ranks).tolist())
    )


def _source_of(items: Sequence[RecommendedItem]) -> Source:
    """What an answer is mostly thanks to: the model, its last answer, or neither."""
    sources = {item.source for item in items}
    return next((source for source in ("model", "cache") if source in sources), "fallback")


def new_ulid() -> str:
    """A 26-character id that sorts by time (ULID: 48 bits of milliseconds, 80 random bits)."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join([_ULID_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])


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
