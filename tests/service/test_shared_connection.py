"""The one connection that all reads share, against a real Redis: its killed, silent and refusing connections too."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from service.histories import Event, EventType, Histories, HistoryTimeoutError, HistoryUnavailableError, connect
from service.shared_connection import ConnectionLostError, SharedConnection, packed

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEVER_ANSWERED = packed(("BLPOP", "no-such-list", "0"))


@pytest_asyncio.fixture(loop_scope="module")
async def redis(url: str) -> AsyncIterator[Redis]:
    """An impatient client, whose end is waited for."""
    client = connect(url, timeout_s=0.2, max_connections=3)
    yield client
    await client.aclose()
    await until_no_listener()


@pytest.fixture
def shared(redis: Redis) -> SharedConnection:
    return SharedConnection(redis)


def echo(text: str) -> bytes:
    return packed(("ECHO", text))


def listeners() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "redis-answers"]


async def until_no_listener() -> None:
    if running := listeners():
        _, left = await asyncio.wait(running, timeout=5)
        assert not left


async def asked(shared: SharedConnection, command: bytes) -> "asyncio.Task[object]":
    """A question that has been written."""
    task = asyncio.ensure_future(shared.ask(command))
    await asyncio.sleep(0.05)
    return task


async def test_each_asker_gets_their_own_answer_and_all_share_one_connection(redis: Redis, shared: SharedConnection):
    texts = [f"{number} 用户 \r\n$3" for number in range(300)]
    assert await asyncio.gather(*(shared.ask(echo(text)) for text in texts)) == texts
    assert len(listeners()) == 1
    assert len(await redis.client_list()) == 2, "that one, and the one that asks this"


async def test_who_gives_up_leaves_no_answer_for_the_next(shared: SharedConnection):
    for rounds in range(8):
        first = asyncio.ensure_future(shared.ask(echo("given up")))
        for _ in range(rounds):
            await asyncio.sleep(0)
        first.cancel()
        assert await shared.ask(echo("second")) == "second"
    assert len(listeners()) == 1, "and the connection goes on"


async def test_a_refusal_is_told_to_its_asker_alone(shared: SharedConnection):
    unknown = packed(("EVALSHA", "0" * 40, "0"))
    before, refused, after = await asyncio.gather(
        *(shared.ask(command) for command in (echo("before"), unknown, echo("after"))), return_exceptions=True
    )
    assert (before, after) == ("before", "after")
    assert isinstance(refused, NoScriptError)


async def test_with_the_connection_its_questions_are_lost_and_the_next_one_opens_another(
    redis: Redis, shared: SharedConnection
):
    waiting = [await asked(shared, NEVER_ANSWERED), await asked(shared, echo("behind it"))]
    await redis.client_kill_filter(_type="normal", skipme=True)
    for one in waiting:
        with pytest.raises(ConnectionLostError) as lost:
            await one
        assert isinstance(lost.value.__cause__, RedisConnectionError), "with what Redis' client says of it"
    assert await shared.ask(echo("again")) == "again"


async def test_an_answer_that_cannot_be_read_loses_its_connection_and_says_why(shared: SharedConnection):
    with pytest.raises(ConnectionLostError) as lost:
        await shared.ask(packed(("EVAL", r"return '\255'", "0")))
    assert isinstance(lost.value.__cause__, UnicodeDecodeError)
    assert await shared.ask(echo("again")) == "again"


async def test_a_silent_connection_is_given_up_by_who_asks_next(shared: SharedConnection):
    waiting = await asked(shared, NEVER_ANSWERED)
    await asyncio.sleep(0.2)
    assert await shared.ask(echo("on another one")) == "on another one"
    with pytest.raises(ConnectionLostError):
        await waiting
    assert len(listeners()) == 1


async def test_a_connection_that_only_waits_for_questions_is_not_silent(shared: SharedConnection):
    assert await shared.ask(echo("first")) == "first"
    (listener,) = listeners()
    await asyncio.sleep(0.3)
    assert await shared.ask(echo("long after")) == "long after"
    assert listeners() == [listener]


async def test_the_clients_end_is_its_end(url: str):
    client = connect(url, timeout_s=5, max_connections=2)
    shared = SharedConnection(client)
    waiting = await asked(shared, NEVER_ANSWERED)
    await client.aclose()
    with pytest.raises(ConnectionLostError):
        await waiting
    await until_no_listener()


async def test_where_none_can_be_opened_all_who_ask_are_told(tmp_path_factory: pytest.TempPathFactory):
    nowhere = tmp_path_factory.mktemp("nowhere") / "redis.sock"
    client = connect(f"unix://{nowhere}", timeout_s=0.5, max_connections=2)
    shared = SharedConnection(client)
    failures = await asyncio.gather(*(shared.ask(echo("x")) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(one, RedisConnectionError) for one in failures)
    assert not any(isinstance(one, ConnectionLostError) for one in failures), "nothing was asked"
    await client.aclose()


async def test_a_history_is_asked_for_again_when_the_connection_is_lost(redis: Redis):
    histories = Histories(redis, namespace="lost")
    await histories.record([Event("e", "u", "i", EventType.CLICK, 1.0)])
    for _ in range(20):
        loads = [asyncio.ensure_future(histories.load("u")) for _ in range(10)]
        await asyncio.sleep(0)
        await redis.client_kill_filter(_type="normal", skipme=True)
        assert all(state.seen == {"i"} for state in await asyncio.gather(*loads))


async def test_a_server_that_forgot_the_script_is_taught_it_on_the_same_connection(url: str, redis: Redis):
    only_one = connect(url, timeout_s=5, max_connections=1)
    histories = Histories(only_one, namespace="forgot")
    await Histories(redis, namespace="forgot").record([Event("e", "u", "i", EventType.CLICK, 1.0)])
    for _ in range(3):
        await redis.script_flush()
        assert all(state.total == 1 for state in await asyncio.gather(*(histories.load("u") for _ in range(10))))
    await only_one.aclose()


async def test_a_history_that_does_not_come_in_time_is_a_failure_of_its_own_kind(redis: Redis):
    histories = Histories(redis, namespace="late")
    await histories.load("u")
    await redis.client_pause(600)
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    with pytest.raises(HistoryTimeoutError):
        await histories.load("u", timeout_s=0.05)
    assert loop.time() - started_at < 0.15
    with pytest.raises(HistoryTimeoutError):  # the sockets' .2 s
        await histories.load("u", timeout_s=60)
    assert loop.time() - started_at < 0.45, "a time-out is not tried again"
    await asyncio.sleep(0.5)
    assert (await histories.load("u")).total == 0


async def test_no_more_of_a_history_comes_than_is_asked_for(redis: Redis):
    histories = Histories(redis, namespace="long")
    await histories.record([Event(str(n), "u", f"i{n}", EventType.CLICK, float(n)) for n in range(30)])
    state = await histories.load("u", last=4)
    assert state.items == ["i26", "i27", "i28", "i29"]
    assert (state.total, len(state.seen)) == (30, 30)


async def test_a_wrong_key_fails_its_user_alone(redis: Redis):
    histories = Histories(redis, namespace="wrong")
    await redis.set("sidrec:{wrong:v}:seen", "not a set")
    good, bad = await asyncio.gather(histories.load("u"), histories.load("v"), return_exceptions=True)
    assert not isinstance(good, BaseException)
    assert isinstance(bad, HistoryUnavailableError)
