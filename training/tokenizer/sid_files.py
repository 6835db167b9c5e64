"""SIDs as files, to and from other tools. JSON as LETTER's authors release theirs, or Parquet.

    .json     {"B004756YJA": ["<a_183>", "<b_70>", "<c_232>", "<d_6>"], …}
    .parquet  columns `item_id` and `codes`, a list of L whole numbers

Reading also takes, in either file, a SID as one string or as a list of token strings or of whole numbers. It knows
nothing of vectors and quantisers; what a token looks like is `semantic_ids.codes`' to say.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from semantic_ids.codes import MAX_CODEBOOK_SIZE, MAX_LEVELS, Codes, SidError, SidSpace
from semantic_ids.trie import sid_keys
from training.stage import StageError, write_atomically

FILE_TYPES = (".json", ".parquet")
NUM_VALUE_CHARACTERS_SHOWN = 80


@dataclass(frozen=True, eq=False)
class GivenSids:
    """SIDs read from a file, in the order of the items that were asked for."""

    space: SidSpace
    codes: Codes  # (N, L)
    num_extra_items: int  # in the file and not asked for


def write_sids(path: Path, item_ids: Sequence[str], codes: Codes, space: SidSpace) -> None:
    """Write the SIDs (N, L) of N items, the whole file or nothing; `read_sids` reads it back.

    `StageError` for another ending than .json and .parquet, for ids that are not N different ones, and where the file
    cannot be written; `SidError` for codes outside `space`.
    """
    _check_file_type(path)
    if len(item_ids) != len(codes) or not len(codes):
        raise StageError(f"{path}: {len(item_ids)} item ids do not fit {len(codes)} SIDs: give one SID for each item")
    repeated = _first_repeated(item_ids)
    if repeated is not None:
        raise StageError(f"{path}: the item {repeated!r} comes twice: give every item one SID")
    rows = space.check(codes)
    content = _as_json(item_ids, rows, space) if path.suffix == ".json" else _as_parquet(item_ids, rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise StageError(f"{path} cannot be written: {error}") from error


def read_sids(path: Path, item_ids: Sequence[str], codebook_size: int | None = None) -> GivenSids:
    """The SIDs of `item_ids`, at least one, in that order; other items of the file are counted and not looked at.

    L is that of the first item; K is `codebook_size`, or the least that holds every code. `StageError` names file,
    item, value and rule for anything else than one SID of L levels for every item.
    """
    _check_file_type(path)
    ids, rows = _read_json(path) if path.suffix == ".json" else _read_parquet(path)
    if not ids:
        raise StageError(f"{path} is empty: it holds no SIDs; export them again")
    places = {item_id: place for place, item_id in enumerate(ids)}
    if len(places) != len(ids):
        raise StageError(f"{path}: the item {_first_repeated(ids)!r} comes twice: keep one SID of every item")
    missing = [item_id for item_id in item_ids if item_id not in places]
    if missing:
        raise StageError(
            f"{path}: {len(missing):,} of {len(item_ids):,} items have no SID, {missing[0]!r} first: "
            "give SIDs for the whole catalogue, or take these items out of the items file"
        )
    codes = _codes(path, item_ids, [rows[places[item_id]] for item_id in item_ids])
    return GivenSids(_space(path, item_ids, codes, codebook_size), codes, len(places) - len(set(item_ids)))


def _check_file_type(path: Path) -> None:
    if path.suffix not in FILE_TYPES:
        raise StageError(f"{path} is no file of SIDs: its name must end in {' or '.join(FILE_TYPES)}")


def _first_repeated(item_ids: Sequence[str]) -> str | None:
    if len(set(item_ids)) == len(item_ids):
        return None
    return next(item_id for item_id, count in Counter(item_ids).items() if count > 1)


def _as_json(item_ids: Sequence[str], codes: Codes, space: SidSpace) -> bytes:
    sids = ([space.token(level, code) for level, code in enumerate(row)] for row in codes.tolist())
    return json.dumps(dict(zip(item_ids, sids, strict=True))).encode()


def _as_parquet(item_ids: Sequence[str], codes: Codes) -> bytes:
    content = io.BytesIO()
    columns = {
        "item_id": pl.Series(item_ids, dtype=pl.String),
        "codes": pl.Series(codes).arr.to_list(),
    }
    pl.DataFrame(columns).write_parquet(content)
    return content.getvalue()


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object in the order of the file, repeated names included."""


def _read_json(path: Path) -> tuple[list[str], list[Any]]:
    try:
        content = path.read_bytes()
        members = json.loads(content, object_pairs_hook=_Pairs) if content.strip() else _Pairs()
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(members, _Pairs):
        raise StageError(
            f"{path} holds {_shown(members)}: the file must be one JSON object with each item's id as the name and its "
            "SID as the value"
        )
    return [name for name, _ in members], [value for _, value in members]


