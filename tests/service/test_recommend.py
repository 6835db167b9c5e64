"""/recommend on the real engine: what is in an answer, what never is, and what answers when the model cannot."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from semantic_ids.bundle import Bundle
from semantic_ids.prompt import window_start
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.service.engines import failing, instant, slow
from tests.service.running import Service, assert_problem, event, running
from tests.service.world import (
    BY_ID,
    ITEM_IDS,
    ITEMS,
    MAX_HISTORY,
    NUM_ITEMS,
    SPACE,
    eligible,
    ids_of,
    random_filter,
    random_ids,
    scores_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = list(ITEM_IDS[:5])
TOLERANCE = 1e-4


async def some_users(service: Service, rng: random.Random, count: int) -> dict[str, tuple[set[str], set[str], bool]]:
    """Users with random events; what each has seen, what is excluded, and whether there is a history."""
    users: dict[str, tuple[set[str], set[str], bool]] = {}
    for number in range(count):
        user_id = f"random-{number}"
        clicked, disliked = random_ids(rng, 60, unknown=False), random_ids(rng, 10, unknown=False)
        events = [event(user_id, item, rng.choice(["click", "purchase", "like"]), rng.random()) for item in clicked]
        events += [event(user_id, item, rng.choice(["dislike", "hide"]), rng.random()) for item in disliked]
        if events:
            await service.record(*events)
        users[user_id] = set(clicked), set(disliked), bool(clicked)
    return users


async def random_requests(service: Service, seed: int, rounds: int, at_once: int = 25) -> None:
    """Random requests, each answer held against the rules."""
    rng = random.Random(seed)
    users = await some_users(service, rng, 40)

    async def one(body: dict[str, Any]) -> None:
        answer = await service.recommend(**body)
        seen, excluded, has_history = users.get(body.get("user_id", ""), (set(), set(), False))
        inline = body.get("history")
        if inline is not None:
            seen, has_history = seen | set(inline), bool(set(inline[-MAX_HISTORY * 3 // 4 :]) & set(ITEM_IDS))
        denied = excluded | (seen if body["exclude_seen"] else set())
        allowed = eligible(body["filter"], denied)
        got = ids_of(answer)
        assert set(got) <= allowed
        assert len(set(got)) == len(got) == min(body["num_items"], len(allowed))
        assert [item["rank"] for item in answer["items"]] == list(range(1, len(got) + 1))
        for item in answer["items"]:
            known = BY_ID[item["item_id"]]
            assert item["sid"] == SPACE.format(known.codes)
            assert item["title"] == known.title
        expected_reason = None if has_history else "cold_start"
        if not allowed:
            expected_reason = "filter_matches_nothing"
        assert answer["reason"] == expected_reason
        assert answer["degraded"] == (expected_reason is not None)
        assert answer["source"] == ("fallback" if expected_reason else "model")
        scores = [item["score"] for item in answer["items"]]
        if expected_reason is None:
            assert scores == sorted(scores, reverse=True)
            assert max(scores) <= 0
        else:
            assert set(scores) <= {None}
        assert answer["ignored_items"] == list(dict.fromkeys(item for item in inline or () if item not in BY_ID))

    for _ in range(rounds):
        bodies = []
        for _ in range(at_once):
            body: dict[str, Any] = {
                "num_items": rng.choice([rng.randint(1, 10), rng.randint(1, 500)]),
                "filter": random_filter(rng),
                "exclude_seen": rng.random() < 0.8,
            }
            if rng.random() < 0.7:
                body["user_id"] = rng.choice([*users, "nobody"])
            if rng.random() < 0.5:
                body["history"] = random_ids(rng, rng.choice([3, 40]))
            bodies.append(body)
        await asyncio.gather(*map(one, bodies))


async def test_random_requests_get_exactly_the_legal_unseen_filtered_items(service: Service):
    await random_requests(service, seed=1, rounds=120)


async def test_random_requests_get_them_from_any_engine_that_follows_the_protocol(instant_service: Service):
    await random_requests(instant_service, seed=2, rounds=160)


async def test_an_answer_names_what_it_was_made_with(service: Service, bundle: Bundle):
    answer = await service.recommend(user_id=None, history=HISTORY, num_items=3)
    assert answer["versions"] == {"bundle": bundle.bundle_id, "catalog_epoch": 0, "prompt": 1}
    assert len(answer["recommendation_id"]) == 26
    assert set(answer["timings_ms"]) == {"history", "reasoning", "decode", "total"}
    assert 0 < answer["timings_ms"]["decode"] <= answer["timings_ms"]["total"]
    assert answer["timings_ms"]["reasoning"] == 0
    assert (answer["user_id"], answer["rationale"], answer["experiment"]) == (None, None, None)
    assert {item["source"] for item in answer["items"]} == {"model"}
    assert {item["propensity"] for item in answer["items"]} == {1.0}


async def test_recommendation_ids_are_unique_and_sort_by_time(service: Service):
    first = await service.recommend(history=HISTORY)
    await asyncio.sleep(0.002)
    second = await service.recommend(history=HISTORY)
    assert first["recommendation_id"] < second["recommendation_id"]


async def test_items_of_one_sid_are_all_reachable_with_one_score_the_popular_first(service: Service):
    answer = await service.recommend(history=HISTORY, num_items=500, exclude_seen=False)
    assert set(ids_of(answer)) == set(ITEM_IDS)
    by_sid: dict[str, list[dict[str, Any]]] = {}
    for item in answer["items"]:
        by_sid.setdefault(item["sid"], []).append(item)
    shared = [items for items in by_sid.values() if len(items) > 1]
    assert len(shared) > 20
    for items in shared:
        assert len({item["score"] for item in items}) == 1
        popularity = [BY_ID[item["item_id"]].popularity for item in items]
        assert popularity == sorted(popularity, reverse=True)


async def test_a_filter_never_changes_a_score(service: Service):
    rng = random.Random(3)
    for _ in range(30):
        history = random_ids(rng, 20, unknown=False) or HISTORY
        everything = scores_of(await service.recommend(history=history, num_items=500, exclude_seen=False))
        filtered = await service.recommend(history=history, num_items=500, filter=random_filter(rng))
        for item_id, score in scores_of(filtered).items():
            assert score == pytest.approx(everything[item_id], abs=TOLERANCE)


async def test_the_score_is_the_one_that_rerank_gives(service: Service):
    rng = random.Random(4)
    for _ in range(30):
        history = random_ids(rng, 20, unknown=False) or HISTORY
        recommended = scores_of(await service.recommend(history=history, num_items=20))
        reranked = await service.rerank(history=history, candidates=list(recommended))
        assert scores_of(reranked) == pytest.approx(recommended, abs=TOLERANCE)


async def test_scores_are_log_probabilities_of_sids(service: Service):
    """Over all SIDs, each counted once, they sum to one."""
    answer = await service.recommend(history=HISTORY, num_items=500, exclude_seen=False)
    of_sid = {item["sid"]: item["score"] for item in answer["items"]}
    assert sum(2.718281828459045**score for score in of_sid.values()) == pytest.approx(1.0, abs=TOLERANCE)


async def test_the_best_of_a_narrow_answer_lead_a_wide_one(service: Service):
    """The configured beam width is 20: asking for fewer items does not narrow the search."""
    ten = await service.recommend(history=HISTORY, num_items=10)
    twenty = await service.recommend(history=HISTORY, num_items=20)
    assert ids_of(ten) == ids_of(twenty)[:10]


async def test_a_stored_history_answers_as_the_same_one_inline(service: Service, user_id: str):
    await service.clicks(user_id, *HISTORY)
    stored, inline = await service.recommend(user_id=user_id), await service.recommend(history=HISTORY)
    assert ids_of(stored) == ids_of(inline)
    assert scores_of(stored) == pytest.approx(scores_of(inline), abs=TOLERANCE)


async def test_an_inline_history_replaces_the_stored_one_in_the_prompt(service: Service, user_id: str):
    await service.clicks(user_id, *ITEM_IDS[20:25])
    both = await service.recommend(user_id=user_id, history=HISTORY, exclude_seen=False)
    inline = await service.recommend(history=HISTORY, exclude_seen=False)
    assert ids_of(both) == ids_of(inline)


async def test_seen_is_the_union_of_stored_and_inline(service: Service, user_id: str):
    await service.clicks(user_id, *ITEM_IDS[20:25])
    answer = await service.recommend(user_id=user_id, history=HISTORY, num_items=500)
    assert set(ids_of(answer)) == set(ITEM_IDS) - set(HISTORY) - set(ITEM_IDS[20:25])


async def test_seen_items_come_back_when_they_are_not_excluded(service: Service, user_id: str):
    await service.clicks(user_id, *ITEM_IDS[20:25])
    answer = await service.recommend(user_id=user_id, history=HISTORY, num_items=500, exclude_seen=False)
    assert set(ids_of(answer)) == set(ITEM_IDS)


@pytest.mark.parametrize("event_type", ["dislike", "hide"])
@pytest.mark.parametrize("exclude_seen", [True, False])
async def test_disliked_and_hidden_items_are_never_recommended(
    service: Service, user_id: str, event_type: str, exclude_seen: bool
):
    await service.record(event(user_id, ITEM_IDS[9], event_type))
    inline = [*HISTORY, {"item_id": ITEM_IDS[10], "event_type": event_type}]
    answer = await service.recommend(user_id=user_id, history=inline, num_items=500, exclude_seen=exclude_seen)
    assert not {ITEM_IDS[9], ITEM_IDS[10]} & set(ids_of(answer))


async def test_dislikes_and_impressions_are_no_taste(service: Service):
    mixed = [
        {"item_id": ITEM_IDS[30], "event_type": "dislike"},
        *HISTORY,
        {"item_id": ITEM_IDS[31], "event_type": "impression", "timestamp": 5.0},
    ]
    liked = await service.recommend(history=HISTORY, filter={"exclude_items": [ITEM_IDS[30]]})
    assert ids_of(await service.recommend(history=mixed)) == ids_of(liked)


async def test_unknown_items_of_a_history_are_listed_wherever_they_stand(service: Service):
    long = ["gone-1", *HISTORY * 10, "gone-2", "gone-1", {"item_id": "gone-3", "event_type": "hide"}]
    answer = await service.recommend(history=long)
    assert answer["ignored_items"] == ["gone-1", "gone-2", "gone-3"]
    assert answer["source"] == "model"


async def test_a_long_history_is_cut_to_the_prompts_window(service: Service):
    long = list(ITEM_IDS[:50])
    window = long[window_start(len(long), MAX_HISTORY) :]
    assert 0 < len(window) <= MAX_HISTORY
    whole = await service.recommend(history=long, exclude_seen=False)
    assert ids_of(whole) == ids_of(await service.recommend(history=window, exclude_seen=False))


async def test_the_window_of_a_stored_history_counts_what_is_no_longer_stored(settings: Settings, user_id: str):
    async with running(settings.model_copy(update={"history_max_stored": 15})) as service:
        await service.clicks(user_id, *ITEM_IDS[:50])
        assert len(await service.history(user_id)) == 15
        stored = await service.recommend(user_id=user_id)
        assert ids_of(stored) == ids_of(await service.recommend(history=list(ITEM_IDS[:50])))


@pytest.mark.parametrize("body", [{}, {"history": []}, {"user_id": "nobody"}, {"history": ["gone"]}])
async def test_nobody_known_is_a_cold_start_with_what_is_popular(
    service: Service, bundle: Bundle, body: dict[str, Any]
):
    answer = await service.recommend(**body, num_items=7)
    assert (answer["source"], answer["degraded"], answer["reason"]) == ("fallback", True, "cold_start")
    assert ids_of(answer) == [bundle.catalog.item_ids[rank] for rank in bundle.catalog.by_popularity[:7]]
    assert all(item["score"] is None and item["source"] == "fallback" for item in answer["items"])


async def test_a_cold_start_obeys_the_filter(service: Service):
    answer = await service.recommend(filter={"any_categories": ["Beauty > Hair Care"]}, num_items=500)
    assert set(ids_of(answer)) == eligible({"any_categories": ["Beauty > Hair Care"]})
    assert 0 < len(answer["items"]) < NUM_ITEMS


@pytest.mark.parametrize(
    "nothing",
    [
        {"include_items": ["gone"]},
        {"include_items": [ITEM_IDS[0]], "exclude_items": [ITEM_IDS[0]]},
        {"any_categories": ["Hair Care"]},  # a part of a name is no node
        {"any_categories": ["Toys"], "none_categories": ["Toys"]},
    ],
)
async def test_a_filter_that_leaves_nothing_is_an_answer(service: Service, nothing: dict[str, Any]):
    for body in ({"history": HISTORY}, {}):
        answer = await service.recommend(**body, filter=nothing)
        assert answer["items"] == []
        assert (answer["degraded"], answer["reason"]) == (True, "filter_matches_nothing")


async def test_empty_filter_lists_restrict_nothing(service: Service):
    empty: dict[str, Any] = {name: [] for name in ("include_items", "exclude_items", "any_categories")}
    assert ids_of(await service.recommend(history=HISTORY, filter=empty)) == ids_of(
        await service.recommend(history=HISTORY)
    )


async def test_a_category_matches_its_path_and_every_path_below_it(service: Service):
    for category in ("Beauty", "Beauty > Hair Care", "Beauty > Hair Care > Shampoo", "Beauty Tools"):
        answer = await service.recommend(
            history=HISTORY, exclude_seen=False, num_items=500, filter={"any_categories": [category]}
        )
        expected = {
            item.item_id for item in ITEMS if any(f"{path} > ".startswith(f"{category} > ") for path in item.categories)
        }
        assert set(ids_of(answer)) == expected


async def test_get_is_post_with_defaults(service: Service, user_id: str):
    await service.clicks(user_id, *HISTORY)
    got = await service.http.get("/recommend", params={"user_id": user_id, "num_items": 7})
    assert got.status_code == 200
    posted = await service.recommend(user_id=user_id, num_items=7)
    assert ids_of(got.json()) == ids_of(posted)
    assert set(got.json()) == set(posted)
    anonymous = (await service.http.get("/recommend")).json()
    assert (anonymous["reason"], len(anonymous["items"])) == ("cold_start", 10)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"reasoning": "on"}, "body.reasoning"),
    ],
)
async def test_what_this_version_cannot_do_is_refused_not_ignored(service: Service, body: dict[str, Any], path: str):
    document = assert_problem(await service.post("/recommend", body), 422, "invalid-request")
    assert [error["path"] for error in document["errors"]] == [path]


async def test_reasoning_off_and_auto_are_one_answer_here(service: Service):
    answers = [await service.recommend(history=HISTORY, reasoning=mode) for mode in ("auto", "off")]
    assert ids_of(answers[0]) == ids_of(answers[1])


class TestDeadline:
    """A late engine."""

    async def test_by_body_header_or_both_alike(self, settings: Settings):
        async with running(settings, slow(30.0)) as service:
            for body, headers in (
                ({"deadline_ms": 150}, {}),
                ({}, {"x_deadline_ms": "150"}),
                ({"deadline_ms": 150}, {"x_deadline_ms": "150"}),
            ):
                start = time.perf_counter()
                response = await service.post("/recommend", {"history": HISTORY, **body}, **headers)
                assert 0.14 < time.perf_counter() - start < 0.4
                answer = response.json()
                assert (answer["source"], answer["degraded"], answer["reason"]) == ("fallback", True, "deadline")
                assert len(answer["items"]) == 10
                assert not set(ids_of(answer)) & set(HISTORY)
            got = await service.http.get("/recommend", params={"user_id": "u"}, headers={"x-deadline-ms": "150"})
            assert got.status_code == 200

    async def test_a_contradiction_is_refused(self, instant_service: Service):
        response = await instant_service.post("/recommend", {"deadline_ms": 150}, x_deadline_ms="151")
        assert "150" in assert_problem(response, 422, "invalid-request")["detail"]
        assert "151" in response.json()["detail"]

    @pytest.mark.parametrize("deadline_ms", [9, 60_001])
    async def test_its_bounds_hold_in_body_and_header(self, instant_service: Service, deadline_ms: int):
        assert_problem(await instant_service.post("/recommend", {"deadline_ms": deadline_ms}), 422, "invalid-request")
        response = await instant_service.post("/recommend", {}, x_deadline_ms=str(deadline_ms))
        document = assert_problem(response, 422, "invalid-request")
        assert document["errors"][0]["path"] == "header.x-deadline-ms"

    async def test_the_default_is_a_second(self, settings: Settings):
        async with running(settings, slow(30.0)) as service:
            start = time.perf_counter()
            answer = (await service.post("/recommend", {"history": HISTORY})).json()
            assert 0.95 < time.perf_counter() - start < 1.4
            assert answer["reason"] == "deadline"

    async def test_it_covers_the_history_too(self, bundles: Path, tmp_path: Path):
        server = EmbeddedRedis(tmp_path)
        settings = Settings(bundles=bundles, redis_url=await server.start(), redis_timeout_s=20)
        async with running(settings, instant) as service:
            await service.state.redis.client_pause(1_000)
            start = time.perf_counter()
            answer = await service.recommend(user_id="u", deadline_ms=100)
            assert time.perf_counter() - start < 0.4
            assert (answer["reason"], len(answer["items"])) == ("history_unavailable", 10)
        await server.stop()


async def test_a_failing_engine_is_answered_by_the_fallback(settings: Settings):
    async with running(settings, failing()) as service:
        answer = await service.recommend(history=HISTORY, num_items=7)
        assert (answer["source"], answer["degraded"], answer["reason"]) == ("fallback", True, "engine_unavailable")
        assert len(set(ids_of(answer))) == 7
        assert not set(ids_of(answer)) & set(HISTORY)


class TestRedisLost:
    """A Redis that is really killed."""

    async def test_recommendations_degrade_events_are_refused_and_both_recover(self, bundles: Path, tmp_path: Path):
        server = EmbeddedRedis(tmp_path)
        settings = Settings(bundles=bundles, redis_url=await server.start())
        async with running(settings, instant) as service:
            await service.clicks("u", *HISTORY)
            await kill(server.pid)

            answer = await service.recommend(user_id="u")
            assert (answer["source"], answer["degraded"], answer["reason"]) == ("fallback", True, "history_unavailable")
            assert len(answer["items"]) == 10
            answer = await service.recommend(user_id="u", history=HISTORY)
            assert (answer["source"], answer["degraded"], answer["reason"]) == ("model", True, "history_unavailable")
            assert not set(ids_of(answer)) & set(HISTORY)
            assert (await service.rerank(user_id="u", candidates=HISTORY))["reason"] == "history_unavailable"
            for response in (
                await service.post("/events", {"events": [event("u", ITEM_IDS[20])]}),
                await service.http.get("/users/u/history"),
                await service.http.delete("/users/u"),
            ):
                document = assert_problem(response, 503, "history-unavailable")
                assert int(response.headers["retry-after"]) >= 1
                assert "sidrec:" not in document["detail"]
                assert str(tmp_path) not in response.text
            assert_problem(await service.http.get("/health/ready"), 503, "not-ready")

            await server.start()
            assert (await service.http.get("/health/ready")).status_code == 200
            assert await service.history("u") == HISTORY
            assert (await service.recommend(user_id="u"))["reason"] is None
        await server.stop()

    async def test_the_embedded_one_comes_back_with_every_acknowledged_event(self, settings: Settings):
        async with running(settings, instant) as service:
            await service.clicks("u", *HISTORY)
            await kill((await service.state.redis.info("server"))["process_id"])
            give_up_at = time.monotonic() + 15
            while (answer := await service.recommend(user_id="u"))["reason"] is not None:
                assert answer["reason"] == "history_unavailable"
                assert time.monotonic() < give_up_at
                await asyncio.sleep(0.02)
            assert await service.history("u") == HISTORY
            assert (await service.record(event("u", ITEM_IDS[20])))["accepted"] == 1


async def kill(pid: int | None) -> None:
    """SIGKILL, and wait until it has taken effect."""
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
