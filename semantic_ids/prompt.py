"""History → token ids. The only module that writes prompt text; each prompt version is one renderer, kept for ever.

A bundle names its prompt version, so a rollback to an old bundle finds the renderer it was trained with. Every prompt
is a *stable* part (instruction, then the history, oldest first), which from one call to the next only grows at its end,
followed by a *volatile* part. An engine that caches KV by prefix thus pays only for what is new.

    version 1, compact     <bos> SID SID SID …                        models trained from scratch
    version 2, chat        ChatML instruction, one line per item       pretrained models
    version 3, thinking    version 2, a think block before the SID     pretrained models that reason
    version 4, stepwise    version 1; steps stand before a SID's codes models that think in latent steps
    version 5, continuous  version 4; a step reads the output before it

Version 3 without a thought has an empty think block (the no-think form of SIDReasoner, arXiv 2603.23183); with one, the
model writes on from `<think>` until `</think>`, and its SID comes after that.

In version 4 fixed tokens stand before the codes of the SID that is asked for, and before no other: a history looks as
in version 1 (S²GR's thinking steps, arXiv 2601.18664, in the discrete form that any engine serves). Version 5 is their
continuous form: the same tokens, and the input of each is its row plus what the model made of the token before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from semantic_ids.catalog import Catalog
from semantic_ids.codes import Codes, SidVocabulary, TokenIds

COMPACT_VERSION = 1
CHAT_VERSION = 2
THINKING_VERSION = 3
STEPWISE_VERSION = 4
CONTINUOUS_VERSION = 5

COMPACT_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", *(f"<reserved_{i}>" for i in range(13)))
"""A from-scratch vocabulary begins with these 16 ids; the SID block follows. Steps are reserved ones."""

MAX_STEPS = 13
"""Thinking steps of one SID, over all its codes."""

THINKING_TOKENS = ("<think>", "</think>")
"""What a thought stands between, each a single token of a model's tokenizer."""


class PromptError(ValueError):
    """A prompt that cannot be rendered, or a version without a renderer."""


class PromptSpec(BaseModel):
    """What a bundle says of its prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    max_history: int
    """Most history items in one prompt."""
    steps: tuple[int, ...] = ()
    """Thinking steps before each code of the SID that is asked for, of stepwise prompts alone."""


@dataclass(frozen=True)
class History:
    """Known items as a prompt shows them, oldest first."""

    codes: Codes  # (H, L)
    titles: Sequence[str] = ()
    """(H,), or none: read by prompts that show titles alone."""

    @classmethod
    def of(
        cls, catalog: Catalog, ranks: npt.NDArray[np.integer] | Sequence[int], *, shows_titles: bool = True
    ) -> "History":
        """The items at `ranks`, (H,); none for `[]`. Their titles need not be read unless a prompt shows them."""
        places = np.asarray(ranks, np.int64)
        return cls(catalog.codes[places], catalog.titles.take(places) if shows_titles else ())

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, places: slice) -> "History":
        return History(self.codes[places], self.titles[places])


@dataclass(frozen=True)
class Prompt:
    """Token ids; the first `stable_length` of them only ever grow at their end."""

    token_ids: TokenIds  # (T,)
    stable_length: int


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model thinks before it writes a SID."""

    open: tuple[int, ...]
    """Ends the prompt where the model is to think: `<think>`, new line."""
    close: tuple[int, ...]
    """Between a thought and its SID: `</think>`, empty line. Its first id ends the thought."""


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

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens and SIDs included; bytes that are no whole character are U+FFFD."""
        ...


class PromptRenderer(Protocol):
    """One prompt version."""

    version: ClassVar[int]
    shows_titles: ClassVar[bool]
    """Whether a prompt has the titles of its items; else they need not be read for it."""
    spec: PromptSpec

    @property
    def thinking(self) -> ThinkingFormat | None:
        """How the model thinks; None where it cannot."""
        ...

    @property
    def forced(self) -> tuple[tuple[int, ...], ...]:
        """Token ids that go before each code of the SID that is asked for, L entries; empty: none anywhere."""
        ...

    @property
    def fed_back(self) -> tuple[int, ...]:
        """Token ids whose input is their row plus the model's output at the token before them (`TreeDecoder`)."""
        ...

    def render(self, history: History, *, thinking: bool = False) -> Prompt:
        """The prompt after which the model writes the next item's SID, or with `thinking` its thought.

        After a thought come `thinking.close` and the SID. `PromptError` where this version cannot think.
        """
        ...

    def training_row(self, items: History) -> TrainingRow:
        """At most `max_history` items and one more, with a loss on every SID; `render` asks for each at serving."""
        ...

    def thought_text(self, token_ids: Sequence[int]) -> str:
        """The text of a thought, whole or still growing: what a longer thought shows begins with it."""
        ...


