"""`service.histories` and `service.redis_keys` against the real embedded Redis."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from service.histories import Event, EventType, Histories, HistoryEntry, HistoryUnavailableError, UserState, connect
from service.redis_keys import user_keys

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEIRD_USERS = ["", " ", "{", "}", "}{", "a:b", "a}:history", "用户", "\U0001f600", "%7B", "\0\n", "x" * 128, "\ud800"]
namespaces = (f"test-{number}" for number in count())


@pytest.fixture
def namespace() -> str:
    return next(namespaces)


@pytest.fixture
def histories(redis: Redis, namespace: str) -> Histories:
    return Histories(redis, namespace=namespace)


def event(
    event_id: str, item_id: str, event_type: EventType = EventType.CLICK, timestamp: float = 1.0, user_id: str = "u"
) -> Event:
    return Event(event_id, user_id, item_id, event_type, timestamp, None)


def items(entries: list[HistoryEntry]) -> list[str]:
    return [entry.item_id for entry in entries]


async def test_an_unknown_user_has_an_empty_state(histories: Histories):
    assert await histories.load("nobody") == UserState([], 0, frozenset(), frozenset())
    assert await histories.history("nobody") == []


async def test_no_events_are_no_work(histories: Histories):
    assert await histories.record([]) == []


@pytest.mark.parametrize("event_type", [EventType.PURCHASE, EventType.CLICK, EventType.LIKE])
async def test_purchase_click_and_like_enter_history_and_seen(histories: Histories, event_type: EventType):
    assert await histories.record([event("e", "i", event_type, 2.5)]) == [True]

    assert await histories.load("u") == UserState(["i"], 1, frozenset({"i"}), frozenset())
    assert await histories.history("u") == [HistoryEntry("i", 2.5, event_type)]


@pytest.mark.parametrize("event_type", [EventType.DISLIKE, EventType.HIDE])
async def test_dislike_and_hide_only_exclude(histories: Histories, event_type: EventType):
    assert await histories.record([event("e", "i", event_type)]) == [True]
    assert await histories.load("u") == UserState([], 0, frozenset(), frozenset({"i"}))


async def test_an_impression_leaves_only_its_id(histories: Histories):
    impression = event("e", "i", EventType.IMPRESSION)
    assert await histories.record([impression]) == [True]
    assert await histories.record([impression]) == [False]
    assert await histories.load("u") == UserState([], 0, frozenset(), frozenset())


async def test_an_event_id_counts_once_per_user_within_a_call_and_across_calls(histories: Histories):
    first, again, other_user = event("e", "a"), event("e", "b"), event("e", "a", user_id="v")
    assert await histories.record([first, again, other_user]) == [True, False, True]
    assert await histories.record([again, event("f", "c"), other_user]) == [False, True, False]

    assert items(await histories.history("u")) == ["a", "c"]
    assert items(await histories.history("v")) == ["a"]


async def test_replies_stand_in_the_order_of_interleaved_users(histories: Histories):
    await histories.record([event("2", "x", user_id="b")])
    mixed = [event("1", "x", user_id=user) for user in "abab"] + [event("2", "y", user_id=user) for user in "ab"]
    assert await histories.record(mixed) == [True, True, False, False, True, False]


async def test_ties_stand_in_order_of_arrival_not_of_item_id(histories: Histories):
    arrivals = [f"i{number}" for number in random.Random(1).sample(range(100), 30)]
    await histories.record([event(item, item) for item in arrivals[:20]])
    await histories.record([event(item, item) for item in arrivals[20:]])
    assert items(await histories.history("u")) == arrivals


async def test_a_late_event_sorts_into_place(histories: Histories):
    await histories.record([event("1", "first", timestamp=1), event("3", "third", timestamp=3)])
    await histories.record([event("2", "second", timestamp=2)])
    assert items(await histories.history("u")) == ["first", "second", "third"]


@pytest.mark.parametrize("timestamp", [1763760000.123456, 0.1 + 0.2, -1.5, 0.0, 1e-300, 2.0**53 + 2, 1763760000])
async def test_timestamps_keep_every_bit(histories: Histories, timestamp: float):
    await histories.record([event("e", "i", timestamp=timestamp)])
    assert (await histories.history("u"))[0].timestamp == timestamp


@pytest.mark.parametrize(
    "bad", [event("e", "i", timestamp=float("nan")), event("e", "i", timestamp=float("inf")), event("", "i")]
)
async def test_a_bad_event_is_refused_before_anything_is_stored(histories: Histories, bad: Event):
    with pytest.raises(ValueError, match=r"not a finite number|empty event_id"):
        await histories.record([event("good", "i"), bad])
    assert (await histories.load("u")).total == 0


async def test_the_history_is_cut_but_neither_the_seen_set_nor_the_total(redis: Redis, namespace: str):
    histories = Histories(redis, namespace=namespace, max_stored=3)
    for number in range(5):
        await histories.record([event(f"e{number}", f"i{number}", timestamp=number)])
    assert await histories.record([event("too late", "old", timestamp=-1)]) == [True]

    state = await histories.load("u")
    assert state.items == ["i2", "i3", "i4"]
    assert state.total == 6
    assert state.seen == {"i0", "i1", "i2", "i3", "i4", "old"}


async def test_a_smaller_max_stored_holds_for_histories_already_stored(
    redis: Redis, histories: Histories, namespace: str
):
    await histories.record([event(f"e{number}", f"i{number}", timestamp=number) for number in range(5)])
    shorter = Histories(redis, namespace=namespace, max_stored=2)
    assert (await shorter.load("u")).items == items(await shorter.history("u")) == ["i3", "i4"]


async def test_the_most_recent_event_ids_are_remembered(redis: Redis, namespace: str):
    histories = Histories(redis, namespace=namespace, max_stored=2, max_event_ids=3)
    await histories.record([event(f"e{number}", "i", EventType.IMPRESSION) for number in range(4)])
    again = [event(f"e{number}", "i", EventType.IMPRESSION) for number in (3, 2, 1, 0)]
    assert await histories.record(again) == [False, False, False, True]


async def test_a_thousand_events_of_one_user_are_one_call(histories: Histories):
    thousand = [event(f"e{number}", f"i{number}", timestamp=number) for number in range(1_000)]
    assert await histories.record(thousand) == [True] * 1_000
    assert (await histories.load("u")).total == 1_000


@pytest.mark.parametrize("user_id", WEIRD_USERS)
async def test_any_user_id_has_a_state_of_its_own(histories: Histories, user_id: str):
    for number, weird in enumerate(WEIRD_USERS):
        await histories.record([event("e", f"i{number}", user_id=weird)])
    assert items(await histories.history(user_id)) == [f"i{WEIRD_USERS.index(user_id)}"]

    assert len({key_slot(key.encode()) for key in user_keys(user_id)}) == 1


@pytest.mark.parametrize("item_id", ["a:b:c", "::", " ", "品", "\0", "a\0b", "\r\n", '"\\', "x" * 500])
async def test_any_item_id_comes_back_as_it_was(histories: Histories, item_id: str):
    await histories.record([event("e", item_id), event("f", item_id, EventType.HIDE)])
    state = await histories.load("u")
    assert state.items == [item_id]
    assert state.seen == state.excluded == {item_id}


async def test_namespaces_do_not_meet(redis: Redis, namespace: str):
    one, other = Histories(redis, namespace=namespace), Histories(redis, namespace=f"{namespace}:u")
    await one.record([event("e", "i", user_id="u:v")])
    assert await other.history("v") == []


async def test_keys_start_with_the_prefix_and_share_the_users_hash_tag():
    assert user_keys("a{b}:c", "tenant") == tuple(
        f"sidrec:{{tenant:a%7Bb%7D%3Ac}}:{what}"
        for what in ("history", "seen", "excluded", "event-ids", "import-ids", "meta", "thought", "think-ahead")
    )


@pytest.mark.parametrize("user_id", ["u", *WEIRD_USERS])
async def test_erase_leaves_no_key_of_the_user_and_every_key_of_others(
    redis: Redis, histories: Histories, namespace: str, user_id: str
):
    for user in (user_id, "bystander"):
        every_type = [event(kind, "i", kind, user_id=user) for kind in EventType]
        await histories.record(every_type)
        await histories.import_histories([(user, [HistoryEntry("j", 0.0, EventType.CLICK)])])
        for key in user_keys(user, namespace)[-2:]:  # what is not the histories' own
            await redis.set(key, "it is there")
    keys_before = set(await redis.keys(f"*{namespace}:*"))
    assert keys_before == {*user_keys(user_id, namespace), *user_keys("bystander", namespace)}

    assert await histories.erase(user_id) == 8
    assert set(await redis.keys(f"*{namespace}:*")) == set(user_keys("bystander", namespace))
    assert await histories.erase(user_id) == 0
    assert await histories.load(user_id) == UserState([], 0, frozenset(), frozenset())


async def test_the_time_to_live_covers_every_key_and_follows_the_setting(redis: Redis, namespace: str):
    mortal = Histories(redis, namespace=namespace, ttl_s=1_000)
    await mortal.record([event(kind, "i", kind) for kind in EventType])
    await redis.set(user_keys("u", namespace).thought, "it is there", ex=10)
    keys = [key for key in await redis.keys(f"*{namespace}:*") if key != user_keys("u", namespace).thought]
    assert len(keys) == 5
    assert all([990 < await redis.ttl(key) <= 1_000 for key in keys])

    await Histories(redis, namespace=namespace).record([event("next", "i")])
    assert all([await redis.ttl(key) == -1 for key in keys])
    assert 0 < await redis.ttl(user_keys("u", namespace).thought) <= 10, "a thought has a time of its own"


@pytest.mark.parametrize("settings", [{"max_stored": 0}, {"max_stored": 10, "max_event_ids": 9}, {"ttl_s": 0}])
async def test_impossible_settings_are_refused(redis: Redis, settings: dict[str, Any]):
    with pytest.raises(ValueError, match=r"max_stored|ttl_s"):
        Histories(redis, **settings)


@dataclass
class _Plain:
    """One user's state kept with lists and sets."""

    max_stored: int
    ids: set[str] = field(default_factory=set)
    rows: list[tuple[float, int, HistoryEntry]] = field(default_factory=list)
    total: int = 0
    seen: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)

    def record(self, event: Event) -> bool:
        if event.event_id in self.ids:
            return False
        self.ids.add(event.event_id)
        if event.event_type in {EventType.CLICK, EventType.LIKE, EventType.PURCHASE}:
            self.total += 1
            entry = HistoryEntry(event.item_id, event.timestamp, event.event_type)
            self.rows = sorted([*self.rows, (event.timestamp, self.total, entry)], key=lambda row: row[:2])
            self.rows = self.rows[-self.max_stored :]
            self.seen.add(event.item_id)
        elif event.event_type is not EventType.IMPRESSION:
            self.excluded.add(event.item_id)
        return True

    def state(self) -> UserState:
        items = [entry.item_id for _, _, entry in self.rows]
        return UserState(items, self.total, frozenset(self.seen), frozenset(self.excluded))


