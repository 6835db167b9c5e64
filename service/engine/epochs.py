"""Live epochs of a catalogue as folders, which the processes of an engine map.

Each engine has a temporary folder of its own, since another life's epochs may have had the same numbers. It holds a
lock on it for as long as it lives; what was left by one that was killed has none, and the next engine removes it.
"""

import asyncio
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from semantic_ids.bundle import Bundle
from service.engine.base import EngineError

_PREFIX = "sidrec-epochs-"
_LOCK = "lock"


class EpochFolders:
    """The folders of one engine."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._lock_fd = -1

    async def write(self, bundle: Bundle) -> Path:
        """The folder with the trie of this epoch; `EngineError` if it cannot be written."""
        try:
            root = await self._made()
            await asyncio.to_thread(bundle.catalog.save_trie, root / bundle.catalog_id)
        except OSError as error:
            where = tempfile.gettempdir()
            raise EngineError(f"the epoch's trie cannot be written to {where} ({error}): set TMPDIR") from error
        return root / bundle.catalog_id

    async def _made(self) -> Path:
        if self._root is not None:
            return self._root
        root, self._lock_fd = await asyncio.to_thread(_made)
        self._root = root
        return root

    async def remove(self, catalog_id: str) -> None:
        """Remove an epoch's folder, if there is one; whoever has mapped it keeps it."""
        if self._root is not None:
            await asyncio.to_thread(shutil.rmtree, self._root / catalog_id, ignore_errors=True)

    async def close(self) -> None:
        """Remove everything."""
        root, self._root = self._root, None
        if root is not None:
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)
            os.close(self._lock_fd)


def _made() -> tuple[Path, int]:
    """A new folder and its lock; folders without a living owner are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_dead(left)
    root = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock_fd = os.open(root / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    return root, lock_fd


def _remove_if_dead(folder: Path) -> None:
    try:
        lock_fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # being made, being removed, or somebody else's
        return
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its owner lives
        pass
    finally:
        os.close(lock_fd)
