"""Columns on disk come back as they were, mapped and read-only."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.columns import MergedColumn, StringColumn, map_array, save_array
from tests.semantic_ids.factories import is_mapped

STRINGS = ["", "plain", "Crème brûlée", "書籍", "a\x00b\n", "\U0001f600", ""]


@given(st.lists(st.text(max_size=8), max_size=8))
def test_a_string_column_is_its_list_of_strings(strings: list[str]):
    column = StringColumn.of(strings)
    assert len(column) == len(strings)
    assert list(column) == strings
    assert column[1:] == strings[1:]
    assert column[::-1] == strings[::-1]
    assert [column[-place] for place in range(1, len(strings) + 1)] == strings[::-1]
    for outside in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            column[outside]


def test_a_saved_string_column_is_mapped_not_read(tmp_path: Path):
    StringColumn.of(STRINGS).save(tmp_path, "titles")
    column = StringColumn.map(tmp_path, "titles")
    assert list(column) == STRINGS
    assert is_mapped(column.blob)
    assert is_mapped(column.offsets)


@pytest.mark.parametrize("strings", [[], [""], ["", ""]])
def test_a_column_without_a_single_byte_survives_saving(tmp_path: Path, strings: list[str]):
    StringColumn.of(strings).save(tmp_path, "empty")
    assert list(StringColumn.map(tmp_path, "empty")) == strings


@given(st.lists(st.text(max_size=8), max_size=5), st.lists(st.text(max_size=8), max_size=5), st.randoms())
def test_a_merged_column_is_a_selection_from_both_columns(base: list[str], added: list[str], random):
    both = [*base, *added]
    sources = [random.randrange(len(both)) for _ in range(len(both))]
    strings = [both[source] for source in sources]
    column = MergedColumn.over(StringColumn.of(base), added, np.array(sources, np.int32))
    assert len(column) == len(strings)
    assert list(column) == strings
    assert column[1:] == strings[1:]
    assert [column[-place] for place in range(1, len(strings) + 1)] == strings[::-1]
    assert column.take(np.arange(len(strings))[::-1]) == strings[::-1]
    for outside in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            column[outside]


def test_a_merged_column_shares_the_text_it_is_made_over_and_is_saved_as_a_plain_one(tmp_path: Path):
    StringColumn.of(STRINGS).save(tmp_path, "titles")
    base = StringColumn.map(tmp_path, "titles")
    column = MergedColumn.over(base, ["new"], np.array([2, 7, 0, 3], np.int32))
    assert column.blob is base.blob
    assert column.offsets is base.offsets
    column.save(tmp_path, "merged")
    assert list(StringColumn.map(tmp_path, "merged")) == list(column) == ["Crème brûlée", "new", "", "書籍"]


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.uint16).reshape(2, 3), np.empty(0, np.uint32)])
def test_a_saved_array_is_mapped_and_cannot_be_written_to(tmp_path: Path, array):
    save_array(tmp_path, "array", array)
    mapped = map_array(tmp_path, "array")
    assert is_mapped(mapped)
    assert np.array_equal(mapped, array)
    assert mapped.dtype == array.dtype
    assert not mapped.flags.writeable


def test_python_objects_are_never_unpickled(tmp_path: Path):
    with pytest.raises(ValueError, match="allow_pickle"):
        save_array(tmp_path, "objects", np.array([{}], object))
