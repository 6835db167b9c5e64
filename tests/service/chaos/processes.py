"""The processes that a scene breaks: the service, and a TCP proxy in front of Redis that is slow when told so."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from service.redis_server import EmbeddedRedis

ROOT = Path(__file__).parents[3]
SERVE = ("service", "run")
START_WITHIN_S = 120.0  # torch alone takes seconds, on a busy machine many


class ServiceProcess:
    """`python -m service run`, or another module that serves and says where; started again as often as a scene wants.

    The folder gets its log. Settings without their prefix, such as `redis_url`.
    """

    def __init__(self, folder: Path, *command: str, **settings: object) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SIDREC_")}
        named = {f"SIDREC_{name.upper()}": str(value) for name, value in settings.items()}
        self._environment = {**inherited, "OMP_NUM_THREADS": "1", "SIDREC_PORT": "0", **named}
        self._command = (sys.executable, "-m", *(command or SERVE))
        self._log = folder / "service.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has said, all starts together."""
        return self._log.read_text(errors="replace")

    async def start(self) -> float:
        """Until it is ready, at `url`; the seconds that took. A second start uses the port of the first."""
        begin = time.monotonic()
        said_before = len(self.log) if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = await asyncio.to_thread(
                subprocess.Popen, self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        while (said := re.search(r"http://127\.0\.0\.1:(\d+)", self.log[said_before:])) is None:
            assert self._process.poll() is None, self.log
            assert time.monotonic() - begin < START_WITHIN_S, self.log
            await asyncio.sleep(0.05)
        self.url, self._environment["SIDREC_PORT"] = said[0], said[1]
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as http:
            response = await http.get("/health/ready")
        assert response.status_code == 200, response.text
        return time.monotonic() - begin

    async def kill(self) -> None:
        """`kill -9`."""
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    async def stop(self) -> None:
        """SIGTERM, and a kill where that is not enough."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 30)
        except subprocess.TimeoutExpired:
            await self.kill()

    def engine_pid(self) -> int:
        """The process in which its local engine decodes."""
        said = (json.loads(line) for line in self.log.splitlines() if line.startswith("{"))
        return [int(entry["pid"]) for entry in said if entry["event"] == "local_engine_ready"][-1]

    def redis_pids(self) -> Iterator[int]:
        """Its embedded Redis: its children of that name."""
        for child in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in child.read_text().split():
                with suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().strip() == "redis-server":
                        yield int(pid)


class RedisProxy:
    """TCP in front of a Redis' socket; every reply comes `delay_s` late."""

    def __init__(self, redis: EmbeddedRedis) -> None:
        self.redis = redis
        self.delay_s = 0.0
        self.socket_path = ""
        self._under_way: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its url, for as long as this lasts."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        try:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        back: asyncio.StreamWriter | None = None
        try:
            replies, back = await asyncio.open_unix_connection(self.socket_path)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, back, late=False))
                both.create_task(self._pump(replies, writer, late=True))
        except* (OSError, EOFError):
            pass
        finally:
            for one in (writer, back):
                if one is not None:
                    one.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, late: bool) -> None:
        """Bytes in their order; whichever end closes first closes the other by an `EOFError`."""
        while data := await source.read(65_536):
            if late and self.delay_s:
                await asyncio.sleep(self.delay_s)
            sink.write(data)
            await sink.drain()
        raise EOFError
