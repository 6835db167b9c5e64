"""The catalogue: item ⇄ SID, with title, categories and popularity. Columnar and memory-mapped.

Items are addressed by *rank*, their place in the order (SID ascending, popularity descending). Several items may share
a SID: they are neighbours in rank, the most popular first, and every one of them can be reached. Equal popularity
under one SID keeps the order of the rows that were passed in, which training makes a seeded shuffle: nothing here
follows item-id order.

A catalogue never changes. Live changes make another one, an *epoch*: `base.with_changes(changes)`, a catalogue like any
other, which shares the base's text and has ranks of its own.
"""

import hashlib
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semantic_ids.catalog_changes import (
    CatalogItem,
    ItemChanges,
    Origins,
    RankMap,
    SortKeys,
    Translation,
    insertion_places,
    spliced,
)
from semantic_ids.codes import Codes, SidSpace
from semantic_ids.columns import MergedColumn, StringColumn, map_array, save_array
from semantic_ids.trie import Ranks, SidTrie, sid_keys

CATEGORY_SEPARATOR = " > "
BASE_EPOCH = 0
"""The catalogue epoch of a freshly loaded bundle; each live change adds one."""

_ARRAYS = ("codes", "popularity", "id_hashes", "id_hash_ranks", "category_offsets", "category_ranks")
_STRINGS = ("item_ids", "titles", "category_paths", "category_names")
_TRIE_ARRAYS = ("level_starts", "tokens", "first_child", "leaf_rank")
_MAX_RECENT = 16_384  # ids whose ranks are kept at hand: 2 MB
_UNIT = "\x1f"  # between an item's category paths, inside the column


class CatalogError(ValueError):
    """Rows or changes that cannot make a catalogue, or files that are none."""


