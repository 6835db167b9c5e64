"""`service.last_known`: what stays hidden from a user while Redis cannot be asked."""

import asyncio
import json
from pathlib import Path

from service.event_types import EventType
from service.last_known import Hidden, LastKnown
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import event, running
from tests.service.test_recommend import kill
from tests.service.world import ITEM_IDS, ids_of

U, V = ("default", "u"), ("default", "v")


def hidden(seen: str = "", excluded: str = "") -> Hidden:
    return Hidden(frozenset(seen), frozenset(excluded))


def in_redis(seen: str = "", excluded: str = "") -> str:
    return json.dumps([list(seen), list(excluded) or {}])  # as Redis' JSON writes an empty list


def told(known: LastKnown, user: tuple[str, str], **items: str) -> None:
    known.tell(user, [(EventType(kind), item) for kind, each in items.items() for item in each])


def test_events_and_states_add_up_by_their_type():
    known = LastKnown()
    assert known.get(U) == hidden()
    told(known, U, click="a", like="b", purchase="c", dislike="d", hide="e", impression="f")
    assert known.get(U) == hidden("abc", "de")
    assert known.get(V) == hidden()
    known.put(U, in_redis("x", "y"), known.num_told)
    assert known.get(U) == hidden("x", "y"), "Redis knows it all"
    known.forget(U)
    assert known.get(U) == hidden()


def test_an_event_acknowledged_while_redis_was_asked_is_not_forgotten():
    known = LastKnown()
    told(known, U, click="a")
    before = known.num_told
    told(known, U, hide="b")
    known.put(U, in_redis("a"), before)
    known.put(U, in_redis("a"), before)
    assert known.get(U) == hidden("a", "b")
    known.put(U, in_redis("ac", "b"), known.num_told)
    assert known.get(U) == hidden("ac", "b")


def test_it_keeps_the_users_of_late_for_a_while():
    now = [0.0]
    known = LastKnown(max_users=2, ttl_s=10, clock=lambda: now[0])
    for name in "abc":
        known.put((name, "u"), in_redis(name), 0)
    assert [known.get((name, "u")) for name in "abc"] == [hidden(), hidden("b"), hidden("c")]
    now[0] = 10
    assert known.get(("c", "u")) == hidden()
    nothing = LastKnown(max_users=0)
    nothing.put(U, in_redis("a"), 0)
    assert nothing.get(U) == hidden()


async def test_what_was_seen_or_hidden_stays_away_while_redis_is_down(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    settings = Settings(bundles=bundles, redis_url=await server.start())
    async with running(settings, instant) as service:
        popular = ids_of(await service.recommend(history=[], num_items=40))
        await service.clicks("u", *popular[:10])
        await service.record(event("u", popular[10], "hide"))
        await service.recommend(user_id="u")
        await service.record(event("u", popular[11]), event("u", popular[12], "dislike"))
        await kill(server.pid)
        answer = await service.recommend(user_id="u", num_items=len(ITEM_IDS))
        assert answer["reason"] == "history_unavailable"
        assert set(ids_of(answer)) == set(ITEM_IDS) - set(popular[:13])
        again = await service.recommend(user_id="u", num_items=len(ITEM_IDS), exclude_seen=False)
        assert set(ids_of(again)) == set(ITEM_IDS) - {popular[10], popular[12]}
        other = await service.recommend(user_id="v", num_items=len(ITEM_IDS))
        assert set(ids_of(other)) == set(ITEM_IDS), "of another user nothing is known"
        await server.start()
        async with asyncio.timeout(15):
            while (await service.http.delete("/users/u")).status_code != 204:  # noqa: ASYNC110 - the breaker is open
                await asyncio.sleep(0.05)
        await kill(server.pid)
        erased = await service.recommend(user_id="u", num_items=len(ITEM_IDS))
        assert set(ids_of(erased)) == set(ITEM_IDS)
