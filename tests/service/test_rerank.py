"""/rerank: every candidate once, best first."""

import asyncio
import random
from typing import Any

import pytest

from service.settings import Settings
from tests.service.engines import failing, slow
from tests.service.running import Service, assert_problem, running
from tests.service.world import BY_ID, ITEM_IDS, ids_of, random_ids

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = list(ITEM_IDS[:5])


async def test_every_answer_is_a_permutation_with_the_unknown_last_as_given(service: Service):
    rng = random.Random(1)

    async def one(candidates: list[str], body: dict[str, Any]) -> None:
        answer = await service.rerank(candidates=candidates, **body)
        assert sorted(ids_of(answer)) == sorted(candidates)
        assert [item["rank"] for item in answer["items"]] == list(range(1, len(candidates) + 1))
        assert [item["known"] for item in answer["items"]] == [item_id in BY_ID for item_id in ids_of(answer)]
        known = [item for item in answer["items"] if item["known"]]
        assert answer["items"][: len(known)] == known
        unknown = answer["items"][len(known) :]
        assert [item["item_id"] for item in unknown] == [item for item in candidates if item not in BY_ID]
        assert {item["score"] for item in unknown} <= {None}
        if answer["source"] == "model":
            scores = [item["score"] for item in known]
            assert scores == sorted(scores, reverse=True)

    for _ in range(20):
        batch = []
        for _ in range(25):
            unique = list(dict.fromkeys([*random_ids(rng, 150), rng.choice([ITEM_IDS[0], "gone"])]))
            rng.shuffle(unique)
            batch.append(one(unique, rng.choice([{}, {"history": random_ids(rng, 30)}, {"user_id": "nobody"}])))
        await asyncio.gather(*batch)


async def test_seen_items_are_ranked_like_any_other(service: Service, user_id: str):
    await service.clicks(user_id, *HISTORY)
    answer = await service.rerank(user_id=user_id, candidates=HISTORY)
    assert answer["source"] == "model"
    assert all(item["known"] and item["score"] < 0 for item in answer["items"])


async def test_the_order_given_does_not_matter_beyond_ties(service: Service):
    candidates = list(ITEM_IDS[:60])
    answers = [await service.rerank(history=HISTORY, candidates=order) for order in (candidates, candidates[::-1])]
    assert ids_of(answers[0]) == ids_of(answers[1])


async def test_the_largest_request_is_answered(service: Service):
    candidates = [*ITEM_IDS, *(f"gone-{number}" for number in range(500 - len(ITEM_IDS)))]
    assert len((await service.rerank(history=HISTORY, candidates=candidates))["items"]) == 500


async def test_only_unknown_candidates_stay_in_order(service: Service):
    answer = await service.rerank(history=HISTORY, candidates=["z", "a", "m"])
    assert ids_of(answer) == ["z", "a", "m"]
    assert not answer["degraded"]


async def test_a_cold_start_ranks_by_popularity_and_equal_ones_as_given(service: Service):
    answer = await service.rerank(candidates=["gone", *ITEM_IDS[:60]])
    assert (answer["source"], answer["degraded"], answer["reason"]) == ("fallback", True, "cold_start")
    by_popularity = sorted(ITEM_IDS[:60], key=lambda item_id: -BY_ID[item_id].popularity)
    assert ids_of(answer) == [*by_popularity, "gone"]
    assert {item["score"] for item in answer["items"]} == {None}


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["B1", "B2", "B1"], "'B1' appears more than once"),
        ([f"gone-{number}" for number in range(501)], "at most 500 items"),
        ([], "at least 1 item"),
        ([""], "at least 1 character"),
        (["x" * 129], "at most 128 characters"),
        ([1], "valid string"),
        ("B1", "valid list"),
    ],
)
async def test_bad_candidates_are_refused(service: Service, candidates: Any, message: str):
    response = await service.post("/rerank", {"history": HISTORY, "candidates": candidates})
    (error,) = assert_problem(response, 422, "invalid-request")["errors"]
    assert error["path"].startswith("body")
    assert message in error["message"]


@pytest.mark.parametrize(
    "unknown_field", [{"num_items": 3}, {"filter": {}}, {"exclude_seen": True}, {"diversity": 0.0}]
)
async def test_fields_of_recommend_are_unknown_here(service: Service, unknown_field: dict[str, Any]):
    response = await service.post("/rerank", {"candidates": ["a"], **unknown_field})
    document = assert_problem(response, 422, "invalid-request")
    assert document["errors"][0]["path"] == f"body.{next(iter(unknown_field))}"


async def test_reasoning_on_is_refused(service: Service):
    assert_problem(await service.post("/rerank", {"candidates": ["a"], "reasoning": "on"}), 422, "invalid-request")


async def test_a_late_engine_leaves_popularity(settings: Settings):
    async with running(settings, slow(30.0)) as late:
        answer = await late.rerank(history=HISTORY, candidates=list(ITEM_IDS[:9]), deadline_ms=100)
        assert (answer["source"], answer["reason"], len(answer["items"])) == ("fallback", "deadline", 9)
        response = await late.post(
            "/rerank", {"history": HISTORY, "candidates": list(ITEM_IDS[:9])}, x_deadline_ms="100"
        )
        assert response.json()["reason"] == "deadline"


async def test_a_failing_engine_leaves_popularity(settings: Settings):
    async with running(settings, failing()) as service:
        answer = await service.rerank(history=HISTORY, candidates=["gone", *ITEM_IDS[:9]])
        assert (answer["source"], answer["reason"], len(answer["items"])) == ("fallback", "engine_unavailable", 10)