@dataclass(frozen=True)
class Catalog:
    """One epoch of the catalogue; all columns are by rank."""

    space: SidSpace
    codes: Codes  # (N, L)
    popularity: npt.NDArray[np.int64]  # (N,) training interactions
    item_ids: StringColumn
    titles: StringColumn
    category_paths: StringColumn
    id_hashes: npt.NDArray[np.uint64]  # (N,) sorted
    id_hash_ranks: npt.NDArray[np.uint32]  # (N,) rank of each hash
    category_names: StringColumn  # every node on every path, sorted
    category_offsets: npt.NDArray[np.int64]  # (categories + 1,)
    category_ranks: npt.NDArray[np.uint32]  # ranks of each category's items, sorted
    trie: SidTrie
    epoch: int = BASE_EPOCH

    @classmethod
    def build(
        cls,
        space: SidSpace,
        item_ids: Sequence[str],
        codes: npt.NDArray[np.integer],
        popularity: npt.NDArray[np.integer],
        titles: Sequence[str],
        categories: Sequence[Sequence[str]],
    ) -> "Catalog":
        """Rank the items and build every index. `codes` is (N, L); the other columns have N rows."""
        lengths = {len(item_ids), len(codes), len(popularity), len(titles), len(categories)}
        if lengths != {len(item_ids)} or not item_ids:
            raise CatalogError(f"a catalogue needs at least one item and columns of one length, not {sorted(lengths)}")
        order = np.lexsort((-popularity.astype(np.int64), sid_keys(space, codes)))  # stable: rows break ties
        ids = [item_ids[row] for row in order]
        hashes = hash_ids(ids)
        by_hash = np.argsort(hashes, kind="stable")
        if len(set(ids)) != len(ids):
            raise CatalogError("item ids must be unique")
        paths = [categories[row] for row in order]
        _check_paths(path for item in paths for path in item)
        names, offsets, ranks = _category_index(paths)
        sorted_codes = space.check(codes)[order]
        return cls(
            space=space,
            codes=sorted_codes,
            popularity=popularity.astype(np.int64)[order],
            item_ids=StringColumn.of(ids),
            titles=StringColumn.of(titles[row] for row in order),
            category_paths=StringColumn.of(_UNIT.join(item) for item in paths),
            id_hashes=hashes[by_hash],
            id_hash_ranks=by_hash.astype(np.uint32),
            category_names=names,
            category_offsets=offsets,
            category_ranks=ranks,
            trie=SidTrie.from_sorted(space, sorted_codes),
        )

    def __len__(self) -> int:
        return len(self.codes)

    def rank_of(self, item_id: str) -> int | None:
        """The item's rank, or None if the catalogue does not hold it."""
        ranks, _ = self.ranks_of([item_id])
        return int(ranks[0]) if len(ranks) else None

    def ranks_of(self, item_ids: Iterable[str]) -> tuple[Ranks, list[str]]:
        """Ranks of the known ids, in the order given, and the ids that are unknown."""
        ids = list(item_ids)
        recent = self._recent_ranks
        found = list(map(recent.get, ids))
        if None not in found:
            return np.array(found, np.int64), []
        looked_up = self._look_up([item_id for item_id, rank in zip(ids, found, strict=True) if rank is None])
        found = [looked_up.get(ids[place]) if rank is None else rank for place, rank in enumerate(found)]
        if len(recent) + len(looked_up) > _MAX_RECENT:
            recent.clear()
        if len(looked_up) <= _MAX_RECENT:
            recent.update(looked_up)
        unknown = [item_id for item_id, rank in zip(ids, found, strict=True) if rank is None]
        return np.array([rank for rank in found if rank is not None], np.int64), unknown

    @cached_property
    def _recent_ranks(self) -> dict[str, int]:
        """Of ids asked for of late: a user's history comes with every one of their requests, and twice."""
        return {}

    def _look_up(self, ids: list[str]) -> dict[str, int]:
        """The ranks of those that are known."""
        hashes = hash_ids(ids)
        first = np.searchsorted(self.id_hashes, hashes)
        end = np.searchsorted(self.id_hashes, hashes, side="right")
        # Nearly always one candidate an id, or none; ids with one hash stand side by side.
        places = [place for low, high in zip(first.tolist(), end.tolist(), strict=True) for place in range(low, high)]
        candidates = self.id_hash_ranks[np.array(places, np.int64)]
        wanted = set(ids)
        pairs = zip(self.item_ids.take(candidates), candidates.tolist(), strict=True)
        return {item_id: rank for item_id, rank in pairs if item_id in wanted}

    def categories_of(self, rank: int) -> list[str]:
        """The item's category paths, such as `["Beauty > Hair Care"]`."""
        joined = self.category_paths[rank]
        return joined.split(_UNIT) if joined else []

    def ranks_in_category(self, name: str) -> Ranks:
        """Ranks of the items that have `name` as a category path or as a node on one; none for an unknown name."""
        place = bisect_left(self.category_names, name)
        if [name] != self.category_names[place : place + 1]:
            return np.empty(0, np.int64)
        return self.category_ranks[self.category_offsets[place] : self.category_offsets[place + 1]].astype(np.int64)

    def sid(self, rank: int) -> str:
        """The item's SID, written."""
        return self.space.format(self.codes[rank])

    def sids(self, ranks: Ranks) -> list[str]:
        """The items' SIDs, written, (M,)."""
        return [self.space.format(codes) for codes in self.codes[ranks].tolist()]

    @property
    def published(self) -> "Catalog":
        """The catalogue that this is an epoch of: itself, unless it is one."""
        return self

    @cached_property
    def origins(self) -> npt.NDArray[np.int32]:
        """The published rank of each item, (N,); -1 for those that were put since."""
        return np.arange(len(self), dtype=np.int32)

    @cached_property
    def ties(self) -> npt.NDArray[np.int64]:
        """What orders items of one SID and popularity, (N,): the published rank, and above all those the arrival."""
        return np.arange(len(self), dtype=np.int64)

    @cached_property
    def by_popularity(self) -> Ranks:
        """All ranks, the most popular first; equal popularity in an order fixed by the SIDs' hash, not by item id."""
        order: Ranks = np.lexsort(_popularity_keys(self, slice(None))[::-1])
        return order

    def check_item(self, item: CatalogItem) -> None:
        """`CatalogError` if `item` could not be put into this catalogue; it names the value and the rule."""
        try:
            _check_item(self.space, item)
        except ValueError as error:
            raise CatalogError(f"item {item.item_id!r} cannot be put: {error}") from error

    def with_changes(self, changes: ItemChanges) -> "CatalogEpoch":
        """This catalogue with `changes`, as its own snapshot: `changes.epoch` is its epoch.

        Deleted items are gone, known ones replaced, new ones inserted. An item whose SID and popularity a change leaves
        alone keeps its place; where others tie with what stands there, they follow it, in the order of `changes.items`.
        Raises `CatalogError` for an item that cannot be put, and if nothing would be left.
        """
        return CatalogEpoch.of(self, changes)

    def save(self, folder: Path) -> None:
        """Write every column into `folder`; the trie's arrays too, so that loading builds nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            save_array(folder, name, getattr(self, name))
        for name in _STRINGS:
            getattr(self, name).save(folder, name)
        _save_trie(self.trie, folder)

    def save_trie(self, folder: Path) -> None:
        """Write what decoding needs, for `load_trie` in another process: all of it at once, by a rename.

        A folder that is there already is left as it is: its name stands for one catalogue at one epoch.
        """
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_array(staging, "space", np.array([self.space.num_levels, self.space.codebook_size]))
            _save_trie(self.trie, staging)
            staging.rename(folder)
        except OSError:
            if not folder.exists():  # or else another process was faster
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, space: SidSpace) -> "Catalog":
        """Map a saved catalogue; `CatalogError` if its columns are not those of `space` or do not fit each other."""
        try:
            trie = _map_trie(folder, space)
            columns: dict[str, Any] = {name: map_array(folder, name) for name in _ARRAYS}
            columns |= {name: StringColumn.map(folder, name) for name in _STRINGS}
            catalog = cls(space=space, trie=trie, **columns)
        except (OSError, ValueError, EOFError) as error:
            raise CatalogError(f"the catalogue in {folder} cannot be read: {error}") from error
        if (
            catalog.codes.ndim != 2
            or catalog.codes.shape[1] != space.num_levels
            or len(trie.level_starts) != space.num_levels + 1
        ):
            raise CatalogError(f"the catalogue in {folder} does not have SIDs of {space.num_levels} levels")
        if int(catalog.codes.max()) >= space.codebook_size:
            raise CatalogError(f"the catalogue in {folder} has codes beyond the codebook size {space.codebook_size}")
        if {len(catalog), len(catalog.item_ids), len(catalog.titles), trie.num_items} != {len(catalog)}:
            raise CatalogError(f"the columns of the catalogue in {folder} differ in length")
        return catalog


@dataclass(frozen=True, kw_only=True)
class CatalogEpoch(Catalog):
    """A catalogue made from another by live changes."""

    base: Catalog
    rank_map: RankMap
    """From the base's ranks to this epoch's."""
    puts: "_RankedPuts"

    @classmethod
    def of(cls, base: Catalog, changes: ItemChanges) -> "CatalogEpoch":
        """`base.with_changes(changes)`."""
        for item in changes.items:
            base.check_item(item)
        deleted, _ = base.ranks_of(changes.deleted)
        puts = _RankedPuts.of(base, changes.items)
        rank_map = RankMap.of(len(base), deleted, puts.places, puts.base_ranks)
        if not len(rank_map.sources):
            raise CatalogError(f"epoch {changes.epoch} deletes all {len(base)} items: a catalogue holds at least one")
        codes = rank_map.column(base.codes, puts.codes)
        hashes, hash_ranks = _changed_id_index(base, rank_map, puts.items)
        names, offsets, ranks = _changed_category_index(base, rank_map, puts.items)
        paths = (_UNIT.join(item.categories) for item in puts.items)
        return cls(
            space=base.space,
            codes=codes,
            popularity=rank_map.column(base.popularity, puts.popularity),
            item_ids=MergedColumn.over(base.item_ids, (item.item_id for item in puts.items), rank_map.sources),
            titles=MergedColumn.over(base.titles, (item.title for item in puts.items), rank_map.sources),
            category_paths=MergedColumn.over(base.category_paths, paths, rank_map.sources),
            id_hashes=hashes,
            id_hash_ranks=hash_ranks,
            category_names=names,
            category_offsets=offsets,
            category_ranks=ranks,
            trie=SidTrie.from_sorted(base.space, codes),
            epoch=changes.epoch,
            base=base,
            rank_map=rank_map,
            puts=puts,
        )

    @property
    def published(self) -> Catalog:
        """The catalogue that all epochs are made from, or from a merged one of it."""
        return self.base.published

    @cached_property
    def origins(self) -> npt.NDArray[np.int32]:
        """As any catalogue's."""
        return self.rank_map.column(self.base.origins, self.puts.origins)

    @cached_property
    def ties(self) -> npt.NDArray[np.int64]:
        """As any catalogue's."""
        return self.rank_map.column(self.base.ties, self.puts.ties)

    @cached_property
    def translation(self) -> Translation:
        """From published ranks to this epoch's: carries over what is kept by published rank, such as neighbours."""
        if self.base is self.published:
            return self.rank_map
        return Origins.of(len(self.published), self.origins)

    def save_merged(self, folder: Path) -> None:
        """Write this epoch into `folder` as a catalogue that later epochs can be made from: `MergedCatalog.load`."""
        self.save(folder)
        save_array(folder, "origins", self.origins)
        save_array(folder, "ties", self.ties)
        save_array(folder, "by_popularity", self.by_popularity)

    def with_changes(self, changes: ItemChanges) -> "CatalogEpoch":
        """Refused: an epoch holds all changes since the base, and the next one starts from the base again."""
        raise CatalogError(f"epoch {changes.epoch} cannot be made from epoch {self.epoch}: use its base")

    @cached_property
    def by_popularity(self) -> Ranks:
        """As the base's, with the changes; the base's order is sorted once, and then only spliced."""
        order, put_ranks = self.base.by_popularity, self.rank_map.put_ranks
        keys = (*_popularity_keys(self, put_ranks), self.rank_map.places)
        listed = np.lexsort(keys[::-1])  # stable: puts are in rank order
        places = insertion_places(
            len(order),
            lambda rows: (*_popularity_keys(self.base, order[rows]), order[rows]),
            tuple(key[listed] for key in keys),
        )
        return self.rank_map.listing(order, places, put_ranks[listed])[0].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class MergedCatalog(Catalog):
    """An epoch, written down, from which later epochs are made with the changes after it.

    They equal those made from the published catalogue and all changes: it keeps where its items stood when published.
    """

    of: Catalog
    merged_origins: npt.NDArray[np.int32]
    merged_ties: npt.NDArray[np.int64]
    merged_popularity: Ranks

    @classmethod
    def load_merged(cls, folder: Path, published: Catalog, epoch: int) -> "MergedCatalog":
        """Map what `CatalogEpoch.save_merged` wrote; `CatalogError` if it cannot be one of `published`."""
        plain = Catalog.load(folder, published.space)
        try:
            origins, ties, popularity = (map_array(folder, name) for name in ("origins", "ties", "by_popularity"))
        except (OSError, ValueError, EOFError) as error:
            raise CatalogError(f"the merged catalogue in {folder} cannot be read: {error}") from error
        if not len(origins) == len(ties) == len(popularity) == len(plain) or origins.max() >= len(published):
            raise CatalogError(f"the merged catalogue in {folder} is none of the published one")
        columns = {one.name: getattr(plain, one.name) for one in fields(Catalog) if one.init} | {"epoch": epoch}
        return cls(**columns, of=published, merged_origins=origins, merged_ties=ties, merged_popularity=popularity)

    @property
    def published(self) -> Catalog:
        """The catalogue that this is an epoch of."""
        return self.of

    @cached_property
    def origins(self) -> npt.NDArray[np.int32]:
        """As any catalogue's."""
        return self.merged_origins

    @cached_property
    def ties(self) -> npt.NDArray[np.int64]:
        """As any catalogue's."""
        return self.merged_ties

    @cached_property
    def by_popularity(self) -> Ranks:
        """As any catalogue's."""
        return self.merged_popularity