def _read_parquet(path: Path) -> tuple[list[str], list[Any]]:
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StageError(f"{path} cannot be read as Parquet: {error}") from error
    for column in ("item_id", "codes"):
        if column not in table.columns:
            found = ", ".join(table.columns)
            raise StageError(f"{path} has no column {column}, only {found}: it needs item_id and codes")
    ids = table["item_id"]
    if ids.dtype != pl.String or ids.null_count():
        raise StageError(
            f"{path}: the column item_id holds {ids.dtype} with {ids.null_count():,} nulls: "
            "write every item's id as text"
        )
    return ids.to_list(), table["codes"].to_list()


def _codes(path: Path, item_ids: Sequence[str], rows: list[Any]) -> Codes:
    """Codes (N, L) of rows that are all written in the same one of the three forms."""
    codes_of = _reader(path, item_ids[0], rows[0])
    values: list[Sequence[int]] = []
    for item_id, row in zip(item_ids, rows, strict=True):
        try:
            values.append(codes_of(row))
        except SidError as error:
            raise StageError(
                f"{path}: the item {item_id!r} has {_shown(row)}: {error}. All SIDs of a file are written like its "
                f"first one asked for, {_shown(rows[0])} of {item_ids[0]!r}: correct the file or export it again"
            ) from error
    num_levels = len(values[0])
    return np.fromiter(chain.from_iterable(values), np.uint16, len(values) * num_levels).reshape(-1, num_levels)


def _reader(path: Path, item_id: str, row: Any) -> Callable[[Any], Sequence[int]]:  # noqa: ANN401 - any JSON value
    """What reads rows of the form and number of levels of this one, the first; it raises `SidError`."""
    is_list = isinstance(row, list) and not isinstance(row, _Pairs)
    for num_levels in (len(row),) if is_list else range(1, MAX_LEVELS + 1):
        for read in (_text_codes, _token_codes, _number_codes):
            try:
                space = SidSpace(num_levels, MAX_CODEBOOK_SIZE)
                read(space, row)
            except SidError:
                continue
            return partial(read, space)
    example = SidSpace(3, MAX_CODEBOOK_SIZE).format([12, 7, 200])
    raise StageError(
        f"{path}: the item {item_id!r} has {_shown(row)}, which is no SID: a SID is a string such as {example}, the "
        f"list of its tokens, or a list of codes such as [12, 7, 200], with 1 to {MAX_LEVELS} levels in the order of "
        f"their letters and whole numbers from 0 to {MAX_CODEBOOK_SIZE - 1}: correct the file or export it again"
    )


def _text_codes(space: SidSpace, row: Any) -> Sequence[int]:  # noqa: ANN401
    if not isinstance(row, str):
        raise SidError("it is not a string")
    return space.parse(row)


def _token_codes(space: SidSpace, row: Any) -> Sequence[int]:  # noqa: ANN401
    if not isinstance(row, list) or not all(isinstance(token, str) for token in row):
        raise SidError("it is not a list of token strings")
    _check_length(space, row)
    return space.parse("".join(row))


def _number_codes(space: SidSpace, row: Any) -> Sequence[int]:  # noqa: ANN401
    if not isinstance(row, list) or any(type(code) is not int for code in row):  # a bool is an int to isinstance
        raise SidError("it is not a list of whole numbers")
    _check_length(space, row)
    bad = next((code for code in row if not 0 <= code < space.codebook_size), None)
    if bad is not None:
        raise SidError(f"the code {bad} is not from 0 to {space.codebook_size - 1}")
    return row


def _check_length(space: SidSpace, row: list[Any]) -> None:
    if len(row) != space.num_levels:
        raise SidError(f"it has {len(row)} codes and not {space.num_levels}")


def _space(path: Path, item_ids: Sequence[str], codes: Codes, codebook_size: int | None) -> SidSpace:
    highest = int(codes.max())
    if codebook_size is not None and codebook_size <= highest:
        item_id = item_ids[int(codes.max(axis=1).argmax())]
        raise StageError(
            f"{path}: the item {item_id!r} has the code {highest}, which is outside a codebook of {codebook_size} "
            f"codes: set the codebook size to at least {highest + 1}, or leave it out"
        )
    try:
        space = SidSpace(codes.shape[1], codebook_size or max(2, highest + 1))
        sid_keys(space, codes[:1])
    except SidError as error:
        raise StageError(f"{path}: {error}: make shorter SIDs or smaller codebooks") from error
    return space


def _shown(value: Any) -> str:  # noqa: ANN401
    text = repr(list(value) if isinstance(value, _Pairs) else value)
    return text if len(text) <= NUM_VALUE_CHARACTERS_SHOWN else f"{text[:NUM_VALUE_CHARACTERS_SHOWN]}…"
