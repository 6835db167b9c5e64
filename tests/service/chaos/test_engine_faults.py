"""The local engine's process is killed, and stopped for a while, in the middle of a beam, under traffic.

The vLLM engine's process is killed in `tests/service/vllm/test_engine.py` and `test_replicas.py`.
"""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from tests.service.chaos.processes import ServiceProcess
from tests.service.chaos.traffic import BENIGN, traffic

log = structlog.get_logger(__name__)
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("engine-faults")
    service = ServiceProcess(folder, bundles=bundles, data_dir=folder / "redis")
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


@pytest.mark.parametrize(
    ("fault", "expected"), [("killed", {"engine_unavailable"}), ("hangs", {"engine_unavailable", "deadline"})]
)
async def test_broken_in_mid_beam(service: ServiceProcess, fault: str, expected: set[str]):
    async with traffic(service.url, seed=len(fault)) as flow:
        await flow.recovery_s(time.monotonic())
        if fault == "hangs":
            flow.hurried_ms = 400
        pid = service.engine_pid()
        os.kill(pid, signal.SIGSTOP)  # whatever it is at stays half done, and what comes now waits
        broken_at = time.monotonic()
        if fault == "killed":
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(3.5)
        outage = Counter(flow.seen_since(broken_at))
        degraded = {reason for _, status, reason in outage if status == 200} - BENIGN
        assert "deadline" in degraded if fault == "hangs" else degraded == {"engine_unavailable"}, outage
        assert degraded <= expected, outage
        assert {reason for _, status, reason in outage if status == 503} <= {"overloaded"}, outage
        assert {status for endpoint, status, _ in outage if endpoint in ("events", "history")} == {200}, outage
        flow.hurried_ms = None
        if fault == "hangs":
            os.kill(pid, signal.SIGCONT)
            broken_at = time.monotonic()
        recovery_s = await flow.recovery_s(broken_at)
        assert (service.engine_pid() == pid) == (fault == "hangs")
    log.info("recovered", fault=fault, recovery_s=recovery_s, meanwhile=dict(outage))