@pytest.mark.parametrize("seed", range(20))
async def test_random_events_end_as_in_plain_lists_and_sets(redis: Redis, namespace: str, seed: int):
    rng = random.Random(seed)
    max_stored = rng.choice([1, 3, 8])
    histories = Histories(redis, namespace=namespace, max_stored=max_stored)
    plain = {user: _Plain(max_stored) for user in ("u", "v", "w")}
    for _ in range(12):
        batch = [
            event(
                f"e{rng.randrange(80)}",
                f"i{rng.randrange(15)}",
                rng.choice(list(EventType)),
                rng.choice([1.0, 2.0, 3.0, rng.random()]),
                rng.choice(list(plain)),
            )
            for _ in range(rng.randrange(1, 12))
        ]
        assert await histories.record(batch) == [plain[one.user_id].record(one) for one in batch]
    for user_id, expected in plain.items():
        assert await histories.load(user_id) == expected.state()
        assert await histories.history(user_id) == [entry for _, _, entry in expected.rows]


def clicks(*timed_items: tuple[str, float]) -> list[HistoryEntry]:
    return [HistoryEntry(item, timestamp, EventType.CLICK) for item, timestamp in timed_items]


async def test_importing_twice_leaves_one_copy(histories: Histories):
    same_twice = ("a", 1.0)
    imported = [("u", clicks(same_twice, same_twice, ("b", 0.5))), ("v", clicks(("c", 1.0))), ("empty", [])]
    progress: list[int] = []
    assert await histories.import_histories(imported, progress.append) == 4
    before = await histories.load("u")
    assert await histories.import_histories(iter(imported), progress.append) == 0

    assert await histories.load("u") == before
    assert before.items == ["b", "a", "a"]
    assert before.total == 3
    assert progress == [4, 4]


