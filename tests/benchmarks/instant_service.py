"""The real application round an engine that answers at once: the server of `bench-http`, in a process of its own.

`python -m tests.benchmarks.instant_service FOLDER` serves FOLDER/bundles and FOLDER/redis under uvicorn as
`sidrec-serve run` does, on a free port, which it writes to stdout once it is ready.
"""

import itertools
import socket
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from semantic_ids.bundle import Bundle
from service.app import create_app
from service.engine.base import DecodeRequest, DecodeResult, ThoughtListener
from service.logs import configure
from service.metrics import Metrics
from service.server import Server
from service.settings import Settings


class InstantEngine:
    """The most popular items that a request may get. For requests whose only filter is the seen set."""

    name = "instant"
    problem: str | None = None
    num_waiting = 0

    def __init__(self, bundle: Bundle, _settings: Settings, _metrics: Metrics) -> None:
        self._by_popularity = bundle.catalog.by_popularity.tolist()
        self._scores = -np.arange(len(bundle.catalog), dtype=np.float32)

    async def start(self) -> None:
        """Nothing to load."""

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """The first `width` items that are not denied: some microseconds."""
        denied = set(request.item_filter.deny.tolist())
        eligible = (rank for rank in self._by_popularity if rank not in denied)
        ranks = np.fromiter(itertools.islice(eligible, request.width), np.int64)
        return DecodeResult(ranks, self._scores[: len(ranks)])

    async def use_catalog(self, bundle: Bundle) -> None:
        """Nothing here changes the catalogue."""

    async def retire_catalog(self, catalog_id: str) -> None:
        """Nothing here changes the catalogue."""

    async def stop(self) -> None:
        """Nothing to free."""


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


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    settings = settings_in(Path(sys.argv[1]))
    configure(settings.log_level, settings.log_format)
    listener = socket.create_server(("127.0.0.1", 0))

    def announce() -> None:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    web = create_app(settings, engine_factory=InstantEngine)
    with suppress(KeyboardInterrupt, SystemExit):
        Server(web, announce).run(sockets=[listener])
    if web.state.startup_error is not None:
        raise SystemExit(f"the service could not start: {web.state.startup_error}")


if __name__ == "__main__":
    main()
