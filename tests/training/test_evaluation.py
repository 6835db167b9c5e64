"""Evaluation on a world whose truth is known: the beam against exhaustive scores, masks, misses and JSON names."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import sparse

from semantic_ids.catalog import Catalog
from semantic_ids.quantizer import ResidualQuantizer
from tests.training.conftest import Run, make_catalog
from training.collaborative import ItemKnn, Popularity, SasRec, SasRecShape
from training.evaluation import (
    Baselines,
    EvaluationConfig,
    EvaluationSummary,
    GenerativeRanker,
    RankedLists,
    load_users,
    run,
    slices_of,
)
from training.examples import Examples
from training.generator import MODEL, SPEC, TrainedModel, build_model
from training.likelihood import item_log_likelihood
from training.metrics import chance_prefix_recall, metrics_of_ranks, prefix_recall, rank_of_a_miss
from training.sequences import Sequences
from training.sft_config import SftConfig
from training.stage import StageError, StageFolder
from training.tokenizer.stage import TokenizedCatalog

MAX_HISTORY = 6


@dataclass(frozen=True)
class Split:
    """The smallest EvaluatedSplit; its users are numbered 0, 10, 20, …"""

    histories: Sequences
    targets: npt.NDArray[np.int32]

    @property
    def users(self) -> npt.NDArray[np.int64]:
        return 10 * np.arange(len(self.targets))


@dataclass(frozen=True)
class World:
    """A random model over a small catalogue; rows and ranks are one."""

    catalog: Catalog
    trained: TrainedModel
    ranker: GenerativeRanker

    @classmethod
    def of(cls, path: Path, num_items: int) -> "World":
        rng = np.random.default_rng(num_items)
        codes = sorted(rng.integers(0, 5, (num_items, 3)).tolist())
        # Popularity falls with the row, so that rows which share a SID are in rank order already.
        catalog = make_catalog(codes, codebook_size=5, popularity=list(range(num_items, 0, -1)))
        config = SftConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_history=MAX_HISTORY)
        torch.manual_seed(0)
        model, vocabulary, renderer = build_model(config, catalog, path)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(path / MODEL)
        (path / SPEC).write_text(renderer.spec.model_dump_json())
        trained = TrainedModel.load(path, catalog)
        assert trained.vocabulary == vocabulary
        return cls(catalog, trained, GenerativeRanker(trained, catalog))

    @property
    def tokenized(self) -> TokenizedCatalog:
        quantizer = ResidualQuantizer(np.zeros(1, np.float32), np.ones(1, np.float32), np.zeros((3, 5, 1), np.float32))
        return TokenizedCatalog(self.catalog, quantizer, np.arange(len(self.catalog), dtype=np.int32))

    def exhaustive_scores(self, history: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """The score of every item, by one forward pass for each."""
        model = self.ranker.decoder.model
        shown = self.ranker.prompt(history)
        recent = history[len(history) - (len(shown) - 1) // 3 :] if len(shown) > 1 else history[:0]
        windows = Sequences.of([[*recent, rank] for rank in range(len(self.catalog))])
        vocabulary = self.trained.vocabulary
        batch = Examples(self.catalog, vocabulary, self.trained.renderer).batch_of_last(windows)
        assert batch.token_ids[0, : len(shown)].tolist() == shown.tolist()
        with torch.inference_mode():
            return item_log_likelihood(model, self.catalog, vocabulary, batch).double().numpy()

    def exhaustive_order(self, history: npt.NDArray[np.int32], masked: bool) -> list[int]:
        """All items by score; items of one SID have one score and stand by popularity, which here is rank."""
        scores = self.exhaustive_scores(history).round(4)
        order = np.lexsort((np.arange(len(scores)), -scores))
        return [int(rank) for rank in order if not (masked and rank in history)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """40 items: a width of 50 covers every level, so the beam must be exact."""
    return World.of(tmp_path_factory.mktemp("small"), 40)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> World:
    """90 items, beyond the longest cut-off."""
    return World.of(tmp_path_factory.mktemp("large"), 90)


def random_split(world: World, count: int, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    num_items = len(world.catalog)
    histories = [rng.choice(num_items, rng.integers(1, 15), replace=False).tolist() for _ in range(count)]
    return Split(Sequences.of(histories), rng.integers(0, num_items, count).astype(np.int32))


def rank_all(world: World, split: Split, **settings: object) -> RankedLists:
    config = EvaluationConfig.model_validate({"threads": 1, **settings})
    return world.ranker.rank_all(split.histories, split.targets, config)


def baselines_of(num_items: int, popularity: list[int] | None = None) -> Baselines:
    shape = SasRecShape(num_items, embedding_width=8, num_layers=1, num_heads=1, max_length=5, dropout=0.0)
    return Baselines(
        Popularity(np.array(popularity or range(num_items), np.int64)),
        ItemKnn(sparse.csr_array(np.zeros((num_items, num_items), np.float32)), 5, 0.8),
        SasRec(shape),
    )


@pytest.mark.parametrize("masked", [True, False])
def test_lists_of_a_wide_beam_are_the_exhaustive_ranking(small, masked):
    split = random_split(small, 15)
    lists = rank_all(small, split, batch_size=4)
    ranks = lists.masked_ranks if masked else lists.unmasked_ranks
    missing = rank_of_a_miss(len(small.catalog))
    orders = [small.exhaustive_order(history, masked) for history in split.histories]
    expected = [
        order.index(target) if target in order else missing
        for order, target in zip(orders, split.targets.tolist(), strict=True)
    ]
    assert ranks.tolist() == expected
    exhaustive = metrics_of_ranks(np.array(expected)).means()
    assert metrics_of_ranks(ranks).means() == exhaustive
    if masked:
        assert lists.first_ten.tolist() == [order[:10] for order in orders]


def test_the_likelihood_of_the_target_is_its_exhaustive_score(large):
    split = random_split(large, 10)
    scores = [
        large.exhaustive_scores(history)[target] for history, target in zip(split.histories, split.targets, strict=True)
    ]
    assert rank_all(large, split).target_log_likelihood == pytest.approx(scores, abs=1e-4)


def test_masking_lifts_targets_past_seen_items_and_drops_seen_targets(large):
    """Unmasked, a target stands as many places lower as there are seen items before it."""
    split = random_split(large, 20)
    lists = rank_all(large, split, width=90)
    for history, target, masked, unmasked in zip(
        split.histories, split.targets.tolist(), lists.masked_ranks, lists.unmasked_ranks, strict=True
    ):
        if target in history:
            assert masked == rank_of_a_miss(90)
            continue
        order = large.exhaustive_order(history, masked=False)
        seen_before = sum(rank in history for rank in order[: order.index(target)])
        assert unmasked - masked == seen_before
    assert (lists.masked_ranks < lists.unmasked_ranks).any()


def test_neither_the_batch_size_nor_the_order_of_users_changes_a_list(large):
    split = random_split(large, 11)
    order = np.random.default_rng(1).permutation(11)
    shuffled = Split(split.histories.select(order), split.targets[order])
    one, eleven, moved = (rank_all(large, s, batch_size=b) for s, b in ((split, 1), (split, 11), (shuffled, 4)))
    assert one.masked_ranks.tolist() == eleven.masked_ranks.tolist()
    assert one.masked_ranks[order].tolist() == moved.masked_ranks.tolist()
    assert one.first_ten[order].tolist() == moved.first_ten.tolist()


def test_at_least_fifty_items_are_listed_however_narrow_the_beam_is_asked(large):
    split = random_split(large, 5)
    narrow, fifty = rank_all(large, split, width=1), rank_all(large, split, width=50)
    assert narrow.masked_ranks.tolist() == fifty.masked_ranks.tolist()


def test_somebody_who_has_seen_everything_is_a_miss(small):
    everything = list(range(40))
    split = Split(Sequences.of([everything, [3]]), np.array([7, 8], np.int32))
    lists = rank_all(small, split)
    assert lists.masked_ranks[0] == rank_of_a_miss(40)
    assert (lists.first_ten[0] == -1).all()
    assert lists.unmasked_ranks[0] < 40
    assert not lists.sid_hits_10[0]
    assert lists.masked_ranks[1] < 40
    assert np.isfinite(lists.target_log_likelihood).all()


def test_somebody_with_three_unseen_items_gets_those_three(small):
    split = Split(Sequences.of([[rank for rank in range(40) if rank not in {5, 17, 30}]]), np.array([17], np.int32))
    lists = rank_all(small, split)
    assert set(lists.first_ten[0, :3].tolist()) == {5, 17, 30}
    assert (lists.first_ten[0, 3:] == -1).all()


def test_a_sid_hit_counts_whatever_item_of_the_sid_was_meant(small):
    codes = np.asarray(small.catalog.codes)
    twin = next(rank for rank in range(39) if (codes[rank] == codes[rank + 1]).all())
    split = random_split(small, 30)
    targets = np.full(30, twin + 1, np.int32)
    lists = rank_all(small, Split(split.histories, targets))
    hits = [any((codes[rank] == codes[twin]).all() for rank in first if rank >= 0) for first in lists.first_ten]
    assert lists.sid_hits_10.tolist() == hits
    assert any(hits)


def test_a_run_puts_the_baselines_beside_the_model_on_the_same_targets(small, tmp_path):
    """Popularity ranks item 39 first, then 38, …: targets 39 and 37 unseen are ranks 0 and 2; 3 is rank 36."""
    split = Split(Sequences.of([[0, 1], [2], [5]]), np.array([39, 37, 3], np.int32))
    config = EvaluationConfig(threads=1, bootstrap_samples=100)
    folder = StageFolder(tmp_path / "evaluate", config, {})
    summary = run(config, small.ranker, baselines_of(40), split, small.tokenized, folder)
    popularity = summary.baselines["popularity"]
    assert popularity.recall_5 == popularity.recall_10 == pytest.approx(2 / 3)
    assert popularity.ndcg_10 == pytest.approx((1 + 1 / 2) / 3)
    assert popularity.recall_50 == 1.0
    lists = rank_all(small, split)
    masked = metrics_of_ranks(lists.masked_ranks).means()
    assert summary.model_dump()["recall@10"] == masked["recall@10"]
    assert summary.unmasked.model_dump() == metrics_of_ranks(lists.unmasked_ranks).means()
    difference = summary.difference_recall_10["popularity"]
    assert difference.difference == pytest.approx(summary.recall_10 - popularity.recall_10)
    assert difference.low <= difference.difference <= difference.high
    assert (summary.num_users, summary.num_items, summary.split, summary.width) == (3, 40, "test", 50)
    assert EvaluationSummary.model_validate(folder.finished()) == summary


def test_users_are_sliced_by_history_and_by_the_order_of_ids(small):
    """Ids are sorted as text: "item 10" is below "item 2"."""
    histories = [[3, 2], [7] * 4, [1] * 5, [1] * 9, [9, *[2] * 9], [4] * 30]
    targets = np.array([10, 8, 1, 0, 1, 5], np.int32)
    slices = slices_of(Sequences.of(histories), targets, small.catalog)
    assert {name: np.flatnonzero(users).tolist() for name, users in slices.items()} == {
        "history_1_to_4": [0, 1],
        "history_5_to_9": [2, 3],
        "history_10_or_more": [4, 5],
        "target_id_below_previous": [0, 3, 4],
    }


def test_a_slice_has_the_rows_of_its_users_and_an_empty_one_is_absent(small, tmp_path):
    """Everybody has five to nine events; popularity ranks item 39 first, then 38, …"""
    split = Split(Sequences.of([list(range(5)), list(range(5, 14)), list(range(6))]), np.array([39, 3, 30], np.int32))
    config = EvaluationConfig(threads=1, bootstrap_samples=10)
    folder = StageFolder(tmp_path / "evaluate", config, {})
    summary = run(config, small.ranker, baselines_of(40), split, small.tokenized, folder)
    assert {name: part.num_users for name, part in summary.slices.items()} == {
        "history_5_to_9": 3,
        "target_id_below_previous": 2,  # "item 39" and "item 30" are below "item 4" and "item 5"
    }
    everybody, below = summary.slices.values()
    assert everybody.model.model_dump().items() <= summary.model_dump().items()
    assert everybody.baselines == summary.baselines
    lists = rank_all(small, split)
    assert below.model.model_dump() == metrics_of_ranks(lists.masked_ranks[[0, 2]]).means()
    popularity = below.baselines["popularity"]
    assert (popularity.recall_5, popularity.recall_10) == (0.5, 1.0)


def test_prefix_recall_is_that_of_the_lists_beside_chance(large, tmp_path):
    split = random_split(large, 12)
    config = EvaluationConfig(threads=1, bootstrap_samples=10)
    folder = StageFolder(tmp_path / "evaluate", config, {})
    summary = run(config, large.ranker, baselines_of(90), split, large.tokenized, folder)
    lists = rank_all(large, split)
    paths = large.catalog.trie.path_of_rank(np.arange(90))
    for recall, length in ((summary.prefix_recall_10, 10), (summary.prefix_recall_50, 50)):
        assert set(recall) == {"model", "popularity", "item_knn", "sasrec", "chance"}
        assert recall["model"] == prefix_recall(paths, lists.first_fifty[:, :length], split.targets)
        assert recall["chance"] == chance_prefix_recall(paths, length, split.targets)
        top = [[rank for rank in range(89, -1, -1) if rank not in history][:length] for history in split.histories]
        assert recall["popularity"] == prefix_recall(paths, np.array(top, np.int32), split.targets)
    assert summary.prefix_recall_10["model"][-1] == summary.sid_recall_10


def test_a_summary_from_before_there_were_slices_can_still_be_read(finished: Run):
    old = {name: value for name, value in finished.outcome.json.items() if "prefix" not in name and name != "slices"}
    assert EvaluationSummary.model_validate(old).slices == {}


def test_a_run_writes_what_every_user_got(small, tmp_path):
    """Targets are written as item indices, which here stand in reverse of the catalogue's ranks."""
    tokenized = small.tokenized
    reverse = TokenizedCatalog(tokenized.catalog, tokenized.quantizer, tokenized.rank_of_item[::-1].copy())
    split = random_split(small, 12)
    by_rank = Split(reverse.to_ranks(split.histories), reverse.rank_of_item[split.targets])
    config = EvaluationConfig(threads=1, bootstrap_samples=100)
    folder = StageFolder(tmp_path / "evaluate", config, {})
    summary = run(config, small.ranker, baselines_of(40), split, reverse, folder)
    results, lists = load_users(folder.path), rank_all(small, by_rank)
    assert results.users.tolist() == split.users.tolist()
    assert results.targets.tolist() == split.targets.tolist()
    assert results.masked_ranks.tolist() == lists.masked_ranks.tolist()
    assert results.unmasked_ranks.tolist() == lists.unmasked_ranks.tolist()
    assert results.target_log_likelihood.tolist() == lists.target_log_likelihood.tolist()
    assert results.target_log_likelihood.mean() == summary.target_log_likelihood
    assert metrics_of_ranks(results.masked_ranks).means()["recall@10"] == summary.recall_10


