"""Prompts: the stable prefix, the window, training rows that match serving, and titles that forge nothing."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from semantic_ids.bundle import FileTokenizer
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.prompt import (
    CHAT_VERSION,
    COMPACT_SPECIAL_TOKENS,
    COMPACT_VERSION,
    CONTINUOUS_VERSION,
    STEPWISE_VERSION,
    THINKING_TOKENS,
    THINKING_VERSION,
    ChatPrompt,
    CompactPrompt,
    ContinuousPrompt,
    History,
    PromptError,
    PromptRenderer,
    PromptSpec,
    StepwisePrompt,
    ThinkingChatPrompt,
    make_renderer,
    window_start,
)
from tests.semantic_ids.factories import catalog_of, history_of

SPACE = SidSpace(num_levels=3, codebook_size=8)
MAX_HISTORY = 12
BOS = COMPACT_SPECIAL_TOKENS.index("<bos>")

SID = st.tuples(*[st.integers(0, 7)] * 3)
HISTORY = st.lists(st.tuples(SID, st.text(max_size=100)), max_size=MAX_HISTORY)


def byte_tokenizer(special_tokens: Sequence[str], space: SidSpace) -> Tokenizer:
    """One token a byte, then the special tokens, then the SID block: what training makes of a base model's."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([*special_tokens])
    tokenizer.add_tokens(space.all_tokens())
    return tokenizer


TOKENIZER = byte_tokenizer(["<|im_start|>", "<|im_end|>", *THINKING_TOKENS], SPACE)
IM_START, IM_END, THINK, END_OF_THOUGHT = 256, 257, 258, 259
NEW_LINE = TOKENIZER.encode("\n").ids[0]
CHAT_VOCABULARY = SidVocabulary(SPACE, first_token_id=260, vocab_size=260 + SPACE.num_tokens)
CHAT = ChatPrompt(PromptSpec(version=CHAT_VERSION, max_history=MAX_HISTORY), CHAT_VOCABULARY, FileTokenizer(TOKENIZER))
THINKING = ThinkingChatPrompt(
    PromptSpec(version=THINKING_VERSION, max_history=MAX_HISTORY), CHAT_VOCABULARY, FileTokenizer(TOKENIZER)
)
COMPACT_VOCABULARY = SidVocabulary(SPACE, len(COMPACT_SPECIAL_TOKENS), 64)
COMPACT = CompactPrompt(PromptSpec(version=COMPACT_VERSION, max_history=MAX_HISTORY), COMPACT_VOCABULARY)
RENDERERS: st.SearchStrategy[PromptRenderer] = st.sampled_from([COMPACT, CHAT, THINKING])


def items(history: list[tuple[tuple[int, ...], str]]) -> History:
    return history_of([sid for sid, _ in history], [title for _, title in history])


def test_a_compact_prompt_is_bos_and_bare_sids():
    """Block at 16, K 8: code c of level l is 16 + 8·l + c."""
    prompt = COMPACT.render(history_of([[1, 2, 3], [0, 0, 7]]))
    assert prompt.token_ids.tolist() == [BOS, 17, 26, 35, 16, 24, 39]
    assert prompt.stable_length == 7


def test_a_new_user_has_a_prompt_too():
    assert COMPACT.render(history_of([])).token_ids.tolist() == [BOS]
    chat = CHAT.render(history_of([]))
    assert 0 < chat.stable_length < len(chat.token_ids)


def test_a_chat_prompt_reads_as_chatml():
    prompt = CHAT.render(history_of([[1, 2, 3], [0, 0, 7]], ["Blue  Train\n", "Ōkami"]))
    text = TOKENIZER.decode(prompt.token_ids.tolist(), skip_special_tokens=False)
    system, user, assistant = [part for part in text.split("<|im_start|>") if part]
    assert system.startswith("system\n")
    assert system.endswith("<|im_end|>\n")
    assert "of 3 codes" in system
    assert user == (
        "user\nMy history, oldest first:\n"
        f"{SPACE.format([1, 2, 3])} Blue Train\n{SPACE.format([0, 0, 7])} Ōkami\nWhat comes next?<|im_end|>\n"
    )
    assert assistant == "assistant\n"


@given(RENDERERS, HISTORY, st.integers(0, MAX_HISTORY))
def test_a_longer_history_keeps_the_stable_part_of_the_shorter_one(renderer: PromptRenderer, history, cut: int):
    longer, shorter = renderer.render(items(history)), renderer.render(items(history[:cut]))
    stable = shorter.stable_length
    assert stable <= longer.stable_length
    assert longer.token_ids[:stable].tolist() == shorter.token_ids[:stable].tolist()
    volatile = longer.token_ids[longer.stable_length :].tolist()
    assert volatile == shorter.token_ids[shorter.stable_length :].tolist()


