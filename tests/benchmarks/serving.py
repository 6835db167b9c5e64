"""The service as the load benchmarks serve it, in a process of its own that has imported no more than a service does.

`python -m tests.benchmarks.serving FOLDER` serves FOLDER/bundles and FOLDER/redis with the local engine, under uvicorn
as `sidrec-serve run` does, on a free port, which it writes to stdout once it is ready.
"""

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI

from service.app import create_app
from service.logs import configure
from service.server import Server
from service.settings import Settings

_BACKLOG = 1024


def settings_in(folder: Path) -> Settings:
    """Settings that no environment variable changes in what matters here."""
    return Settings(
        host="127.0.0.1",
        api_key_hashes=(),
        bundles=folder / "bundles",
        redis_url=None,
        data_dir=folder / "redis",
        log_level="warning",
    )


def serve(make_app: Callable[[Settings], FastAPI], folder: Path) -> None:
    """The server on `folder`, until SIGTERM or Ctrl-C; its port goes to stdout once it is ready."""
    settings = settings_in(folder)
    configure(settings.log_level, settings.log_format)
    listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)

    def announce() -> None:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    web = make_app(settings)
    with suppress(KeyboardInterrupt, SystemExit):
        Server(web, announce).run(sockets=[listener])
    if web.state.startup_error is not None:
        raise SystemExit(f"the service could not start: {web.state.startup_error}")


if __name__ == "__main__":
    serve(create_app, Path(sys.argv[1]))