def test_a_run_without_its_users_says_what_to_do(tmp_path):
    with pytest.raises(StageError, match=r"users.parquet cannot be read .*: remove .* `sidrec-train evaluate` again"):
        load_users(tmp_path)


def test_when_everybody_has_seen_everything_there_is_still_a_summary(small, tmp_path):
    config = EvaluationConfig(threads=1, bootstrap_samples=10)
    split = Split(Sequences.of([list(range(40))]), np.array([0], np.int32))
    folder = StageFolder(tmp_path / "evaluate", config, {})
    summary = run(config, small.ranker, baselines_of(40), split, small.tokenized, folder)
    assert summary.recall_50 == summary.coverage_10 == summary.gini_10 == 0
    assert summary.unmasked.recall_50 == 1


def test_a_split_without_users_is_refused(small, tmp_path):
    config = EvaluationConfig(threads=1)
    split = Split(Sequences.of([]), np.empty(0, np.int32))
    with pytest.raises(StageError, match="the test split has no user: leave-one-out needs users with at least three"):
        run(config, small.ranker, baselines_of(40), split, small.tokenized, StageFolder(tmp_path / "e", config, {}))


def test_the_json_has_the_names_of_the_contract(finished: Run):
    summary = finished.outcome.json
    row = {"recall@5", "ndcg@5", "recall@10", "ndcg@10"}
    assert row | {"num_users", "baselines"} <= summary.keys()
    assert set(summary["baselines"]) == {"popularity", "item_knn", "sasrec"}
    for metrics in (summary, summary["unmasked"], *summary["baselines"].values()):
        assert row | {"recall@50", "ndcg@50"} <= metrics.keys()
        assert all(0 <= metrics[name] <= 1 for name in row)
        assert metrics["ndcg@5"] <= metrics["recall@5"] <= metrics["recall@10"] <= metrics["recall@50"]
    assert summary["num_users"] == 60
    stored = json.loads((finished.out / "evaluate" / "stage.json").read_text())["summary"]
    assert stored == summary
