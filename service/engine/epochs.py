"""Live epochs of a catalogue as folders, which the processes of an engine map."""

import asyncio
import shutil
import tempfile
from pathlib import Path

from semantic_ids.bundle import Bundle
from service.engine.base import EngineError


class EpochFolders:
    """One temporary folder of one engine: another life's epochs may have had the same numbers."""

    def __init__(self) -> None:
        self._root: tempfile.TemporaryDirectory[str] | None = None

    async def write(self, bundle: Bundle) -> Path:
        """The folder with the trie of this epoch; `EngineError` if it cannot be written."""
        if self._root is None:
            self._root = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="sidrec-epochs-")
        folder = Path(self._root.name) / bundle.catalog_id
        try:
            await asyncio.to_thread(bundle.catalog.save_trie, folder)
        except OSError as error:
            raise EngineError(f"the epoch's trie cannot be written to {folder} ({error}): set TMPDIR") from error
        return folder

    async def remove(self, catalog_id: str) -> None:
        """Remove an epoch's folder, if there is one; whoever has mapped it keeps it."""
        if self._root is not None:
            await asyncio.to_thread(shutil.rmtree, Path(self._root.name) / catalog_id, ignore_errors=True)

    async def close(self) -> None:
        """Remove everything."""
        if self._root is not None:
            await asyncio.to_thread(self._root.cleanup)
            self._root = None
