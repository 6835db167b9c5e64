"""Catalogue epochs: the base with changes is the catalogue that would be built from the items as they are now."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.catalog import Catalog, CatalogEpoch, CatalogError, MergedCatalog, hash_ids, load_trie
from semantic_ids.catalog_changes import (
    CatalogItem,
    ItemChanges,
    ItemChangesError,
    RankMap,
    insertion_places,
    translated,
)
from semantic_ids.codes import SidSpace
from semantic_ids.filters import FilterCompiler, FilterSpec
from semantic_ids.neighbours import Neighbours
from semantic_ids.trie import ROOT
from tests.semantic_ids.factories import (
    CATEGORIES,
    SPACE,
    catalog_of,
    is_mapped,
    random_catalog,
    random_codes,
    random_neighbours,
)

SMALL = SidSpace(num_levels=2, codebook_size=3)  # nine SIDs: most are shared
IDS = [f"item-{number}" for number in range(6)] + ["new-a", "new-b", "new-c"]
NAMES = [*CATEGORIES, "Garden", "Garden > Tools", "A"]

items = st.builds(
    CatalogItem,
    item_id=st.sampled_from(IDS),
    title=st.text(max_size=3),
    categories=st.lists(st.sampled_from(NAMES), max_size=2, unique=True).map(tuple),
    codes=st.tuples(*[st.integers(0, SMALL.codebook_size - 1)] * SMALL.num_levels),
    popularity=st.none() | st.integers(0, 4),
)
operations = st.lists(st.one_of(items, st.sampled_from(IDS)), max_size=12)


def after(sequence: list[CatalogItem | str], changes: ItemChanges | None = None) -> ItemChanges:
    """`sequence` of items put and ids deleted, one by one."""
    changes = changes or ItemChanges()
    for change in sequence:
        changes = changes.with_deleted(change) if isinstance(change, str) else changes.with_put(change)
    return changes


def item_at(catalog: Catalog, rank: int) -> CatalogItem:
    """The item of this rank, as it would be put."""
    return CatalogItem(
        catalog.item_ids[rank],
        catalog.titles[rank],
        tuple(catalog.categories_of(rank)),
        tuple(catalog.codes[rank].tolist()),
        int(catalog.popularity[rank]),
    )


def built_from(space: SidSpace, rows: list[CatalogItem]) -> Catalog:
    """A catalogue built from scratch; the rows' order breaks ties."""
    return Catalog.build(
        space,
        [item.item_id for item in rows],
        np.array([item.codes for item in rows]),
        np.array([item.popularity for item in rows]),
        [item.title for item in rows],
        [item.categories for item in rows],
    )


def rows_after(base: Catalog, changes: ItemChanges) -> list[CatalogItem]:
    """The items in the order that decides ties: the base's rows, and behind them what is new or stands elsewhere."""
    put = {item.item_id: item for item in changes.items}
    rows, moved = [], {}
    for old in (item_at(base, rank) for rank in range(len(base))):
        new = put.pop(old.item_id, old)
        new = new if new.popularity is not None else CatalogItem(**{**vars(new), "popularity": old.popularity})
        if (new.codes, new.popularity) != (old.codes, old.popularity):
            moved[new.item_id] = new
        elif old.item_id not in changes.deleted:
            rows.append(new)
    moved |= {
        item_id: CatalogItem(**{**vars(item), "popularity": item.popularity or 0}) for item_id, item in put.items()
    }
    return rows + [moved[item.item_id] for item in changes.items if item.item_id in moved]