@dataclass(frozen=True)
class _RankedPuts:
    """Items put, in rank order, as columns (A,)."""

    items: list[CatalogItem]
    codes: Codes  # (A, L)
    popularity: npt.NDArray[np.int64]
    base_ranks: Ranks  # -1 where the base does not have the item
    origins: npt.NDArray[np.int32]  # the published ranks, likewise
    ties: npt.NDArray[np.int64]
    places: Ranks  # base rows before each

    @classmethod
    def of(cls, base: Catalog, items: Sequence[CatalogItem]) -> "_RankedPuts":
        published, item_ids = base.published, [item.item_id for item in items]
        base_ranks = _base_ranks(base, item_ids)
        origins = base_ranks if published is base else _base_ranks(published, item_ids)
        is_known = origins >= 0
        codes = np.array([item.codes for item in items], np.uint16).reshape(len(items), base.space.num_levels)
        popularity = np.where(is_known, published.popularity[origins], 0)
        for place, item in enumerate(items):
            if item.popularity is not None:
                popularity[place] = item.popularity
        is_unmoved = is_known & (published.codes[origins] == codes).all(axis=1)
        is_unmoved &= published.popularity[origins] == popularity
        # Among equals an unmoved item stands where it did, and what came later follows what was published.
        ties = np.where(is_unmoved, origins, len(published) + _arrivals(base, items))
        keys = (sid_keys(base.space, codes), -popularity, ties)
        order = np.lexsort(keys[::-1])
        places = insertion_places(
            len(base),
            lambda rows: (sid_keys(base.space, base.codes[rows]), -base.popularity[rows], base.ties[rows]),
            tuple(key[order] for key in keys),
        )
        return cls(
            [items[place] for place in order],
            codes[order],
            popularity[order],
            base_ranks[order],
            origins[order].astype(np.int32),
            ties[order],
            places,
        )