async def test_importing_a_longer_version_adds_what_is_new(histories: Histories):
    history = clicks(*[(f"i{number}", number) for number in range(5)])
    await histories.import_histories([("u", history[:3])])
    assert await histories.import_histories([("u", history)]) == 2
    assert await histories.history("u") == history


async def test_import_after_many_live_events_still_changes_nothing(redis: Redis, namespace: str):
    histories = Histories(redis, namespace=namespace, max_stored=3, max_event_ids=3)
    imported = [("u", clicks(("a", 1.0), ("b", 2.0)))]
    await histories.import_histories(imported)
    await histories.record([event(f"e{number}", "i", EventType.IMPRESSION) for number in range(10)])
    assert await histories.import_histories(imported) == 0


async def test_import_beyond_max_stored_records_the_newest_and_has_seen_all(redis: Redis, namespace: str):
    histories = Histories(redis, namespace=namespace, max_stored=2)
    imported = [("u", clicks(("new", 9.0), ("a", 1.0), ("b", 2.0), ("newest", 10.0)))]
    for _ in range(2):
        await histories.import_histories(imported)
        state = await histories.load("u")
        assert state.items == ["new", "newest"]
        assert state.total == 2
        assert state.seen == {"a", "b", "new", "newest"}


async def test_import_takes_every_type_as_record_does(histories: Histories):
    await histories.import_histories([("u", [HistoryEntry(kind, 1.0, kind) for kind in EventType])])
    state = await histories.load("u")
    assert set(state.items) == state.seen == {"click", "purchase", "like"}
    assert state.excluded == {"dislike", "hide"}


