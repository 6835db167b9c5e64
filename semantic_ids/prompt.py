"""History → token ids. The only module that writes prompt text; each prompt version is one renderer, kept for ever.

A bundle names its prompt version, so a rollback to an old bundle finds the renderer it was trained with. Every prompt
is a *stable* part (instruction, then the history, oldest first), which from one call to the next only grows at its end,
followed by a *volatile* part. An engine that caches KV by prefix thus pays only for what is new.

    version 1, compact   <bos> SID SID SID …                        models trained from scratch
    version 2, chat      ChatML instruction, one line per item       pretrained models
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from semantic_ids.codes import Codes, SidVocabulary, TokenIds

COMPACT_VERSION = 1
CHAT_VERSION = 2

COMPACT_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", *(f"<reserved_{i}>" for i in range(13)))
"""A from-scratch vocabulary begins with these 16 ids; the SID block follows."""


class PromptError(ValueError):
    """A prompt that cannot be rendered, or a version without a renderer."""


class PromptSpec(BaseModel):
    """What a bundle says of its prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    max_history: int
    """Most history items in one prompt."""


@dataclass(frozen=True)
class HistoryItem:
    """One known item of a history, as a prompt shows it."""

    codes: Codes  # (L,)
    title: str


@dataclass(frozen=True)
class Prompt:
    """Token ids; the first `stable_length` of them only ever grow at their end."""

    token_ids: TokenIds  # (T,)
    stable_length: int


@dataclass(frozen=True)
class TrainingRow:
    """A token sequence with its SID positions.

    `levels[t]` is the SID level of token t where t is to be predicted, else -1. The levels run 0 … L-1 item by item,
    in the order of the items passed in, so a row and its items need no further alignment.
    """

    token_ids: TokenIds  # (T,)
    levels: npt.NDArray[np.int8]  # (T,)


class TextTokenizer(Protocol):
    """What chat prompts need of a pretrained model's tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        ...


class PromptRenderer(Protocol):
    """One prompt version."""

    version: ClassVar[int]
    spec: PromptSpec

    def render(self, history: Sequence[HistoryItem]) -> Prompt:
        """The prompt after which the model writes the next item's SID."""
        ...

    def training_row(self, items: Sequence[HistoryItem]) -> TrainingRow:
        """At most `max_history` items and one more, with a loss on every SID; `render` asks for each at serving."""
        ...


class CompactPrompt:
    """Version 1: `<bos>` and bare SIDs. The whole sequence is one row, and every item in it is a target."""

    version: ClassVar[int] = COMPACT_VERSION
    bos_token_id: ClassVar[int] = COMPACT_SPECIAL_TOKENS.index("<bos>")

    def __init__(self, spec: PromptSpec, vocabulary: SidVocabulary) -> None:
        self.spec = spec
        self._vocabulary = vocabulary

    def render(self, history: Sequence[HistoryItem]) -> Prompt:
        """`<bos>` and the history's SIDs; there is no volatile part."""
        _check_length(len(history), self.spec)
        token_ids = self._token_ids(history)
        return Prompt(token_ids, len(token_ids))

    def training_row(self, items: Sequence[HistoryItem]) -> TrainingRow:
        """Every SID token is a target, the first item's too."""
        num_levels = self._vocabulary.space.num_levels
        levels = np.tile(np.arange(num_levels, dtype=np.int8), len(items))
        _check_length(len(items) - 1, self.spec)
        return TrainingRow(self._token_ids(items), np.concatenate(([np.int8(-1)], levels)))

    def _token_ids(self, items: Sequence[HistoryItem]) -> TokenIds:
        if not items:
            return np.array([self.bos_token_id], np.int64)
        codes = np.stack([item.codes for item in items])
        return np.concatenate(([self.bos_token_id], self._vocabulary.token_ids(codes).ravel()))


