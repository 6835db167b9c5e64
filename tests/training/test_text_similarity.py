"""The text baseline, by hand."""

import numpy as np
import pytest

from training.sequences import Sequences
from training.text_similarity import LAST_ITEMS, TextSimilarity

VECTORS = np.array([[2, 0], [0, 3], [1, 1], [0, 0]], np.float32)


def test_a_score_is_the_cosine_with_the_mean_of_the_last_items():
    """After items 0 and 1, whose directions are at right angles, the mean points along item 2."""
    scores = TextSimilarity(VECTORS).scores(Sequences.of([[0], [0, 1], []]))
    half = 0.5**0.5
    assert scores.tolist() == pytest.approx(np.array([[1, 0, half, 0], [half, half, 1, 0], [0, 0, 0, 0]]))
    assert scores.dtype == np.float32


def test_what_is_longer_ago_does_not_count():
    text = TextSimilarity(VECTORS)
    recent = [1] * LAST_ITEMS
    assert text.scores(Sequences.of([[0, *recent]])).tolist() == text.scores(Sequences.of([recent])).tolist()
    assert text.scores(Sequences.of([[0, *recent[1:]]]))[0, 0] > 0
