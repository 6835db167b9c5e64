"""Catalogues with their older changes worked in, on disk: an epoch is made from one of these and the later changes.

base as published ─ all changes up to epoch E ─→ merged catalogue, written in the background ─ later changes ─→ epoch

It is a cache. Redis keeps the truth, and the process holds every change: a merged catalogue that is missing, damaged,
or made of other changes than Redis has now (it was set back) is left alone and made again. An epoch made from one
equals the epoch made from everything, so replicas with and without agree. A folder is named by bundle and epoch, checks
itself by sha256, and comes by a rename; the one before is removed, and those of bundles that are no more.
"""

import asyncio
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from semantic_ids.bundle import Bundle
from semantic_ids.catalog import Catalog, CatalogEpoch, CatalogError, MergedCatalog
from service.item_store import ItemChange

log = structlog.get_logger(__name__)

_FOLDER = ".merged"
_MANIFEST = "merged.json"
MERGE_AT = 5_000
"""Changes beyond the last merge that begin another: at a million items they make an epoch half as slow again."""

_RETRY_S = 60.0
"""After a merge that could not be written."""


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    epoch: int
    changes: dict[str, str]
    """Item → digest of its latest change by then."""
    files: dict[str, str]
    """Name → sha256."""


@dataclass(frozen=True)
class Merged:
    """A catalogue with every change up to its epoch."""

    catalog: MergedCatalog
    changes: Mapping[str, str]  # item → digest of its latest change by then

    def is_of(self, changes: Mapping[str, ItemChange]) -> bool:
        """Whether these changes are those that it was made of, and later ones."""
        epoch = self.catalog.epoch
        older = {item_id: one for item_id, one in changes.items() if one.epoch <= epoch}
        if not older.keys() <= self.changes.keys() <= changes.keys():
            return False
        return all(_digest(one) == self.changes[item_id] for item_id, one in older.items())


class MergedCatalogs:
    """The latest merged catalogue of each bundle; `stop` when done."""

    def __init__(self, folder: Path | None = None, merge_at: int = MERGE_AT) -> None:
        """`folder` is where they are kept; None: in `.merged` beside the bundles."""
        self._folder = folder
        self._merge_at = merge_at
        self._merged: dict[str, Merged | None] = {}  # by bundle; None: there is none on disk
        self._doubted: set[str] = set()
        self._merging: dict[str, asyncio.Task[None]] = {}
        self._next_try: dict[str, float] = {}

    async def latest(self, base: Bundle, changes: Mapping[str, ItemChange], epoch: int) -> Merged | None:
        """The latest one that is made of these changes, up to an epoch; the first time it is looked for on disk."""
        name = base.bundle_id
        if name not in self._merged:
            self._merged[name] = await asyncio.to_thread(_found, self._folder_of(base), base.catalog, changes)
        elif name in self._doubted:
            self._doubted.discard(name)  # first: they may be read anew while this looks at them
            merged = self._merged[name]
            if merged is not None and not await asyncio.to_thread(merged.is_of, changes):
                log.warning("merged_catalog_left", bundle=name, epoch=merged.catalog.epoch)
                self._merged[name] = None
        merged = self._merged[name]
        return merged if merged is not None and merged.catalog.epoch <= epoch else None

    def doubt(self) -> None:
        """All changes were read anew: they may be others than those that were merged."""
        self._doubted = set(self._merged)

    def offer(self, base: Bundle, epoch: Catalog, changes: Mapping[str, ItemChange], num_later: int) -> None:
        """Merge in the background, if this epoch of `base`, made of `changes`, is far enough from the last merge."""
        name = base.bundle_id
        is_time = name not in self._merging and time.monotonic() >= self._next_try.get(name, 0.0)
        if num_later >= self._merge_at and is_time and isinstance(epoch, CatalogEpoch):
            self._merging[name] = asyncio.create_task(self._merge(base, epoch, changes), name=f"merge-{name}")
            self._merging[name].add_done_callback(lambda _task: self._merging.pop(name, None))

    async def stop(self) -> None:
        """Wait for the merges under way: seconds."""
        await asyncio.gather(*self._merging.values(), return_exceptions=True)

    async def _merge(self, base: Bundle, epoch: CatalogEpoch, changes: Mapping[str, ItemChange]) -> None:
        folder = self._folder_of(base)
        try:
            merged = await asyncio.to_thread(_written, folder, base.catalog, epoch, changes)
            await asyncio.to_thread(_sweep, folder, base.path.parent)
        except (OSError, CatalogError) as error:  # epochs are made from everything meanwhile
            self._next_try[base.bundle_id] = time.monotonic() + _RETRY_S
            log.warning("catalog_not_merged", bundle=base.bundle_id, folder=str(folder), error=str(error))
        else:
            self._merged[base.bundle_id] = merged
            self._doubted.add(base.bundle_id)  # the changes may have been read anew meanwhile
            log.info("catalog_merged", bundle=base.bundle_id, epoch=merged.catalog.epoch, changes=len(changes))

    def _folder_of(self, base: Bundle) -> Path:
        return (self._folder or base.path.parent / _FOLDER) / base.bundle_id


def _written(folder: Path, published: Catalog, epoch: CatalogEpoch, changes: Mapping[str, ItemChange]) -> Merged:
    """The epoch, merged: on disk, whole, and mapped from there."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    try:
        epoch.save_merged(staging)
        digests = {item_id: _digest(change) for item_id, change in changes.items()}
        files = {path.name: _sha256(path) for path in staging.iterdir()}
        (staging / _MANIFEST).write_text(_Manifest(epoch=epoch.epoch, changes=digests, files=files).model_dump_json())
        final = folder / str(epoch.epoch)
        shutil.rmtree(final, ignore_errors=True)  # another replica's, or one that was not usable
        staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    merged = _loaded(final, published)
    for other in folder.iterdir():  # whoever has mapped it keeps it
        if other != final and other.name.isdigit() and int(other.name) < epoch.epoch:
            shutil.rmtree(other, ignore_errors=True)
    return merged


def _sweep(folder: Path, bundles: Path) -> None:
    """Remove what was merged, beside `folder`, of bundles that were deleted."""
    for one in folder.parent.iterdir():
        if one != folder and not (bundles / one.name).exists():
            shutil.rmtree(one, ignore_errors=True)


def _found(folder: Path, published: Catalog, changes: Mapping[str, ItemChange]) -> Merged | None:
    """The latest merged catalogue in the folder that is whole and made of these changes."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for epoch in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        try:
            merged = _loaded(folder / str(epoch), published)
        except (OSError, ValueError, CatalogError) as error:
            log.warning("merged_catalog_left", folder=str(folder / str(epoch)), error=str(error))
            continue
        if merged.is_of(changes):
            return merged
    return None


def _loaded(folder: Path, published: Catalog) -> Merged:
    try:
        manifest = _Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except ValidationError as error:
        raise CatalogError(f"{folder / _MANIFEST} is not one of a merged catalogue") from error
    for name, digest in manifest.files.items():
        if _sha256(folder / name) != digest:
            raise CatalogError(f"{folder / name} is not as it was written")
    catalog = MergedCatalog.load_merged(folder, published, manifest.epoch)
    return Merged(catalog, manifest.changes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(change: ItemChange) -> str:
    put = change.put
    content = None if put is None else [put.title, put.categories, put.codes, put.bundle, put.at]
    text = json.dumps([change.epoch, change.arrival, content])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
