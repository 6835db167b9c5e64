"""User sequences as two flat arrays, the form in which every stage reads interactions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sequences:
    """Time-ordered item indices of many users: user u has `items[offsets[u]:offsets[u + 1]]`, oldest first."""

    offsets: npt.NDArray[np.int64]  # (users + 1,)
    items: npt.NDArray[np.int32]  # (events,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> npt.NDArray[np.int32]:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.int32]]:
        return (self[user] for user in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Events of each user, (users,)."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, sequences: "list[npt.NDArray[np.int32]] | list[list[int]]") -> "Sequences":
        """Flatten a list of sequences."""
        lengths = np.fromiter((len(sequence) for sequence in sequences), np.int64, len(sequences))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        items = np.concatenate([np.asarray(s, np.int32) for s in sequences]) if sequences else np.empty(0, np.int32)
        return cls(offsets.astype(np.int64), items.astype(np.int32))

    def without_last(self, count: int) -> "Sequences":
        """Each sequence less its last `count` events (empty where it has no more)."""
        return self.slice_each(np.zeros(len(self), np.int64), np.maximum(self.lengths - count, 0))

    def slice_each(self, start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64]) -> "Sequences":
        """Sequence u becomes its events `start[u]:stop[u]`."""
        lengths = np.maximum(stop - start, 0)
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Sequences(offsets, self.items[np.repeat(self.offsets[:-1] + start, lengths) + within])

    def where(self, is_kept: npt.NDArray[np.bool_]) -> "Sequences":
        """Of each sequence only the events that are kept, by a mask beside `items`, (events,)."""
        kept_before = np.concatenate(([0], np.cumsum(is_kept))).astype(np.int64)
        return Sequences(kept_before[self.offsets], self.items[is_kept])

    def select(self, users: npt.NDArray[np.int64]) -> "Sequences":
        """The sequences of these users, in this order."""
        lengths = self.lengths[users]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Sequences(offsets, self.items[np.repeat(self.offsets[users], lengths) + within])
