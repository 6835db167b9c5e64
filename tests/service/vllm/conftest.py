"""A real vLLM engine on a CPU, in its own process, shared by the session: it takes some twenty seconds to start."""

import warnings
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from semantic_ids.bundle import Bundle
from service.engine.local import LocalEngine, LocalEngineConfig
from service.engine.vllm_engine import VllmEngine, VllmEngineConfig
from service.metrics import Metrics
from tests.service.thinking import publish_thinking

VLLM_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
"""vLLM's attention kernels for CPUs take heads of 32 dimensions and more."""


def pytest_configure(config: pytest.Config) -> None:
    """vLLM's imports warn of its dependencies, and it leaves sockets to the end of the process: not ours to mend."""
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning", "RuntimeWarning", "ResourceWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}")  # while a test runs
    warnings.simplefilter("ignore", ResourceWarning)  # at the end of the session


@pytest.fixture(scope="session")
def vllm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that thinks without end, on a model of a shape that vLLM runs."""
    return publish_thinking(tmp_path_factory.mktemp("vllm"), None, max_positions=512, **VLLM_SIZES)


@pytest.fixture(scope="session")
def metrics() -> Metrics:
    """Of the shared engine."""
    return Metrics()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm_engine(vllm_bundle: Bundle, metrics: Metrics) -> AsyncIterator[VllmEngine]:
    """Started, checked and warm."""
    engine = VllmEngine(vllm_bundle, VllmEngineConfig(kv_cache_gib=0.25), metrics)
    await engine.start()
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def local_engine(vllm_bundle: Bundle) -> AsyncIterator[LocalEngine]:
    """The same bundle on torch in this process."""
    engine = LocalEngine(vllm_bundle, LocalEngineConfig(), Metrics())
    await engine.start()
    yield engine
    await engine.stop()
