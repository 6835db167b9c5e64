"""What a rationale may say: it names only items of the history or of the answer. Pure: no I/O, no clock.

A thought is judged sentence by sentence, as it grows. A sentence is cut whole if it names an item that it may not:

    sid     a SID, a part of one, or what looks like one, unless it is the SID of an item that may be named, which is
            shown by its title: a reader has no use for codes
    title   the title of an item of the catalogue, outside a title that may be named
    quote   a name in quotes or emphasis that is no title that may be named

What is judged is what would be shown, behind what is shown already, so no title can come together over a cut. A title
of words that anybody may use is a title only where it is written like one: `_is_written_as_name` has the rule.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from semantic_ids.catalog import CATEGORY_SEPARATOR, Catalog
from semantic_ids.codes import SidSpace
from semantic_ids.trie import Ranks
from service.catalog_titles import TitleMatch, Word, folded, words_of

Invention: TypeAlias = Literal["sid", "title", "quote"]

_SENTENCE_END = re.compile(
    r"[.!?…]+[\"”’»)\]*]*(?=\s)"
    r"|[。！？]+[」』”）]*(?=[^」』”）。！？])"
    r"|(?=\n)"
)
_LONGEST_QUOTED_SENTENCE = 400  # characters: a quote that is still open then will not be closed
_TAIL = 600  # characters of what is shown that a title may begin in
_QUOTE = re.compile(
    r"(?:(?<=[\s(\[{—–])|^)(?P<plain>\"|\*{1,2})(?=[^\s*])|(?P<paired>[“„«「『])|(?<!\w)(?P<single>‘)(?=\S)"
)
_CLOSERS = {
    '"': re.compile(r"(?<=\S)\""),
    "*": re.compile(r"(?<=\S)\*{1,2}"),
    "“": re.compile('[”"]'),
    "„": re.compile("[“”]"),
    "«": re.compile("»"),
    "「": re.compile("」"),
    "『": re.compile("』"),
    "‘": re.compile(r"’(?!\w)"),
}
_MOST_WORDS_OF_A_NAME = 16  # longer quotes are speech
_PLAIN_WORDS = 3  # titles of at most so many words may be plain speech
_LEAST_LETTERS = 3  # of a title of one word, outside quotes: It, Up, M
_LEAST_OPENING = 4  # words by which a long title may be named


class Titles(Protocol):
    """Finds titles of the catalogue (`catalog_titles.CatalogTitles`)."""

    def matches(self, words: Sequence[Word], ending_from: int = 0) -> list[TitleMatch]:
        """Every title among the runs of words that end after word `ending_from`."""
        ...


@dataclass(frozen=True)
class NamedItems:
    """What a rationale may name."""

    sids: Mapping[tuple[int, ...], str]
    """Codes → what is shown for them."""
    titles: frozenset[tuple[str, ...]]
    """By their words."""
    categories: frozenset[tuple[str, ...]]
    """Of the items, and the categories above them, by their words."""

    @classmethod
    def of(cls, catalog: Catalog, ranks: Ranks) -> "NamedItems":
        """These items; of two with one SID the first one is shown."""
        sids: dict[tuple[int, ...], str] = {}
        titles = catalog.titles.take(ranks)
        for rank, title in zip(ranks.tolist(), titles, strict=True):
            shown = " ".join(title.split()) or catalog.item_ids[rank]
            sids.setdefault(tuple(catalog.codes[rank].tolist()), shown)
        nodes = {
            node
            for rank in ranks.tolist()
            for path in catalog.categories_of(rank)
            for node in path.split(CATEGORY_SEPARATOR)
        }
        named = (folded(title) for title in (*titles, *sids.values()))
        return cls(sids, frozenset(one for one in named if one), frozenset(map(folded, nodes)))

    def and_also(self, other: "NamedItems") -> "NamedItems":
        """These and those; of two with one SID this one is shown."""
        return NamedItems({**other.sids, **self.sids}, self.titles | other.titles, self.categories | other.categories)


class RationaleCheck:
    """A rationale under way: the growing thought in, what may be shown of it out.

    Until `finish` only items of the history may be named. The first sentence that names something else waits, and with
    it all that follows: it may name an item of the answer. So `text` is the same whether it was shown in pieces or not.
    """

    def __init__(self, space: SidSpace, titles: Titles, history: NamedItems) -> None:
        self._space = space
        self._titles = titles
        self._allowed = history
        self._judged = 0  # characters of the thought
        self._waits = False
        self.text = ""
        self.cuts: Counter[Invention] = Counter()

    def grow(self, thought: str) -> str:
        """The text that may be shown now, beside what was; `thought` is all of it so far."""
        before = len(self.text)
        while not self._waits and (end := _sentence_end(thought, self._judged)) is not None:
            sentence = thought[self._judged : end]
            shown, invention = self._judged_sentence(sentence)
            self._waits = invention is not None
            if not self._waits:
                self.text += shown
                self._judged = end
        return self.text[before:]

    def finish(self, thought: str, answer: NamedItems) -> str:
        """The rest of the text that may be shown, now that the thought is whole and the answer is known."""
        before = len(self.text)
        self._allowed = self._allowed.and_also(answer)
        thought = thought.rstrip()
        while self._judged < len(thought):
            end = _sentence_end(thought, self._judged)
            sentence = thought[self._judged : end]
            shown, invention = self._judged_sentence(sentence)
            if invention is None:
                self.text += shown
            else:
                self.cuts[invention] += 1
            self._judged += len(sentence)
        return self.text[before:]

    def _judged_sentence(self, sentence: str) -> tuple[str, Invention | None]:
        """What a sentence shows, and why it may not."""
        shown = self._with_titles(sentence)
        if shown is None:
            return "", "sid"
        if not self.text:
            shown = shown.lstrip()
        quotes, _ = _quotes(shown)
        if self._names_another_title(shown, quotes):
            return "", "title"
        if any(self._is_foreign_name(shown[start:end]) for start, end in quotes):
            return "", "quote"
        return shown, None

    def _with_titles(self, sentence: str) -> str | None:
        """The sentence with titles for SIDs; None if it has a SID that is none or may not be named."""
        parts: list[str] = []
        place = 0
        for mention in self._space.mentions(sentence):
            title = self._allowed.sids.get(mention.codes) if mention.codes is not None else None
            if title is None:
                return None
            parts += [sentence[place : mention.start], title]
            place = mention.end
            rest = sentence[place:]
            if rest.lstrip().casefold().startswith(title.casefold()):  # the prompt's own form: SID, then title
                place += len(rest) - len(rest.lstrip()) + len(title)
        return "".join((*parts, sentence[place:]))

    def _names_another_title(self, shown: str, quotes: Sequence[tuple[int, int]]) -> bool:
        tail = self.text[-_TAIL:]
        text = tail + shown
        words = words_of(text)
        first_new = next((place for place, word in enumerate(words) if word.end > len(tail)), len(words))
        quoted = [(start + len(tail), end + len(tail)) for start, end in quotes]
        known_words = frozenset(word for phrase in self._allowed.titles | self._allowed.categories for word in phrase)
        for match in self._titles.matches(words, first_new):
            run = tuple(word.folded for word in words[match.first : match.end])
            span = words[match.first].start, words[match.end - 1].end
            if run in self._allowed.titles or _is_covered(words, match, self._allowed.titles):
                continue
            if any(start <= span[0] and span[1] <= end for start, end in quoted):
                return True
            if len(run) == 1 and run[0] in known_words:
                continue
            if _is_written_as_name(text, words, match, first_new):
                return True
        return False

    def _is_foreign_name(self, quote: str) -> bool:
        words = words_of(quote)
        if not words or len(words) > _MOST_WORDS_OF_A_NAME:
            return False
        high = [not quote[word.start].islower() for word in words]
        if not high[0] or 2 * sum(high) < len(high):
            return False
        said = {word.folded for word in words}
        return not any(said <= set(phrase) for phrase in self._allowed.titles | self._allowed.categories)


def _sentence_end(thought: str, start: int) -> int | None:
    """Where the sentence that begins at `start` ends; None while more of the thought might belong to it.

    It depends on the thought up to its end and the character after it, never on what follows.
    """
    for found in _SENTENCE_END.finditer(thought, start):
        sentence = thought[start : found.end()]
        if not sentence.strip():
            continue
        is_line = found.end() == found.start()
        if is_line or len(sentence) > _LONGEST_QUOTED_SENTENCE or not _quotes(sentence)[1]:
            return start + len(sentence.rstrip())  # white space behind it may be the end of all, which shows none
    return None


def _quotes(text: str) -> tuple[list[tuple[int, int]], bool]:
    """What is quoted, without its marks, and whether the last quote is open, which then runs to the end."""
    quotes: list[tuple[int, int]] = []
    place = 0
    while (opener := _QUOTE.search(text, place)) is not None:
        mark = opener["plain"] or opener["paired"] or opener["single"]
        closer = _CLOSERS[mark[0]].search(text, opener.end())
        if closer is None:
            return [*quotes, (opener.end(), len(text))], True
        quotes.append((opener.end(), closer.start()))
        place = closer.end()
    return quotes, False


def _is_covered(words: Sequence[Word], match: TitleMatch, titles: frozenset[tuple[str, ...]]) -> bool:
    """Whether a match lies within a longer title that may be named, or within the first half of such a title."""
    return any(
        first <= match.first and match.end <= first + length and length > match.end - match.first
        for title in titles
        for first, length in _openings(words, match.first, title)
        if length == len(title) or length >= max(_LEAST_OPENING, len(title) / 2)
    )


def _openings(words: Sequence[Word], last: int, title: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Where, up to word `last`, the words begin as a title does, and for how long."""
    for first in range(max(0, last - len(title) + 1), last + 1):
        length = 0
        while length < min(len(title), len(words) - first) and words[first + length].folded == title[length]:
            length += 1
        if length:
            yield first, length


def _is_written_as_name(text: str, words: Sequence[Word], match: TitleMatch, sentence_start: int) -> bool:
    """Whether words that are a title are meant as one, outside quotes.

    More than three words are. Fewer must have the capitals of the title, one of them (or a number) not just because the
    sentence begins there; a single word moreover three letters.
    """
    run = words[match.first : match.end]
    if len(run) > _PLAIN_WORDS:
        return True
    title_words = words_of(match.title)
    is_high = [_is_high(text[word.start]) for word in run]
    in_title = [_is_high(match.title[word.start]) for word in title_words]
    if any(wanted and not found for wanted, found in zip(in_title, is_high, strict=True)):
        return False
    if len(run) == 1 and (len(run[0].folded) < _LEAST_LETTERS or not text[run[0].start].isupper()):
        return False
    return any(wanted and match.first + place != sentence_start for place, wanted in enumerate(in_title))


def _is_high(letter: str) -> bool:
    return letter.isupper() or letter.istitle() or letter.isdigit()