class ChatPrompt:
    """Version 2: ChatML, as SmolLM2 and Qwen3 read it. SID tokens come from ids, so no title can forge one."""

    version: ClassVar[int] = CHAT_VERSION

    _INSTRUCTION = (
        "<|im_start|>system\nYou recommend items. Every item is named by a semantic ID of {num_levels} codes. "
        "Answer with the semantic ID of the item that the user will choose next.<|im_end|>\n"
        "<|im_start|>user\nMy history, oldest first:\n"
    )
    _QUESTION = "What comes next?<|im_end|>\n<|im_start|>assistant\n"
    _END = "<|im_end|>\n"
    _MAX_TITLE_CHARS = 80

    def __init__(self, spec: PromptSpec, vocabulary: SidVocabulary, tokenizer: TextTokenizer) -> None:
        self.spec = spec
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._instruction = self._encode(self._INSTRUCTION.format(num_levels=vocabulary.space.num_levels))
        self._question = self._encode(self._QUESTION)
        self._end = self._encode(self._END)

    def render(self, history: Sequence[HistoryItem]) -> Prompt:
        """Instruction and history are stable; the question is volatile."""
        stable, _ = self._stable(history)
        return Prompt(np.array(stable + self._question, np.int64), len(stable))

    def training_row(self, items: Sequence[HistoryItem]) -> TrainingRow:
        """All but the last item as history, the last one as the answer; a loss on every SID."""
        if not items:
            raise PromptError("a training row needs at least one item")
        stable, levels = self._stable(items[:-1])
        answer = self._sid(items[-1])
        token_ids = stable + self._question + answer + self._end
        levels = levels + [-1] * len(self._question) + list(range(len(answer))) + [-1] * len(self._end)
        return TrainingRow(np.array(token_ids, np.int64), np.array(levels, np.int8))

    def _stable(self, history: Sequence[HistoryItem]) -> tuple[list[int], list[int]]:
        _check_length(len(history), self.spec)
        token_ids = list(self._instruction)
        levels = [-1] * len(token_ids)
        for item in history:
            sid, title = self._sid(item), self._encode(f" {_plain(item.title)[: self._MAX_TITLE_CHARS]}\n")
            token_ids += sid + title
            levels += [*range(len(sid)), *[-1] * len(title)]
        return token_ids, levels

    def _sid(self, item: HistoryItem) -> list[int]:
        token_ids: list[int] = self._vocabulary.token_ids(item.codes).tolist()
        return token_ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def make_renderer(
    spec: PromptSpec, vocabulary: SidVocabulary, tokenizer: TextTokenizer | None = None
) -> PromptRenderer:
    """The renderer of `spec.version`; `PromptError` for a version that this build does not know."""
    if spec.version == COMPACT_VERSION:
        return CompactPrompt(spec, vocabulary)
    if spec.version == CHAT_VERSION:
        if tokenizer is None:
            raise PromptError("chat prompts need the model's tokenizer, and the bundle carries none")
        return ChatPrompt(spec, vocabulary, tokenizer)
    known = [COMPACT_VERSION, CHAT_VERSION]
    raise PromptError(
        f"no renderer for prompt version {spec.version}; this build knows {known}: upgrade it or roll the bundle back"
    )


def window_start(total: int, max_history: int) -> int:
    """The first of a user's `total` events that the prompt shows (sawtooth truncation).

    The oldest quarter of the window goes at once, so the start, and with it every cached prefix, stays put for a
    quarter window of events. It depends on the count alone: no state, the same on every replica.
    """
    if total <= max_history:
        return 0
    quarter = max(1, max_history // 4)
    return -(-(total - max_history) // quarter) * quarter


def _check_length(num_items: int, spec: PromptSpec) -> None:
    if num_items > spec.max_history:
        raise PromptError(
            f"a prompt holds at most {spec.max_history} history items, not {num_items}: cut it by window_start"
        )


def _plain(text: str) -> str:
    """Text that cannot be read as a special token or a new line."""
    return " ".join(text.replace("<", "‹").replace(">", "›").split())
