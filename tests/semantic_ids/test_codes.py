"""SID arithmetic: strings, ids and their one layout, against hand-written values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import MAX_CODEBOOK_SIZE, MAX_LEVELS, SidError, SidSpace, SidVocabulary

SPACE = SidSpace(num_levels=3, codebook_size=8)
VOCABULARY = SidVocabulary(SPACE, first_token_id=16, vocab_size=40)


@st.composite
def spaces_and_sids(draw: st.DrawFn) -> tuple[SidSpace, tuple[int, ...]]:
    space = SidSpace(draw(st.integers(1, MAX_LEVELS)), draw(st.sampled_from([2, 3, 256, MAX_CODEBOOK_SIZE])))
    code = st.integers(0, space.codebook_size - 1)
    return space, tuple(draw(st.lists(code, min_size=space.num_levels, max_size=space.num_levels)))


def test_a_token_names_its_level_by_a_letter_and_its_code_by_a_number():
    assert [SPACE.token(0, 0), SPACE.token(1, 7), SPACE.token(2, 3)] == ["<a_0>", "<b_7>", "<c_3>"]


def test_all_tokens_stand_level_by_level():
    assert SidSpace(2, 3).all_tokens() == ["<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<b_2>"]
    assert len(SPACE.all_tokens()) == SPACE.num_tokens == 24


@given(spaces_and_sids())
def test_parse_reads_what_format_writes(case: tuple[SidSpace, tuple[int, ...]]):
    space, sid = case
    assert space.parse(space.format(sid)) == sid


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<a_1><b_2>",  # too few
        "<a_1><b_2><c_3><d_4>",  # too many
        "<b_2><a_1><c_3>",  # out of order
        "<a_1><a_2><c_3>",  # a level twice
        "<a_1><b_2><c_8>",  # beyond the codebook
        "<a_1><b_2><c_99999>",
        "<a_1> <b_2><c_3>",  # a space
        " <a_1><b_2><c_3>",
        "<a_1><b_2><c_3>\n",
        "<a_01><b_2><c_3>",  # a leading zero
        "<a_-1><b_2><c_3>",
        "<A_1><b_2><c_3>",
        "<a_١><b_2><c_3>",  # an Arabic digit
        "<a_1><b_2><c_3>x",
    ],
)
def test_parse_refuses_what_is_nearly_a_sid(text: str):
    with pytest.raises(SidError):
        SPACE.parse(text)


@given(st.text(alphabet="<>_abc0123789 ", max_size=20))
def test_parse_accepts_only_what_format_writes(text: str):
    try:
        codes = SPACE.parse(text)
    except SidError:
        return
    assert SPACE.format(codes) == text


def test_format_wants_exactly_one_code_a_level():
    with pytest.raises(SidError, match="3 codes, not 2"):
        SPACE.format([1, 2])


@pytest.mark.parametrize(("level", "code"), [(-1, 0), (3, 0), (0, -1), (0, 8)])
def test_a_token_outside_the_space_is_refused(level: int, code: int):
    with pytest.raises(SidError, match="outside"):
        SPACE.token(level, code)


@pytest.mark.parametrize(
    ("num_levels", "codebook_size"), [(0, 8), (MAX_LEVELS + 1, 8), (3, 1), (3, MAX_CODEBOOK_SIZE + 1)]
)
def test_an_impossible_space_is_refused(num_levels: int, codebook_size: int):
    with pytest.raises(SidError):
        SidSpace(num_levels, codebook_size)


def test_check_names_the_code_outside_the_codebook():
    assert SPACE.check(np.array([[0, 7, 3]])).dtype == np.uint16
    with pytest.raises(SidError, match="code 8 "):
        SPACE.check(np.array([[0, 8, 3]]))
    with pytest.raises(SidError, match="code -1 "):
        SPACE.check(np.array([[0, -1, 3]]))
    with pytest.raises(SidError, match=r"shape \(1, 2\)"):
        SPACE.check(np.array([[0, 1]]))


def test_token_ids_are_the_block_start_plus_level_times_k_plus_code():
    """16 + 0·8 + 1 = 17; 16 + 1·8 + 2 = 26; 16 + 2·8 + 3 = 35."""
    assert VOCABULARY.token_ids(np.array([1, 2, 3])).tolist() == [17, 26, 35]
    assert [VOCABULARY.block(level) for level in range(3)] == [slice(16, 24), slice(24, 32), slice(32, 40)]


@given(spaces_and_sids(), st.integers(0, 1000))
def test_codes_read_what_token_ids_write(case: tuple[SidSpace, tuple[int, ...]], first_token_id: int):
    space, sid = case
    vocabulary = SidVocabulary(space, first_token_id, first_token_id + space.num_tokens)
    token_ids = vocabulary.token_ids(np.array([sid]))
    assert vocabulary.codes(token_ids).tolist() == [list(sid)]
    written = dict(enumerate(space.all_tokens())) if space.num_tokens < 2000 else {}
    for level, (code, token_id) in enumerate(zip(sid, token_ids[0].tolist(), strict=True)):
        assert token_id in range(*vocabulary.block(level).indices(vocabulary.vocab_size))
        assert written.get(token_id - first_token_id, space.token(level, code)) == space.token(level, code)


@pytest.mark.parametrize("token_ids", [[15, 26, 35], [17, 35, 26], [17, 26, 40], [26, 26, 35]])
def test_a_token_of_another_level_or_of_none_is_refused(token_ids: list[int]):
    with pytest.raises(SidError):
        VOCABULARY.codes(np.array(token_ids))


@pytest.mark.parametrize(("first_token_id", "vocab_size"), [(-1, 40), (16, 39), (17, 40)])
def test_a_block_must_fit_the_vocabulary(first_token_id: int, vocab_size: int):
    with pytest.raises(SidError, match="does not fit"):
        SidVocabulary(SPACE, first_token_id, vocab_size)
