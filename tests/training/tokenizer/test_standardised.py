"""Zero mean and unit variance in every dimension, however the vectors are stored and read."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from training.tokenizer.standardised import Standardised


def test_statistics_by_hand():
    """Dimension 0 has 1, 3: mean 2, deviation 1. Dimension 1 has 10, 30: mean 20, deviation 10."""
    items = Standardised.of(np.array([[1, 10], [3, 30]], np.float32))
    assert items.mean.tolist() == [2, 20]
    assert items.scale.tolist() == [1, 10]
    assert items.rows(np.array([1, 0, 1])).tolist() == [[1, 1], [-1, -1], [1, 1]]
    assert items.columns(slice(1, 2)).tolist() == [[-1], [1]]
    assert (len(items), items.width) == (2, 2)


def test_a_dimension_that_never_varies_is_zero():
    items = Standardised.of(np.full((1000, 2), [0.1, 12345.678], np.float32))
    assert (items.rows(slice(None)) == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_memory_mapped_vectors_of_any_width_give_what_arrays_give(tmp_path: Path, dtype: type[np.floating]):
    drawn = 3 + np.random.default_rng(0).normal(size=(10_000, 5))  # more than one batch
    vectors: npt.NDArray[np.floating] = drawn.astype(dtype)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = Standardised.of(np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    rows = mapped.rows(np.arange(10_000))
    assert rows.dtype == np.float32
    assert rows.mean(axis=0) == pytest.approx(0, abs=1e-3)
    assert rows.std(axis=0) == pytest.approx(1, abs=1e-3)
    assert mapped.mean == pytest.approx(vectors.astype(np.float64).mean(axis=0), abs=1e-6)


def test_rows_columns_and_batches_agree():
    items = Standardised.of(np.random.default_rng(0).normal(size=(9000, 5)).astype(np.float32))
    whole = items.rows(slice(None))
    assert (np.concatenate([items.rows(rows) for rows in items.batches()]) == whole).all()
    assert (items.columns(slice(1, 4)) == whole[:, 1:4]).all()
    assert (items.rows(np.array([8999, 3])) == whole[[8999, 3]]).all()


def test_one_item_is_the_origin():
    assert (Standardised.of(np.array([[4, 5]], np.float32)).rows(slice(None)) == 0).all()
