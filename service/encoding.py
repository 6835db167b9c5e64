"""The text encoder of a bundle, loaded once in a process: importing this loads no torch, the first text does."""

import threading
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from semantic_ids.text_encoder import TextEncoder, TextEncoderIdentity

_one_at_a_time = threading.Lock()


def encode_texts(identity: TextEncoderIdentity, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Vectors (N, D) of item texts. Blocks: the first call for seconds. `TextEncoderError` if this is another encoder.

    An `ImportError` where no encoder is installed.
    """
    with _one_at_a_time:
        return _encoder(identity).encode(texts)


@cache
def _encoder(identity: TextEncoderIdentity) -> TextEncoder:
    return TextEncoder.of(identity)