def _arrivals(base: Catalog, items: Sequence[CatalogItem]) -> npt.NDArray[np.int64]:
    numbers = [item.arrival for item in items]
    given = [number for number in numbers if number is not None]
    if len(given) == len(numbers):
        return np.array(given, np.int64)
    if given or base is not base.published:
        raise CatalogError("items that are put into a merged catalogue, or with others that do, need an arrival number")
    return np.arange(len(items))


def _base_ranks(base: Catalog, item_ids: Sequence[str]) -> Ranks:
    known, unknown = base.ranks_of(item_ids)
    missing = set(unknown)
    ranks = np.full(len(item_ids), -1, np.int64)
    ranks[[item_id not in missing for item_id in item_ids]] = known
    return ranks


def _check_item(space: SidSpace, item: CatalogItem) -> None:
    if not item.item_id:
        raise ValueError("an id has at least one character")
    for text in (item.item_id, item.title, *item.categories):
        text.encode()  # a lone surrogate raises UnicodeEncodeError, which names it
    _check_paths(item.categories)
    space.format(item.codes)
    if item.popularity is not None and not 0 <= item.popularity < 1 << 63:
        raise ValueError(f"popularity {item.popularity} is not in [0, 2⁶³)")


def _check_paths(paths: Iterable[str]) -> None:
    bad = next((path for path in paths if not path or _UNIT in path), None)
    if bad is not None:
        raise CatalogError(f"{bad!r} cannot be a category path: it is empty or holds a unit separator (U+001F)")