class CompactPrompt:
    """Version 1: `<bos>` and bare SIDs. The whole sequence is one row, and every item in it is a target."""

    version: ClassVar[int] = COMPACT_VERSION
    shows_titles: ClassVar[bool] = False
    thinking: ClassVar[None] = None
    forced: tuple[tuple[int, ...], ...] = ()
    fed_back: tuple[int, ...] = ()
    bos_token_id: ClassVar[int] = COMPACT_SPECIAL_TOKENS.index("<bos>")

    def __init__(self, spec: PromptSpec, vocabulary: SidVocabulary) -> None:
        self.spec = spec
        self._vocabulary = vocabulary

    def render(self, history: History, *, thinking: bool = False) -> Prompt:
        """`<bos>` and the history's SIDs; there is no volatile part."""
        if thinking:
            raise _cannot_think(self.version)
        _check_length(len(history), self.spec)
        token_ids = self._token_ids(history)
        return Prompt(token_ids, len(token_ids))

    def training_row(self, items: History) -> TrainingRow:
        """Every SID token is a target, the first item's too."""
        num_levels = self._vocabulary.space.num_levels
        levels = np.tile(np.arange(num_levels, dtype=np.int8), len(items))
        _check_length(len(items) - 1, self.spec)
        return TrainingRow(self._token_ids(items), np.concatenate(([np.int8(-1)], levels)))

    def thought_text(self, token_ids: Sequence[int]) -> str:
        """`PromptError`: this version has no thoughts."""
        raise _cannot_think(self.version)

    def _token_ids(self, items: History) -> TokenIds:
        return np.concatenate(([self.bos_token_id], self._vocabulary.token_ids(items.codes).ravel()))


class StepwisePrompt(CompactPrompt):
    """Version 4: as version 1, and thinking steps before the codes of the SID that is asked for, each its own token."""

    version: ClassVar[int] = STEPWISE_VERSION

    def __init__(self, spec: PromptSpec, vocabulary: SidVocabulary) -> None:
        super().__init__(spec, vocabulary)
        num_levels = vocabulary.space.num_levels
        if len(spec.steps) != num_levels or min(spec.steps) < 0 or not 0 < sum(spec.steps) <= MAX_STEPS:
            raise PromptError(
                f"stepwise prompts have a number of steps for each of {num_levels} levels, together 1 to {MAX_STEPS}, "
                f"not {list(spec.steps)}"
            )
        first = COMPACT_SPECIAL_TOKENS.index("<reserved_0>")
        ends = [first + sum(spec.steps[: level + 1]) for level in range(num_levels)]
        self.forced = tuple(tuple(range(end - steps, end)) for end, steps in zip(ends, spec.steps, strict=True))


class ContinuousPrompt(StepwisePrompt):
    """Version 5: as version 4, and each step's input is its row plus the model's output at the token before it.

    With h that output, of the last layer after its norm, S²GR's t_l = h + p_l; the row is the position vector p_l.
    """

    version: ClassVar[int] = CONTINUOUS_VERSION

    def __init__(self, spec: PromptSpec, vocabulary: SidVocabulary) -> None:
        super().__init__(spec, vocabulary)
        self.fed_back = tuple(chain.from_iterable(self.forced))