def observed(catalog: Catalog) -> dict[str, Any]:
    """Everything that can be asked of a catalogue."""
    trie, everyone = catalog.trie, range(len(catalog))
    return {
        "items": [item_at(catalog, rank) for rank in everyone],
        "sids": [catalog.sid(rank) for rank in everyone],
        "ranks": [catalog.rank_of(item_id) for item_id in (*IDS, *catalog.item_ids)],
        "together": [part if isinstance(part, list) else part.tolist() for part in catalog.ranks_of([*IDS, "nobody"])],
        "taken": [column.take(np.arange(len(catalog))[::-1]) for column in (catalog.item_ids, catalog.titles)],
        "categories": {name: catalog.ranks_in_category(name).tolist() for name in (*NAMES, "nowhere")},
        "category_names": list(catalog.category_names),
        "category_index": [catalog.category_offsets.tolist(), catalog.category_ranks.tolist()],
        "hashes": catalog.id_hashes.tolist(),
        "by_popularity": catalog.by_popularity.tolist(),
        "trie": [trie.level_starts.tolist(), trie.tokens.tolist(), trie.first_child.tolist(), trie.leaf_rank.tolist()],
        "types": [column.dtype for column in (catalog.codes, catalog.popularity, catalog.id_hashes)],
        "index_types": [column.dtype for column in (catalog.id_hash_ranks, catalog.category_ranks)],
    }


@pytest.fixture
def three() -> Catalog:
    """Three items of one SID and one popularity, `i0`, `i1`, `i2` in this order."""
    return Catalog.build(
        SMALL, ["i0", "i1", "i2"], np.zeros((3, 2), int), np.ones(3, int), ["0", "1", "2"], [["A"], [], []]
    )


def put(
    item_id: str, *, codes: tuple[int, ...] = (0, 0), popularity: int | None = None, title: str = ""
) -> CatalogItem:
    return CatalogItem(item_id, title, (), codes, popularity)


