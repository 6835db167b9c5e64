"""Which words are an item's title: an index of every title of a catalogue, to find them in free text.

A title is known by its words alone: letters and digits of any script, without case, accents and whatever stands between
them. The
index has a 64-bit hash of each title's words, sorted; text is looked up by the hashes of its runs of words, and what is
found is compared with the title itself, so two titles with one hash are never mixed up. Making it is a pass over the
bytes of all titles, in small pieces: it belongs in a thread, and gives way to the event loop. Knows nothing of what may
be named.
"""

import asyncio
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from threading import Lock, Thread

import numpy as np
import numpy.typing as npt

from semantic_ids.catalog import Catalog
from semantic_ids.columns import MergedColumn, StringColumn

Hashes = npt.NDArray[np.uint64]

MAX_WORDS = 48
"""A title of more words is not looked for."""

_CHUNK = 2_000  # titles in one go: each numpy call is over in a millisecond, and the event loop has its turn
_SPACE = 0x20
_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)  # odd, so that it has an inverse mod 2⁶⁴
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


@dataclass(frozen=True)
class Word:
    """One word of a text: `text[start:end]`."""

    start: int
    end: int
    folded: str


@dataclass(frozen=True)
class TitleMatch:
    """A run of words `[first, end)` that is the title of an item."""

    first: int
    end: int
    title: str
    """As the catalogue writes it."""


def words_of(text: str) -> list[Word]:
    """The words of a text, in order: runs of letters and digits, and each ideograph or kana by itself."""
    words: list[Word] = []
    start = -1
    for place, letter in enumerate(text):
        kind = _kind(letter)
        if kind == _MARK:
            continue
        if start >= 0 and kind != _LETTER:
            words.append(_word(text, start, place))
            start = -1
        if kind == _IDEOGRAPH:
            words.append(_word(text, place, place + 1))
        elif kind == _LETTER and start < 0:
            start = place
    if start >= 0:
        words.append(_word(text, start, len(text)))
    return words


def folded(text: str) -> tuple[str, ...]:
    """The words by which a title is known; none for a title of punctuation alone."""
    return tuple(word.folded for word in words_of(text))


class TitleIndex:
    """The titles of one column, sorted by hash."""

    def __init__(self, titles: StringColumn) -> None:
        self._titles = titles
        parts = list(_hashed(titles))
        hashes = np.concatenate([hashes for hashes, _ in parts]) if parts else np.empty(0, np.uint64)
        num_words = np.concatenate([counts for _, counts in parts]) if parts else np.empty(0, np.int64)
        kept = np.flatnonzero((num_words > 0) & (num_words <= MAX_WORDS)).astype(np.uint32)
        order = np.argsort(hashes[kept], kind="stable")
        self._places = kept[order]
        self._hashes: Hashes = hashes[self._places]
        self._lengths: list[int] = np.unique(num_words[kept]).tolist()

    def __len__(self) -> int:
        return len(self._hashes)

    def matches(self, words: Sequence[Word], ending_from: int = 0) -> list[TitleMatch]:
        """Every title among the runs of `words` that end after word `ending_from`; one for each run."""
        if not words or not len(self._hashes):
            return []
        firsts, ends = _runs(len(words), self._lengths, ending_from)
        hashes = _run_hashes([word.folded for word in words], firsts, ends)
        low = np.searchsorted(self._hashes, hashes)
        found = np.flatnonzero(self._hashes[np.minimum(low, len(self._hashes) - 1)] == hashes)
        matches = (
            self._match(words, int(firsts[run]), int(ends[run]), hashes[run], int(low[run])) for run in found.tolist()
        )
        return [match for match in matches if match is not None]

    def _match(self, words: Sequence[Word], first: int, end: int, key: np.uint64, place: int) -> TitleMatch | None:
        run = tuple(word.folded for word in words[first:end])
        while place < len(self._hashes) and self._hashes[place] == key:
            title = self._titles[int(self._places[place])]
            if folded(title) == run:
                return TitleMatch(first, end, title)
            place += 1
        return None


