"""/users: the stored history, and its end."""

import pytest

from tests.service.running import Service, assert_problem, event
from tests.service.world import ITEM_IDS, ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_history_is_oldest_first_with_time_and_type(instant_service: Service, user_id: str):
    await instant_service.record(
        event(user_id, ITEM_IDS[1], "purchase", 20.5), event(user_id, ITEM_IDS[0], "like", 10.25)
    )
    assert (await instant_service.http.get(f"/users/{user_id}/history")).json() == {
        "user_id": user_id,
        "events": [
            {"item_id": ITEM_IDS[0], "timestamp": 10.25, "event_type": "like"},
            {"item_id": ITEM_IDS[1], "timestamp": 20.5, "event_type": "purchase"},
        ],
    }


async def test_an_unknown_user_has_an_empty_history(instant_service: Service):
    assert (await instant_service.http.get("/users/nobody/history")).json() == {"user_id": "nobody", "events": []}


async def test_an_erased_user_is_a_new_user(instant_service: Service, user_id: str):
    first = event(user_id, ITEM_IDS[0])
    await instant_service.record(first, event(user_id, ITEM_IDS[1], "hide"), event(f"{user_id}-other", ITEM_IDS[2]))
    erased = await instant_service.http.delete(f"/users/{user_id}")
    assert (erased.status_code, erased.content) == (204, b"")

    assert await instant_service.history(user_id) == []
    answer = await instant_service.recommend(user_id=user_id, num_items=500)
    assert answer["reason"] == "cold_start"
    assert set(ids_of(answer)) == set(ITEM_IDS)
    assert [key async for key in instant_service.state.redis.scan_iter(f"*:{user_id}}}*")] == []
    assert await instant_service.history(f"{user_id}-other") == [ITEM_IDS[2]]
    assert (await instant_service.record(first))["accepted"] == 1, "its event ids are forgotten too"


async def test_erasing_twice_is_fine(instant_service: Service):
    assert (await instant_service.http.delete("/users/nobody")).status_code == 204


@pytest.mark.parametrize("name", ["a b", "a/b", "a/history", "a%2Fb", "a:b", "{a}", "用户", "?", "#", "x" * 128])
async def test_any_user_id_can_be_read_and_erased(instant_service: Service, name: str):
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())
    await instant_service.clicks(name, ITEM_IDS[0])
    assert await instant_service.history(encoded) == [ITEM_IDS[0]]
    assert (await instant_service.http.delete(f"/users/{encoded}")).status_code == 204
    assert await instant_service.history(encoded) == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("DELETE", "/users/u/history", 405),  # neither the user `u/history` nor the history of `u`
        ("GET", "/users/u%2Fhistory", 405),
        ("GET", "/users/a/b/history", 404),
        ("DELETE", "/users/a/b", 404),
        ("GET", "/users/u%2Fhistory/history", 200),
    ],
)
async def test_a_slash_that_is_not_encoded_is_no_part_of_an_id(
    instant_service: Service, method: str, path: str, status: int
):
    await instant_service.clicks("u", ITEM_IDS[0])
    assert (await instant_service.http.request(method, path)).status_code == status
    assert await instant_service.history("u") == [ITEM_IDS[0]]
    assert (await instant_service.http.delete("/users/u")).status_code == 204


async def test_a_user_id_is_at_most_128_characters_in_a_path_too(instant_service: Service):
    document = assert_problem(await instant_service.http.get(f"/users/{'x' * 129}/history"), 422, "invalid-request")
    assert document["errors"][0]["path"] == "path.user_id"


async def test_a_line_break_in_an_id_names_that_user_and_no_other(instant_service: Service):
    for user_id in ("broken", "broken\n"):
        await instant_service.clicks(user_id, ITEM_IDS[0])
    assert (await instant_service.http.delete("/users/broken%0A")).status_code == 204
    assert await instant_service.history("broken") == [ITEM_IDS[0]]
