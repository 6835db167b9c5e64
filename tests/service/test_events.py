"""/events: what is stored, what is refused, and what the next request knows."""

import random
from typing import Any

import pytest

from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import Service, assert_problem, event, running
from tests.service.world import ITEM_IDS, ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

STORED = {"accepted": 1, "duplicates": 0, "rejected": []}


async def test_accepted_duplicate_and_rejected_are_told_apart(instant_service: Service, user_id: str):
    known, unknown = event(user_id, ITEM_IDS[0]), event(user_id, "gone")
    answer = await instant_service.record(unknown, known, known, unknown)
    assert answer == {
        "accepted": 1,
        "duplicates": 1,
        "rejected": [{"index": 0, "reason": "unknown_item"}, {"index": 3, "reason": "unknown_item"}],
    }
    assert await instant_service.history(user_id) == [ITEM_IDS[0]]


async def test_sending_again_changes_nothing(instant_service: Service, user_id: str):
    batch = [event(user_id, item_id, timestamp=time) for time, item_id in enumerate(ITEM_IDS[:9])]
    assert (await instant_service.record(*batch))["accepted"] == 9
    assert await instant_service.record(*batch) == {"accepted": 0, "duplicates": 9, "rejected": []}
    assert await instant_service.history(user_id) == list(ITEM_IDS[:9])


async def test_only_rejected_events_are_an_answer_too(instant_service: Service):
    answer = await instant_service.record(event("u", "gone"))
    assert (answer["accepted"], answer["duplicates"], len(answer["rejected"])) == (0, 0, 1)


async def test_the_next_recommendation_knows(service: Service, user_id: str):
    rng = random.Random(1)
    for item_id in rng.sample(ITEM_IDS, 30):
        before = await service.recommend(user_id=user_id, num_items=500)
        assert item_id in ids_of(before)
        assert await service.record(event(user_id, item_id)) == STORED
        after = await service.recommend(user_id=user_id, num_items=500)
        assert set(ids_of(after)) == set(ids_of(before)) - {item_id}
        assert after["reason"] is None


@pytest.mark.parametrize(
    ("event_type", "in_history", "excluded"),
    [
        ("purchase", True, True),
        ("click", True, True),
        ("like", True, True),
        ("dislike", False, True),
        ("hide", False, True),
        ("impression", False, False),
    ],
)
async def test_what_each_type_does(
    instant_service: Service, user_id: str, event_type: str, in_history: bool, excluded: bool
):
    assert await instant_service.record(event(user_id, ITEM_IDS[0], event_type)) == STORED
    assert (ITEM_IDS[0] in await instant_service.history(user_id)) == in_history
    answer = await instant_service.recommend(user_id=user_id, num_items=500)
    assert (ITEM_IDS[0] not in ids_of(answer)) == excluded
    assert (answer["reason"] == "cold_start") == (not in_history)


async def test_events_of_many_users_in_one_batch(instant_service: Service):
    users = [f"crowd-{number}" for number in range(50)]
    answer = await instant_service.record(*(event(user, item_id) for item_id in ITEM_IDS[:4] for user in users))
    assert answer["accepted"] == 200
    assert [await instant_service.history(user) for user in users] == [list(ITEM_IDS[:4])] * 50


async def test_a_thousand_events_are_taken_and_one_more_refused(instant_service: Service, user_id: str):
    thousand = [event(user_id, ITEM_IDS[number % 150], timestamp=number) for number in range(1_000)]
    assert (await instant_service.record(*thousand))["accepted"] == 1_000
    response = await instant_service.post("/events", {"events": [*thousand, event(user_id, ITEM_IDS[0])]})
    (error,) = assert_problem(response, 422, "invalid-request")["errors"]
    assert error["path"] == "body.events"
    assert "1000" in error["message"]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "1e13", '"1"', "true", "null"])
async def test_a_timestamp_that_is_no_time_is_refused(instant_service: Service, user_id: str, literal: str):
    content = (
        f'{{"events": [{{"event_id": "e", "user_id": "{user_id}", "item_id": "{ITEM_IDS[0]}", '
        f'"event_type": "click", "timestamp": {literal}}}]}}'
    )
    response = await instant_service.http.post("/events", content=content, headers={"content-type": "application/json"})
    document = assert_problem(response, 422, "invalid-request")
    assert document["errors"][0]["path"] == "body.events.0.timestamp"
    assert await instant_service.history(user_id) == []


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"event_type": "buy"}, "event_type"),
        ({"event_type": "CLICK"}, "event_type"),
        ({"event_id": ""}, "event_id"),
        ({"event_id": "x" * 129}, "event_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"item_id": 1}, "item_id"),
        ({"recommendation_id": 1}, "recommendation_id"),
        ({"price": 1.0}, "price"),
    ],
)
async def test_one_bad_event_refuses_the_batch_and_stores_nothing(
    instant_service: Service, user_id: str, change: dict[str, Any], path: str
):
    batch = [event(user_id, ITEM_IDS[0]), event(user_id, ITEM_IDS[1]) | change]
    document = assert_problem(await instant_service.post("/events", {"events": batch}), 422, "invalid-request")
    assert [error["path"] for error in document["errors"]] == [f"body.events.1.{path}"]
    assert await instant_service.history(user_id) == []


@pytest.mark.parametrize("missing", ["event_id", "user_id", "item_id", "event_type", "timestamp"])
async def test_a_missing_field_is_named(instant_service: Service, missing: str):
    body = {name: value for name, value in event("u", ITEM_IDS[0]).items() if name != missing}
    document = assert_problem(await instant_service.post("/events", {"events": [body]}), 422, "invalid-request")
    assert document["errors"] == [{"path": f"body.events.0.{missing}", "message": "Field required"}]


async def test_no_events_are_refused(instant_service: Service):
    assert_problem(await instant_service.post("/events", {"events": []}), 422, "invalid-request")


async def test_a_whole_number_of_seconds_and_the_id_of_the_recommendation_are_fine(
    instant_service: Service, user_id: str
):
    shown = await instant_service.recommend(history=[ITEM_IDS[0]])
    one = event(user_id, ITEM_IDS[1], timestamp=1763760000, recommendation_id=shown["recommendation_id"])
    assert await instant_service.record(one) == STORED


async def test_restarts_of_the_service_lose_nothing(settings: Settings):
    sent = [event("u", item_id, timestamp=time) for time, item_id in enumerate(ITEM_IDS[:30])]
    for start in range(0, 30, 10):
        async with running(settings, instant) as service:
            assert (await service.record(*sent[: start + 10]))["accepted"] == 10
    async with running(settings, instant) as service:
        assert await service.history("u") == list(ITEM_IDS[:30])
        answer = await service.recommend(user_id="u", num_items=500)
        assert set(ids_of(answer)) == set(ITEM_IDS[30:])