class CatalogTitles:
    """The titles of one epoch of a catalogue: its base's, made once, in a thread, and those that were put since.

    A title that a change took away is still known, until its base is another one: it names no item that may be named.
    """

    def __init__(self, catalog: Catalog, base: "_Lazy | None" = None) -> None:
        titles = catalog.titles
        self._base = base or _Lazy(StringColumn(titles.blob, titles.offsets))
        self._put = _Lazy(titles.added) if isinstance(titles, MergedColumn) else None

    def at(self, catalog: Catalog) -> "CatalogTitles":
        """Of another epoch; the index of the base is kept, as long as it is the same base."""
        if self._base.is_of(catalog.titles):
            return CatalogTitles(catalog, self._base)
        titles = CatalogTitles(catalog)
        if self._base.is_begun:
            titles.prepare()
        return titles

    @property
    def is_ready(self) -> bool:
        """Whether `matches` may be asked."""
        return all(one.is_ready for one in self._parts())

    def prepare(self, on_ready: Callable[[], None] | None = None) -> None:
        """Begin to make what is not there yet; `on_ready` is called, in any thread, whenever a part of it is there."""
        for one in self._parts():
            index = one.begin()
            if on_ready is not None:
                index.add_done_callback(lambda _index: on_ready())

    async def ready(self) -> None:
        """Wait until it is there."""
        for one in self._parts():
            await asyncio.shield(asyncio.wrap_future(one.begin()))

    def matches(self, words: Sequence[Word], ending_from: int = 0) -> list[TitleMatch]:
        """Every title among the runs of `words` that end after word `ending_from`; blocks until it is ready."""
        return [match for one in self._parts() for match in one.begin().result().matches(words, ending_from)]

    def _parts(self) -> list["_Lazy"]:
        return [self._base] if self._put is None else [self._base, self._put]


class _Lazy:
    """An index that is made when it is first asked for, in a thread of its own."""

    def __init__(self, titles: StringColumn) -> None:
        self._titles = titles
        self._index: Future[TitleIndex] | None = None
        self._lock = Lock()

    def is_of(self, titles: StringColumn) -> bool:
        """Whether these are its titles, or a view of them."""
        return self._titles.blob is titles.blob

    @property
    def is_begun(self) -> bool:
        return self._index is not None

    @property
    def is_ready(self) -> bool:
        return self._index is not None and self._index.done()

    def begin(self) -> "Future[TitleIndex]":
        with self._lock:
            if self._index is None:
                self._index = Future()
                Thread(target=self._make, args=(self._index,), name="title-index", daemon=True).start()
            return self._index

    def _make(self, future: "Future[TitleIndex]") -> None:
        try:
            future.set_result(TitleIndex(self._titles))
        except Exception as error:
            future.set_exception(error)


_OTHER, _LETTER, _IDEOGRAPH, _MARK = range(4)