@given(operations, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_an_epoch_is_the_catalogue_built_from_its_items(sequence: list[CatalogItem | str], num_items: int, seed: int):
    base, changes = random_catalog(SMALL, num_items, seed), after(sequence)
    rows = rows_after(base, changes)
    if not rows:
        with pytest.raises(CatalogError, match=f"deletes all {num_items} items"):
            base.with_changes(changes)
        return
    epoch = base.with_changes(changes)
    assert observed(epoch) == observed(built_from(SMALL, rows))
    assert epoch.epoch == changes.epoch == len(sequence)


@given(operations, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_base_is_left_as_it_was(sequence: list[CatalogItem | str], num_items: int, seed: int):
    base = random_catalog(SMALL, num_items, seed)
    before = observed(base)
    base.with_changes(after([*sequence, put("new-z")])).by_popularity.sort()
    assert observed(base) == before


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_no_changes_change_nothing(num_items: int, seed: int):
    base = random_catalog(SPACE, num_items, seed)
    epoch = base.with_changes(ItemChanges())
    assert observed(epoch) == observed(base)
    assert epoch.epoch == base.epoch == 0
    assert epoch.rank_map.epoch_ranks.tolist() == list(range(num_items))


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_putting_every_item_as_it_is_changes_nothing(num_items: int, seed: int):
    base = random_catalog(SMALL, num_items, seed)
    every_item = [item_at(base, rank) for rank in np.random.default_rng(seed).permutation(num_items)]
    epoch = base.with_changes(ItemChanges().with_put(*every_item))
    assert observed(epoch) == observed(base)
    assert epoch.rank_map.epoch_ranks.tolist() == list(range(num_items))


def test_what_ties_follows_the_base_in_the_order_of_the_changes(three: Catalog):
    changes = ItemChanges().with_put(put("z", popularity=1), put("a", popularity=1), put("top", popularity=2))
    assert list(three.with_changes(changes).item_ids) == ["top", "i0", "i1", "i2", "z", "a"]


def test_an_item_put_again_keeps_its_place_and_one_deleted_before_comes_last(three: Catalog):
    changes = ItemChanges().with_put(put("x", popularity=1), put("y", popularity=1))
    again = changes.with_put(put("x", popularity=1, title="new"))
    assert list(three.with_changes(again).item_ids) == ["i0", "i1", "i2", "x", "y"]
    back = changes.with_deleted("x").with_put(put("x", popularity=1))
    assert list(three.with_changes(back).item_ids) == ["i0", "i1", "i2", "y", "x"]


def test_a_new_title_moves_nobody_and_keeps_the_popularity(three: Catalog):
    epoch = three.with_changes(ItemChanges().with_put(put("i1", title="new")))
    assert list(epoch.item_ids) == ["i0", "i1", "i2"]
    assert list(epoch.titles) == ["0", "new", "2"]
    assert epoch.popularity.tolist() == [1, 1, 1]


def test_an_item_with_a_new_popularity_follows_those_that_have_it_already(three: Catalog):
    known = three.with_changes(ItemChanges().with_put(put("i0", popularity=0), put("i1", popularity=3)))
    assert list(known.item_ids) == ["i1", "i2", "i0"]
    ties = Catalog.build(SMALL, ["b", "a", "c"], np.zeros((3, 2), int), np.array([2, 1, 1]), ["", "", ""], [[], [], []])
    epoch = ties.with_changes(ItemChanges().with_put(put("b", popularity=1)))
    assert list(epoch.item_ids) == ["a", "c", "b"]


def test_an_item_with_a_new_sid_leaves_its_old_place(three: Catalog):
    epoch = three.with_changes(ItemChanges().with_put(put("i0", codes=(2, 1))))
    assert list(epoch.item_ids) == ["i1", "i2", "i0"]
    assert epoch.sid(2) == "<a_2><b_1>"
    assert epoch.trie.children(np.array([ROOT])).code.tolist() == [0, 2]
    assert epoch.rank_map.epoch_ranks.tolist() == [2, 0, 1]
    assert list(epoch.category_names) == []  # it was the only one under "A"


def test_a_deleted_item_is_gone_until_it_is_put_again(three: Catalog):
    gone = ItemChanges().with_deleted("i1")
    epoch = three.with_changes(gone)
    assert list(epoch.item_ids) == ["i0", "i2"]
    assert epoch.rank_of("i1") is None
    assert epoch.rank_map.epoch_ranks.tolist() == [0, -1, 1]
    back = three.with_changes(gone.with_put(put("i1", title="back")))
    assert list(back.item_ids) == ["i0", "i1", "i2"]
    assert back.titles[1] == "back"
    assert back.epoch == 2


def test_deleting_what_nobody_knows_only_counts(three: Catalog):
    epoch = three.with_changes(ItemChanges().with_deleted("stranger"))
    assert list(epoch.item_ids) == ["i0", "i1", "i2"]
    assert epoch.epoch == 1


def test_every_item_may_be_replaced_by_another(three: Catalog):
    changes = ItemChanges().with_deleted("i0", "i1", "i2").with_put(put("new", codes=(2, 2)))
    epoch = three.with_changes(changes)
    assert list(epoch.item_ids) == ["new"]
    assert epoch.by_popularity.tolist() == [0]
    assert epoch.rank_map.epoch_ranks.tolist() == [-1, -1, -1]


@given(operations, st.integers(0, 2**32 - 1), st.permutations(IDS))
def test_permuting_item_ids_permutes_nothing_else(sequence: list[CatalogItem | str], seed: int, renamed_ids: list[str]):
    renamed = dict(zip(IDS, renamed_ids, strict=True))
    base, changes = random_catalog(SMALL, 6, seed), after([*sequence, put("keep")])
    rows = [item_at(base, rank) for rank in range(6)]
    other_base = built_from(SMALL, [CatalogItem(**{**vars(row), "item_id": renamed[row.item_id]}) for row in rows])
    other_changes = ItemChanges(
        tuple(
            CatalogItem(**{**vars(item), "item_id": renamed.get(item.item_id, item.item_id)}) for item in changes.items
        ),
        frozenset(renamed[item_id] for item_id in changes.deleted),
        changes.epoch,
    )
    one, other = base.with_changes(changes), other_base.with_changes(other_changes)
    assert [renamed.get(item_id, item_id) for item_id in one.item_ids] == list(other.item_ids)
    for same in ("sids", "categories", "category_index", "by_popularity", "trie"):
        assert observed(one)[same] == observed(other)[same]
    assert (one.rank_map.epoch_ranks == other.rank_map.epoch_ranks).all()


@given(operations, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_rank_map_leads_from_each_item_to_itself(sequence: list[CatalogItem | str], num_items: int, seed: int):
    base = random_catalog(SMALL, num_items, seed)
    epoch = base.with_changes(after([*sequence, put("new-z")]))
    ranks = [epoch.rank_of(item_id) for item_id in base.item_ids]
    assert epoch.rank_map.epoch_ranks.tolist() == [-1 if rank is None else rank for rank in ranks]
    back = [base.rank_of(item_id) for item_id in epoch.item_ids]
    assert epoch.rank_map.base_ranks(np.arange(len(epoch))).tolist() == [-1 if rank is None else rank for rank in back]
    assert [epoch.item_ids[rank] for rank in epoch.rank_map.put_ranks] == [
        item_id for item_id in epoch.item_ids if item_id in {item.item_id for item in after(sequence).items} | {"new-z"}
    ]


@given(operations, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 30), max_size=5))
def test_neighbours_are_translated_to_an_epoch(sequence: list[CatalogItem | str], seed: int, picks: list[int]):
    """Against the table rewritten by item id: a new item has no row, a deleted one is no neighbour."""
    base, table = random_catalog(SMALL, 6, seed), random_neighbours(6, seed)
    epoch = base.with_changes(after([*sequence, put("new-z")]))
    rows: list[list[tuple[int, float]]] = []
    for item_id in epoch.item_ids:
        old = base.rank_of(item_id)
        pieces = slice(*table.offsets[[old, old + 1]]) if old is not None else slice(0, 0)
        found = [epoch.rank_of(base.item_ids[rank]) for rank in table.ranks[pieces]]
        rows.append(
            [(rank, weight) for rank, weight in zip(found, table.weights[pieces], strict=True) if rank is not None]
        )
    flat = list(itertools.chain.from_iterable(rows))
    rewritten = Neighbours(
        np.cumsum([0, *map(len, rows)]),
        np.array([rank for rank, _ in flat], np.uint32),
        np.array([weight for _, weight in flat], np.float32),
    )
    history = np.array([pick % len(epoch) for pick in picks], np.int64)
    found, expected = (of.of_history(history).tolist() for of in (translated(table, epoch.rank_map), rewritten))
    weights: dict[int, float] = dict.fromkeys(expected, 0.0)
    for age, rank in enumerate(history[::-1]):
        for neighbour, weight in rows[rank]:
            weights[neighbour] += float(weight) * 0.8**age
    assert sorted(found) == sorted(expected)
    assert np.allclose([weights[rank] for rank in found], [weights[rank] for rank in expected])


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_an_id_whose_hash_another_item_has_or_nearly_has_is_found(three: Catalog, shift: int):
    [key] = hash_ids(["stranger"]).tolist()
    hashes = np.array([key + shift - 1, key + shift, key + shift + 1], np.uint64)
    base = dataclasses.replace(three, id_hashes=hashes, id_hash_ranks=np.array([2, 0, 1], np.uint32))
    epoch = base.with_changes(ItemChanges().with_put(put("stranger", popularity=7), put("other")))
    assert (epoch.rank_of("stranger"), epoch.rank_of("other")) == (0, 4)
    assert (np.diff(epoch.id_hashes) >= 0).all()
    assert sorted(epoch.id_hash_ranks.tolist()) == list(range(5))


def test_items_of_one_sid_are_each_filtered_by_themselves(three: Catalog):
    epoch = three.with_changes(ItemChanges().with_put(put("new", popularity=9)).with_deleted("i1"))
    item_filter = FilterCompiler(epoch).compile(FilterSpec(exclude_items=frozenset({"i0", "i1"})))
    low, high = epoch.trie.rank_range(np.array([epoch.trie.walk([0, 0])]), 1)
    assert (low[0], high[0]) == (0, 3)
    left = np.flatnonzero(item_filter.contains(np.arange(3)))
    assert [epoch.item_ids[rank] for rank in left] == ["new", "i2"]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (CatalogItem("", "t", (), (0, 0)), "'' cannot be put: an id has at least one character"),
        (CatalogItem("x", "t", (), (0, 3)), "'x' cannot be put: code 3 is outside this codebook of 3 codes"),
        (CatalogItem("x", "t", (), (-1, 0)), "code -1 is outside"),
        (CatalogItem("x", "t", (), (0, 0, 0)), "2 codes, not 3"),
        (CatalogItem("x", "t", (), ()), "2 codes, not 0"),
        (CatalogItem("x", "t", ("A\x1fB",), (0, 0)), "unit separator"),
        (CatalogItem("x", "t", ("A", ""), (0, 0)), "'' cannot be a category path"),
        (CatalogItem("x\ud800", "t", (), (0, 0)), "surrogates not allowed"),
        (CatalogItem("x", "\udfff", (), (0, 0)), "surrogates not allowed"),
        (CatalogItem("x", "t", ("\ud800",), (0, 0)), "surrogates not allowed"),
        (CatalogItem("x", "t", (), (0, 0), -1), "popularity -1 is not in"),
        (CatalogItem("x", "t", (), (0, 0), 1 << 63), "popularity 9223372036854775808 is not in"),
    ],
)
def test_an_item_that_cannot_be_put_is_refused(three: Catalog, item: CatalogItem, reason: str):
    with pytest.raises(CatalogError, match=reason):
        three.check_item(item)
    with pytest.raises(CatalogError, match=reason):
        three.with_changes(ItemChanges().with_put(put("y"), item))


