"""The catalogue: order, lookups, categories, and that item ids decide nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.catalog import Catalog, CatalogError, hash_ids, nodes_on_path
from semantic_ids.codes import SidError, SidSpace
from semantic_ids.columns import StringColumn
from tests.semantic_ids.factories import SPACE, catalog_of, is_mapped, random_catalog, random_codes


def columns(catalog: Catalog) -> dict[str, list[object]]:
    """Everything that must not depend on item ids."""
    trie = catalog.trie
    return {
        "codes": catalog.codes.tolist(),
        "popularity": catalog.popularity.tolist(),
        "titles": list(catalog.titles),
        "categories": [catalog.categories_of(rank) for rank in range(len(catalog))],
        "category_names": list(catalog.category_names),
        "category_ranks": catalog.category_ranks.tolist(),
        "by_popularity": catalog.by_popularity.tolist(),
        "trie": [trie.tokens.tolist(), trie.first_child.tolist(), trie.leaf_rank.tolist()],
    }


def test_items_stand_by_sid_and_then_by_popularity():
    """Rows: b (1,0) popularity 5; c (0,3) 1; a (0,3) 9; d (0,1) 0 → d, a, c, b."""
    catalog = Catalog.build(
        SidSpace(2, 4),
        ["b", "c", "a", "d"],
        np.array([[1, 0], [0, 3], [0, 3], [0, 1]]),
        np.array([5, 1, 9, 0]),
        ["B", "C", "A", "D"],
        [[]] * 4,
    )
    assert list(catalog.item_ids) == ["d", "a", "c", "b"]
    assert list(catalog.titles) == ["D", "A", "C", "B"]
    assert catalog.popularity.tolist() == [0, 9, 1, 5]
    assert catalog.sid(1) == catalog.sid(2) == "<a_0><b_3>"
    assert catalog.by_popularity.tolist() == [1, 3, 2, 0]


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_items_of_one_sid_are_all_reachable_the_most_popular_first(num_items: int, seed: int):
    space = SidSpace(2, 3)  # nine SIDs
    catalog = random_catalog(space, num_items, seed)
    trie, reached = catalog.trie, []
    for sid in np.unique(catalog.codes, axis=0):
        low, high = trie.rank_range(np.array([trie.walk(sid)]), 1)
        ranks = np.arange(low[0], high[0])
        assert (catalog.codes[ranks] == sid).all()
        assert (np.diff(catalog.popularity[ranks]) <= 0).all()
        reached += ranks.tolist()
    assert sorted(reached) == list(range(num_items))


@given(st.integers(1, 50), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_permuting_item_ids_permutes_nothing_else(num_items: int, seed: int, random):
    generator = np.random.default_rng(seed)
    ids = [f"id-{number}" for number in range(num_items)]
    renamed = random.sample(ids, num_items)
    space = SidSpace(2, 4)
    rows = (
        random_codes(space, num_items, seed),
        generator.integers(0, 3, num_items),
        [f"title {row}" for row in range(num_items)],
        [[f"Category {row % 5} > Sub {row % 3}"] for row in range(num_items)],
    )
    one, other = Catalog.build(space, ids, *rows), Catalog.build(space, renamed, *rows)
    assert columns(one) == columns(other)
    row_of_title = {title: row for row, title in enumerate(rows[2])}
    assert [renamed[row_of_title[title]] for title in one.titles] == list(other.item_ids)


@pytest.mark.parametrize("ids", [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]])
def test_ties_keep_the_order_of_the_rows_and_not_of_the_ids(ids: list[str]):
    catalog = Catalog.build(SPACE, ids, np.zeros((3, 3), int), np.ones(3, int), ["t"] * 3, [[]] * 3)
    assert list(catalog.item_ids) == ids


def test_ids_asked_for_again_have_the_same_ranks_and_only_so_many_are_remembered(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("semantic_ids.catalog._MAX_RECENT", 3)
    ids = list(catalog.item_ids)
    for asked in ([*ids, "nobody"], ids[:2], [ids[1], "nobody", ids[2], ids[1]], ids[3:], ids[:2], [], ["nobody"]):
        ranks, unknown = catalog.ranks_of(asked)
        assert [ids[rank] for rank in ranks] == [item_id for item_id in asked if item_id != "nobody"]
        assert unknown == [item_id for item_id in asked if item_id == "nobody"]
        assert len(catalog._recent_ranks) <= 3


def test_rank_of_finds_every_item_and_no_other(catalog: Catalog):
    assert [catalog.rank_of(item_id) for item_id in catalog.item_ids] == list(range(len(catalog)))
    assert catalog.rank_of("item-") is None
    assert catalog.rank_of("") is None
    assert catalog.rank_of("\ud800") is None  # a lone surrogate: no UTF-8, but an id that a client can send
    ranks, unknown = catalog.ranks_of([catalog.item_ids[7], "nobody", catalog.item_ids[3], catalog.item_ids[7]])
    assert (ranks.tolist(), unknown) == ([7, 3, 7], ["nobody"])


@given(st.permutations(range(6)), st.integers(0, 3), st.integers(0, 3))
def test_ids_whose_hashes_collide_are_told_apart(ranks: list[int], num_below: int, num_above: int):
    """Items whose hash is that of `stranger`, in any order, between items with hashes just below and above it."""
    catalog = catalog_of(random_codes(SPACE, 6))
    [key] = hash_ids(["stranger"])
    one, num_shared = np.uint64(1), 6 - num_below - num_above
    collided = dataclasses.replace(
        catalog,
        id_hashes=np.repeat([key - one, key, key + one], [num_below, num_shared, num_above]),
        id_hash_ranks=np.array(ranks, np.uint32),
    )
    assert collided.rank_of("stranger") is None
    for rank in ranks[num_below : num_below + num_shared]:
        renamed = [*catalog.item_ids[:rank], "stranger", *catalog.item_ids[rank + 1 :]]
        assert dataclasses.replace(collided, item_ids=StringColumn.of(renamed)).rank_of("stranger") == rank


def test_a_category_holds_the_items_of_every_path_through_it():
    catalog = Catalog.build(
        SidSpace(1, 8),
        ["i0", "i1", "i2", "i3"],
        np.array([[0], [1], [2], [3]]),
        np.zeros(4, int),
        [""] * 4,
        [["A"], ["A > B"], ["B"], ["A > B > C", "D"]],
    )
    ranks = {name: catalog.ranks_in_category(name).tolist() for name in [*catalog.category_names, "C", "A > ", ""]}
    assert ranks == {
        "A": [0, 1, 3],
        "A > B": [1, 3],
        "A > B > C": [3],
        "B": [2],
        "D": [3],
        "C": [],  # a node is named by its whole path
        "A > ": [],
        "": [],
    }
    assert [catalog.categories_of(rank) for rank in range(4)] == [["A"], ["A > B"], ["B"], ["A > B > C", "D"]]
    assert nodes_on_path("A > B > C") == ["A", "A > B", "A > B > C"]


def test_an_item_twice_under_a_category_is_listed_once():
    catalog = Catalog.build(SPACE, ["i"], np.zeros((1, 3), int), np.zeros(1, int), [""], [["A > B", "A > C", "A"]])
    assert catalog.ranks_in_category("A").tolist() == [0]


def test_by_popularity_lists_every_rank_once_and_falls(catalog: Catalog):
    order = catalog.by_popularity
    assert sorted(order.tolist()) == list(range(len(catalog)))
    assert (np.diff(catalog.popularity[order]) <= 0).all()


@pytest.mark.parametrize("num_items", [1, 40])
def test_a_saved_catalogue_comes_back_whole_and_memory_mapped(tmp_path: Path, num_items: int):
    saved = random_catalog(num_items=num_items)
    saved.save(tmp_path)
    loaded = Catalog.load(tmp_path, SPACE)
    assert columns(loaded) == columns(saved)
    assert [loaded.rank_of(item_id) for item_id in saved.item_ids] == list(range(num_items))
    for array in (loaded.codes, loaded.popularity, loaded.id_hashes, loaded.category_ranks, loaded.titles.blob):
        assert is_mapped(array)
    for array in (loaded.trie.tokens, loaded.trie.first_child, loaded.trie.leaf_rank):
        assert is_mapped(array)


def test_a_catalogue_without_categories_can_be_saved(tmp_path: Path):
    catalog_of([[0, 1], [2, 3]]).save(tmp_path)
    loaded = Catalog.load(tmp_path, SidSpace(2, 8))
    assert len(loaded.ranks_in_category("A")) == 0
    assert loaded.categories_of(0) == []


@pytest.mark.parametrize(
    ("space", "reason"),
    [(SidSpace(2, 8), "levels"), (SidSpace(4, 8), "levels"), (SidSpace(3, 4), "beyond the codebook size 4")],
)
def test_a_catalogue_of_another_sid_space_is_refused(tmp_path: Path, space: SidSpace, reason: str):
    random_catalog().save(tmp_path)
    with pytest.raises(CatalogError, match=reason):
        Catalog.load(tmp_path, space)


@pytest.mark.parametrize("name", ["codes.npy", "titles.blob.npy", "trie.tokens.npy", "id_hash_ranks.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_an_unreadable_column_is_a_catalogue_error(tmp_path: Path, name: str, damage: str):
    random_catalog().save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(CatalogError, match="cannot be read"):
        Catalog.load(tmp_path, SPACE)


def test_columns_of_different_catalogues_do_not_mix(tmp_path: Path):
    random_catalog(num_items=40).save(tmp_path)
    catalog_of(random_codes(SPACE, 30)).item_ids.save(tmp_path, "item_ids")
    with pytest.raises(CatalogError, match="differ in length"):
        Catalog.load(tmp_path, SPACE)


def test_rows_that_make_no_catalogue_are_refused():
    codes, popularity = np.zeros((2, 3), int), np.zeros(2, int)
    with pytest.raises(CatalogError, match="unique"):
        Catalog.build(SPACE, ["a", "a"], codes, popularity, ["", ""], [[], []])
    with pytest.raises(CatalogError, match="one length"):
        Catalog.build(SPACE, ["a", "b"], codes, popularity, [""], [[], []])
    with pytest.raises(CatalogError, match="at least one item"):
        Catalog.build(SPACE, [], codes[:0], popularity[:0], [], [])
    with pytest.raises(SidError, match="code 8"):
        Catalog.build(SPACE, ["a", "b"], codes + 8, popularity, ["", ""], [[], []])
