"""What prompts left in a model, kept for the next prompt that begins alike.

A user who asks again has the same prompt, and one with new events the same and a little more: the window that a prompt
shows moves in jumps (`prompt.window_start`), so its beginning stays. What is known of it is not computed again.

Two prompts have in common what their token ids say, never what a digest says: a digest only finds the candidate.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from semantic_ids.codes import TokenIds

_BLOCK = 16
"""Tokens; a beginning shorter than this is not found, except that of the very same prompt."""


@dataclass(frozen=True, eq=False)
class KeptPrompt:
    """One prompt of P tokens, as a model with E layers left it."""

    token_ids: TokenIds  # (P,)
    states: Tensor  # (2E, H, P, D_h): keys and values of the first layer, of the second, …
    last_hidden: Tensor  # (D,): the output at the last token

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return sum(one.nbytes for one in (self.token_ids, self.states, self.last_hidden))

    def num_common(self, token_ids: TokenIds) -> int:
        """How many tokens both begin with."""
        shorter = min(len(self.token_ids), len(token_ids))
        differs = np.flatnonzero(self.token_ids[:shorter] != token_ids[:shorter])
        return int(differs[0]) if len(differs) else shorter


@dataclass(frozen=True)
class Known:
    """What is known of a prompt: its first `num_tokens`, as `kept` begins with them too."""

    kept: KeptPrompt
    num_tokens: int
    is_same: bool
    """Whether it is that very prompt, of which nothing is to be run. Of any other its last token is to be."""


class PromptCache:
    """Prompts of one model, in at most so many bytes; what was used longest ago goes first. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._prompts: OrderedDict[int, KeptPrompt] = OrderedDict()  # by id(); the oldest use first
        self._by_beginning: dict[int, KeptPrompt] = {}  # the newest of those that begin so

    def __len__(self) -> int:
        return len(self._prompts)

    def find(self, token_ids: TokenIds) -> Known | None:
        """What is known of a prompt, if anything is."""
        for digest in reversed([*_beginnings(token_ids)]):
            kept = self._by_beginning.get(digest)
            if kept is None:
                continue
            num_common = kept.num_common(token_ids)
            is_same = num_common == len(token_ids) == len(kept.token_ids)
            num_known = num_common if is_same else min(num_common, len(token_ids) - 1)
            if num_known > 0:
                self._prompts.move_to_end(id(kept))
                return Known(kept, num_known, is_same)
        return None

    def put(self, prompt: KeptPrompt) -> None:
        """Keep a prompt, unless a longer one begins with it, or all the room is too little for it.

        One that it begins with goes: its user has moved on.
        """
        if prompt.num_bytes > self._max_bytes:
            return
        digests = [*_beginnings(prompt.token_ids)]
        for other in {kept for digest in digests if (kept := self._by_beginning.get(digest)) is not None}:
            num_common = other.num_common(prompt.token_ids)
            if num_common == len(other.token_ids):
                self._drop(other)
            elif num_common == len(prompt.token_ids):
                return
        self._by_beginning.update(dict.fromkeys(digests, prompt))
        self._prompts[id(prompt)] = prompt
        self.num_bytes += prompt.num_bytes
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._prompts.values())))

    def _drop(self, prompt: KeptPrompt) -> None:
        del self._prompts[id(prompt)]
        self.num_bytes -= prompt.num_bytes
        for digest in _beginnings(prompt.token_ids):
            if self._by_beginning.get(digest) is prompt:
                del self._by_beginning[digest]


def _beginnings(token_ids: npt.NDArray[np.int64]) -> Iterator[int]:
    """A digest of each beginning of whole blocks, and of all."""
    data, digest = token_ids.tobytes(), 0
    size = _BLOCK * token_ids.itemsize
    for start in range(0, len(data), size):
        digest = hash((digest, data[start : start + size]))
        yield digest