def test_a_catalogue_holds_at_least_one_item(three: Catalog):
    with pytest.raises(CatalogError, match="epoch 3 deletes all 3 items: a catalogue holds at least one"):
        three.with_changes(ItemChanges().with_deleted("i0", "i1", "i2"))


def test_an_epoch_is_made_from_the_base_only(three: Catalog):
    changes = ItemChanges().with_put(put("x"))
    with pytest.raises(CatalogError, match="epoch 2 cannot be made from epoch 1"):
        three.with_changes(changes).with_changes(changes.with_put(put("y")))


def test_each_change_is_one_epoch():
    changes = ItemChanges().with_put(put("x"), put("y")).with_deleted("x").with_put(put("x", title="again"))
    assert changes == ItemChanges((put("y"), put("x", title="again")), frozenset(), 4)
    assert changes.with_deleted("y", "z") == ItemChanges((put("x", title="again"),), frozenset({"y", "z"}), 6)


@given(operations)
def test_changes_come_back_from_json(sequence: list[CatalogItem | str]):
    changes = after(sequence)
    text = changes.to_json()
    assert ItemChanges.from_json(text) == ItemChanges.from_json(text.encode()) == changes
    assert ItemChanges.from_json(text).to_json() == text


def test_the_json_of_changes_is_canonical():
    changes = ItemChanges((put("é", codes=(1, 2)),), frozenset({"b", "a"}), 3)
    assert changes.to_json() == (
        '{"deleted":["a","b"],"epoch":3,"items":'
        '[{"arrival":null,"categories":[],"codes":[1,2],"item_id":"\\u00e9","popularity":null,"title":""}]}'
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "EOF"),
        ("[]", "object"),
        ('{"epoch":1,"more":2}', "more"),
        ('{"epoch":"1"}', "valid integer"),
        ('{"epoch":-1}', "epoch -1 is negative"),
        ('{"items":[{"item_id":"x"}]}', "title"),
        ('{"items":[{"item_id":"x","title":"","categories":[],"codes":[0.5]}]}', "codes"),
        ('{"items":[{"item_id":"x","title":"","categories":[],"codes":[true]}]}', "codes"),
        ('{"items":[{"item_id":"x","title":"","categories":[],"codes":[0]}],"deleted":["x"]}', "both put and deleted"),
    ],
)
def test_json_that_is_no_set_of_changes_is_refused(text: str, reason: str):
    with pytest.raises(ItemChangesError, match=reason):
        ItemChanges.from_json(text)


