"""What reads a step: its numbers by hand, its codes in order, and its place in a bundle."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from semantic_ids.bundle import Bundle, BundleError, publish
from semantic_ids.codes import SidError
from semantic_ids.prompt import COMPACT_VERSION, STEPWISE_VERSION, PromptSpec
from semantic_ids.step_reader import NO_CLUSTER, StepReader
from tests.semantic_ids.factories import bundle_parts

ALONG, ACROSS = (1.0, 0.0), (0.0, 1.0)


def reader(**changed: npt.NDArray[Any]) -> StepReader:
    """Two levels of four codes; three clusters a level, of which the third has no code. D = 3, d = 2, τ = 0.5."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "centres": np.array([[ALONG, ACROSS, (-1.0, 0.0)], [ACROSS, ALONG, (0.0, 0.0)]], np.float32),
        "projection": np.stack([np.eye(3, 2), 2 * np.eye(3, 2)]).astype(np.float32),
        "cluster_of_code": np.array([[0, 1, 0, NO_CLUSTER], [1, 1, 1, 0]], np.int16),
        "temperature": np.array([0.5], np.float32),
    }
    return StepReader(**arrays | changed)


def test_the_nearest_cluster_is_that_of_the_largest_cosine_and_its_share_the_softmax_over_all():
    """(3, 4, 7) is projected to (3, 4): cosines .6, .8 and -.6. The share is 1 / (1 + e^-.4 + e^-2.8) = .57747."""
    found = reader().read(0, np.array([3, 4, 7], np.float32))
    assert (found.level, found.cluster) == (0, 1)
    assert found.cosine == pytest.approx(0.8)
    assert found.share == pytest.approx(1 / (1 + np.exp(-0.4) + np.exp(-2.8)))
    found = reader().read(1, np.array([3, 4, 7], np.float32))  # the same directions, the other way round
    assert found.cluster == 0
    assert found.cosine == pytest.approx(0.8)


def test_a_cluster_without_codes_is_never_the_nearest():
    found = reader().read(0, np.array([-5, -0.1, 0], np.float32))
    assert found.cluster == 1
    assert found.cosine == pytest.approx(-0.02, abs=1e-3)
    assert reader().read(0, np.zeros(3, np.float32)).cosine == 0


def test_the_codes_of_a_cluster_stand_by_their_nearness_to_its_centre():
    codebooks = np.zeros((2, 4, 2), np.float32)
    codebooks[1] = [(1, 1), (9, 1), (5, -9), ALONG]
    assert reader().members(1, 1, codebooks).tolist() == [1, 0, 2]
    assert reader().members(0, 2, codebooks).tolist() == []


def test_it_comes_back_as_it_was_saved(tmp_path: Path):
    reader().save(tmp_path / "steps")
    found = StepReader.load(tmp_path / "steps")
    for name, array in vars(reader()).items():
        np.testing.assert_array_equal(getattr(found, name), array)
    (tmp_path / "steps" / "projection.npy").unlink()
    with pytest.raises(SidError, match="cannot be read"):
        StepReader.load(tmp_path / "steps")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projection": np.zeros((2, 3), np.float32)}, r"\(L, C, d\), \(L, D, d\)"),
        ({"projection": np.zeros((2, 3, 5), np.float32)}, "do not fit each other"),
        ({"cluster_of_code": np.zeros((3, 4), np.int16)}, "do not fit each other"),
        ({"cluster_of_code": np.full((2, 4), 3, np.int16)}, "beyond the 3 that there are"),
        ({"projection": np.full((2, 3, 2), np.nan, np.float32)}, "not finite"),
        ({"temperature": np.zeros(1, np.float32)}, "not above 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed: dict[str, npt.NDArray[Any]], message: str):
    with pytest.raises(SidError, match=message):
        reader(**changed)


class TestInABundle:
    """A model of three levels of eight codes, codebooks 4 wide, whose output is 6 wide."""

    @staticmethod
    def published(root: Path, *, width: int = 6, num_codes: int = 8, steps: tuple[int, ...] = (1, 0, 2)) -> Bundle:
        parts = bundle_parts(root)
        config = parts.model_folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 6}))
        generator = np.random.default_rng(0)
        step_reader = StepReader(
            generator.standard_normal((3, 2, 4)).astype(np.float32),
            generator.standard_normal((3, width, 4)).astype(np.float32),
            generator.integers(0, 2, (3, num_codes)).astype(np.int16),
            np.array([0.1], np.float32),
        )
        version = STEPWISE_VERSION if steps else COMPACT_VERSION
        prompt = PromptSpec(version=version, max_history=5, steps=steps)
        return publish(root / "bundles", replace(parts, prompt=prompt, step_reader=step_reader), lambda _bundle: None)

    def test_it_is_loaded_with_it_and_its_files_are_checked(self, tmp_path: Path):
        bundle = self.published(tmp_path)
        assert {f"steps/{name}.npy" for name in ("centres", "projection", "cluster_of_code", "temperature")} <= set(
            bundle.manifest.files
        )
        assert Bundle.load(bundle.path).step_reader is not None
        file = bundle.path / "steps" / "projection.npy"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(BundleError, match=r"steps/projection\.npy was changed"):
            Bundle.load(bundle.path)

    def test_a_bundle_without_one_is_as_it_ever_was(self, tmp_path: Path):
        bundle = publish(tmp_path / "bundles", bundle_parts(tmp_path), lambda _bundle: None)
        assert bundle.step_reader is None
        assert not any(name.startswith("steps") for name in bundle.manifest.files)

    @pytest.mark.parametrize("changed", [{"width": 5}, {"num_codes": 7}, {"steps": ()}])
    def test_one_that_does_not_fit_the_model_is_refused(self, tmp_path: Path, changed: dict[str, Any]):
        with pytest.raises(BundleError, match=r"its steps project .* its model has an output of 6"):
            self.published(tmp_path, **changed)
