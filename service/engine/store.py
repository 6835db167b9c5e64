"""Catalogues by id and bitmaps by name, inside an engine's process: what requests name there.

A catalogue is memory-mapped from disk, a bundle's own or the trie of a live epoch: nothing large crosses between the
processes. vLLM makes its worker and its processors by name, so they meet in this module's `STORE`.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from semantic_ids.bundle import Bundle
from semantic_ids.catalog import load_trie
from semantic_ids.codes import SidVocabulary
from semantic_ids.filters import ItemFilter, RankBitmap
from semantic_ids.step_reader import StepReader
from semantic_ids.trie import SidTrie
from service.engine.wire import SidRequestError, WireFilter, unpack_bitmap, unpack_ranks

MAX_BITMAPS = 256
MAX_ERRORS = 4096
"""Errors of sampled rows that wait to be asked for; a caller that never asks must not cost memory."""


@dataclass(frozen=True)
class DecodingCatalog:
    """What decoding reads of a catalogue."""

    trie: SidTrie

    def __len__(self) -> int:
        return self.trie.num_items


@dataclass(frozen=True)
class CatalogSnapshot:
    """One catalogue epoch of one bundle."""

    catalog_id: str
    catalog: DecodingCatalog
    vocabulary: SidVocabulary
    step_reader: StepReader | None = None


class SidStore:
    """What requests name, and how it is found."""

    def __init__(self) -> None:
        self._catalogs: dict[str, CatalogSnapshot] = {}
        self._bitmaps: OrderedDict[tuple[str, str], RankBitmap] = OrderedDict()
        self._errors: OrderedDict[str, SidRequestError] = OrderedDict()

    def load(self, bundle_path: Path) -> str:
        """Map a bundle's catalogue; its id, also when it was there already."""
        return self.add(Bundle.load(bundle_path))

    def add(self, bundle: Bundle) -> str:
        """Keep a loaded bundle's catalogue; its id."""
        catalog_id = bundle.catalog_id
        catalog = DecodingCatalog(bundle.catalog.trie)
        snapshot = CatalogSnapshot(catalog_id, catalog, bundle.vocabulary, bundle.step_reader)
        self._catalogs.setdefault(catalog_id, snapshot)
        return catalog_id

    def load_epoch(self, base_id: str, catalog_id: str, folder: Path) -> None:
        """Map the trie of an epoch of the catalogue `base_id`, as `Catalog.save_trie` wrote it."""
        base = self.snapshot(base_id)
        self._catalogs[catalog_id] = replace(base, catalog_id=catalog_id, catalog=DecodingCatalog(load_trie(folder)))

    def forget(self, catalog_id: str) -> None:
        """Forget a catalogue, if it is there, and its bitmaps."""
        self._catalogs.pop(catalog_id, None)
        for key in [key for key in self._bitmaps if key[0] == catalog_id]:
            del self._bitmaps[key]

    def keep_only(self, catalog_id: str) -> None:
        """Forget every other catalogue and its bitmaps."""
        self._catalogs = {catalog_id: self.snapshot(catalog_id)}
        for key in [key for key in self._bitmaps if key[0] != catalog_id]:
            del self._bitmaps[key]

    def snapshot(self, catalog_id: str) -> CatalogSnapshot:
        """The catalogue of this id, or a typed error."""
        found = self._catalogs.get(catalog_id)
        if found is None:
            raise SidRequestError(
                "unknown_catalog", f"no catalogue {catalog_id!r} here; there is {sorted(self._catalogs)}"
            )
        return found

    def put_bitmap(self, catalog_id: str, digest: str, packed: bytes) -> None:
        """Keep a bitmap; the one that was used longest ago is forgotten."""
        bitmap = unpack_bitmap(packed, len(self.snapshot(catalog_id).catalog))
        if bitmap.digest != digest:
            raise SidRequestError("bad_request", f"bitmap {digest!r} was sent with other content")
        self._bitmaps[catalog_id, digest] = bitmap
        self._bitmaps.move_to_end((catalog_id, digest))
        if len(self._bitmaps) > MAX_BITMAPS:
            self._bitmaps.popitem(last=False)

    def item_filter(self, snapshot: CatalogSnapshot, wire: WireFilter) -> ItemFilter:
        """A request's filter, exact; a filter that leaves nothing is an error."""
        num_items = len(snapshot.catalog)
        bitmap = None
        if wire.bitmap is not None:
            key = (snapshot.catalog_id, wire.bitmap)
            bitmap = self._bitmaps.get(key)
            if bitmap is None:
                raise SidRequestError("unknown_bitmap", f"bitmap {wire.bitmap!r} is not here: send it")
            self._bitmaps.move_to_end(key)
        allow = None if wire.allow is None else unpack_ranks(wire.allow, num_items)
        deny = unpack_ranks(wire.deny, num_items)
        if allow is None and bitmap is None:  # already what `ItemFilter.of` would make of it
            item_filter = ItemFilter(num_items, None, None, deny)
        else:
            item_filter = ItemFilter.of(num_items, bitmap=bitmap, allow=allow, deny=deny)
        if item_filter.num_eligible == 0:
            raise SidRequestError("empty_allowed_set", "the filter leaves no item: that is no request for the model")
        return item_filter

    def put_error(self, name: str, error: SidRequestError) -> None:
        """Keep why the sampled row of this name was ended; the oldest error is forgotten."""
        self._errors[name] = error
        self._errors.move_to_end(name)
        if len(self._errors) > MAX_ERRORS:
            self._errors.popitem(last=False)

    def take_error(self, name: str) -> SidRequestError | None:
        """Why the sampled row of this name was ended, once; None if it was not."""
        return self._errors.pop(name, None)


STORE = SidStore()
"""The one of vLLM's process."""