def test_an_id_is_put_once():
    with pytest.raises(ItemChangesError, match="2 items have 1 ids"):
        ItemChanges((put("x"), put("x")))


def test_text_of_the_base_stays_mapped(tmp_path: Path):
    random_catalog().save(tmp_path)
    epoch = Catalog.load(tmp_path, SPACE).with_changes(ItemChanges().with_put(put("x", codes=(0, 0, 0))))
    for column in (epoch.item_ids, epoch.titles, epoch.category_paths, epoch.category_names):
        assert is_mapped(column.blob)
        assert is_mapped(column.offsets)


def test_a_saved_epoch_is_a_catalogue(tmp_path: Path):
    changes = ItemChanges().with_put(put("x", codes=(7, 7, 7), title="書"), put("item-3", codes=(0, 0, 0)))
    epoch = random_catalog().with_changes(changes.with_deleted("item-5"))
    epoch.save(tmp_path)
    assert observed(Catalog.load(tmp_path, SPACE)) == observed(epoch)


def test_a_saved_trie_comes_back_mapped(tmp_path: Path):
    epoch = random_catalog().with_changes(ItemChanges().with_put(put("x", codes=(7, 7, 7))))
    epoch.save_trie(tmp_path / "tries" / "bundle@1")
    trie = load_trie(tmp_path / "tries" / "bundle@1")
    assert trie.space == SPACE
    assert trie.num_items == 41
    for name in ("level_starts", "tokens", "first_child", "leaf_rank"):
        assert np.array_equal(getattr(trie, name), getattr(epoch.trie, name))
        assert is_mapped(getattr(trie, name))


