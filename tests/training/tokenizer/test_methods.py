"""A method is a row of switches; the configuration sets over it, and all that decides the SIDs is its identity."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from training.interactions import Dataset
from training.sequences import Sequences
from training.stage import StageFolder
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.methods import METHODS, Method, Objectives, objectives_of
from training.tokenizer.stage import Inputs, TokenizedCatalog, run

LETTER = {"initialisation": "constrained", "collaborative_weight": 0.2, "diversity_weight": 1e-4}
COBA = {"sinkhorn_last_level": False, "graph": True, "uniformity_weight": 0.01, "load_balance": 0.1}
GR2 = {"codebook_update": "ema", "sinkhorn_last_level": False, "cointeraction_weight": 0.1, "repair": "random"}
NO_OVERRIDES: dict[str, Any] = dict.fromkeys(field.name for field in fields(Objectives))


@pytest.mark.parametrize(
    ("method", "switches"),
    [("rqvae", {}), ("letter", LETTER), ("coba", COBA), ("letter-coba", LETTER | COBA), ("gr2", GR2)],
)
def test_a_method_differs_from_the_plain_one_in_its_own_switches_only(method, switches):
    plain, row = asdict(METHODS["rqvae"]), asdict(METHODS[method])
    assert {name: value for name, value in row.items() if value != plain[name]} == switches


def test_every_method_that_can_be_named_has_a_row():
    assert set(METHODS) == set(get_args(Method))


def test_every_switch_can_be_set_in_the_configuration_and_is_left_to_the_method_unless_it_is():
    defaults = TokenizerConfig.model_validate({}).model_dump()
    for name in NO_OVERRIDES:
        assert defaults[name] is None


@pytest.mark.parametrize("method", get_args(Method))
def test_without_overrides_the_row_holds(method):
    assert objectives_of(method, NO_OVERRIDES) == METHODS[method]
    assert TokenizerConfig.model_validate({"method": method}).objectives() == METHODS[method]


def test_overrides_win_even_where_they_switch_off():
    off = {"graph": False, "collaborative_weight": 0.0, "initialisation": "kmeans++", "sinkhorn_last_level": True}
    config = TokenizerConfig.model_validate({"method": "letter-coba", **off, "repair": "none"})
    objectives = asdict(config.objectives())
    assert objectives == asdict(METHODS["letter-coba"]) | off | {"repair": "none"}
    assert not config.objectives().needs_collaborative
    assert not config.objectives().needs_graph


@pytest.mark.parametrize(
    ("method", "collaborative", "graph"),
    [
        ("rqvae", False, False),
        ("letter", True, False),
        ("coba", False, True),
        ("letter-coba", True, True),
        ("gr2", False, True),
    ],
)
def test_a_method_reads_what_it_needs_and_no_more(method, collaborative, graph):
    assert (METHODS[method].needs_collaborative, METHODS[method].needs_graph) == (collaborative, graph)


def test_what_a_method_stands_for_is_part_of_the_identity():
    identity = TokenizerConfig.model_validate({"method": "letter"}).identity()
    assert identity["objectives"] == repr(METHODS["letter"])
    changed = TokenizerConfig.model_validate({"method": "letter", "diversity_weight": 1e-3}).identity()
    assert "diversity_weight=0.001" in changed["objectives"]
    assert identity != changed
    assert "threads" not in identity


# -- the whole stage by method

Vectors = npt.NDArray[np.float32]
NUM_ITEMS = 96
COMMUNITY = np.arange(NUM_ITEMS) % 6
MEMBERS = [np.flatnonzero(label == COMMUNITY) for label in range(6)]


def text_vectors() -> Vectors:
    rng = np.random.default_rng(0)
    vectors: npt.NDArray[np.float64] = rng.normal(size=(6, 12))[COMMUNITY] + 0.5 * rng.normal(size=(NUM_ITEMS, 12))
    return vectors.astype(np.float32)


def sequences(seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    return Sequences.of([rng.choice(MEMBERS[user % 6], 6).tolist() for user in range(90)])


def dataset_with(every_event: Sequences) -> Dataset:
    nothing = np.empty(0)
    return Dataset(
        item_ids=[f"item {number}" for number in range(NUM_ITEMS)],
        titles=[""] * NUM_ITEMS,
        categories=[[]] * NUM_ITEMS,
        attributes=[{}] * NUM_ITEMS,
        user_ids=[],
        sequences=every_event,
        timestamps=nothing,
        event_types=nothing.astype(np.uint8),
    )


def collaborative_vectors() -> Vectors:
    """One direction for each community, and each item's own part."""
    rng = np.random.default_rng(9)
    vectors: npt.NDArray[np.float64] = 2 * np.eye(6)[COMMUNITY] + 0.3 * rng.normal(size=(NUM_ITEMS, 6))
    return vectors.astype(np.float32)


