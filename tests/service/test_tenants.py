"""A key opens one tenant's users: the others' can neither be read, nor changed, nor told from nobody."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from service.histories import EventType, Histories, HistoryEntry
from service.security import hash_key
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import Service, event, running
from tests.service.world import ITEM_IDS, ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

RED, ALSO_RED, BLUE, PLAIN, RED_ADMIN = "red-key", "another-red-key", "blue-key", "plain-key", "red-admin-key"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    settings = Settings(
        bundles=bundles,
        data_dir=tmp_path_factory.mktemp("redis"),
        api_key_hashes=(
            f"{hash_key(RED)}:red",
            f"{hash_key(ALSO_RED)}:red",
            f"{hash_key(BLUE)}:blue",
            hash_key(PLAIN),
        ),
        admin_key_hashes=(f"{hash_key(RED_ADMIN)}:red",),
    )
    async with running(settings, instant) as service:
        yield service


async def history(shared: Service, key: str, user_id: str) -> list[str]:
    response = await shared.http.get(f"/users/{user_id}/history", headers={"x-api-key": key})
    return [entry["item_id"] for entry in response.json()["events"]]


async def click(shared: Service, key: str, body: dict[str, object]) -> dict[str, int]:
    answer: dict[str, int] = (await shared.post("/events", {"events": [body]}, x_api_key=key)).json()
    return answer


async def test_a_user_is_seen_by_the_keys_of_its_tenant_only(shared: Service, user_id: str):
    assert (await click(shared, RED, event(user_id, ITEM_IDS[0])))["accepted"] == 1
    for key, seen in (
        (RED, [ITEM_IDS[0]]),
        (ALSO_RED, [ITEM_IDS[0]]),
        (RED_ADMIN, [ITEM_IDS[0]]),
        (BLUE, []),
        (PLAIN, []),
    ):
        assert await history(shared, key, user_id) == seen


async def test_the_same_name_is_another_user_for_another_tenant(shared: Service, user_id: str):
    once = event(user_id, ITEM_IDS[0])
    assert [(await click(shared, key, once))["accepted"] for key in (RED, BLUE, PLAIN, ALSO_RED)] == [1, 1, 1, 0]
    await click(shared, BLUE, event(user_id, ITEM_IDS[1], timestamp=1.0))
    assert await history(shared, RED, user_id) == [ITEM_IDS[0]]
    assert await history(shared, BLUE, user_id) == [ITEM_IDS[0], ITEM_IDS[1]]
    assert await history(shared, PLAIN, user_id) == [ITEM_IDS[0]]


@pytest.mark.parametrize("path", ["/recommend", "/rerank"])
async def test_answers_know_the_users_of_the_tenant_only(shared: Service, user_id: str, path: str):
    await click(shared, RED, event(user_id, ITEM_IDS[0]))
    body = {"user_id": user_id} | ({"candidates": [ITEM_IDS[1]]} if path == "/rerank" else {"num_items": 500})
    reasons = {}
    for key in (RED, BLUE, PLAIN):
        answer = (await shared.post(path, {**body, "deadline_ms": 60_000}, x_api_key=key)).json()
        reasons[key] = answer["reason"]
        if path == "/recommend":
            assert (ITEM_IDS[0] in ids_of(answer)) is (key != RED), "seen by the red user alone"
    assert reasons == {RED: None, BLUE: "cold_start", PLAIN: "cold_start"}


async def test_answers_by_query_too(shared: Service, user_id: str):
    await click(shared, BLUE, event(user_id, ITEM_IDS[0]))
    for key, source in ((BLUE, "model"), (RED, "fallback")):
        response = await shared.http.get(f"/recommend?user_id={user_id}", headers={"x-api-key": key})
        assert response.json()["source"] == source


async def test_erasing_a_user_leaves_the_others_of_that_name(shared: Service, user_id: str):
    for key in (RED, BLUE):
        await click(shared, key, event(user_id, ITEM_IDS[0]))
    assert (await shared.http.delete(f"/users/{user_id}", headers={"x-api-key": RED})).status_code == 204
    assert await history(shared, RED, user_id) == []
    assert await history(shared, BLUE, user_id) == [ITEM_IDS[0]]
    assert [key async for key in shared.state.redis.scan_iter(f"sidrec:{{red:{user_id}}}*")] == []


async def test_no_user_id_reaches_into_another_tenant(shared: Service, user_id: str):
    await click(shared, RED, event(user_id, ITEM_IDS[0]))
    for name in (f"red:{user_id}", f"..%2Fred%2F{user_id}", f"%7Bred:{user_id}%7D", f"{user_id}%7D:history"):
        assert await history(shared, BLUE, name) == []


async def test_imported_histories_are_the_tenants(shared: Service, user_id: str):
    imported = Histories(shared.state.redis, namespace="blue")
    await imported.import_histories([(user_id, [HistoryEntry(ITEM_IDS[3], 1.0, EventType.CLICK)])])
    assert await history(shared, BLUE, user_id) == [ITEM_IDS[3]]
    assert await history(shared, RED, user_id) == []
