"""Folders of live epochs: an engine's own, removed with it, or by the next one where it was killed."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from semantic_ids.bundle import Bundle
from service.engine.epochs import EpochFolders


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_they_go_with_their_engine(bundle: Bundle, temporary: Path):
    folders = EpochFolders()
    folder = await folders.write(bundle)
    assert folder.is_dir()
    await folders.remove(bundle.catalog_id)
    assert not folder.exists()
    await folders.close()
    assert not left_in(temporary)
    await folders.close()


async def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(bundle: Bundle, temporary: Path):
    program = (
        "import sys, time; from service.engine.epochs import _made; kept = _made(); "
        "print(kept[0], flush=True); time.sleep(60)"
    )

    def other() -> tuple[subprocess.Popen[str], Path]:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    (killed, left), (living, used) = await asyncio.to_thread(lambda: (other(), other()))
    try:
        killed.send_signal(signal.SIGKILL)
        await asyncio.to_thread(killed.wait)
        folders = EpochFolders()
        await folders.write(bundle)
        assert not left.exists()
        assert used.exists()
        await folders.close()
    finally:
        for process in (killed, living):
            process.kill()
            await asyncio.to_thread(process.wait)
            assert process.stdout is not None
            process.stdout.close()