def tokenize(path: Path, every_event: Sequences | None = None, **settings: object) -> TokenizedCatalog:
    small = {"num_levels": 2, "codebook_size": 8, "hidden_widths": [16], "latent_width": 8, "max_epochs": 3}
    more: dict[str, object] = {"diversity_clusters": 3, "batch_size": 32, "kmeans_restarts": 1, "repair": "none"}
    config = TokenizerConfig.model_validate({**small, **more, **settings})
    dataset = dataset_with(sequences() if every_event is None else every_event)
    run(config, Inputs(dataset, sequences(), text_vectors(), collaborative_vectors), StageFolder(path, config, {}))
    return TokenizedCatalog.load(path, dataset)


def codes_of(tokenized: TokenizedCatalog) -> npt.NDArray[np.uint16]:
    return np.asarray(tokenized.catalog.codes)[tokenized.rank_of_item]


@pytest.mark.parametrize("method", ["rqvae", "letter", "coba", "letter-coba", "gr2"])
def test_the_catalogues_codes_are_those_of_the_exported_quantiser(tmp_path, method):
    """With the vectors mixed along the graph the bundle's quantiser still reads text, so only there they may differ."""
    tokenized = tokenize(tmp_path, method=method)
    agree = (tokenized.quantizer.encode(text_vectors()) == codes_of(tokenized)).all(axis=1)
    assert agree.all() or (METHODS[method].graph and agree.mean() > 0.2)


@pytest.mark.parametrize("method", ["letter-coba", "gr2"])
def test_events_outside_training_have_no_part_in_the_sids(tmp_path, method):
    one, other = (
        tokenize(tmp_path / str(seed), every_event=sequences(seed), method=method).quantizer for seed in (1, 2)
    )
    assert (one.codebooks == other.codebooks).all()


def test_the_permuted_control_aligns_items_with_vectors_that_are_not_their_own(tmp_path):
    """With alignment to their own vectors, whose communities are the texts', items of a community share their latents'
    direction more than with those of anybody else.
    """
    weights: dict[str, Any] = {
        "method": "letter",
        "collaborative_weight": 1.0,
        "collaborative_similarity": "cosine",
        "max_epochs": 40,
        "learning_rate": 3e-3,
    }

    def cohesion(path: Path, *, permuted: bool) -> float:
        latents = tokenize(path, **weights, collaborative_permuted=permuted).quantizer.latents(text_vectors())
        units = latents / np.linalg.norm(latents, axis=1, keepdims=True)
        cosines, same = units @ units.T, COMMUNITY[:, None] == COMMUNITY
        return float(cosines[same].mean() - cosines[~same].mean())

    assert cohesion(tmp_path / "own", permuted=False) > cohesion(tmp_path / "permuted", permuted=True) + 0.2


def test_a_stage_leaves_no_scratch_behind(tmp_path):
    tokenize(tmp_path, method="letter-coba", checkpoint_epochs=1)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "catalog",
        "quantizer",
        "report.html",
        "stage.json",
    }
