"""Item → text → vector: one text for one item, and only the encoder that the bundle names."""

import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.text_encoder import PACKAGED_MINILM, TextEncoder, TextEncoderError, item_text

TEXTS = ["a red lipstick", "", "Poèmes en prose. " * 30, "garden hose", "a crimson lip colour"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(PACKAGED_MINILM)


def test_an_item_reads_title_then_categories_then_attributes_by_name():
    text = item_text(" Blue Train ", ["Music > Jazz", "Vinyl"], {"year": "1957", "artist": " Coltrane ", "note": "  "})
    assert text == "Blue Train. Music > Jazz; Vinyl. artist: Coltrane. year: 1957"


def test_what_an_item_lacks_leaves_no_trace():
    assert item_text("Title", [], {}) == "Title"
    assert item_text("", [], {"brand": "X"}) == "brand: X"


def test_a_long_attribute_is_cut():
    assert item_text("T", [], {"description": "x" * 5000}) == f"T. description: {'x' * 1000}"


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_the_attributes_does_not_matter(attributes: dict[str, str], random):
    shuffled = dict(random.sample(list(attributes.items()), len(attributes)))
    assert item_text("Title", ["A"], attributes) == item_text("Title", ["A"], shuffled)


def test_vectors_have_unit_length_and_stand_in_the_order_of_their_texts(encoder: TextEncoder):
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (5, encoder.identity.dimension) == (5, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[4] > max(vectors[0] @ vectors[3], vectors[0] @ vectors[2])


def test_a_text_has_one_vector_whatever_it_is_encoded_with(encoder: TextEncoder):
    together, alone = encoder.encode(TEXTS), np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(encoder.encode(TEXTS, batch=2), together, atol=1e-5)


def test_progress_is_told_batch_by_batch(encoder: TextEncoder):
    done: list[int] = []
    encoder.encode(TEXTS, batch=2, on_batch=done.append)
    assert done == [2, 2, 1]


def test_no_texts_have_no_vectors(encoder: TextEncoder):
    assert encoder.encode([]).shape == (0, 384)


def test_the_encoder_of_a_bundle_is_taken_only_if_it_is_the_same_one(encoder: TextEncoder):
    assert TextEncoder.of(encoder.identity).identity == encoder.identity
    for change in ({"revision": "0.0.9"}, {"dimension": 768}, {"item_text_version": 0}):
        with pytest.raises(TextEncoderError, match="install that version"):
            TextEncoder.of(encoder.identity.model_copy(update=change))


def test_the_encoder_of_a_bundle_is_never_downloaded(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: asked.append(host))
    for name in ("nobody/no-such-encoder", "/no/such/folder"):
        with pytest.raises(TextEncoderError, match=f"{name}' is not on this machine.*`hf download {name}`"):
            TextEncoder.of(encoder.identity.model_copy(update={"name": name}))
    assert asked == []


def test_a_folder_without_an_encoder_is_refused_by_name(tmp_path: Path):
    with pytest.raises(TextEncoderError, match=f"{tmp_path.name}.* cannot be loaded"):
        TextEncoder(str(tmp_path))
