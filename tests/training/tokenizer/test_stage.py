"""SIDs: unique after an optimal repair, blind to item ids, and described by numbers that can be checked by hand."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ids.codes import Codes
from training.interactions import Dataset
from training.sequences import Sequences
from training.stage import StageError, StageFolder
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.stage import (
    Inputs,
    TokenizedCatalog,
    TokenizerSummary,
    default_codebook_size,
    run,
)

Vectors = npt.NDArray[np.float32]


def dataset_of(num_items: int, item_ids: list[str] | None = None) -> Dataset:
    nothing = np.empty(0)
    return Dataset(
        item_ids=item_ids or [f"item {number}" for number in range(num_items)],
        titles=[""] * num_items,
        categories=[[]] * num_items,
        attributes=[{}] * num_items,
        user_ids=[],
        sequences=Sequences.of([[0, 1]]),
        timestamps=nothing,
        event_types=nothing.astype(np.uint8),
    )


def clustered(num_items: int, num_clusters: int = 5, seed: int = 0) -> Vectors:
    """Vectors in tight clusters: nearest codes collide."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_clusters, 6))
    return (centres[rng.integers(num_clusters, size=num_items)] + 0.01 * rng.normal(size=(num_items, 6))).astype(
        np.float32
    )


def tokenize(
    path: Path, vectors: Vectors, *, dataset: Dataset | None = None, train: Sequences | None = None, **settings: object
) -> tuple[TokenizerSummary, TokenizedCatalog]:
    config = TokenizerConfig.model_validate({"method": "residual-kmeans", "threads": 1, **settings})
    dataset = dataset or dataset_of(len(vectors))
    folder = StageFolder(path, config, {})
    train = Sequences.of([[0, 1]]) if train is None else train
    collaborative = np.random.default_rng(7).normal(size=(len(vectors), 8)).astype(np.float32)
    summary = run(config, Inputs(dataset, train, vectors, lambda: collaborative), folder)
    assert TokenizerSummary.model_validate(folder.finished()) == summary
    return summary, TokenizedCatalog.load(path, dataset)


def codes_by_row(tokenized: TokenizedCatalog) -> Codes:
    return np.asarray(tokenized.catalog.codes)[tokenized.rank_of_item]


def column(*values: float) -> Vectors:
    return np.array(values, np.float32)[:, None]


def test_every_item_of_a_clustered_catalogue_gets_a_sid_of_its_own(tmp_path):
    summary, tokenized = tokenize(tmp_path, clustered(200), codebook_size=16)
    assert summary.collision_before_repair > 0
    assert summary.num_moved > 0
    assert summary.uniqueness == 1.0
    assert len(np.unique(tokenized.catalog.codes, axis=0)) == 200
    assert (summary.num_items, summary.num_levels, summary.codebook_size) == (200, 3, 16)


def test_repair_moves_last_codes_only_and_only_under_prefixes_with_a_collision(tmp_path):
    vectors = clustered(200)
    _, tokenized = tokenize(tmp_path, vectors, codebook_size=16)
    nearest = tokenized.quantizer.encode(vectors)
    codes = codes_by_row(tokenized)
    assert (codes[:, :-1] == nearest[:, :-1]).all()
    _, sid, count = np.unique(nearest, axis=0, return_inverse=True, return_counts=True)
    crowded = {tuple(prefix) for prefix in nearest[count[sid.reshape(-1)] > 1][:, :-1].tolist()}
    moved = (codes != nearest).any(axis=1)
    assert moved.any()
    assert {tuple(prefix) for prefix in nearest[moved][:, :-1].tolist()} <= crowded


def test_items_that_share_a_sid_are_all_reachable(tmp_path):
    """30 items on 2 x 4 codes: each has its own rank, under a node that covers it."""
    summary, tokenized = tokenize(tmp_path, clustered(30), num_levels=2, codebook_size=4)
    catalog = tokenized.catalog
    assert summary.uniqueness < 1
    assert sorted(tokenized.rank_of_item.tolist()) == list(range(30))
    node = catalog.trie.path_of_rank(np.arange(30))[:, -1]
    low, high = catalog.trie.rank_range(node, 1)
    assert ((low <= np.arange(30)) & (np.arange(30) < high)).all()
    assert catalog.trie.num_leaves <= 16
    assert [catalog.rank_of(f"item {row}") for row in range(30)] == tokenized.rank_of_item.tolist()


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(40)), st.sampled_from([4, 16]))
def test_nothing_follows_the_order_of_item_ids(tmp_path_factory, relabelled, codebook_size):
    vectors = clustered(40)
    _, plain = tokenize(tmp_path_factory.mktemp("plain"), vectors, num_levels=2, codebook_size=codebook_size)
    dataset = dataset_of(40, [f"id-{label:02}" for label in relabelled])
    folder = tmp_path_factory.mktemp("renamed")
    _, renamed = tokenize(folder, vectors, dataset=dataset, num_levels=2, codebook_size=codebook_size)
    assert (codes_by_row(plain) == codes_by_row(renamed)).all()
    assert (plain.rank_of_item == renamed.rank_of_item).all()