def test_a_trie_is_saved_whole_or_not_at_all_and_once(tmp_path: Path):
    folder = tmp_path / "bundle@0"
    one, other = catalog_of([[0, 1]]), catalog_of([[0, 1], [0, 2]])
    one.save_trie(folder)
    other.save_trie(folder)  # a name stands for one content
    assert load_trie(folder).num_items == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bundle@0"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        one.save_trie(tmp_path / "file" / "bundle@1")


def test_many_may_save_one_trie_at_once(tmp_path: Path):
    catalog, folder = random_catalog(), tmp_path / "bundle@0"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: catalog.save_trie(folder), range(32)))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle@0"]
    assert load_trie(folder).num_items == len(catalog)


@pytest.mark.parametrize("name", ["space.npy", "trie.tokens.npy"])
def test_a_trie_that_is_not_whole_is_refused(tmp_path: Path, name: str):
    folder = tmp_path / "bundle@0"
    with pytest.raises(CatalogError, match="cannot be read"):
        load_trie(folder)
    catalog_of([[0, 1], [2, 3]]).save_trie(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(CatalogError, match="cannot be read"):
        load_trie(folder)


def test_a_trie_of_other_levels_is_refused(tmp_path: Path):
    catalog_of([[0, 1], [2, 3]]).save_trie(tmp_path / "trie")
    np.save(tmp_path / "trie" / "space.npy", np.array([3, 8]))
    with pytest.raises(CatalogError, match="SIDs of 3 levels"):
        load_trie(tmp_path / "trie")


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1),
    st.lists(st.tuples(*[st.integers(-1, 4)] * 2)),
)
def test_insertion_places_count_the_rows_before(rows: list[tuple[int, int]], others: list[tuple[int, int]]):
    table = np.array(sorted(rows))
    keys = np.array(others, np.int64).reshape(-1, 2)
    places = insertion_places(len(table), lambda at: (table[at, 0], table[at, 1]), (keys[:, 0], keys[:, 1]))
    assert places.tolist() == [sum(row < other for row in rows) for other in others]


