"""The text encoder of a bundle, loaded once in a process: importing this loads no torch, the first text does.

It runs in one thread, whoever asks: torch keeps a pool of threads and scratch memory for each thread that it runs in.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt

from semantic_ids.text_encoder import TextEncoder, TextEncoderIdentity

_thread = ThreadPoolExecutor(1, thread_name_prefix="text-encoder")


def encode_texts(identity: TextEncoderIdentity, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Vectors (N, D) of item texts. Blocks: the first call for seconds. `TextEncoderError` if this is another encoder.

    An `ImportError` where no encoder is installed.
    """
    return _thread.submit(_encode, identity, texts).result()


def _encode(identity: TextEncoderIdentity, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    return _encoder(identity).encode(texts)


@cache
def _encoder(identity: TextEncoderIdentity) -> TextEncoder:
    return TextEncoder.of(identity)