class ChatPrompt:
    """Version 2: ChatML, as SmolLM2 and Qwen3 read it. SID tokens come from ids, so no title can forge one."""

    version: ClassVar[int] = CHAT_VERSION
    shows_titles: ClassVar[bool] = True
    thinking: ThinkingFormat | None = None
    forced: ClassVar[tuple[tuple[int, ...], ...]] = ()
    fed_back: ClassVar[tuple[int, ...]] = ()

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

    def render(self, history: History, *, thinking: bool = False) -> Prompt:
        """Instruction and history are stable; the question is volatile."""
        if thinking:
            raise _cannot_think(self.version)
        return self._prompt(history, self._question)

    def training_row(self, items: History) -> TrainingRow:
        """All but the last item as history, the last one as the answer; a loss on every SID."""
        if not items:
            raise PromptError("a training row needs at least one item")
        stable, levels = self._stable(items[:-1])
        answer: list[int] = self._vocabulary.token_ids(items.codes[-1]).tolist()
        token_ids = stable + self._question + answer + self._end
        levels = levels + [-1] * len(self._question) + list(range(len(answer))) + [-1] * len(self._end)
        return TrainingRow(np.array(token_ids, np.int64), np.array(levels, np.int8))

    def thought_text(self, token_ids: Sequence[int]) -> str:
        """`PromptError`: this version has no thoughts."""
        raise _cannot_think(self.version)

    def _prompt(self, history: History, volatile: list[int]) -> Prompt:
        stable, _ = self._stable(history)
        return Prompt(np.array(stable + volatile, np.int64), len(stable))

    def _stable(self, history: History) -> tuple[list[int], list[int]]:
        _check_length(len(history), self.spec)
        if len(history.titles) != len(history):
            raise PromptError(
                f"prompt version {self.version} shows titles, and the history has {len(history.titles)} of "
                f"{len(history)}: make it with `History.of(…, shows_titles=True)`"
            )
        token_ids = list(self._instruction)
        levels = [-1] * len(token_ids)
        for sid, title in zip(self._vocabulary.token_ids(history.codes).tolist(), history.titles, strict=True):
            line = self._encode(f" {_plain(title)[: self._MAX_TITLE_CHARS]}\n")
            token_ids += sid + line
            levels += [*range(len(sid)), *[-1] * len(line)]
        return token_ids, levels

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class ThinkingChatPrompt(ChatPrompt):
    """Version 3: version 2, and before the SID a think block, which is empty unless the model is to think.

    The tokenizer must know the thinking tokens, and the SID tokens by their ids in the vocabulary: thoughts name SIDs.
    """

    version: ClassVar[int] = THINKING_VERSION

    def __init__(self, spec: PromptSpec, vocabulary: SidVocabulary, tokenizer: TextTokenizer) -> None:
        super().__init__(spec, vocabulary, tokenizer)
        opening, closing = THINKING_TOKENS
        for token in THINKING_TOKENS:
            self._check_single(token)
        self._check_sid_tokens()
        self.thinking = ThinkingFormat(
            open=tuple(self._encode(f"{opening}\n")), close=tuple(self._encode(f"{closing}\n\n"))
        )
        self._question_to_think = self._question + list(self.thinking.open)
        self._question = self._question + self._encode(f"{opening}\n\n{closing}\n\n")

    def render(self, history: History, *, thinking: bool = False) -> Prompt:
        """As version 2; the volatile part ends with an empty think block, or with `thinking` inside an open one."""
        return self._prompt(history, self._question_to_think if thinking else self._question)

    def thought_text(self, token_ids: Sequence[int]) -> str:
        """The text; a character whose bytes are not all there yet is left out."""
        return self._tokenizer.decode(token_ids).rstrip("\ufffd")

    def _check_single(self, token: str) -> None:
        if len(self._encode(token)) != 1:
            raise PromptError(
                f"prompt version {self.version} thinks, and the model's tokenizer has no single token {token}: "
                "give a checkpoint whose tokenizer knows it, such as `sidrec-train base-model` writes"
            )

    def _check_sid_tokens(self) -> None:
        space, first = self._vocabulary.space, self._vocabulary.first_token_id
        last = space.token(space.num_levels - 1, space.codebook_size - 1)
        for token, token_id in ((space.token(0, 0), first), (last, first + space.num_tokens - 1)):
            if (found := self._encode(token)) != [token_id]:
                raise PromptError(
                    f"the model's tokenizer reads {token} as {found}, the vocabulary has it as {token_id}: "
                    "the tokenizer file is not this model's"
                )


def make_renderer(
    spec: PromptSpec, vocabulary: SidVocabulary, tokenizer: TextTokenizer | None = None
) -> PromptRenderer:
    """The renderer of `spec.version`; `PromptError` for a version that this build does not know."""
    if spec.version in (STEPWISE_VERSION, CONTINUOUS_VERSION):
        return (StepwisePrompt if spec.version == STEPWISE_VERSION else ContinuousPrompt)(spec, vocabulary)
    if spec.steps:
        raise PromptError(f"prompt version {spec.version} has no thinking steps, and {list(spec.steps)} are asked for")
    if spec.version == COMPACT_VERSION:
        return CompactPrompt(spec, vocabulary)
    if spec.version in (CHAT_VERSION, THINKING_VERSION):
        if tokenizer is None:
            raise PromptError("chat prompts need the model's tokenizer, and the bundle carries none")
        kind = ChatPrompt if spec.version == CHAT_VERSION else ThinkingChatPrompt
        return kind(spec, vocabulary, tokenizer)
    known = [COMPACT_VERSION, CHAT_VERSION, THINKING_VERSION, STEPWISE_VERSION, CONTINUOUS_VERSION]
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


def _cannot_think(version: int) -> PromptError:
    return PromptError(
        f"prompt version {version} has no think block: ask without thinking, or train with prompt version "
        f"{THINKING_VERSION} (sft.thinking=true)"
    )


def _check_length(num_items: int, spec: PromptSpec) -> None:
    if num_items > spec.max_history:
        raise PromptError(
            f"a prompt holds at most {spec.max_history} history items, not {num_items}: cut it by window_start"
        )


def _plain(text: str) -> str:
    """Text that cannot be read as a special token or a new line."""
    return " ".join(text.replace("<", "‹").replace(">", "›").split())
