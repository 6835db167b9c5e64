"""Semantic ID arithmetic: code ⇄ token string ⇄ token id. The only module that knows what a SID token looks like.

A SID is L codes, one per level, each in [0, K). Written: `<a_12><b_7><c_200>`, one letter per level. In a language
model's vocabulary the L·K tokens are one contiguous block, level by level, from `first_token_id` on.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint16]
"""(..., L) codes."""

TokenIds = npt.NDArray[np.int64]

_SID_TOKEN = re.compile(r"<([a-h])_(0|[1-9]\d{0,4})>")
_LIKE_SID_TOKEN = re.compile(r"<\s*([A-Za-z])_(\d+)\s*>|<\s*[A-Za-z]_\d*")
"""A SID token, and whatever a reader would take for one: cut off, in capitals, spaced, of no such level."""

MAX_LEVELS = 8
MAX_CODEBOOK_SIZE = 65_536  # codes are stored as uint16


class SidError(ValueError):
    """A SID, or a SID space, that cannot be: the message has the value and the rule."""


@dataclass(frozen=True)
class SidMention:
    """Where free text names a SID: `text[start:end]`."""

    start: int
    end: int
    codes: tuple[int, ...] | None
    """(L,); None for what looks like a SID and is none: a part of one, or codes that this space does not have."""


@dataclass(frozen=True)
class SidSpace:
    """All SIDs of `num_levels` (L) codes below `codebook_size` (K)."""

    num_levels: int
    codebook_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_levels <= MAX_LEVELS:
            raise SidError(f"a SID has 1 to {MAX_LEVELS} levels, not {self.num_levels}")
        if not 2 <= self.codebook_size <= MAX_CODEBOOK_SIZE:
            raise SidError(f"a codebook has 2 to {MAX_CODEBOOK_SIZE} codes, not {self.codebook_size}")

    @property
    def num_tokens(self) -> int:
        """L·K, the length of the token block."""
        return self.num_levels * self.codebook_size

    def token(self, level: int, code: int) -> str:
        """The token string of one code, such as `<b_7>` for code 7 of level 1."""
        if not 0 <= level < self.num_levels:
            raise SidError(f"level {level} is outside this space of {self.num_levels} levels")
        if not 0 <= code < self.codebook_size:
            raise SidError(f"code {code} is outside this codebook of {self.codebook_size} codes")
        return _written(level, code)

    @cached_property
    def _template(self) -> str:
        """Of a SID: `<a_%d><b_%d>`."""
        return "".join(_written(level, "%d") for level in range(self.num_levels))

    def all_tokens(self) -> list[str]:
        """Every token string in block order, to extend a tokenizer's vocabulary."""
        return [self.token(level, code) for level in range(self.num_levels) for code in range(self.codebook_size)]

    def format(self, codes: "Codes | list[int] | tuple[int, ...]") -> str:
        """The written form of one SID of exactly L codes."""
        if len(codes) != self.num_levels:
            raise SidError(f"a SID here has {self.num_levels} codes, not {len(codes)}: {list(codes)}")
        plain = tuple(map(int, codes))
        if min(plain) >= 0 and max(plain) < self.codebook_size:
            return self._template % plain
        return "".join(self.token(level, code) for level, code in enumerate(plain))  # raises, and says which

    def parse(self, text: str) -> tuple[int, ...]:
        """The L codes of a written SID; anything else, however near, raises `SidError`."""
        matches = list(_SID_TOKEN.finditer(text))
        codes = tuple(int(match[2]) for match in matches)
        if len(codes) != self.num_levels or "".join(match[0] for match in matches) != text:
            raise SidError(
                f"{text!r} is not a SID of {self.num_levels} levels such as {self.format([0] * self.num_levels)}"
            )
        if self.format(codes) != text:
            raise SidError(f"the levels of {text!r} are not in order")
        return codes

    def mentions(self, text: str) -> list[SidMention]:
        """Every SID in free text, and everything that looks like a SID or a part of one, in order.

        The tokens of a SID follow each other, level by level, with nothing but white space between them.
        """
        mentions: list[SidMention] = []
        pending: list[re.Match[str]] = []

        def close() -> None:
            if pending:
                start, end = pending[0].start(), pending[-1].end()
                codes = tuple(int(match[2]) for match in pending) if len(pending) == self.num_levels else None
                mentions.append(SidMention(start, end, codes))
                pending.clear()

        for match in _LIKE_SID_TOKEN.finditer(text):
            if pending and text[pending[-1].end() : match.start()].strip():
                close()
            if not self._is_token(match, level=len(pending)):
                close()
            if self._is_token(match, level=len(pending)):
                pending.append(match)
                if len(pending) == self.num_levels:
                    close()
            else:
                mentions.append(SidMention(match.start(), match.end(), None))
        close()
        return mentions

    def _is_token(self, match: re.Match[str], *, level: int) -> bool:
        exact = _SID_TOKEN.fullmatch(match[0])
        return exact is not None and exact[1] == chr(ord("a") + level) and int(exact[2]) < self.codebook_size

    def check(self, codes: npt.NDArray[np.integer]) -> Codes:
        """`codes` as a uint16 array (..., L), or `SidError` naming the first code outside the space."""
        if codes.shape[-1:] != (self.num_levels,):
            raise SidError(f"codes have shape {codes.shape}; the last axis must be the {self.num_levels} levels")
        if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            bad = int(codes.min()) if int(codes.min()) < 0 else int(codes.max())
            raise SidError(f"code {bad} is outside this codebook of {self.codebook_size} codes")
        return codes.astype(np.uint16, copy=False)


@dataclass(frozen=True)
class SidVocabulary:
    """A SID space placed in a model's vocabulary of `vocab_size` ids, as the block that starts at `first_token_id`."""

    space: SidSpace
    first_token_id: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.first_token_id < 0 or self.first_token_id + self.space.num_tokens > self.vocab_size:
            raise SidError(
                f"the SID block [{self.first_token_id}, {self.first_token_id + self.space.num_tokens}) "
                f"does not fit a vocabulary of {self.vocab_size} ids"
            )

    def block(self, level: int) -> slice:
        """The token ids of one level: `logits[..., block(l)]` are the K logits of level l."""
        start = self.first_token_id + level * self.space.codebook_size
        return slice(start, start + self.space.codebook_size)

    def token_ids(self, codes: npt.NDArray[np.integer]) -> TokenIds:
        """Token ids of whole SIDs, (..., L) → (..., L)."""
        return self._first_of_level + codes.astype(np.int64)

    def codes(self, token_ids: npt.NDArray[np.integer]) -> Codes:
        """Codes of whole SIDs, (..., L) → (..., L); a token of another level or none raises `SidError`."""
        return self.space.check(token_ids.astype(np.int64) - self._first_of_level)

    @cached_property
    def _first_of_level(self) -> TokenIds:
        """The token id of each level's code 0, (L,)."""
        return self.first_token_id + np.arange(self.space.num_levels, dtype=np.int64) * self.space.codebook_size


def _written(level: int, code: int | str) -> str:
    return f"<{chr(ord('a') + level)}_{code}>"
