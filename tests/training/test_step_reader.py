"""What reads thinking steps, as training hands it over: of the kept weights, and only where it means something."""

from pathlib import Path

import numpy as np
import pytest
import torch

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.step_outputs import StepOutputs
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import History
from semantic_ids.step_reader import NO_CLUSTER, StepReader
from tests.training.conftest import Cli, Run
from tests.training.test_sft import CATALOG, VALIDATION
from tests.training.test_stepwise import train
from training.generator import TrainedModel
from training.stepwise import StepClusters

CLUSTERS: dict[str, object] = {"steps": (1, 1, 1), "step_clusters": 2}


def reader_after(path: Path, **settings: object) -> StepReader | None:
    train(path, **settings)
    return TrainedModel.load(path, CATALOG).step_reader


def test_it_gives_the_probability_that_training_raised():
    """Cross-entropy of one item at one level = -log share of its cluster, where that is the nearest."""
    codebooks = np.random.default_rng(1).standard_normal((1, 8, 4)).astype(np.float32)
    codes = np.array([[0], [1], [2], [3], [4], [5]], np.uint16)
    clusters = StepClusters(codebooks, codes, 3, (1,), width=5, is_shuffled=False, seed=0)
    reader = clusters.reader()
    assert (reader.cluster_of_code[0] == NO_CLUSTER).tolist() == [False] * 6 + [True] * 2
    hidden = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(2))
    found = reader.read(0, hidden[0, 0].numpy())
    code = int(np.flatnonzero(reader.cluster_of_code[0] == found.cluster)[0])
    assert clusters(hidden, torch.tensor([[code]])).item() == pytest.approx(-np.log(found.share), abs=1e-4)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_steps_of_the_kept_model_are_read_as_the_clusters_of_what_comes_next(tmp_path: Path, average: float):
    """A cycle is learnt, so before each code of the next item stands a step whose nearest cluster is that code's."""
    settings = {**CLUSTERS, "max_epochs": 14, "learning_rate": 0.01, "dropout": 0.0, "moving_average": average}
    reader = reader_after(tmp_path, **settings)
    assert reader is not None
    trained = TrainedModel.load(tmp_path, CATALOG)
    decoder = trained.load_decoder()
    is_read = []
    for history, target in zip(VALIDATION.histories, VALIDATION.targets.tolist(), strict=True):
        outputs = StepOutputs()
        state = decoder.prefill([trained.renderer.render(History.of(CATALOG, history)).token_ids])
        only = ItemFilter.of(len(CATALOG), allow=np.array([target]))
        constrained_beam(decoder, CATALOG.trie, state, [only], [1], forced=trained.renderer.forced, on_level=outputs)
        for level, output in enumerate(outputs.of(CATALOG.trie, 0, target)):
            if output is not None:
                expected = reader.cluster_of_code[level, CATALOG.codes[target, level]]
                is_read.append(reader.read(level, output).cluster == expected)
    assert len(is_read) > 2 * len(VALIDATION.targets)
    assert np.mean(is_read) > 0.95


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"steps": (1, 1, 1)}, id="pause"),
        pytest.param({**CLUSTERS, "step_clusters_shuffled": True}, id="shuffled"),
        pytest.param({"step_clusters": 2}, id="clusters alone"),
        pytest.param({"steps": (1, 1, 1), "global_interest": 0.1}, id="interest alone"),
    ],
)
def test_steps_that_mean_nothing_are_not_read(tmp_path: Path, settings: dict[str, object]):
    assert reader_after(tmp_path, **settings, max_epochs=1) is None


def test_it_goes_into_the_bundle(finished: Run, cli: Cli, tmp_path: Path) -> None:
    copy = finished.copy(tmp_path / "run")
    cli("pipeline", *copy.args("sft.steps=[1,1,1]", "sft.step_clusters=4", "sft.max_epochs=1"), "--json")
    bundle = Bundle.load_current(copy.out / "bundles")
    trained = StepReader.load(copy.out / "sft" / "steps")
    assert bundle.step_reader is not None
    assert bundle.step_reader.centres.shape[:2] == (bundle.catalog.space.num_levels, 4)
    for name, array in vars(trained).items():
        np.testing.assert_array_equal(getattr(bundle.step_reader, name), array)
