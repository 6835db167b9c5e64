"""Columns on disk that are mapped, not read: numeric arrays as `.npy`, strings as one UTF-8 blob with offsets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

_COPIED_TOGETHER = 65_536  # strings: bounds the memory of their bytes' places


def save_array(folder: Path, name: str, array: npt.NDArray[Any]) -> None:
    """Write `name.npy` into `folder`."""
    np.save(folder / f"{name}.npy", array, allow_pickle=False)


def map_array(folder: Path, name: str) -> npt.NDArray[Any]:
    """`name.npy` of `folder`, memory-mapped read-only."""
    path = folder / f"{name}.npy"
    # A plain view of the map: `np.memmap` itself costs a microsecond per element read.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


@dataclass(frozen=True)
class StringColumn(Sequence[str]):
    """Strings of any length, addressed by index without reading the others."""

    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]  # (n + 1,)

    @classmethod
    def of(cls, strings: Iterable[str]) -> "StringColumn":
        """Pack strings."""
        encoded = [string.encode() for string in strings]
        lengths = np.fromiter((len(item) for item in encoded), np.int64, len(encoded))
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        return cls(np.frombuffer(b"".join(encoded) or b"\0", np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])  # counts from the end, and raises, as any sequence does

    def _read(self, place: int) -> str:
        return self.blob[self.offsets[place] : self.offsets[place + 1]].tobytes().decode()

    def take(self, places: npt.NDArray[np.integer]) -> list[str]:
        """The strings at `places`, (M,), each in [0, n): about a third of the time of M single reads."""
        blob = self.blob.data
        starts, ends = self.offsets[places].tolist(), self.offsets[places + 1].tolist()
        return [str(blob[start:end], "utf-8") for start, end in zip(starts, ends, strict=True)]

    def save(self, folder: Path, name: str) -> None:
        """Write `name.blob.npy` and `name.offsets.npy`."""
        save_array(folder, f"{name}.blob", self.blob)
        save_array(folder, f"{name}.offsets", self.offsets)

    @classmethod
    def map(cls, folder: Path, name: str) -> "StringColumn":
        """The column `name` of `folder`, memory-mapped."""
        return cls(map_array(folder, f"{name}.blob"), map_array(folder, f"{name}.offsets"))


@dataclass(frozen=True)
class MergedColumn(StringColumn):
    """A column with strings left out, replaced and put between, as a view: its text is shared, not copied.

    `blob` and `offsets` are those of the column of n strings that was changed.
    """

    added: StringColumn
    sources: npt.NDArray[np.int32]  # (strings here,): the place in the changed column, or n + the place in `added`

    @classmethod
    def over(cls, base: StringColumn, added: Iterable[str], sources: npt.NDArray[np.int32]) -> "MergedColumn":
        """The view of a plain column and of the strings `added` to it."""
        return cls(base.blob, base.offsets, StringColumn.of(added), sources)

    def __len__(self) -> int:
        return len(self.sources)

    def _read(self, place: int) -> str:
        source = int(self.sources[place])
        return super()._read(source) if source < self._num_base else self.added[source - self._num_base]

    @property
    def _num_base(self) -> int:
        return len(self.offsets) - 1

    def take(self, places: npt.NDArray[np.integer]) -> list[str]:
        """The strings at `places`, (M,), each in [0, len)."""
        sources = self.sources[places]
        is_added = sources >= self._num_base
        of_base = iter(super().take(sources[~is_added]))
        of_added = iter(self.added.take(sources[is_added] - self._num_base))
        return [next(of_added if one_is else of_base) for one_is in is_added.tolist()]

    def save(self, folder: Path, name: str) -> None:
        """Write the column as a plain one, which `StringColumn.map` reads."""
        self.plain().save(folder, name)

    def plain(self) -> StringColumn:
        """The same strings in a blob of their own; a million of them take some tenths of a second."""
        blob = np.concatenate((self.blob, self.added.blob))
        starts = np.concatenate((self.offsets[:-1], len(self.blob) + self.added.offsets[:-1]))[self.sources]
        ends = np.concatenate((self.offsets[1:], len(self.blob) + self.added.offsets[1:]))[self.sources]
        offsets = np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int64)
        copied = np.zeros(max(1, int(offsets[-1])), np.uint8)
        for first in range(0, len(starts), _COPIED_TOGETHER):
            low, high = offsets[first], offsets[min(first + _COPIED_TOGETHER, len(starts))]
            some = slice(first, first + _COPIED_TOGETHER)
            shift = np.repeat(starts[some] - offsets[:-1][some], (ends - starts)[some])
            copied[low:high] = blob[np.arange(low, high) + shift]
        return StringColumn(copied, offsets)
