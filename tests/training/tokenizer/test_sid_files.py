"""SIDs as files: what is written reads back, and what is no SID for every item is refused with file, item and value."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ids.codes import SidError, SidSpace
from training.stage import StageError
from training.tokenizer.sid_files import read_sids, write_sids

TYPES = (".json", ".parquet")
RELEASED = {"B1": ["<a_1>", "<b_20>", "<c_300>"], "B2": ["<a_0>", "<b_0>", "<c_0>"]}


def written(path: Path, content: Any) -> Path:
    file = path / "sids.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def parquet(path: Path, **columns: Any) -> Path:
    file = path / "sids.parquet"
    pl.DataFrame(columns).write_parquet(file)
    return file


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[list[str], list[list[int]], int]:
    codebook_size = draw(st.sampled_from([2, 5, 256, 65_536]))
    num_levels = draw(st.integers(1, 4))
    ids = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=8, unique=True))
    sid = st.lists(st.integers(0, codebook_size - 1), min_size=num_levels, max_size=num_levels)
    return ids, draw(st.lists(sid, min_size=len(ids), max_size=len(ids))), codebook_size


@pytest.mark.parametrize("ending", TYPES)
@settings(max_examples=25)  # each is a file that is synced to disk
@given(catalogue=catalogues())
def test_what_is_written_reads_back_in_any_order_of_the_items(
    tmp_path_factory: pytest.TempPathFactory, ending: str, catalogue: tuple[list[str], list[list[int]], int]
):
    ids, rows, codebook_size = catalogue
    codes, path = np.array(rows, np.uint16), tmp_path_factory.mktemp("sids") / f"sids{ending}"
    write_sids(path, ids, codes, SidSpace(codes.shape[1], codebook_size))
    back = read_sids(path, ids[::-1], codebook_size)
    assert back.codes.dtype == np.uint16
    assert (back.codes[::-1] == codes).all()
    assert back.space == SidSpace(codes.shape[1], codebook_size)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_json_is_written_in_the_shape_of_the_released_files(tmp_path):
    path = tmp_path / "new folder" / "sids.json"
    write_sids(path, ["B1", "B2"], np.array([[1, 20, 300], [0, 0, 0]], np.uint16), SidSpace(3, 301))
    assert json.loads(path.read_text()) == RELEASED


@pytest.mark.parametrize(
    "rows",
    [
        RELEASED,
        {item: "".join(tokens) for item, tokens in RELEASED.items()},
        {"B1": [1, 20, 300], "B2": [0, 0, 0]},
    ],
    ids=["token lists", "strings", "numbers"],
)
def test_each_form_of_a_sid_is_read_from_either_file(tmp_path, rows: dict[str, Any]):
    for path in (written(tmp_path, rows), parquet(tmp_path, item_id=list(rows), codes=list(rows.values()))):
        given_sids = read_sids(path, ["B2", "B1"])
        assert given_sids.codes.tolist() == [[0, 0, 0], [1, 20, 300]]
        assert given_sids.space == SidSpace(3, 301)


def test_items_that_were_not_asked_for_are_counted_and_not_looked_at(tmp_path):
    given_sids = read_sids(written(tmp_path, {"x": [9], "a": [1, 0], "y": "?"}), ["a"])
    assert (given_sids.codes.tolist(), given_sids.num_extra_items) == ([[1, 0]], 2)


@pytest.mark.parametrize(("highest", "size"), [(0, 2), (1, 2), (2, 3), (65_535, 65_536)])
def test_the_codebook_is_the_least_that_holds_every_code(tmp_path, highest: int, size: int):
    assert read_sids(written(tmp_path, {"a": [highest, 0]}), ["a"]).space.codebook_size == size


def test_a_larger_codebook_may_be_asked_for_and_a_smaller_one_may_not(tmp_path):
    path = written(tmp_path, {"a": [0, 3], "b": [7, 1]})
    assert read_sids(path, ["a", "b"], 256).space == SidSpace(2, 256)
    with pytest.raises(StageError, match=r"sids.json: the item 'b' has the code 7, .* codebook of 7 codes: .*least 8"):
        read_sids(path, ["a", "b"], 7)


def test_items_without_a_sid_are_counted_and_the_first_is_named(tmp_path):
    with pytest.raises(StageError, match=r"sids.json: 2 of 3 items have no SID, 'b' first: give SIDs for the whole"):
        read_sids(written(tmp_path, {"a": [1]}), ["a", "b", "c"])


def test_an_item_that_comes_twice_is_refused_even_with_one_sid(tmp_path):
    with pytest.raises(StageError, match=r"sids.json: the item 'a' comes twice"):
        read_sids(written(tmp_path, '{"a": [1], "b": [2], "a": [1]}'), ["b"])
    with pytest.raises(StageError, match=r"sids.parquet: the item 'a' comes twice"):
        read_sids(parquet(tmp_path, item_id=["a", "a"], codes=[[1], [1]]), ["a"])


@pytest.mark.parametrize(
    "row",
    [
        [],
        "",
        None,
        7,
        {"codes": [1]},
        [True, 0],
        [1.0, 2.0],
        [-1, 0],
        [65_536],
        [10**30],
        [[1, 2]],
        ["1", "2"],
        [0] * 9,
        ["<a_1>", 2],
        "<a_1>, <b_2>",
        "<a_01>",
        "<a_65536>",
        "<b_1><a_2>",
        ["<b_1>", "<a_2>"],
        ["<a_1>", "<a_2>"],
    ],
    ids=repr,
)
def test_what_is_no_sid_is_refused_with_file_item_and_rule(tmp_path, row: Any):
    with pytest.raises(StageError, match=r"sids.json: the item 'a' has .*, which is no SID: a SID is a string such as"):
        read_sids(written(tmp_path, {"a": row}), ["a"])


@pytest.mark.parametrize(
    ("first", "row", "reason"),
    [
        ([1, 2], [1, 2, 3], r"\[1, 2, 3\]: it has 3 codes and not 2"),
        ([1, 2], [1], r"\[1\]: it has 1 codes and not 2"),
        ([1, 2], [1, -2], r"\[1, -2\]: the code -2 is not from 0 to 65535"),
        ([1, 2], [1, 2.5], r"\[1, 2.5\]: it is not a list of whole numbers"),
        ([1, 2], [True, 2], r"\[True, 2\]: it is not a list of whole numbers"),
        ([1, 2], "<a_1><b_2>", r"'<a_1><b_2>': it is not a list of whole numbers"),
        (["<a_1>", "<b_2>"], ["<b_1>", "<a_2>"], r"the levels of '<b_1><a_2>' are not in order"),
        (["<a_1>", "<b_2>"], ["<a_1>"], r"\['<a_1>'\]: it has 1 codes and not 2"),
        ("<a_1><b_2>", "<a_1>", r"'<a_1>' is not a SID of 2 levels"),
        ("<a_1><b_2>", "<b_1><a_2>", r"the levels of '<b_1><a_2>' are not in order"),
        ("<a_1><b_2>", "<a_1><b_65536>", r"code 65536 is outside this codebook"),
    ],
)
def test_a_row_unlike_the_first_is_refused_with_item_value_and_reason(tmp_path, first: Any, row: Any, reason: str):
    with pytest.raises(StageError, match=rf"sids.json: the item 'b' has .*{reason}.*of 'a': correct the file"):
        read_sids(written(tmp_path, {"b": row, "a": first}), ["a", "b"])


@pytest.mark.parametrize("content", ["", "  \n", "{}"])
def test_an_empty_file_is_refused(tmp_path, content: str):
    with pytest.raises(StageError, match=r"sids.json is empty"):
        read_sids(written(tmp_path, content), ["a"])


def test_an_empty_table_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"sids.parquet is empty"):
        read_sids(parquet(tmp_path, item_id=pl.Series([], dtype=pl.String), codes=[]), ["a"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": ', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('[["a", [1]]]', r"holds \[\['a', \[1\]\]\]: the file must be one JSON object"),
        ('"a"', "holds 'a': the file must be one JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content: str, reason: str):
    with pytest.raises(StageError, match=rf"sids.json {reason}"):
        read_sids(written(tmp_path, content), ["a"])


def test_bytes_of_no_text_and_of_no_table_are_refused(tmp_path):
    for ending, kind in (("json", "JSON"), ("parquet", "Parquet")):
        (tmp_path / f"sids.{ending}").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(StageError, match=rf"sids.{ending} cannot be read as {kind}"):
            read_sids(tmp_path / f"sids.{ending}", ["a"])
        with pytest.raises(StageError, match=rf"absent.{ending} cannot be read as {kind}"):
            read_sids(tmp_path / f"absent.{ending}", ["a"])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"item": ["a"], "codes": [[1]]}, "has no column item_id, only item, codes"),
        ({"item_id": ["a"], "sid": [[1]]}, "has no column codes, only item_id, sid"),
        ({"item_id": [1], "codes": [[1]]}, "the column item_id holds Int64 with 0 nulls"),
        ({"item_id": ["a", None], "codes": [[1], [1]]}, "the column item_id holds String with 1 nulls"),
        ({"item_id": ["a"], "codes": [None]}, "the item 'a' has None, which is no SID"),
        ({"item_id": ["a"], "codes": [[1, None]]}, r"the item 'a' has \[1, None\], which is no SID"),
    ],
)
def test_a_table_of_other_columns_or_with_nulls_is_refused(tmp_path, columns: dict[str, Any], reason: str):
    with pytest.raises(StageError, match=rf"sids.parquet:? {reason}"):
        read_sids(parquet(tmp_path, **columns), ["a"])


def test_sids_too_long_to_be_packed_are_refused_before_anything_is_made_of_them(tmp_path):
    with pytest.raises(StageError, match=r"sids.json: 8 levels of 1001 codes need 80 bits.*: make shorter SIDs"):
        read_sids(written(tmp_path, {"a": [1000] * 8}), ["a"])


def test_other_endings_are_refused_both_ways(tmp_path):
    path = tmp_path / "sids.csv"
    with pytest.raises(StageError, match=r"sids.csv is no file of SIDs: its name must end in .json or .parquet"):
        read_sids(path, ["a"])
    with pytest.raises(StageError, match=r"sids.csv is no file of SIDs"):
        write_sids(path, ["a"], np.zeros((1, 1), np.uint16), SidSpace(1, 2))


@pytest.mark.parametrize("ending", TYPES)
def test_nothing_is_written_of_sids_that_are_not_one_for_each_item(tmp_path, ending: str):
    path, space = tmp_path / f"sids{ending}", SidSpace(2, 4)
    for ids, codes, reason in (
        (["a"], np.zeros((2, 2)), "1 item ids do not fit 2 SIDs"),
        ([], np.zeros((0, 2)), "0 item ids do not fit 0 SIDs"),
        (["a", "a"], np.zeros((2, 2)), "the item 'a' comes twice"),
    ):
        with pytest.raises(StageError, match=re.escape(f"{path}: {reason}")):
            write_sids(path, ids, codes.astype(np.uint16), space)
    with pytest.raises(SidError, match="code 4 is outside this codebook"):
        write_sids(path, ["a"], np.full((1, 2), 4, np.uint16), space)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "sids.json"
    with pytest.raises(StageError, match=re.escape(f"{path} cannot be written")):
        write_sids(path, ["a"], np.zeros((1, 1), np.uint16), SidSpace(1, 2))
