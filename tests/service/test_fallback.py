"""The fallback policy: lists in order, each under the request's filter; and the model's last answers."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from semantic_ids.bundle import Bundle
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import Ranks
from service.engine.base import DecodeRequest, DecodeResult, EngineUnavailableError, ThoughtListener
from service.fallback import POLICY, AnswerCache, Asked, FallbackSource, cache_key, fallback_items
from service.settings import Settings
from tests.service.engines import InstantEngine
from tests.service.running import Service, event, running
from tests.service.world import ITEM_IDS, eligible, ids_of, random_filter, random_ids

NOBODY = np.empty(0, np.int64)


def everything(bundle: Bundle) -> ItemFilter:
    return ItemFilter.of(len(bundle.catalog))


def fallback_ranks(
    bundle: Bundle, history: Ranks, item_filter: ItemFilter, count: int, *policy: FallbackSource
) -> Ranks:
    found = fallback_items(Asked(bundle, history), item_filter, count, policy or POLICY)
    return np.array([item.rank for item in found], np.int64)


def neighbours_of(bundle: Bundle, rank: int) -> list[int]:
    return [int(other) for other in bundle.neighbours.ranks[4 * rank : 4 * rank + 4]]


def test_the_lists_follow_each_other_and_no_item_comes_twice(bundle: Bundle):
    catalog = bundle.catalog
    rank = next(rank for rank in range(len(catalog)) if len(catalog.categories_of(rank)) == 1)
    (category,) = catalog.categories_of(rank)
    cached, close = np.array([3, 140, 77]), neighbours_of(bundle, rank)
    alike = sorted(catalog.ranks_in_category(category).tolist(), key=lambda one: (-catalog.popularity[one], one))
    expected = list(dict.fromkeys([*cached.tolist(), *close, *alike, *catalog.by_popularity.tolist()]))
    found = fallback_items(Asked(bundle, np.array([rank]), cached), everything(bundle), len(catalog))
    assert [item.rank for item in found] == expected
    names = [item.source for item in found]
    assert list(dict.fromkeys(names)) == ["cache", "cooccurrence", "category_popularity", "popularity"]
    assert names == sorted(names, key=list(dict.fromkeys(names)).index)
    assert names.count("cache") == 3


def test_categories_get_places_by_their_weight_in_the_history(bundle: Bundle):
    """Highest averages: weights 0.8 + 0.64 = 1.44 and 1, so turns at 0.69, 1.39, 2.08, … and at 1, 2, 3, …"""
    catalog = bundle.catalog
    single = [rank for rank in range(len(catalog)) if len(catalog.categories_of(rank)) == 1]
    first = single[0]
    (name,) = catalog.categories_of(first)
    second = next(rank for rank in single if catalog.categories_of(rank)[0].split(" ")[0] != name.split(" ")[0])
    other = catalog.categories_of(second)[0]
    twin = next(rank for rank in single if rank != first and catalog.categories_of(rank) == [name])
    (source,) = (source for source in POLICY if source.name == "category_popularity")
    (ranks,) = source.ranks(Asked(bundle, np.array([first, twin, second])))

    def popular(category: str) -> list[int]:
        return sorted(catalog.ranks_in_category(category).tolist(), key=lambda one: (-catalog.popularity[one], one))

    turns = [((place + 1) / 1.44, rank) for place, rank in enumerate(popular(name))]
    turns += [((place + 1) / 1.0, rank) for place, rank in enumerate(popular(other))]
    assert ranks.tolist() == [rank for _, rank in sorted(turns, key=lambda turn: turn[0])]


def test_the_newest_item_of_the_history_counts_most(bundle: Bundle):
    # weights are 4, 3, 2, 1 by place; one step back counts 0.8: 4 > 3.2 > 3 > 2.4 > 2 > 1.6 > 1 > 0.8
    newest = next(
        rank for rank in range(4, 150) if not set(neighbours_of(bundle, 3)) & set(neighbours_of(bundle, rank))
    )
    old, new = neighbours_of(bundle, 3), neighbours_of(bundle, newest)
    expected = [rank for pair in zip(new, old, strict=True) for rank in pair]
    assert fallback_ranks(bundle, np.array([3, newest]), everything(bundle), 8).tolist() == expected


def test_nobody_known_gets_what_is_popular(bundle: Bundle):
    found = fallback_ranks(bundle, NOBODY, everything(bundle), 20)
    assert found.tolist() == bundle.catalog.by_popularity[:20].tolist()
    popularity = bundle.catalog.popularity[found]
    assert popularity.tolist() == sorted(popularity, reverse=True)


@pytest.mark.parametrize("seed", range(50))
def test_the_answer_is_full_eligible_and_without_repeats(bundle: Bundle, seed: int):
    rng = np.random.default_rng(seed)
    num_items = len(bundle.catalog)
    item_filter = ItemFilter.of(
        num_items,
        allow=rng.integers(0, num_items, rng.integers(1, 300)) if seed % 2 else None,
        deny=rng.integers(0, num_items, rng.integers(0, 300)),
    )
    history = rng.integers(0, num_items, rng.integers(0, 30))
    count = int(rng.integers(1, 501))
    found = fallback_ranks(bundle, history, item_filter, count)
    assert len(set(found.tolist())) == len(found) == min(count, item_filter.num_eligible)
    assert item_filter.contains(found).all()


def test_a_policy_is_data(bundle: Bundle):
    def last(_asked: Asked) -> Iterator[Ranks]:
        yield np.array([9, 8])
        yield np.array([8, 7, 6])

    policy = FallbackSource("last", last), *POLICY
    assert fallback_ranks(bundle, NOBODY, everything(bundle), 4, *policy).tolist() == [9, 8, 7, 6]


def test_a_list_is_made_only_as_far_as_it_is_needed(bundle: Bundle):
    def endless(_asked: Asked) -> Iterator[Ranks]:
        yield np.array([5])
        raise AssertionError("nobody needs more")

    assert fallback_ranks(bundle, NOBODY, everything(bundle), 1, FallbackSource("x", endless)).tolist() == [5]


class TestAnswerCache:
    """What is kept, for how long, and for whom."""

    def test_the_least_recently_used_go_first(self):
        cache = AnswerCache(2, ttl_s=60)
        for name in (b"a", b"b"):
            cache.put(name, ["x"])
        assert cache.get(b"a") == ("x",)
        cache.put(b"c", ["x"])
        assert [len(cache.get(name)) for name in (b"a", b"b", b"c")] == [1, 0, 1]
        assert len(cache) == 2

    def test_nothing_is_kept_where_nothing_may_be(self):
        cache = AnswerCache(0, ttl_s=60)
        cache.put(b"a", ["x"])
        assert cache.get(b"a") == ()

    def test_an_answer_gets_too_old(self):
        now = 0.0
        cache = AnswerCache(2, ttl_s=60, clock=lambda: now)
        cache.put(b"a", ["x"])
        now = 59.9
        assert cache.get(b"a") == ("x",)
        now = 60.0
        assert cache.get(b"a") == ()
        assert len(cache) == 0

    def test_items_are_withdrawn_and_answers_forgotten(self):
        cache = AnswerCache(2, ttl_s=60)
        cache.put(b"a", ["x", "y", "z"])
        cache.withdraw(b"a", ["y"])
        cache.withdraw(b"b", ["y"])
        assert cache.get(b"a") == ("x", "z")
        cache.forget(b"a")
        cache.forget(b"a")
        assert cache.get(b"a") == ()

    def test_keys_never_meet(self):
        keys = [
            cache_key(tenant, user_id, history)
            for tenant in ("", "a", "user")
            for user_id in (None, "", "a", "b")
            for history in (None, [], ["a"], ["a", "b"], ["ab"], ["a", "", "b"])
            if not (user_id is not None and history is not None)
        ]
        anonymous = [cache_key(tenant, None, []) for tenant in ("", "a", "user")]
        assert len(set(keys)) == len(keys) - len(anonymous), "only no history and an empty one are alike"
        assert cache_key("a", "u", ["x"]) == cache_key("a", None, ["x"]), "an inline history replaces the stored one"


class MoodyEngine(InstantEngine):
    """Answers as told: `well`, `failing`, `late`, or wrongly: `short`, `foreign`, `repeating`."""

    mood = "well"

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        if self.mood == "failing":
            raise EngineUnavailableError("in a mood")
        if self.mood == "late":
            await asyncio.sleep(60)
        result = await super().decode(request, on_thought)
        ranks = result.ranks[::-1].copy()
        if self.mood == "short":
            ranks = ranks[:2]
        if self.mood == "repeating":
            ranks[1:] = ranks[0]
        if self.mood == "foreign":
            ranks[::2] = request.item_filter.num_items + 5
            if len(request.item_filter.deny):
                ranks[1::2] = request.item_filter.deny[0]
        return DecodeResult(ranks, -0.01 * np.arange(1, len(ranks) + 1, dtype=np.float32))


def moody(bundle: Bundle, _settings: Settings, _metrics: object) -> MoodyEngine:
    return MoodyEngine(bundle)


def put_in_mood(service: Service, mood: str) -> None:
    engine = service.state.engine
    assert isinstance(engine, MoodyEngine)
    engine.mood = mood


def unbroken(settings: Settings) -> Settings:
    return settings.model_copy(update={"breaker_failures": 1_000_000})


async def test_the_last_answer_of_the_model_leads_the_fallback(settings: Settings, user_id: str):
    async with running(unbroken(settings), moody) as service:
        await service.clicks(user_id, *ITEM_IDS[:5])
        usual = await service.recommend(user_id=user_id, num_items=10)
        put_in_mood(service, "failing")
        cached = await service.recommend(user_id=user_id, num_items=10)
        assert (cached["source"], cached["degraded"], cached["reason"]) == ("cache", True, "engine_unavailable")
        assert ids_of(cached) == ids_of(usual)
        assert {(item["source"], item["score"]) for item in cached["items"]} == {("cache", None)}

        put_in_mood(service, "late")
        late = await service.recommend(user_id=user_id, num_items=10, deadline_ms=100)
        assert (late["source"], late["reason"], ids_of(late)) == ("cache", "deadline", ids_of(usual))

        await service.record(event(user_id, ids_of(usual)[0], "hide"), event(user_id, ids_of(usual)[1]))
        put_in_mood(service, "failing")
        again = await service.recommend(user_id=user_id, num_items=30)
        assert ids_of(again)[:8] == ids_of(usual)[2:10]
        sources = [item["source"] for item in again["items"]]
        assert sources == sorted(sources)
        assert set(sources) == {"cache", "fallback"}
        samples = service.state.metrics.registry
        assert samples.get_sample_value("sidrec_fallback_items_total", {"source": "cache"}) >= 28  # type: ignore[operator]

        other = await service.recommend(user_id=f"{user_id}-other", history=list(ITEM_IDS[:4]))
        assert other["source"] == "fallback", "nobody gets what was another's"
        assert (await service.http.delete(f"/users/{user_id}")).status_code == 204
        erased = await service.recommend(user_id=user_id, history=list(ITEM_IDS[:3]))
        assert erased["source"] == "fallback"


async def test_what_is_done_since_the_last_answer_counts_when_redis_is_gone(settings: Settings, user_id: str):
    async with running(settings, moody) as service:
        await service.clicks(user_id, *ITEM_IDS[:5])
        usual = ids_of(await service.recommend(user_id=user_id, num_items=10))
        await service.record(event(user_id, usual[0], "dislike"))
        await service.state.redis.client_pause(3_000)
        answer = await service.recommend(user_id=user_id, num_items=5, deadline_ms=150)
        assert (answer["source"], answer["reason"]) == ("cache", "history_unavailable")
        assert ids_of(answer) == usual[1:6]
        await asyncio.sleep(3)


async def test_explored_answers_are_not_kept(settings: Settings, user_id: str):
    async with running(unbroken(settings)) as service:
        await service.clicks(user_id, *ITEM_IDS[:5])
        await service.recommend(user_id=user_id, exploration=0.5)
        recommender = service.state.deployments.current.recommender
        assert len(recommender._answers) == 0
        await service.recommend(user_id=user_id)
        assert len(recommender._answers) == 1


@pytest.mark.parametrize("mood", ["short", "foreign", "repeating"])
async def test_a_wrong_answer_of_the_model_is_repaired(settings: Settings, mood: str):
    async with running(unbroken(settings), moody) as service:
        put_in_mood(service, mood)
        answer = await service.recommend(history=list(ITEM_IDS[:5]), num_items=12)
        assert (answer["degraded"], answer["reason"]) == (True, "model_output_repaired")
        assert_in_full(answer, set(ITEM_IDS) - set(ITEM_IDS[:5]), 12)
        reranked = await service.rerank(history=list(ITEM_IDS[:5]), candidates=list(ITEM_IDS[20:29]))
        assert sorted(ids_of(reranked)) == sorted(ITEM_IDS[20:29])
        assert reranked["reason"] == "model_output_repaired"


def assert_in_full(answer: dict[str, Any], allowed: set[str], num_items: int) -> None:
    """Eligible, unseen, unique, in full number; what has no score follows what has one."""
    got = ids_of(answer)
    assert set(got) <= allowed
    assert len(set(got)) == len(got) == min(num_items, len(allowed))
    assert [item["rank"] for item in answer["items"]] == list(range(1, len(got) + 1))
    for item in answer["items"]:
        assert (item["score"] is None) == (item["source"] != "model")
    order = {"model": 0, "cache": 1, "fallback": 2}
    places = [order[item["source"]] for item in answer["items"]]
    assert places == sorted(places)
    if got:
        assert answer["source"] == answer["items"][0]["source"]


async def test_whatever_the_degradation_items_are_eligible_unseen_unique_and_in_full_number(settings: Settings):
    rng = random.Random(11)
    async with running(unbroken(settings), moody) as service:
        users = {f"user-{number}": random_ids(rng, 40, unknown=False) for number in range(6)}
        for clicker, clicked in users.items():
            await service.clicks(clicker, *clicked)
        for _ in range(250):
            mood = rng.choice(["well", "well", "failing", "late", "short", "foreign", "repeating"])
            put_in_mood(service, mood)
            user_id, inline = rng.choice([*users, None]), None
            if user_id is None or rng.random() < 0.3:
                inline = random_ids(rng, 20)
            body: dict[str, Any] = {
                "user_id": user_id,
                "history": inline,
                "num_items": rng.choice([1, 10, 60, 500]),
                "filter": random_filter(rng),
                "exclude_seen": rng.random() < 0.8,
                "deadline_ms": 30 if mood == "late" else 60_000,
            }
            answer = await service.recommend(**{name: value for name, value in body.items() if value is not None})
            seen = set(users.get(user_id or "", [])) | set(inline or [])
            assert_in_full(answer, eligible(body["filter"], seen if body["exclude_seen"] else ()), body["num_items"])
