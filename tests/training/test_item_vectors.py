"""Text vectors: what the finished run wrote, item by item."""

import json

import numpy as np
import pytest

from semantic_ids.text_encoder import PACKAGED_MINILM
from tests.training.conftest import NUM_ITEMS, TWINS, Run
from training.interactions import Dataset
from training.item_vectors import PARTS, VectorsConfig, item_texts, load_vectors, run
from training.stage import StageError, StageFolder


@pytest.fixture
def dataset(finished: Run) -> Dataset:
    return Dataset.load(finished.out / "data")


def test_the_text_of_an_item_is_its_title_its_categories_and_its_attributes(dataset):
    texts = item_texts(dataset)
    assert len(texts) == NUM_ITEMS
    assert texts[dataset.item_ids.index("g0/0")] == (
        "The lantern, a tale of sea voyages. Sea voyages > lantern. description: Told in 1 parts."
    )
    assert texts[dataset.item_ids.index(TWINS[0])] == "The twin. Drama > Twins"


def test_every_item_has_a_unit_vector_and_items_with_one_text_have_one_vector(finished, dataset):
    vectors, identity = load_vectors(finished.out / "vectors")
    assert vectors.shape == (NUM_ITEMS, 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    one, other = (dataset.item_ids.index(twin) for twin in TWINS)
    assert (vectors[one] == vectors[other]).all()
    assert len(np.unique(vectors, axis=0)) == NUM_ITEMS - 1
    assert (identity.name, identity.dimension) == (PACKAGED_MINILM, 384)
    summary = json.loads((finished.out / "vectors" / "stage.json").read_text())["summary"]
    assert summary == {
        "encoder": PACKAGED_MINILM,
        "dimension": 384,
        "num_items": NUM_ITEMS,
        "distinct_texts": NUM_ITEMS - 1,
    }


def test_vectors_stand_in_the_order_of_the_items(finished, dataset):
    """Items of one genre are nearer to each other than to the rest, which no other order would give."""
    vectors, _ = load_vectors(finished.out / "vectors")
    genre = np.array([item_id.split("/")[0] for item_id in dataset.item_ids])
    similarity = np.asarray(vectors) @ np.asarray(vectors).T
    alike = genre[:, None] == genre[None]
    np.fill_diagonal(alike, False)
    assert similarity[alike].mean() > similarity[genre[:, None] != genre[None]].mean() + 0.1


def test_an_encoder_that_is_not_there_is_named_with_the_ways_out(dataset, tmp_path):
    config = VectorsConfig(encoder="/no/such/encoder", threads=1)
    with pytest.raises(StageError, match=r"'/no/such/encoder' cannot be loaded.*Name a local folder, a hub model, or"):
        run(config, dataset, StageFolder(tmp_path / "vectors", config, {}))


def test_a_part_that_a_killed_run_left_is_not_encoded_again(dataset, tmp_path):
    config = VectorsConfig(threads=1)
    folder = StageFolder(tmp_path / "vectors", config, {})
    left_behind = np.random.default_rng(0).normal(size=(NUM_ITEMS - 1, 384)).astype(np.float32)
    (folder.path / PARTS).mkdir()
    np.save(folder.path / PARTS / "0.npy", left_behind)
    run(config, dataset, folder)
    vectors, _ = load_vectors(folder.path)
    assert (np.unique(vectors, axis=0) == np.unique(left_behind, axis=0)).all()
    assert not (folder.path / PARTS).exists()
