"""Stage `vectors`: every item's text as a vector. Knows items only, never interactions."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field

from semantic_ids.text_encoder import PACKAGED_MINILM, TextEncoder, TextEncoderError, TextEncoderIdentity, item_text
from training.interactions import Dataset
from training.stage import THREADS, StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically

VECTORS = "vectors.npy"
IDENTITY = "encoder.json"
PARTS = "parts"
PART_SIZE = 4096  # texts; about half a minute of MiniLM on two cores


class VectorsConfig(StageConfig):
    """Which encoder reads the items' text."""

    encoder: str = Field(PACKAGED_MINILM, description="the packaged MiniLM, a local folder, or a hub name")
    batch_size: int = Field(64, ge=1)
    threads: int = Field(1, ge=1, description=THREADS)


class VectorsSummary(Summary):
    """What was embedded, by what."""

    encoder: str
    dimension: int
    num_items: int
    distinct_texts: int


def run(config: VectorsConfig, dataset: Dataset, folder: StageFolder) -> VectorsSummary:
    """Embed each distinct text once and write (N, D) float32 vectors, unit length."""
    import torch

    torch.set_num_threads(config.threads)
    texts = item_texts(dataset)
    distinct = list(dict.fromkeys(texts))
    try:
        encoder = TextEncoder(config.encoder)
    except TextEncoderError as error:
        raise StageError(str(error)) from error
    encoded = _encode(encoder, distinct, config, folder.path / PARTS)
    place = {text: row for row, text in enumerate(distinct)}
    np.save(folder.path / VECTORS, encoded[[place[text] for text in texts]])
    shutil.rmtree(folder.path / PARTS)
    write_atomically(folder.path / IDENTITY, encoder.identity.model_dump_json().encode())
    summary = VectorsSummary(
        encoder=config.encoder, dimension=encoder.identity.dimension, num_items=len(texts), distinct_texts=len(distinct)
    )
    folder.finish(summary)
    return summary


def _encode(encoder: TextEncoder, texts: Sequence[str], config: VectorsConfig, parts: Path) -> npt.NDArray[np.float32]:
    """Vectors of all texts; every finished part is on disk, so that a killed run goes on behind it."""
    parts.mkdir(exist_ok=True)
    vectors = np.empty((len(texts), encoder.identity.dimension), np.float32)
    with progress_bar("vectors: item texts", len(texts)) as bar:
        for start in range(0, len(texts), PART_SIZE):
            part, piece = parts / f"{start}.npy", texts[start : start + PART_SIZE]
            if part.exists():
                bar.advance(len(piece))
            else:
                content = io.BytesIO()
                np.save(content, encoder.encode(piece, batch=config.batch_size, on_batch=bar.advance))
                write_atomically(part, content.getvalue())
            vectors[start : start + PART_SIZE] = np.load(part)
    return vectors


def item_texts(dataset: Dataset) -> Sequence[str]:
    """The text of each item, by index."""
    columns = zip(dataset.titles, dataset.categories, dataset.attributes, strict=True)
    return [item_text(title, categories, attributes) for title, categories, attributes in columns]


def load_vectors(path: Path) -> tuple[npt.NDArray[np.float32], TextEncoderIdentity]:
    """The vectors (N, D) by item index, memory-mapped, and the encoder that made them."""
    return np.load(path / VECTORS, mmap_mode="r"), TextEncoderIdentity.model_validate_json(
        (path / IDENTITY).read_bytes()
    )