async def test_import_of_a_hundred_thousand_events_takes_seconds(histories: Histories):
    rng = random.Random(0)
    imported = [
        (f"u{user}", clicks(*((f"i{rng.randrange(1_700)}", rng.random()) for _ in range(100)))) for user in range(1_000)
    ]
    progress: list[int] = []
    started_at = time.perf_counter()
    assert await histories.import_histories(imported, progress.append) == 100_000
    # 2.5 s on an idle core; the bound leaves room for a busy machine
    assert time.perf_counter() - started_at < 30
    assert sum(progress) == 100_000


async def test_a_server_that_forgot_the_script_is_taught_again(redis: Redis, histories: Histories):
    await redis.script_flush()
    assert await histories.record([event("e", "i"), event("e", "i", user_id="v")]) == [True, True]


async def test_no_server_is_a_typed_failure_of_every_method_and_says_nothing_internal(tmp_path_factory):
    nowhere = tmp_path_factory.mktemp("nowhere") / "redis.sock"
    client = connect(f"unix://{nowhere}", timeout_s=0.5, max_connections=2)
    histories = Histories(client)
    attempts: list[Callable[[], Awaitable[object]]] = [
        lambda: histories.record([event("e", "i")]),
        lambda: histories.load("u"),
        lambda: histories.history("u"),
        lambda: histories.erase("u"),
        lambda: histories.import_histories([("u", clicks(("i", 1.0)))]),
    ]
    for attempt in attempts:
        with pytest.raises(HistoryUnavailableError) as failure:
            await attempt()
        assert str(failure.value) == "the history store is unavailable (ConnectionError)"
        assert failure.value.__cause__ is not None
    await client.aclose()


