"""The text encoder of a bundle, loaded once in a process: importing this loads no torch, the first text does.

It runs in one thread, whoever asks: torch keeps a pool of threads and scratch memory for each thread that it runs in.
And nothing stays of a batch but its vectors: items come in every number and with texts of every length, and the
libraries under torch keep something for each shape that they have not had before.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt

from semantic_ids.text_encoder import TextEncoder, TextEncoderIdentity

_KEEPING_LITTLE = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",  # oneDNN makes functions for each shape, 28 KB, and would keep a thousand
    "MKL_DISABLE_FAST_MM": "1",  # MKL would keep buffers of the first shapes, 6 MB
}

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
    with _environment(_KEEPING_LITTLE):
        encoder = TextEncoder.of(identity)
        encoder.encode(["what is read at the first use is read now"])
    return encoder


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """With these too, unless somebody has set them; processes that are started later do not have them."""
    added = variables.keys() - os.environ.keys()
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
