"""Publication: histories for import, the kNN's table by rank, and a bundle that is tried before it is current."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import sparse

from semantic_ids.bundle import CURRENT, Bundle, BundleError, BundleParts, current_id
from semantic_ids.decoding.beam import ScoredItems, constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import History
from tests.training.conftest import NUM_ITEMS, NUM_USERS, Cli, Run, command, environment
from training.collaborative import COOCCURRENCE_FILE, ItemKnn, load_item_knn
from training.generator import TrainedModel
from training.interactions import EVENT_TYPES, Dataset
from training.item_vectors import load_vectors
from training.publish import PublishConfig, histories_as_json_lines, neighbours_by_rank, run, try_out
from training.stage import StageError, StageFolder
from training.tokenizer.stage import TokenizedCatalog


def tokenized_of(finished: Run) -> TokenizedCatalog:
    return TokenizedCatalog.load(finished.out / "tokenizer", Dataset.load(finished.out / "data"))


@pytest.fixture
def parts(finished: Run, tmp_path: Path) -> BundleParts:
    """What the finished run would publish, with a model of its own to be damaged."""
    tokenized = tokenized_of(finished)
    trained = TrainedModel.load(finished.out / "sft", tokenized.catalog)
    model_folder = tmp_path / "model"
    shutil.copytree(trained.folder, model_folder)
    return BundleParts(
        catalog=tokenized.catalog,
        quantizer=tokenized.quantizer,
        neighbours=neighbours_by_rank(load_item_knn(finished.out / "collaborative" / COOCCURRENCE_FILE), tokenized),
        vocabulary=trained.vocabulary,
        prompt=trained.renderer.spec,
        text_encoder=load_vectors(finished.out / "vectors")[1],
        model_folder=model_folder,
        config_hash="0" * 16,
        metrics={},
    )


def answer(bundle: Bundle) -> ScoredItems:
    decoder = TreeDecoder.load(bundle.model_folder, bundle.vocabulary)
    state = decoder.prefill([bundle.renderer.render(History.of(bundle.catalog, [])).token_ids])
    return constrained_beam(decoder, bundle.catalog.trie, state, [ItemFilter.of(len(bundle.catalog))], [20])[0]


def test_the_published_bundle_is_what_was_trained_and_evaluated(finished):
    bundle = Bundle.load_current(finished.out / "bundles")
    tokenized = tokenized_of(finished)
    assert len(bundle.catalog) == NUM_ITEMS
    assert (np.asarray(bundle.catalog.codes) == np.asarray(tokenized.catalog.codes)).all()
    evaluated = finished.outcome.json
    assert bundle.manifest.metrics == {
        name: evaluated[name] for name in ("recall@10", "ndcg@10", "target_log_likelihood")
    }
    summary = json.loads((finished.out / "publish" / "stage.json").read_text())["summary"]
    assert summary["bundle_id"] == bundle.bundle_id
    assert summary["num_bytes"] == sum(
        file.stat().st_size for file in bundle.path.rglob("*") if file.is_file() and file.name != "manifest.json"
    )
    trained = TrainedModel.load(finished.out / "sft", tokenized.catalog)
    weights = "model.safetensors"
    assert (bundle.model_folder / weights).read_bytes() == (trained.folder / weights).read_bytes()
    try_out(bundle)


def test_every_user_has_a_line_with_the_whole_history_oldest_first(finished):
    dataset = Dataset.load(finished.out / "data")
    lines = (finished.out / "publish" / "histories.jsonl").read_text(encoding="utf-8").splitlines()
    users = [json.loads(line) for line in lines]
    assert sorted(user["user_id"] for user in users) == sorted(f"user {number}" for number in range(NUM_USERS))
    for user, items in zip(users, dataset.sequences, strict=True):
        assert set(user) == {"user_id", "events"}
        assert [item_id for item_id, _, _ in user["events"]] == [dataset.item_ids[item] for item in items]
        times = [timestamp for _, timestamp, _ in user["events"]]
        assert times == sorted(times)
        assert {kind for _, _, kind in user["events"]} <= {"click", "like"}


def test_ids_of_any_script_survive_the_lines_of_histories(finished):
    dataset = Dataset.load(finished.out / "data")
    dataset.user_ids[0], dataset.item_ids[int(dataset.sequences[0][0])] = 'ü "\n\u2028', "品/\\"
    lines = histories_as_json_lines(dataset).decode().split("\n")
    first = json.loads(lines[0])
    assert len(lines) == NUM_USERS + 1
    assert first["user_id"] == 'ü "\n\u2028'
    assert first["events"][0][0] == "品/\\"
    assert first["events"][0][2] in EVENT_TYPES


def test_the_neighbours_are_the_knns_table_under_new_names(finished):
    tokenized = tokenized_of(finished)
    cells = np.random.default_rng(0).random((NUM_ITEMS, NUM_ITEMS), np.float32)
    cells[cells < 0.9] = 0
    table = sparse.csr_array(cells)
    neighbours = neighbours_by_rank(ItemKnn(table, last_items=5, decay=0.8), tokenized)
    for item, rank in enumerate(tokenized.rank_of_item.tolist()):
        row = slice(int(neighbours.offsets[rank]), int(neighbours.offsets[rank + 1]))
        ranks, strengths = neighbours.ranks[row], neighbours.weights[row]
        others = np.flatnonzero(cells[item])
        assert dict(zip(ranks.tolist(), strengths.tolist(), strict=True)) == {
            int(tokenized.rank_of_item[other]): float(cells[item, other]) for other in others
        }
        assert (np.diff(strengths) <= 0).all()


def damage(model_folder: Path, value: float) -> None:
    path = model_folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(
        {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def test_a_model_of_nan_is_refused_and_the_current_bundle_stays(finished, parts, tmp_path):
    bundles = tmp_path / "bundles"
    shutil.copytree(finished.out / "bundles", bundles)
    before = current_id(bundles)
    damage(parts.model_folder, float("nan"))
    folder = StageFolder(tmp_path / "publish", PublishConfig(), {})
    with pytest.raises(StageError, match=r"the new bundle was not made current: bundle .* answered its first request"):
        run(PublishConfig(), parts, Dataset.load(finished.out / "data"), bundles, folder)
    assert current_id(bundles) == before
    assert folder.finished() is None


def test_a_bundle_may_be_published_without_making_it_current(finished, parts, tmp_path):
    config, bundles = PublishConfig(activate=False), tmp_path / "bundles"
    folder = StageFolder(tmp_path / "publish", config, {})
    summary = run(config, parts, Dataset.load(finished.out / "data"), bundles, folder)
    assert not (bundles / CURRENT).exists()
    assert len(answer(Bundle.load(bundles / summary.bundle_id)).ranks) >= 20


def test_an_inactive_publication_is_not_repeated(finished, cli, tmp_path):
    copied = finished.copy(tmp_path / "run")
    shutil.rmtree(copied.out / "bundles")
    first, second = (cli("publish", *copied.args("publish.activate=false"), "--json").json for _ in range(2))
    assert first == second
    assert [bundle.bundle_id for bundle in whole_bundles(copied.out / "bundles")] == [first["bundle_id"]]


def test_a_bundle_removed_by_hand_is_published_again_and_nothing_else_is_done(finished, cli, tmp_path):
    copied = finished.copy(tmp_path / "run")
    gone = current_id(copied.out / "bundles")
    shutil.rmtree(copied.out / "bundles" / gone)
    trained = (copied.out / "sft" / "stage.json").stat().st_mtime_ns
    cli("pipeline", *copied.args(), "--json")
    bundle = Bundle.load_current(copied.out / "bundles")
    assert bundle.bundle_id != gone
    assert (copied.out / "sft" / "stage.json").stat().st_mtime_ns == trained
    scores = answer(Bundle.load_current(finished.out / "bundles")).scores
    assert answer(bundle).scores.tolist() == scores.tolist()


def whole_bundles(bundles: Path) -> Iterator[Bundle]:
    """Every folder that a reader could find; a half one raises."""
    for path in bundles.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            yield Bundle.load(path)


def test_a_publication_killed_at_any_moment_leaves_no_half_bundle(finished: Run, cli: Cli, tmp_path: Path) -> None:
    copied = finished.copy(tmp_path / "run")
    bundles = copied.out / "bundles"
    shutil.rmtree(bundles)
    shutil.rmtree(copied.out / "publish")
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command("publish", *copied.args()),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (bundles.exists() and any(bundles.iterdir())) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.04)
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            whole = Bundle.load_current(bundles)
        except BundleError as error:
            assert str(error).startswith("no bundle is published")
        else:
            assert len(answer(whole).ranks) >= 20
        assert all(len(bundle.catalog) == NUM_ITEMS for bundle in whole_bundles(bundles))
        (bundles / CURRENT).unlink(missing_ok=True)
    published = cli("publish", *copied.args(), "--json").json
    assert Bundle.load_current(bundles).bundle_id == published["bundle_id"]
    assert not list(bundles.glob(".staging-*"))
