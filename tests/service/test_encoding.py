"""`service.encoding`, with the packaged encoder: what stays in the process of the texts that it was given."""

import ctypes
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

import pytest

from semantic_ids.text_encoder import PACKAGED_MINILM, TextEncoderIdentity
from service.encoding import encode_texts

ENCODER = TextEncoderIdentity(name=PACKAGED_MINILM, revision=version(PACKAGED_MINILM), dimension=384)
LENGTHS = range(1, 120)  # in words


class _Mallinfo2(ctypes.Structure):
    """As in glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _in_use() -> int:
    """Bytes of the heap that are in use."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().uordblks)


def _kept_of_every_length() -> tuple[bool, int, bool]:
    """In a process of its own: whether torch was there before, the bytes that stay, and the environment as it was."""
    was_loaded, environment = "torch" in sys.modules, dict(os.environ)
    encode_texts(ENCODER, ["a lamp"] * 3)
    before = _in_use()
    for length in LENGTHS:
        encode_texts(ENCODER, [" ".join(["lamp"] * length)])
    return was_loaded, _in_use() - before, dict(os.environ) == environment


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_nothing_stays_of_the_lengths_of_texts():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        was_loaded, kept, is_as_it_was = fresh.submit(_kept_of_every_length).result()
    assert not was_loaded
    assert kept < 1 << 20, "with the libraries' own ways 8 MB"
    assert is_as_it_was, "the environment, for processes that are started later"