@asynccontextmanager
async def out_of_memory(redis: Redis) -> AsyncIterator[None]:
    await redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        await redis.config_set("maxmemory", 0)


@asynccontextmanager
async def read_only_replica(redis: Redis) -> AsyncIterator[None]:
    await redis.replicaof("127.0.0.1", "1")
    try:
        yield
    finally:
        await redis.replicaof("no", "one")


@pytest.mark.parametrize("refusing", [out_of_memory, read_only_replica])
async def test_a_server_that_refuses_writes_keeps_nothing_of_the_call_and_still_answers_reads(
    redis: Redis, histories: Histories, refusing
):
    await histories.record([event("before", "b")])
    batch = [event("1", "x"), event("2", "y", EventType.HIDE), event("3", "z", EventType.IMPRESSION)]
    state = await histories.load("u")
    async with refusing(redis):
        with pytest.raises(HistoryUnavailableError):
            await histories.record(batch)
        assert await histories.load("u") == state
    assert await histories.record(batch) == [True, True, True]


async def test_a_failure_of_one_user_fails_the_call_and_the_retry_loses_nothing(
    redis: Redis, histories: Histories, namespace: str
):
    blocked = user_keys("v", namespace).seen
    await redis.set(blocked, "not a set")
    batch = [event("e", "i", user_id=user) for user in "uvw"]
    with pytest.raises(HistoryUnavailableError):
        await histories.record(batch)
    await redis.delete(blocked)

    assert await histories.record(batch) == [False, True, False]
    for user in "uvw":
        assert (await histories.load(user)).seen == {"i"}


async def test_a_timed_out_event_is_stored_once_whatever_the_retry_says(url: str, redis: Redis, namespace: str):
    client = connect(url, timeout_s=0.1, max_connections=2)
    impatient = Histories(client, namespace=namespace)
    await impatient.record([event("before", "b")])
    await redis.client_pause(400)
    started_at = time.perf_counter()
    with pytest.raises(HistoryUnavailableError):
        await impatient.record([event("e", "i")])
    assert time.perf_counter() - started_at < 0.35, "a time-out is not tried again"
    await asyncio.sleep(0.5)

    await impatient.record([event("e", "i")])
    assert items(await impatient.history("u")) == ["b", "i"]
    await client.aclose()


async def test_a_cancelled_call_leaves_no_answer_for_the_next_one(url: str, namespace: str):
    client = connect(url, timeout_s=5, max_connections=1)
    histories = Histories(client, namespace=namespace)
    for steps in range(12):
        task = asyncio.ensure_future(histories.record([event(f"{steps}", f"i{steps}", user_id="cancelled")]))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await histories.record([event(f"{steps}", "i"), event(f"{steps}", "i")]) == [True, False]
    await client.aclose()


async def test_more_callers_than_connections_wait_their_turn(url: str, namespace: str):
    client = connect(url, timeout_s=5, max_connections=2)
    histories = Histories(client, namespace=namespace)
    calls = [histories.record([event(f"{number}", f"i{number}", user_id=f"u{number % 7}")]) for number in range(60)]
    assert await asyncio.gather(*calls) == [[True]] * 60
    await client.aclose()
