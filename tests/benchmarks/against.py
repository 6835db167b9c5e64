"""A run of a load benchmark against a service in a process of its own, which Ctrl-C and SIGTERM end cleanly."""

import asyncio
import gc
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from service.logs import configure
from tests.benchmarks.load import precise_event_loop
from tests.benchmarks.small_bundle import publish_small_bundle, store_histories

SERVER_STOP_S = 30

Results: TypeAlias = dict[str, float | int | str]


@asynccontextmanager
async def running_server(module: str, folder: Path) -> AsyncIterator[tuple[int, int]]:
    """Port and process id of the server that `python -m MODULE FOLDER` is; stopped at the end, whatever happens."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, str(folder), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        line = await server.stdout.readline()
        if not line:
            raise SystemExit("the server did not start: its own message is above")
        yield int(line), server.pid
    finally:
        with suppress(ProcessLookupError):
            server.terminate()
        try:
            async with asyncio.timeout(SERVER_STOP_S):
                await server.wait()
        except TimeoutError:
            server.kill()
            await server.wait()


def run_against(
    module: str,
    measure: Callable[[int, int], Awaitable[Results]],
    *,
    num_items: int,
    num_users: int,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = precise_event_loop,
) -> Results:
    """What `measure` finds, given port and process id of a server on a small bundle with stored histories."""

    async def run() -> Results:
        with tempfile.TemporaryDirectory(prefix="sidrec-bench-") as name:
            folder = Path(name)
            publish_small_bundle(folder / "bundles", num_items)
            await store_histories(folder / "redis", num_users, num_items)
            gc.disable()  # the client is to stand still for nothing, and keeps all that it makes
            async with running_server(module, folder) as (port, pid):
                return await measure(port, pid)

    configure("warning", "console")  # stdout is for the table
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(run())
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