def _popularity_keys(catalog: Catalog, rows: Ranks | slice) -> SortKeys:
    scrambled = sid_keys(catalog.space, catalog.codes[rows]).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return -catalog.popularity[rows], scrambled


def load_trie(folder: Path) -> SidTrie:
    """Map what `Catalog.save_trie` wrote; `CatalogError` if it is not there or not whole."""
    try:
        num_levels, codebook_size = map_array(folder, "space").tolist()
        trie = _map_trie(folder, SidSpace(num_levels, codebook_size))
    except (OSError, ValueError, EOFError) as error:
        raise CatalogError(f"the trie in {folder} cannot be read: {error}") from error
    if len(trie.level_starts) != num_levels + 1 or trie.level_starts[-1] != len(trie.tokens):
        raise CatalogError(f"the trie in {folder} does not have SIDs of {num_levels} levels")
    return trie


def _save_trie(trie: SidTrie, folder: Path) -> None:
    for name in _TRIE_ARRAYS:
        save_array(folder, f"trie.{name}", getattr(trie, name))


def _map_trie(folder: Path, space: SidSpace) -> SidTrie:
    return SidTrie(space, *(map_array(folder, f"trie.{name}") for name in _TRIE_ARRAYS))


def hash_ids(item_ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each id, the same in every process; of any string, since ids come from outside."""
    digests = b"".join(
        hashlib.blake2b(item_id.encode(errors="surrogatepass"), digest_size=8).digest() for item_id in item_ids
    )
    return np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64)


def nodes_on_path(path: str) -> list[str]:
    """`A > B > C` → `A`, `A > B`, `A > B > C`: every name under which a filter finds the path."""
    parts = path.split(CATEGORY_SEPARATOR)
    return [CATEGORY_SEPARATOR.join(parts[: depth + 1]) for depth in range(len(parts))]


def _category_index(
    paths_by_rank: Iterable[Sequence[str]],
) -> tuple[StringColumn, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    places = _places_by_category(paths_by_rank)
    names = sorted(places)
    ranks = np.array([rank for name in names for rank in places[name]], np.uint32)
    return StringColumn.of(names), _offsets([len(places[name]) for name in names]), ranks


def _places_by_category(paths_by_place: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, paths in enumerate(paths_by_place):
        for name in {name for path in paths for name in nodes_on_path(path)}:
            places.setdefault(name, []).append(place)
    return places


def _offsets(sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def _changed_id_index(
    base: Catalog, rank_map: RankMap, puts: Sequence[CatalogItem]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    hashes = hash_ids([item.item_id for item in puts])
    by_hash = np.argsort(hashes, kind="stable")
    places = np.searchsorted(base.id_hashes, hashes[by_hash])
    ranks, gone = rank_map.listing(base.id_hash_ranks, places, rank_map.put_ranks[by_hash])
    return spliced(base.id_hashes, gone, places, hashes[by_hash]), ranks


def _changed_category_index(
    base: Catalog, rank_map: RankMap, puts: Sequence[CatalogItem]
) -> tuple[StringColumn, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    puts_of = _places_by_category(item.categories for item in puts)
    names = sorted(puts_of)
    name_places = np.array([bisect_left(base.category_names, name) for name in names], np.int64)
    is_new = np.array(
        [[name] != base.category_names[place : place + 1] for name, place in zip(names, name_places, strict=True)],
        np.bool_,
    )
    places, put_ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    spans = zip(base.category_offsets[name_places], base.category_offsets[name_places + ~is_new], strict=True)
    for name, (low, high) in zip(names, spans, strict=True):
        places.append(low + np.searchsorted(base.category_ranks[low:high], rank_map.places[puts_of[name]]))
        put_ranks.append(rank_map.put_ranks[puts_of[name]])
    ranks, gone = rank_map.listing(base.category_ranks, np.concatenate(places), np.concatenate(put_ranks))
    # Each name now stands behind the new ones before it; a name that has lost all its items goes.
    sizes = np.diff(base.category_offsets - np.searchsorted(gone, base.category_offsets))
    sizes = np.insert(sizes, name_places[is_new], 0)
    sizes[name_places + np.cumsum(is_new) - is_new] += np.array([len(puts_of[name]) for name in names], np.int64)
    new_names = [name for name, one_is in zip(names, is_new, strict=True) if one_is]
    num_base = len(base.category_names)
    sources = np.insert(np.arange(num_base), name_places[is_new], num_base + np.arange(len(new_names)))
    merged = MergedColumn.over(base.category_names, new_names, sources[sizes > 0].astype(np.int32))
    return merged, _offsets(sizes[sizes > 0]), ranks
