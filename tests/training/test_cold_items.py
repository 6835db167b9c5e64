"""Cold items through the real stages: nothing that is learnt meets them, and they are ranked all the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semantic_ids.trie import ROOT
from tests.training.conftest import SMALL, make_catalog
from training.collaborative import ITEM_VECTORS_FILE, load_item_knn, load_popularity, load_sasrec
from training.distillation import sample_continuations
from training.evaluation import EvaluationSummary, load_users
from training.interactions import Dataset, DataSummary
from training.item_vectors import load_vectors
from training.pipeline import Pipeline, load_config, parse_overrides
from training.stage import StageError, StageFolder
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.methods import METHODS, Method
from training.tokenizer.sid_files import write_sids
from training.tokenizer.stage import Inputs, TokenizedCatalog
from training.tokenizer.stage import run as tokenize

LEVERS = ("sft.item_memory=true", "sft.distillation=0.5", "sft.continuations=100", "tokenizer.method=clustered")
COLD = ("data.cold_share=0.2", "evaluate.split=cold")


def run_pipeline(data: Path, out: Path, *overrides: str) -> dict[Any, Any]:
    config = load_config("default", parse_overrides([*SMALL, *LEVERS, *overrides]))
    return dict(Pipeline(config, data, out).run("evaluate"))


@pytest.fixture(scope="module")
def cold_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    """A run with a fifth of the items held out, and everything that could learn from them switched on."""
    out = tmp_path_factory.mktemp("cold") / "run"
    return out, run_pipeline(tiny_data, out, *COLD)


def test_the_cold_split_is_ranked_beside_text_and_by_prefixes(cold_run):
    out, summaries = cold_run
    data, evaluated = summaries["data"], summaries["evaluate"]
    assert isinstance(data, DataSummary)
    assert isinstance(evaluated, EvaluationSummary)
    assert data.cold_items == round(0.2 * 48)
    assert (evaluated.split, evaluated.num_users, evaluated.num_items) == ("cold", data.cold_users, 48)
    assert set(evaluated.baselines) == {"popularity", "item_knn", "sasrec", "text"}
    assert evaluated.baselines["popularity"].recall_10 == evaluated.baselines["item_knn"].recall_10 == 0
    assert evaluated.baselines["text"].recall_10 > 0
    assert set(evaluated.prefix_recall_10) == {"model", *evaluated.baselines, "chance"}
    assert all(len(by_level) == 2 for by_level in evaluated.prefix_recall_50.values())
    for name, row in ({"model": evaluated} | evaluated.baselines).items():
        assert evaluated.prefix_recall_10[name][-1] == row.recall_10  # every item has a SID of its own
    by_length = [part.num_users for name, part in evaluated.slices.items() if name.startswith("history")]
    assert sum(by_length) == evaluated.num_users
    assert set(load_users(out / "evaluate").targets) <= set(Dataset.load(out / "data").cold_items)


def test_nothing_that_was_counted_or_sampled_is_cold(cold_run):
    out, _ = cold_run
    dataset = Dataset.load(out / "data")
    train, cold = dataset.train(), dataset.cold_items
    popularity = load_popularity(out / "collaborative" / "popularity.npy")
    item_knn = load_item_knn(out / "collaborative" / "cooccurrence.npz")
    assert popularity.counts[cold].sum() == 0
    assert popularity.counts.sum() == len(train.items)
    assert item_knn.table[:, cold].nnz == item_knn.table[cold].nnz == 0
    tokenized = TokenizedCatalog.load(out / "tokenizer", dataset)
    assert tokenized.catalog.popularity[tokenized.rank_of_item[cold]].sum() == 0
    sasrec = load_sasrec(out / "collaborative/sasrec.safetensors")

    def cold_events() -> int:
        sampled = sample_continuations(train, sasrec, item_knn, count=300, max_events=9, seed=0)
        weights = sampled.lists.weights[np.isin(sampled.lists.items, cold)]
        return int(np.isin(sampled.sequences.items, cold).sum()) + int((weights > 0).sum())

    assert cold_events() > 0
    sasrec.never_next = cold
    assert cold_events() == 0


def test_the_other_splits_of_the_same_run_have_warm_targets_only(cold_run, tiny_data):
    """And nothing but the evaluation is done again."""
    out, before = cold_run
    trained = (out / "sft" / "stage.json").stat().st_mtime_ns
    evaluated = run_pipeline(tiny_data, out, COLD[0])["evaluate"]
    dataset = Dataset.load(out / "data")
    assert (out / "sft" / "stage.json").stat().st_mtime_ns == trained
    assert evaluated.num_users + before["evaluate"].num_users <= 60
    assert not np.isin(load_users(out / "evaluate").targets, dataset.cold_items).any()
    assert set(evaluated.baselines) == {"popularity", "item_knn", "sasrec"}
    assert json.loads((out / "evaluate" / "stage.json").read_text())["config"]["split"] == "test"


def test_a_model_is_trained_and_validated_among_warm_items_and_ranked_among_all(cold_run, tiny_data):
    """The same weights, users and targets, with fewer wrong answers in training: so every target is likelier there."""
    out, before = cold_run
    evaluated = run_pipeline(tiny_data, out, COLD[0], "evaluate.split=validation")["evaluate"]
    assert evaluated.target_log_likelihood < before["sft"].validation_log_likelihood - 0.05


def test_a_cold_split_without_cold_items_is_refused_before_anything_is_done(tiny_data, tmp_path):
    with pytest.raises(StageError, match=r"evaluate.split=cold has nobody .* data.cold_share=0: set it"):
        run_pipeline(tiny_data, tmp_path / "run", "evaluate.split=cold")
    assert not (tmp_path / "run").exists()


CODES = [[0, 1], [0, 2], [0, 2], [1, 0], [2, 0], [2, 3]]


@pytest.mark.parametrize("left_out", [[], [0], [1], [1, 2], [3], [0, 3, 5], [5]])
def test_a_trie_without_items_has_every_other_sid_and_no_more(left_out):
    """Item i stands at rank 5 - i. Items 3 and 4, of ranks 1 and 2, share a SID, which is gone only with both."""
    catalog = make_catalog(CODES, codebook_size=4, popularity=[1] * 6)
    tokenized = TokenizedCatalog(catalog, None, np.arange(5, -1, -1, dtype=np.int32))  # type: ignore[arg-type]
    trie = tokenized.catalog_without(np.array([5 - rank for rank in left_out][::-1], np.int64)).trie
    kept = [rank for rank in range(6) if rank not in left_out]
    first = trie.children(np.array([ROOT]))
    sids = {
        (int(code), int(second))
        for code, node in zip(first.code, first.node, strict=True)
        for second in trie.children(np.array([node])).code
    }
    assert sids == {(CODES[rank][0], CODES[rank][1]) for rank in kept}
    paths = trie.path_of_rank(np.array(kept))
    assert [[int(trie.tokens[node]) for node in path] for path in paths] == [CODES[rank] for rank in kept]
    assert (trie.path_of_rank(np.arange(6)) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_tokenizer_method_gives_cold_items_their_sids(cold_run, tmp_path, method: Method):
    out, _ = cold_run
    dataset = Dataset.load(out / "data")
    settings: dict[str, Any] = {"method": method, "threads": 1}
    if method == "imported":
        catalog = TokenizedCatalog.load(out / "tokenizer", dataset).catalog
        write_sids(tmp_path / "sids.json", catalog.item_ids, catalog.codes, catalog.space)
        settings |= {"sids": str(tmp_path / "sids.json")}
    elif method != "clustered":
        settings |= {"max_epochs": 3, "hidden_widths": (32,), "latent_width": 8, "codebook_size": 16}
    config = TokenizerConfig.model_validate(settings)
    vectors, _ = load_vectors(out / "vectors")
    inputs = Inputs(dataset, dataset.train(), vectors, lambda: np.load(out / "collaborative" / ITEM_VECTORS_FILE))
    summary = tokenize(config, inputs, StageFolder(tmp_path / "tokenizer", config, {}))
    tokenized = TokenizedCatalog.load(tmp_path / "tokenizer", dataset)
    assert summary.num_items == len(tokenized.catalog) == 48
    assert summary.uniqueness == 1.0