_IDEOGRAPHS = (
    (0x2E80, 0x2FDF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


@cache
def _kind(letter: str) -> int:
    """Whether a character belongs to a word, is one by itself, or only changes how the one before it looks."""
    if unicodedata.category(letter)[0] == "M":
        return _MARK
    if not letter.isalnum() or not _folded(letter):
        return _OTHER
    return _IDEOGRAPH if any(low <= ord(letter) <= high for low, high in _IDEOGRAPHS) else _LETTER


@cache
def _folded(letter: str) -> str:
    """The letters by which a character is compared: compatibility forms, case and accents make no difference."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", letter).casefold())
    return "".join(part for part in parts if part.isalnum() and unicodedata.category(part)[0] != "M")


def _word(text: str, start: int, end: int) -> Word:
    return Word(start, end, "".join(map(_folded, text[start:end])))


class _Folds:
    """`_kind` and `_folded` as tables over all characters; each is filled in when it is first met."""

    _UNKNOWN = 255

    def __init__(self) -> None:
        self.kinds = np.full(0x110000, self._UNKNOWN, np.uint8)
        self.lengths = np.zeros(0x110000, np.uint8)
        self.starts = np.zeros(0x110000, np.uint32)
        self.letters = np.empty(0, np.uint32)

    def learn(self, characters: npt.NDArray[np.uint32]) -> None:
        """Fill in what is missing of these."""
        for code in np.unique(characters[self.kinds[characters] == self._UNKNOWN]).tolist():
            letters = np.array([ord(one) for one in _folded(chr(code))], np.uint32)
            self.kinds[code], self.lengths[code] = _kind(chr(code)), len(letters)
            self.starts[code] = len(self.letters)
            self.letters = np.concatenate((self.letters, letters))


def _hashed(titles: StringColumn) -> Iterator[tuple[Hashes, npt.NDArray[np.int64]]]:
    """Hash and number of words of each title, chunk by chunk: `folded` of many titles at once."""
    folds = _Folds()
    for start in range(0, len(titles), _CHUNK):
        offsets = titles.offsets[start : start + _CHUNK + 1]
        blob = titles.blob[offsets[0] : offsets[-1]]
        characters = np.frombuffer(blob.tobytes().decode().encode("utf-32-le"), "<u4")
        folds.learn(characters)
        kinds = folds.kinds[characters]
        is_kept = kinds != _MARK
        kept_before = np.concatenate(([0], np.cumsum(is_kept)))
        characters_before = np.concatenate(([0], np.cumsum((blob & 0xC0) != 0x80)))
        bounds = kept_before[characters_before[offsets - offsets[0]]]  # of each title, in kept characters
        yield _hashed_kept(folds, characters[is_kept], kinds[is_kept], bounds)


def _hashed_kept(
    folds: _Folds, characters: npt.NDArray[np.uint32], kinds: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int64]
) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Each title becomes its words, folded, a space before each; `bounds` (titles + 1,) are places in `characters`."""
    starts_word = kinds == _LETTER
    starts_word[1:] &= kinds[:-1] != _LETTER
    first = bounds[:-1][np.diff(bounds) > 0]
    starts_word[first] = kinds[first] == _LETTER
    starts_word |= kinds == _IDEOGRAPH
    lengths = np.where(kinds == _OTHER, 0, folds.lengths[characters]).astype(np.int64)
    ends = np.concatenate(([0], np.cumsum(lengths + starts_word)))
    stream = np.full(ends[-1], _SPACE, np.uint32)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(ends[1:] - lengths, lengths) + within
    stream[places] = folds.letters[np.repeat(folds.starts[characters], lengths) + within]
    words_before = np.concatenate(([0], np.cumsum(starts_word)))
    return _segment_hashes(stream, ends[bounds[:-1]], ends[bounds[1:]]), np.diff(words_before[bounds])


def _run_hashes(words: Sequence[str], firsts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Hashes:
    stream = np.array([ord(letter) for word in words for letter in " " + word], np.uint32)
    bounds = np.concatenate(([0], np.cumsum([1 + len(word) for word in words])))
    return _segment_hashes(stream, bounds[firsts], bounds[ends])


def _runs(
    num_words: int, lengths: Sequence[int], ending_from: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First word and end of each run of one of these lengths that ends after `ending_from`."""
    ends = np.arange(ending_from + 1, num_words + 1)
    grid = ends[:, None] - np.array(lengths, np.int64)[None, :]
    row, _ = np.nonzero(grid >= 0)
    return grid[grid >= 0], ends[row]


def _segment_hashes(
    stream: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> Hashes:
    """Σ mix(letter) · baseⁱ over each segment, i from 0, mod 2⁶⁴, by prefix sums; then mixed once more."""
    powers, inverses = _powers(len(stream) + 1)
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(_mixed(stream.astype(np.uint64)) * powers[:-1])))
    return _mixed((sums[ends] - sums[starts]) * inverses[starts])


_power_table = (np.ones(1, np.uint64), np.ones(1, np.uint64))


def _powers(length: int) -> tuple[Hashes, Hashes]:
    """The first powers of the base and of its inverse."""
    global _power_table  # noqa: PLW0603 - a table that only ever grows
    if len(_power_table[0]) < length:
        size = max(length, 1 << 16)
        _power_table = (
            np.concatenate((np.ones(1, np.uint64), np.cumprod(np.full(size - 1, _BASE)))),
            np.concatenate((np.ones(1, np.uint64), np.cumprod(np.full(size - 1, _INVERSE)))),
        )
    powers, inverses = _power_table
    return powers[:length], inverses[:length]


def _mixed(values: Hashes) -> Hashes:
    """Scrambled bits (the finaliser of splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
