"""The catalogue: item ⇄ SID, with title, categories and popularity. Columnar and memory-mapped.

Items are addressed by *rank*, their place in the order (SID ascending, popularity descending). Several items may share
a SID: they are neighbours in rank, the most popular first, and every one of them can be reached. Equal popularity
under one SID keeps the order of the rows that were passed in, which training makes a seeded shuffle: nothing here
follows item-id order.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import Codes, SidSpace
from semantic_ids.columns import StringColumn, map_array, save_array
from semantic_ids.trie import Ranks, SidTrie, sid_keys

CATEGORY_SEPARATOR = " > "
BASE_EPOCH = 0
"""The catalogue epoch of a freshly loaded bundle; each live change adds one."""

_ARRAYS = ("codes", "popularity", "id_hashes", "id_hash_ranks", "category_offsets", "category_ranks")
_STRINGS = ("item_ids", "titles", "category_paths", "category_names")
_UNIT = "\x1f"  # between an item's category paths, inside the column


class CatalogError(ValueError):
    """Rows that cannot make a catalogue."""


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
        bad = next((path for item in paths for path in item if not path or _UNIT in path), None)
        if bad is not None:
            raise CatalogError(f"{bad!r} cannot be a category path: it is empty or holds a unit separator (U+001F)")
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
        hashes = hash_ids(ids)
        first = np.searchsorted(self.id_hashes, hashes)
        end = np.searchsorted(self.id_hashes, hashes, side="right")
        # Nearly always one candidate an id, or none; ids with one hash stand side by side.
        places = [place for low, high in zip(first.tolist(), end.tolist(), strict=True) for place in range(low, high)]
        candidates = self.id_hash_ranks[np.array(places, np.int64)]
        rank_of = dict(zip(self.item_ids.take(candidates), candidates.tolist(), strict=True))
        ranks = [rank_of[item_id] for item_id in ids if item_id in rank_of]
        unknown = [item_id for item_id in ids if item_id not in rank_of]
        return np.array(ranks, np.int64), unknown

    def categories_of(self, rank: int) -> list[str]:
        """The item's category paths, such as `["Beauty > Hair Care"]`."""
        joined = self.category_paths[rank]
        return joined.split(_UNIT) if joined else []

    def ranks_in_category(self, name: str) -> Ranks:
        """Ranks of the items that have `name` as a category path or as a node on one; none for an unknown name."""
        place = self._category_places.get(name)
        if place is None:
            return np.empty(0, np.int64)
        return self.category_ranks[self.category_offsets[place] : self.category_offsets[place + 1]].astype(np.int64)

    def sid(self, rank: int) -> str:
        """The item's SID, written."""
        return self.space.format(self.codes[rank])

    @cached_property
    def by_popularity(self) -> Ranks:
        """All ranks, the most popular first; equal popularity in an order fixed by the SIDs' hash, not by item id."""
        scrambled = sid_keys(self.space, self.codes).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        order: Ranks = np.lexsort((scrambled, -self.popularity))
        return order

    @cached_property
    def _category_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.category_names)}

    def save(self, folder: Path) -> None:
        """Write every column into `folder`; the trie's arrays too, so that loading builds nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            save_array(folder, name, getattr(self, name))
        for name in _STRINGS:
            getattr(self, name).save(folder, name)
        for name in ("level_starts", "tokens", "first_child", "leaf_rank"):
            save_array(folder, f"trie.{name}", getattr(self.trie, name))

    @classmethod
    def load(cls, folder: Path, space: SidSpace) -> "Catalog":
        """Map a saved catalogue; `CatalogError` if its columns are not those of `space` or do not fit each other."""
        try:
            trie = SidTrie(
                space,
                np.asarray(map_array(folder, "trie.level_starts")),
                map_array(folder, "trie.tokens"),
                map_array(folder, "trie.first_child"),
                map_array(folder, "trie.leaf_rank"),
            )
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
    paths_by_rank: Sequence[Sequence[str]],
) -> tuple[StringColumn, npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    ranks_by_name: dict[str, list[int]] = {}
    for rank, paths in enumerate(paths_by_rank):
        for name in {name for path in paths for name in nodes_on_path(path)}:
            ranks_by_name.setdefault(name, []).append(rank)
    names = sorted(ranks_by_name)
    offsets = np.concatenate(([0], np.cumsum([len(ranks_by_name[name]) for name in names]))).astype(np.int64)
    ranks = np.array([rank for name in names for rank in ranks_by_name[name]], np.uint32)
    return StringColumn.of(names), offsets, ranks