def test_a_rank_map_by_hand():
    """Base a b c d; b is deleted, d is put before a, and x between c and where d was: d a c x."""
    ranks = RankMap.of(4, np.array([1]), np.array([0, 3]), np.array([3, -1]))
    assert ranks.epoch_ranks.tolist() == [1, -1, 2, 0]
    assert ranks.sources.tolist() == [4, 0, 2, 5]
    assert ranks.put_ranks.tolist() == [0, 3]
    assert ranks.base_ranks(np.arange(4)).tolist() == [3, 0, 2, -1]
    assert "".join(ranks.column(np.array(list("abcd")), np.array(list("Dx")))) == "Dacx"
    listed, gone = ranks.listing(np.array([3, 2, 1, 0]), np.array([0, 4]), np.array([3, 0]))
    assert listed.tolist() == [3, 2, 1, 0]  # x, c, a, d
    assert gone.tolist() == [0, 2]


def test_epochs_of_many_changes_agree_with_a_build():
    base = random_catalog(SidSpace(4, 16), 3_000)
    generator, codes = np.random.default_rng(1), random_codes(SidSpace(4, 16), 400, 1)
    changes = ItemChanges().with_put(
        *(
            CatalogItem(f"item-{number}", "t", (str(generator.choice(NAMES)),), tuple(sid), None)
            for number, sid in zip(generator.choice(4_000, 400, replace=False), codes.tolist(), strict=True)
        )
    )
    changes = changes.with_deleted(*(f"item-{number}" for number in generator.choice(4_000, 400, replace=False)))
    epoch = base.with_changes(changes)
    assert isinstance(epoch, CatalogEpoch)
    assert observed(epoch) == observed(built_from(base.space, rows_after(base, changes)))


steps = st.lists(st.one_of(items, st.sampled_from(IDS), st.just(None)), max_size=16)


def numbered(changes: ItemChanges, arrivals: dict[str, int]) -> ItemChanges:
    """The changes with arrival numbers, as the service gives them."""
    in_order = sorted(changes.items, key=lambda item: arrivals[item.item_id])
    numbered = tuple(dataclasses.replace(item, arrival=arrivals[item.item_id]) for item in in_order)
    return ItemChanges(numbered, changes.deleted, changes.epoch)


@given(steps, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_an_epoch_on_a_merged_one_equals_that_of_all_changes(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[CatalogItem | str | None], num_items: int, seed: int
):
    """None in the sequence: merge here."""
    published = random_catalog(SMALL, num_items, seed)
    neighbours = random_neighbours(num_items, seed)
    base: Catalog = published
    everything, later = ItemChanges(), ItemChanges()
    arrivals: dict[str, int] = {}
    for number, step in enumerate([*sequence, None]):
        if step is not None:
            item_id = step if isinstance(step, str) else step.item_id
            if isinstance(step, str) or item_id in everything.deleted or item_id not in arrivals:
                arrivals[item_id] = number
            everything, later = after([step], everything), after([step], later)
            continue
        try:
            expected = published.with_changes(numbered(everything, arrivals))
        except CatalogError:  # nothing is left
            continue
        epoch = base.with_changes(dataclasses.replace(numbered(later, arrivals), epoch=everything.epoch))
        assert observed(epoch) == observed(expected)
        for history in itertools.combinations(range(len(epoch)), 2):
            asked = [translated(neighbours, one.translation).of_history(np.array(history)) for one in (epoch, expected)]
            assert asked[0].tolist() == asked[1].tolist()
        folder = tmp_path_factory.mktemp("merged") / "catalog"
        epoch.save_merged(folder)
        base, later = MergedCatalog.load_merged(folder, published, everything.epoch), ItemChanges()
        assert observed(base) == observed(expected)
        assert base.epoch == everything.epoch
