"""One tiny real bundle for the session, and the real application on it."""

import os
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from redis.asyncio import Redis

from semantic_ids.bundle import Bundle, publish
from service.histories import connect
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import Service, running
from tests.service.thinking import publish_thinking
from tests.service.world import make_parts

_user_numbers = count()


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SIDREC_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    """As structlog's defaults, but a traceback does not take seconds."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles with a current one."""
    root = tmp_path_factory.mktemp("bundles")
    publish(root, make_parts(tmp_path_factory.mktemp("model")), lambda bundle: None)
    return root


@pytest.fixture(scope="session")
def bundle(bundles: Path) -> Bundle:
    """The current one."""
    return Bundle.load_current(bundles)


@pytest.fixture(scope="session")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose model thinks `thinking.THOUGHT` and closes it."""
    return publish_thinking(tmp_path_factory.mktemp("reciting"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose model never closes a thought."""
    return publish_thinking(tmp_path_factory.mktemp("endless"), None)


@pytest.fixture
def settings(bundles: Path, tmp_path: Path) -> Settings:
    """Settings with an embedded Redis of the test's own."""
    return Settings(bundles=bundles, data_dir=tmp_path / "redis")


@pytest.fixture
def user_id() -> str:
    """A user that no other test knows."""
    return f"user-{next(_user_numbers)}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A Redis of the module's own."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield await server.start()
    await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def redis(url: str) -> AsyncIterator[Redis]:
    """A client of that Redis."""
    client = connect(url, timeout_s=5, max_connections=4)
    yield client
    await client.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The service with its local engine, shared by the tests of a module."""
    async with running(Settings(bundles=bundles, data_dir=tmp_path_factory.mktemp("redis"))) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def thinking(reciting: Bundle, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The service with its local engine on the reciting model, shared by the tests of a module."""
    settings = Settings(bundles=reciting.path.parent, data_dir=tmp_path_factory.mktemp("redis"))
    async with running(settings) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def instant_service(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The service with an engine that answers at once, shared by the tests of a module."""
    async with running(Settings(bundles=bundles, data_dir=tmp_path_factory.mktemp("redis")), instant) as service:
        yield service