def test_the_same_seed_gives_the_same_sids(tmp_path):
    vectors = clustered(80, num_clusters=30)
    one, two, other = (
        codes_by_row(tokenize(tmp_path / name, vectors, codebook_size=8, seed=seed)[1])
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert (one == two).all()
    assert (one != other).any()


def test_identical_texts_get_different_sids_while_there_are_codes(tmp_path):
    vectors = clustered(20, num_clusters=20)
    vectors[10:] = vectors[0]
    summary, _ = tokenize(tmp_path, vectors, codebook_size=16)
    assert summary.uniqueness == 1.0
    assert summary.collision_before_repair >= 11 / 20


def test_more_codes_than_items_leave_codes_unused(tmp_path):
    summary, tokenized = tokenize(tmp_path, clustered(5, num_clusters=5, seed=3), codebook_size=64)
    assert summary.uniqueness == 1.0
    assert max(summary.codes_used) <= 5
    assert np.isfinite(tokenized.quantizer.codebooks).all()


def test_the_numbers_of_a_summary_by_hand(tmp_path):
    """Four well separated points on two levels of 2 codes: two far pairs, and within each pair two places.

    All four SIDs are used once. Interactions 4, 2, 1, 1: H(pair) with shares 6/8 and 2/8 is 0.8113 bits, and
    H(SID) = 1.75 bits, so the second level adds 0.9387 (or, if k-means pairs them otherwise, the same sum).
    """
    vectors = np.array([[0, 0], [0, 1], [100, 0], [100, 1]], np.float32)
    train = Sequences.of([[0, 0, 0, 0, 1, 1, 2, 3]])
    summary, tokenized = tokenize(tmp_path, vectors, train=train, num_levels=2, codebook_size=2)
    assert summary.codes_used == [2, 2]
    assert summary.perplexity == pytest.approx([2.0, 2.0])
    assert sum(summary.bits) == pytest.approx(1.75)
    first = codes_by_row(tokenized)[:, 0]
    share = np.bincount(first, [4, 2, 1, 1]) / 8
    assert summary.bits[0] == pytest.approx(float(-(share * np.log2(share)).sum()))
    assert tokenized.catalog.popularity.tolist() == [[4, 2, 1, 1][row] for row in np.argsort(tokenized.rank_of_item)]


def test_items_without_interactions_count_alike(tmp_path):
    """Nobody touched anything: four equally likely SIDs are 2 bits."""
    vectors = np.array([[0, 0], [0, 1], [100, 0], [100, 1]], np.float32)
    summary, _ = tokenize(tmp_path, vectors, train=Sequences.of([]), num_levels=2, codebook_size=2)
    assert sum(summary.bits) == pytest.approx(2.0)


def test_uneven_use_of_a_codebook_lowers_its_perplexity(tmp_path):
    """Three points in a heap and one far away, on 2 codes: shares 3/4 and 1/4, exp(H) = exp(0.5623) = 1.7548."""
    summary, _ = tokenize(tmp_path, column(0, 0.1, 0.2, 100), num_levels=3, codebook_size=2)
    assert summary.perplexity[0] == pytest.approx(1.7548, abs=1e-4)


def test_texts_that_are_all_the_same_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(StageError, match=r"level 0 collapsed: 1 of 8 codes used for 12 items.*give titles, categories"):
        tokenize(tmp_path, np.ones((12, 6), np.float32), codebook_size=8)


def test_sequences_are_read_in_catalogue_ranks(tmp_path):
    _, tokenized = tokenize(tmp_path, clustered(30), codebook_size=8)
    ranked = tokenized.to_ranks(Sequences.of([[4, 7], [], [29]]))
    names = [[tokenized.catalog.item_ids[rank] for rank in ranks] for ranks in ranked]
    assert names == [["item 4", "item 7"], [], ["item 29"]]


@pytest.mark.parametrize(("num_items", "size"), [(3, 8), (48, 8), (1682, 64), (12_101, 128), (1_000_000, 256)])
def test_the_default_codebook_grows_with_the_catalogue(num_items, size):
    assert default_codebook_size(num_items) == size


def test_nothing_is_written_when_a_codebook_collapsed(tmp_path):
    with pytest.raises(StageError, match="collapsed"):
        tokenize(tmp_path / "run", np.ones((12, 6), np.float32), codebook_size=8)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".fingerprint"}