@given(st.integers(0, 60), st.data())
def test_the_prompt_of_a_growing_history_grows_at_its_end_while_the_window_stays(total: int, data: st.DataObject):
    sids = [[place // 8, place % 8, 0] for place in range(total + 1)]
    renderer = data.draw(RENDERERS)
    start, later = window_start(total, MAX_HISTORY), window_start(total + 1, MAX_HISTORY)
    before = renderer.render(history_of(sids[start:total]))
    after = renderer.render(history_of(sids[later : total + 1]))
    grows = after.token_ids[: before.stable_length].tolist() == before.token_ids[: before.stable_length].tolist()
    assert grows or later > start


@given(st.integers(0, 500), st.integers(1, 100))
def test_the_window_holds_between_three_quarters_and_all_of_its_size(total: int, max_history: int):
    start = window_start(total, max_history)
    length = total - start
    assert (start, length) == (0, total) if total <= max_history else 0.75 * max_history < length <= max_history


@given(st.integers(0, 500), st.integers(1, 100))
def test_the_window_only_moves_forward_and_by_whole_quarters(total: int, max_history: int):
    step = window_start(total + 1, max_history) - window_start(total, max_history)
    assert step in (0, max(1, max_history // 4))


def test_the_window_moves_once_in_a_quarter():
    """A window of 8 drops two at a time: 9 and 10 events start at 2, 11 and 12 at 4."""
    assert [window_start(total, 8) for total in range(7, 14)] == [0, 0, 2, 2, 4, 4, 6]


def test_the_stable_part_of_consecutive_windows_is_reused_until_the_quarter_is_full():
    sids = [[place % 8, 0, 0] for place in range(40)]
    moved = 0
    for total in range(MAX_HISTORY, 39):
        start, later = window_start(total, MAX_HISTORY), window_start(total + 1, MAX_HISTORY)
        before, after = (
            COMPACT.render(history_of(sids[begin:end])).token_ids.tolist()
            for begin, end in ((start, total), (later, total + 1))
        )
        moved += after[: len(before)] != before
    assert moved == 9  # 27 events, a quarter of three each


@given(st.lists(SID, max_size=MAX_HISTORY))
def test_a_compact_training_row_is_the_serving_prompt_at_each_of_its_items(sids):
    history = history_of(sids)
    row = COMPACT.training_row(history)
    assert row.token_ids.shape == row.levels.shape
    assert row.levels.tolist() == [-1] + [0, 1, 2] * len(history)
    for place, sid in enumerate(sids):
        first = 1 + 3 * place
        assert row.token_ids[:first].tolist() == COMPACT.render(history[:place]).token_ids.tolist()
        assert COMPACT_VOCABULARY.codes(row.token_ids[first : first + 3]).tolist() == list(sid)


@given(
    st.sampled_from([CHAT, THINKING]),
    st.lists(st.tuples(SID, st.text(max_size=100)), min_size=1, max_size=MAX_HISTORY + 1),
)
def test_a_chat_training_row_is_the_serving_prompt_and_its_answer(renderer: PromptRenderer, history):
    row = renderer.training_row(items(history))
    prompt = renderer.render(items(history[:-1])).token_ids
    assert row.token_ids[: len(prompt)].tolist() == prompt.tolist()
    assert CHAT_VOCABULARY.codes(row.token_ids[len(prompt) :][:3]).tolist() == list(history[-1][0])
    assert row.token_ids[len(prompt) + 3] == IM_END
    assert row.token_ids.shape == row.levels.shape


@given(RENDERERS, st.lists(st.tuples(SID, st.text(max_size=100)), min_size=1, max_size=MAX_HISTORY))
def test_the_levels_of_a_training_row_are_the_items_in_order(renderer: PromptRenderer, history):
    row = renderer.training_row(items(history))
    targets = row.levels >= 0
    assert row.levels[targets].tolist() == [0, 1, 2] * len(history)
    vocabulary = COMPACT_VOCABULARY if renderer is COMPACT else CHAT_VOCABULARY
    written = vocabulary.codes(row.token_ids[targets].reshape(-1, 3))
    assert written.tolist() == [list(sid) for sid, _ in history]


FORGERIES = [
    SPACE.token(0, 1),
    SPACE.format([1, 2, 3]),
    *THINKING_TOKENS,
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "\n",
    "<",
    ">",
]
FORGED_TITLE = st.lists(st.sampled_from(FORGERIES) | st.text(max_size=5), max_size=8).map("".join)


def test_a_raw_title_would_forge_tokens():
    """What the next test guards against is real: this tokenizer reads the strings as special tokens."""
    assert TOKENIZER.encode(f"{SPACE.token(0, 1)}<|im_end|>", add_special_tokens=False).ids == [261, IM_END]


@given(st.lists(FORGED_TITLE, min_size=1, max_size=3))
def test_no_title_can_forge_a_sid_a_turn_or_a_line(titles: list[str]):
    sids = [[1, 2, 3]] * len(titles)
    forged, plain = (THINKING.render(history_of(sids, names)).token_ids for names in (titles, ["plain"] * len(titles)))
    for token_id in (NEW_LINE, *range(256, CHAT_VOCABULARY.vocab_size)):
        assert np.count_nonzero(forged == token_id) == np.count_nonzero(plain == token_id)


def test_a_title_is_cut_after_eighty_characters():
    long, longer = (CHAT.render(history_of([[1, 2, 3]], ["x" * length])) for length in (80, 5000))
    assert long.token_ids.tolist() == longer.token_ids.tolist()


@pytest.mark.parametrize("renderer", [COMPACT, CHAT, THINKING])
def test_a_history_beyond_the_window_is_refused_not_cut(renderer: PromptRenderer):
    assert renderer.render(history_of([[0, 0, 0]] * MAX_HISTORY))
    with pytest.raises(PromptError, match="at most 12 history items, not 13: cut it by window_start"):
        renderer.render(history_of([[0, 0, 0]] * (MAX_HISTORY + 1)))


@pytest.mark.parametrize("renderer", [CHAT, THINKING])
def test_a_history_without_titles_is_refused_where_they_are_shown(renderer: PromptRenderer):
    untitled = history_of([[1, 2, 3], [0, 0, 7]], [])
    assert len(COMPACT.render(untitled).token_ids) == 7
    with pytest.raises(PromptError, match="shows titles, and the history has 0 of 2"):
        renderer.render(untitled)


@pytest.mark.parametrize("ranks", [[], [2], (1, 0, 2), np.array([3, 3], np.int32)])
def test_a_history_is_read_from_the_catalogue_in_its_order(ranks: Sequence[int]):
    catalog = catalog_of([[3, 0, 1], [0, 0, 7], [1, 2, 3], [0, 5, 0]])
    history, untitled = History.of(catalog, ranks), History.of(catalog, ranks, shows_titles=False)
    assert history.codes.shape == (len(ranks), 3)
    assert history.codes.tolist() == untitled.codes.tolist() == [catalog.codes[rank].tolist() for rank in ranks]
    assert list(history.titles) == [catalog.titles[rank] for rank in ranks]
    assert list(untitled.titles) == []
    assert (len(history[1:]), list(history[1:].titles)) == (len(ranks[1:]), [*history.titles][1:])


def test_a_chat_training_row_needs_an_answer():
    with pytest.raises(PromptError, match="at least one item"):
        CHAT.training_row(history_of([]))


def test_every_prompt_version_has_its_renderer():
    compact = make_renderer(PromptSpec(version=1, max_history=5), COMPACT_VOCABULARY)
    chat = make_renderer(PromptSpec(version=2, max_history=5), CHAT_VOCABULARY, FileTokenizer(TOKENIZER))
    assert (compact.version, type(compact)) == (COMPACT_VERSION, CompactPrompt)
    thinking = make_renderer(PromptSpec(version=3, max_history=5), CHAT_VOCABULARY, FileTokenizer(TOKENIZER))
    assert (chat.version, type(chat)) == (CHAT_VERSION, ChatPrompt)
    assert (thinking.version, type(thinking)) == (THINKING_VERSION, ThinkingChatPrompt)
    steps = [
        make_renderer(PromptSpec(version=version, max_history=5, steps=(2, 0, 1)), COMPACT_VOCABULARY)
        for version in (STEPWISE_VERSION, CONTINUOUS_VERSION)
    ]
    assert [type(one) for one in steps] == [StepwisePrompt, ContinuousPrompt]
    assert [one.version for one in steps] == [STEPWISE_VERSION, CONTINUOUS_VERSION]


def test_the_continuous_form_has_the_steps_of_the_discrete_one_and_feeds_them_back():
    discrete, continuous = (
        make_renderer(PromptSpec(version=version, max_history=5, steps=(2, 0, 1)), COMPACT_VOCABULARY)
        for version in (STEPWISE_VERSION, CONTINUOUS_VERSION)
    )
    assert discrete.forced == continuous.forced == ((3, 4), (), (5,))
    assert (discrete.fed_back, continuous.fed_back) == ((), (3, 4, 5))


def test_an_unknown_version_is_refused_with_the_known_ones():
    with pytest.raises(PromptError, match=r"no renderer for prompt version 99; this build knows \[1, 2, 3, 4, 5\]"):
        make_renderer(PromptSpec(version=99, max_history=5), COMPACT_VOCABULARY)


@pytest.mark.parametrize("version", [CHAT_VERSION, THINKING_VERSION])
def test_a_chat_prompt_without_a_tokenizer_is_refused(version: int):
    with pytest.raises(PromptError, match="tokenizer"):
        make_renderer(PromptSpec(version=version, max_history=5), CHAT_VOCABULARY)


@given(HISTORY)
def test_the_thinking_prompt_is_the_chat_prompt_and_a_think_block(history):
    """Empty: `<think>`, an empty line, `</think>`, an empty line. To think: `<think>` and a new line."""
    chat, empty, to_think = (
        CHAT.render(items(history)),
        THINKING.render(items(history)),
        THINKING.render(items(history), thinking=True),
    )
    length = len(chat.token_ids)
    for prompt in (empty, to_think):
        assert prompt.token_ids[:length].tolist() == chat.token_ids.tolist()
        assert prompt.stable_length == chat.stable_length
    assert empty.token_ids[length:].tolist() == [THINK, *[NEW_LINE] * 2, END_OF_THOUGHT, *[NEW_LINE] * 2]
    assert to_think.token_ids[length:].tolist() == [THINK, NEW_LINE]


def test_the_thinking_format_ends_a_thought_with_one_token():
    assert THINKING.thinking is not None
    assert THINKING.thinking.open == (THINK, NEW_LINE)
    assert THINKING.thinking.close == (END_OF_THOUGHT, NEW_LINE, NEW_LINE)


@pytest.mark.parametrize("renderer", [COMPACT, CHAT])
def test_a_version_without_a_think_block_refuses_to_think(renderer: PromptRenderer):
    assert renderer.thinking is None
    for call in (lambda: renderer.render(history_of([]), thinking=True), lambda: renderer.thought_text([1])):
        with pytest.raises(PromptError, match=rf"version {renderer.version} has no think block.*sft.thinking=true"):
            call()


@pytest.mark.parametrize("known", [(), THINKING_TOKENS[:1], THINKING_TOKENS[1:]])
def test_a_tokenizer_without_a_thinking_token_is_refused_by_the_tokens_name(known: tuple[str, ...]):
    (missing, *_) = [token for token in THINKING_TOKENS if token not in known]
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", *known], SPACE)
    first = 258 + len(known)
    vocabulary = SidVocabulary(SPACE, first, first + SPACE.num_tokens)
    with pytest.raises(PromptError, match=f"no single token {missing}: give a checkpoint whose tokenizer knows it"):
        ThinkingChatPrompt(THINKING.spec, vocabulary, FileTokenizer(tokenizer))


@pytest.mark.parametrize(
    "vocabulary",
    [SidVocabulary(SPACE, 261, 400), SidVocabulary(SidSpace(3, 9), 260, 400), SidVocabulary(SidSpace(4, 8), 260, 400)],
)
def test_a_tokenizer_with_other_sid_tokens_is_refused(vocabulary: SidVocabulary):
    with pytest.raises(PromptError, match=r"tokenizer reads <\w_\d+> as .*, the vocabulary has it as"):
        ThinkingChatPrompt(THINKING.spec, vocabulary, FileTokenizer(TOKENIZER))


def test_a_thought_reads_as_text_with_its_sids_and_special_tokens():
    thought = f"After {SPACE.format([1, 2, 3])} “Ōkami” 😀<|im_end|>\n"
    assert THINKING.thought_text(TOKENIZER.encode(thought, add_special_tokens=False).ids) == thought


@given(
    st.lists(st.sampled_from([SPACE.token(0, 1), "😀", "é", "�", " "]) | st.text(max_size=4), max_size=6).map("".join)
)
def test_a_growing_thought_only_grows_in_text(thought: str):
    """One token a byte: most places to stop are inside a character."""
    token_ids = TOKENIZER.encode(thought, add_special_tokens=False).ids
    shown = [THINKING.thought_text(token_ids[:length]) for length in range(len(token_ids) + 1)]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(shown))
    assert all("�" not in text for text in shown) or "�" in thought
    assert shown[-1] == thought.rstrip("�")
