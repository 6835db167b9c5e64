"""The `data` stage: interactions and items as people have them become one validated `Dataset`.

First in the flow: `data` → vectors → collaborative → tokenizer → sft → evaluate → publish. It reads a directory with
one `interactions.csv|parquet` and one `items.csv|jsonl|parquet`, and refuses what it cannot read, naming file, row,
column, value and remedy. It knows nothing of item vectors, Semantic IDs or models.

No order in the dataset comes from the ids: items, users and events at the same time are shuffled by (seed, row
position) alone, so that relabelling every item changes the labels and nothing else.
"""

import codecs
import csv
import hashlib
import io
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field

from training.sequences import Sequences
from training.stage import StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically

EVENT_TYPES = ("impression", "click", "purchase", "like", "dislike", "hide")
TRAINING_EVENT_TYPES = ("click", "purchase", "like")
DEFAULT_EVENT_TYPE = "click"
MAX_ID_CHARACTERS = 128
CATEGORY_SEPARATOR = "|"
LEVEL_SEPARATOR = " > "
SKIPPED_ROWS_FILE = "skipped_rows.csv"

NUM_PROBLEMS_SHOWN = 20
NUM_VALUE_CHARACTERS_SHOWN = 200

REQUIRED_COLUMNS = {"interactions": ("user_id", "item_id", "timestamp"), "items": ("item_id", "title")}
OPTIONAL_COLUMNS = {"interactions": ("event_type",), "items": ("categories", "description", "brand", "…")}
FILE_TYPES = {"interactions": ("csv", "parquet"), "items": ("csv", "jsonl", "parquet")}
FileName = Literal["interactions", "items"]
SplitName = Literal["test", "validation", "cold"]


class DataConfig(StageConfig):
    """How raw interactions become the dataset."""

    added_later = frozenset({"cold_share"})

    k_core: int = Field(1, ge=1, description="keep users and items with at least so many events each; 1 keeps all")
    seed: int = Field(0, ge=0, description="of the shuffles of items, users and events at the same time")
    skip_bad_rows: bool = Field(False, description="drop and list the rows that are not valid, instead of stopping")
    cold_share: float = Field(
        0.0, ge=0, lt=1, description="of the items with events: out of all training, for evaluate.split=cold"
    )


class RemovedByKCore(Summary):
    """What the k-core took out of the events, one-event users among them; the items stay in the catalogue."""

    users: int
    items: int
    events: int


class DataSummary(Summary):
    """What the dataset holds, and everything that was left out of it."""

    num_users: int
    num_items: int
    num_events: int
    events_by_type: dict[str, int]
    mean_length: float  # events of a user
    median_length: float
    max_length: int
    density: float  # share of all (user, item) pairs that have an event
    repeat_share: float  # share of the events that repeat an item of the same user
    items_without_events: int
    items_without_title: int
    training_only_users: int  # two events: too few to hold any out
    users_without_training_events: int  # only impressions, dislikes and hides
    ignored_events: dict[str, int]  # by type: legal, but nothing to train on
    removed_by_k_core: RemovedByKCore
    skipped_rows: dict[str, int]  # by reason; each row is in skipped_rows.csv
    cold_items: int = 0
    cold_events: int = 0  # events of cold items: in no training sequence and in no history
    cold_users: int = 0  # users of the cold split


@dataclass(frozen=True)
class EvaluationSplit:
    """One held-out event for each user that has one, and what came before it."""

    users: npt.NDArray[np.int64]  # (evaluated users,), ascending
    histories: Sequences  # (evaluated users,), oldest first
    targets: npt.NDArray[np.int32]  # (evaluated users,)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Items with their text, and every user's training events in time order.

    Item index i means the same in every field, and user index u likewise. Items without events (below the k-core, or
    never seen) are in the catalogue like all others, and so are the cold items, whose events are in `sequences` but in
    nothing that is learnt from or shown as a history: `train` and `evaluation` leave them out.
    """

    item_ids: list[str]  # (N,)
    titles: list[str]  # (N,), "" where there is none
    categories: list[list[str]]  # (N,), each a path such as "Beauty > Makeup > Nails"
    attributes: list[dict[str, str]]  # (N,), further text by column name: description, brand, …
    user_ids: list[str]  # (users,)
    sequences: Sequences  # (users,), oldest first
    timestamps: npt.NDArray[np.float64]  # (events,), seconds, beside `sequences.items`
    event_types: npt.NDArray[np.uint8]  # (events,), index into EVENT_TYPES, beside `sequences.items`
    cold_items: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # ascending

    @property
    def num_items(self) -> int:
        """N: all items of the catalogue, with or without events."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        """Users with at least two training events."""
        return len(self.user_ids)

    @cached_property
    def is_cold(self) -> npt.NDArray[np.bool_]:
        """Which items are cold, (N,)."""
        is_cold = np.zeros(self.num_items, np.bool_)
        is_cold[self.cold_items] = True
        return is_cold

    def train(self) -> Sequences:
        """Leave-one-out: users with three or more events lose their last two, users with two keep both.

        With cold items their events are left out, and users who have no other ones.
        """
        lengths = self.sequences.lengths
        train = self.sequences.slice_each(np.zeros_like(lengths), np.where(lengths >= 3, lengths - 2, lengths))
        if not len(self.cold_items):
            return train
        warm = self._without_cold(train)
        return warm.select(np.flatnonzero(warm.lengths))

    def evaluation(self, split: SplitName) -> EvaluationSplit:
        """The event before last (validation) or the last (test, cold) of each user with at least three, with a history.

        The targets of the cold split are the cold items, and those of the other two the rest. Cold items are in no
        history, and a user for whom nothing else is left is in no split.
        """
        held_out = {"validation": 2, "test": 1, "cold": 1}[split]
        users = np.flatnonzero(self.sequences.lengths >= 3)
        targets = self.sequences.items[self.sequences.offsets[1:][users] - held_out]
        histories = self.sequences.select(users).without_last(held_out)
        if not len(self.cold_items) and split != "cold":
            return EvaluationSplit(users, histories, targets)
        histories = self._without_cold(histories)
        rows = np.flatnonzero((self.is_cold[targets] == (split == "cold")) & (histories.lengths > 0))
        return EvaluationSplit(users[rows], histories.select(rows), targets[rows])

    def _without_cold(self, sequences: Sequences) -> Sequences:
        return sequences.where(~self.is_cold[sequences.items])

    def save(self, path: Path) -> None:
        """Write `items.parquet`, `users.parquet` and `events.parquet` into the folder, each whole or not at all."""
        path.mkdir(parents=True, exist_ok=True)
        texts = [json.dumps(attributes, ensure_ascii=False) for attributes in self.attributes]
        items = {"item_id": self.item_ids, "title": self.titles, "categories": self.categories, "attributes": texts}
        catalogue = pl.DataFrame(items, schema=_ITEMS_SCHEMA)
        if len(self.cold_items):
            catalogue = catalogue.with_columns(is_cold=pl.Series(self.is_cold))
        _write(path / "items.parquet", catalogue.write_parquet)
        users = {"user_id": self.user_ids, "num_events": self.sequences.lengths}
        _write(path / "users.parquet", pl.DataFrame(users, schema=_USERS_SCHEMA).write_parquet)
        types = pl.Series(EVENT_TYPES).gather(self.event_types)
        events = {"item": self.sequences.items, "timestamp": self.timestamps, "event_type": types}
        _write(path / "events.parquet", pl.DataFrame(events).write_parquet)

    @classmethod
    def load(cls, path: Path) -> "Dataset":
        """The dataset that `save` wrote into the folder `path`."""
        try:
            items, users, events = (pl.read_parquet(path / f"{name}.parquet") for name in ("items", "users", "events"))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise StageError(f"{path} holds no readable dataset ({error}); run the data stage again") from error
        return cls(
            item_ids=items["item_id"].to_list(),
            titles=items["title"].to_list(),
            categories=items["categories"].to_list(),
            attributes=[json.loads(attributes) for attributes in items["attributes"].to_list()],
            user_ids=users["user_id"].to_list(),
            sequences=Sequences(_offsets(users["num_events"].to_numpy()), events["item"].to_numpy().astype(np.int32)),
            timestamps=events["timestamp"].to_numpy(),
            event_types=events["event_type"].cast(pl.Enum(EVENT_TYPES)).to_physical().to_numpy().astype(np.uint8),
            cold_items=np.flatnonzero(items["is_cold"]) if "is_cold" in items.columns else np.empty(0, np.int64),
        )


_ITEMS_SCHEMA = {
    "item_id": pl.String(),
    "title": pl.String(),
    "categories": pl.List(pl.String),
    "attributes": pl.String(),  # JSON: names differ from item to item
}
_USERS_SCHEMA = {"user_id": pl.String, "num_events": pl.Int64}


def run(config: DataConfig, data_dir: Path, folder: StageFolder) -> DataSummary:
    """Validate the two files of `data_dir`, write the `Dataset` into the stage's folder and mark it done.

    Raises StageError: at once for a missing file or column, otherwise for all bad rows together, unless
    `skip_bad_rows`, which drops them, lists them in `skipped_rows.csv` and counts them in the summary.
    """
    problems = Problems()
    with progress_bar("data", total=4) as bar:
        bar.note("reading items")
        catalogue = read_items(find_input(data_dir, "items"), problems)
        bar.advance()
        bar.note("reading interactions")
        interactions = read_interactions(find_input(data_dir, "interactions"), catalogue, config, problems)
        if problems and not config.skip_bad_rows:
            raise StageError(problems.message(data_dir))
        if problems:
            _write(folder.path / SKIPPED_ROWS_FILE, problems.as_listed().write_csv)
        bar.advance()
        bar.note("ordering events")
        events = interactions.training_events()
        core = events.select(k_core(events.users, events.items, config.k_core))
        dataset = _ordered(catalogue, interactions.user_ids, core, config.seed)
        if not dataset.num_users:
            raise StageError(_nothing_left(data_dir, config, len(events), problems))
        if config.cold_share:
            dataset = _with_cold_items(dataset, config)
        summary = _summarise(dataset, interactions, events, problems)
        bar.advance()
        bar.note("writing")
        dataset.save(folder.path)
        folder.finish(summary)
        bar.advance()
        bar.note(f"{dataset.num_users:,} users, {dataset.num_items:,} items")
    return summary


def fingerprint_of(data_dir: Path) -> str:
    """SHA-256 over the names and bytes of the two input files."""
    digest = hashlib.sha256()
    for path in (find_input(data_dir, "interactions"), find_input(data_dir, "items")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def find_input(data_dir: Path, name: FileName) -> Path:
    """The one `name.*` file of the directory; none, or more than one, is an error."""
    wanted = [f"{name}.{file_type}" for file_type in FILE_TYPES[name]]
    if not data_dir.is_dir():
        raise StageError(f"{data_dir} is not a directory; give the one with interactions.* and items.* in it")
    found = [file for file in wanted if (data_dir / file).is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in data_dir.iterdir())[:NUM_PROBLEMS_SHOWN]) or "nothing"
        raise StageError(f"{data_dir} has no {name} file (it holds {there}); add one of {', '.join(wanted)}")
    if len(found) > 1:
        raise StageError(f"{data_dir} has both {' and '.join(found)}; keep the one that is meant, move the other away")
    return data_dir / found[0]


# Bad rows


@dataclass(frozen=True)
class Rule:
    """What is asked of a row, and how a row that breaks it is put right."""

    demand: str
    remedy: str


RULES = {
    "not UTF-8": Rule(
        "files are UTF-8 text", "convert the file, for example `iconv -f WINDOWS-1252 -t UTF-8 old.csv > new.csv`"
    ),
    "misplaced quote": Rule(
        "a double quote opens or closes a whole field", 'write a field with quotes in it as "5"" nail", quotes doubled'
    ),
    "wrong number of fields": Rule(
        "each row has as many fields as the header", "put a field with a comma in it between double quotes"
    ),
    "malformed JSON": Rule("each line is one JSON object", "write every item as one JSON object on one line"),
    "empty id": Rule("an id has at least one character", "fill it in or remove the row"),
    "id with outer whitespace": Rule("an id neither begins nor ends with whitespace", "strip it in both files"),
    "id too long": Rule(f"an id has at most {MAX_ID_CHARACTERS} characters", "shorten it in both files"),
    "id is not text": Rule("an id is a string (or an integer)", "write it as a string"),
    "duplicate item": Rule("each item has one row", "keep one of the two rows"),
    "nested value": Rule("only categories may hold lists", "flatten the value into one string, or remove the column"),
    "malformed categories": Rule(
        'categories are paths: in CSV "A > B|C > D", elsewhere also ["A > B", "C > D"] or [["A", "B"], ["C", "D"]]',
        "write them in one of these forms",
    ),
    "no timestamp": Rule("each interaction has a time", "fill it in or remove the row"),
    "unreadable timestamp": Rule(
        "a timestamp is a number of seconds or an ISO-8601 time", "write it as 1719830000 or 2024-07-01T10:33:20Z"
    ),
    "timestamp not finite": Rule("a timestamp is finite", "fill in the time or remove the row"),
    "unknown event type": Rule(
        f"an event type is one of {', '.join(EVENT_TYPES)} (empty: {DEFAULT_EVENT_TYPE})", "rename it or remove the row"
    ),
    "unknown item": Rule("each item of an interaction has a row in items.*", "add the item or remove the interaction"),
    "item was skipped": Rule("the item's own row is valid", "correct the item's row"),
    "duplicate interaction": Rule(
        "no two rows share user, item, timestamp and event type", "remove the repetition, or give it its own timestamp"
    ),
    "one-event user": Rule(
        f"a user has at least two training events ({', '.join(TRAINING_EVENT_TYPES)})",
        "remove the user, or let k_core=2 remove and count such users",
    ),
}

_PROBLEM_SCHEMA = {
    "file": pl.String,
    "row": pl.Int64,
    "column": pl.String,
    "value": pl.String,
    "reason": pl.String,
    "detail": pl.String,
}


class Problems:
    """All bad rows found so far, each once: file, row, column, value, reason (a key of RULES) and detail."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, str, str, str, str]] = []
        self._frames: list[pl.DataFrame] = []

    def __bool__(self) -> bool:
        return bool(self._rows or self._frames)

    def add(self, file: str, row: int, column: str, value: str, reason: str, detail: str = "") -> None:
        """Add one bad row; no column where it is the whole row."""
        self._rows.append((file, row, column, value, reason, detail))

    def add_all(self, rows: pl.DataFrame) -> None:
        """Add bad rows with these six columns."""
        if len(rows):
            self._frames.append(rows.select(pl.col(name).cast(dtype) for name, dtype in _PROBLEM_SCHEMA.items()))

    def counts(self) -> dict[str, int]:
        """Bad rows by reason, the most frequent first."""
        counted = (
            self._table()
            .group_by("reason", maintain_order=True)
            .len()
            .sort("len", descending=True, maintain_order=True)
        )
        return {str(reason): int(count) for reason, count in counted.iter_rows()}

    def as_listed(self) -> pl.DataFrame:
        """The rows of `skipped_rows.csv`: file, row, column, value, reason."""
        detail = pl.when(pl.col("detail") == "").then(pl.lit("")).otherwise(pl.format(" ({})", "detail"))
        value = pl.col("value").str.slice(0, NUM_VALUE_CHARACTERS_SHOWN)
        return self._table().with_columns(value=value, reason=pl.col("reason") + detail).drop("detail")

    def message(self, data_dir: Path) -> str:
        """The first of them, the rules they break and the ways out, for the person who has to correct them."""
        listed, counts = self.as_listed(), self.counts()
        lines = [f"{len(listed):,} bad row{'' if len(listed) == 1 else 's'} in {data_dir}:"]
        for file, row, column, value, reason in listed.head(NUM_PROBLEMS_SHOWN).iter_rows():
            lines.append(f"  {file}, {_place(file, row)}{f', {column}' if column else ''}: {reason}: {value!r}")
        if len(listed) > NUM_PROBLEMS_SHOWN:
            lines.append(f"  … and {len(listed) - NUM_PROBLEMS_SHOWN:,} more")
        lines.append("What is asked, and what to do:")
        for reason, count in counts.items():
            lines.append(f"  {reason} ({count:,}): {RULES[reason].demand}; {RULES[reason].remedy}")
        lines.append(
            "Correct these rows, or run again with --skip-bad-rows (skip_bad_rows=true) to leave them out; "
            f"every row left out is then listed in {SKIPPED_ROWS_FILE}."
        )
        return "\n".join(lines)

    def _table(self) -> pl.DataFrame:
        single = pl.DataFrame(self._rows, schema=_PROBLEM_SCHEMA, orient="row")
        return pl.concat([single, *self._frames]).sort("file", "row", descending=[True, False], maintain_order=True)


def _place(file: str, row: int) -> str:
    """Where an editor shows the row: the 1-based line of a text file, the 0-based row of a Parquet file."""
    return f"{_row_word(file)} {row}"


def _row_word(file: str) -> str:
    return "row" if file.endswith(".parquet") else "line"


# Items


@dataclass(frozen=True)
class Catalogue:
    """The items of `items.*` in the file's row order."""

    item_ids: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    categories: list[list[str]] = field(default_factory=list)
    attributes: list[dict[str, str]] = field(default_factory=list)
    rejected_ids: set[str] = field(default_factory=set)
    """Ids of bad rows: their interactions follow them, they are not unknown."""


def read_items(path: Path, problems: Problems) -> Catalogue:
    """All valid items; bad rows go to `problems`, and of two rows with one id the second is the bad one."""
    catalogue = Catalogue()
    first_row: dict[str, int] = {}
    for row, record in _item_records(path, problems):
        try:
            identity = _identity(record.get("item_id"))
            _check_new(identity, first_row, path.name)
            title = _text("title", record.get("title"))
            categories = _category_paths(record.get("categories"))
            attributes = {name: _text(name, value) for name, value in record.items() if name not in _ITEM_FIELDS}
        except _BadValueError as bad:
            problems.add(path.name, row, bad.column, str(bad.value), bad.reason, bad.detail)
            if bad.column != "item_id":
                catalogue.rejected_ids.add(str(record["item_id"]))
            continue
        first_row[identity] = row
        catalogue.item_ids.append(identity)
        catalogue.titles.append(title)
        catalogue.categories.append(categories)
        catalogue.attributes.append({name: text for name, text in attributes.items() if text})
    catalogue.rejected_ids.difference_update(first_row)
    return catalogue


_ITEM_FIELDS = frozenset({"item_id", "title", "categories"})


class _BadValueError(Exception):
    """A field of an item breaks a rule."""

    def __init__(self, column: str, value: object, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.column, self.value, self.reason, self.detail = column, value, reason, detail


def _identity(value: object) -> str:
    if value is None or value == "":
        raise _BadValueError("item_id", "", "empty id")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadValueError("item_id", value, "id is not text")
    identity = str(value)
    if identity != identity.strip():
        raise _BadValueError("item_id", identity, "id with outer whitespace")
    if len(identity) > MAX_ID_CHARACTERS:
        raise _BadValueError("item_id", identity, "id too long", f"{len(identity)} characters")
    return identity


def _check_new(identity: str, first_row: dict[str, int], file: str) -> None:
    if identity in first_row:
        raise _BadValueError("item_id", identity, "duplicate item", f"first in {_place(file, first_row[identity])}")


def _text(column: str, value: object) -> str:
    """A string or number as text; missing (null, NaN) is the empty text."""
    match value:
        case None:
            return ""
        case str():
            return value.strip()
        case bool():
            return "true" if value else "false"
        case float():
            if math.isnan(value):
                return ""
            return str(int(value)) if value.is_integer() else str(value)
        case int() | Decimal():
            return str(value)
        case _:
            raise _BadValueError(column, value, "nested value")


def _category_paths(value: object) -> list[str]:
    """The distinct paths in order, levels joined by " > "."""
    match value:
        case None:
            return []
        case str():
            paths: list[object] = list(value.split(CATEGORY_SEPARATOR))
        case list():
            paths = value
        case _:
            raise _BadValueError("categories", value, "malformed categories")
    normal: dict[str, None] = {}
    for path in paths:
        levels = path.split(LEVEL_SEPARATOR) if isinstance(path, str) else path
        if not isinstance(levels, list) or not all(isinstance(level, str) for level in levels):
            raise _BadValueError("categories", value, "malformed categories")
        stripped = (level.strip() for level in levels)
        normal[LEVEL_SEPARATOR.join(level for level in stripped if level)] = None
    normal.pop("", None)
    return list(normal)


def _item_records(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    """Row number and fields of each item that can be parsed at all."""
    if path.suffix == ".jsonl":
        return _json_records(path, problems)
    table = _read_table(path, "items", problems)
    for name, dtype in table.frame.schema.items():
        if name != "categories" and not (dtype.is_numeric() or isinstance(dtype, _TEXT_TYPES)):
            raise StageError(
                f"{path}: column {name!r} is of type {dtype}; only strings and numbers can be item text; "
                "cast the column to a string or remove it"
            )
    records = table.frame.iter_rows(named=True)
    return zip(table.rows.tolist(), records, strict=True)


_TEXT_TYPES = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)


def _json_records(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    columns: dict[str, None] = {}
    records: list[tuple[int, dict[str, object]]] = []
    num_rows = 0
    for row, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        num_rows += 1
        try:
            record = _json_object(line)
        except UnicodeDecodeError:
            problems.add(path.name, row, "", _shown(line), "not UTF-8")
        except (ValueError, TypeError, RecursionError) as error:
            problems.add(path.name, row, "", _shown(line), "malformed JSON", str(error))
        else:
            columns.update(dict.fromkeys(record))
            records.append((row, record))
    if not num_rows:
        raise StageError(_no_rows(path))
    if records:
        _check_columns(path, "items", list(columns))
    return iter(records)


def _json_object(line: bytes) -> dict[str, object]:
    record = json.loads(line.decode(), parse_constant=_no_json)
    if not isinstance(record, dict):
        raise TypeError(f"a {type(record).__name__} instead of an object")
    if rb"\u" in line:
        json.dumps(record, ensure_ascii=False).encode()  # raises ValueError for half of a surrogate pair
    return record


def _no_json(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON value")


# Interactions


@dataclass(frozen=True)
class Events:
    """Training events in file order, as indices."""

    users: npt.NDArray[np.int64]  # (events,), index into `Interactions.user_ids`
    items: npt.NDArray[np.int64]  # (events,), row in the catalogue
    timestamps: npt.NDArray[np.float64]  # (events,), seconds
    types: npt.NDArray[np.uint8]  # (events,), index into EVENT_TYPES

    def __len__(self) -> int:
        return len(self.users)

    def select(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "Events":
        """The events of a mask, or of indices in their order."""
        return Events(self.users[chosen], self.items[chosen], self.timestamps[chosen], self.types[chosen])


@dataclass(frozen=True)
class Interactions:
    """All valid interactions, of every event type, in file order."""

    user_ids: list[str]
    """By first appearance in the file."""
    rows: pl.DataFrame
    """row (as a person sees it), user (index into `user_ids`), item (row in the catalogue), seconds, type."""

    def training_events(self) -> Events:
        """The clicks, purchases and likes."""
        rows = self.rows.filter(_IS_TRAINING)
        return Events(
            users=rows["user"].to_numpy().astype(np.int64),
            items=rows["item"].to_numpy().astype(np.int64),
            timestamps=rows["seconds"].to_numpy(),
            types=rows["type"].to_physical().to_numpy().astype(np.uint8),
        )


_IS_TRAINING = pl.col("type").is_in(TRAINING_EVENT_TYPES)
_IS_BROKEN = pl.col("broken").is_not_null()


def read_interactions(path: Path, catalogue: Catalogue, config: DataConfig, problems: Problems) -> Interactions:
    """The valid rows of `interactions.*`; a bad one goes to `problems`, under the first rule that it breaks."""
    table = _read_table(path, "interactions", problems)
    frame = _with_text(path, table.frame.with_columns(row=pl.Series(table.rows, dtype=pl.Int64)))
    frame = _with_seconds(path, frame)
    user_ids = frame["user_id"].unique(maintain_order=True).to_list()
    frame = frame.with_columns(
        user=_index_in(user_ids, "user_id"),
        item=_index_in([*catalogue.item_ids, *sorted(catalogue.rejected_ids)], "item_id"),
        type=pl.col("event_type").cast(pl.Enum(EVENT_TYPES), strict=False),
    )
    frame = _without_bad_values(path, frame, catalogue, config, problems)
    frame = _without_duplicates(path, frame, problems)
    if config.k_core == 1:
        frame = _without_one_event_users(path, frame, user_ids, config, problems)
    return Interactions(user_ids, frame.filter(~_IS_BROKEN).select("row", "user", "item", "seconds", "type"))


def _with_text(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    """Ids and event types as strings; what is missing is the empty string, a missing event type is a click."""
    for name in ("user_id", "item_id", "event_type"):
        dtype = frame.schema.get(name, pl.String())
        if not (dtype.is_integer() or isinstance(dtype, (pl.String, pl.Categorical, pl.Enum, pl.Null))):
            raise StageError(f"{path}: column {name!r} is of type {dtype}; cast it to a string")
    event_type = pl.col("event_type") if "event_type" in frame.columns else pl.lit(None)
    return frame.with_columns(
        pl.col("user_id", "item_id").cast(pl.String).fill_null(""),
        event_type=event_type.cast(pl.String).replace("", None).fill_null(DEFAULT_EVENT_TYPE),
    )


_ISO_8601 = r"^(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2})(?::(\d{2}(?:\.\d+)?))?(Z|[+-]\d{2}:?\d{2})?)?$"


def _with_seconds(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    """Add `seconds`: the timestamp as a float, null where it cannot be read. An ISO time without a zone is UTC."""
    dtype, raw = frame.schema["timestamp"], pl.col("timestamp")
    if isinstance(dtype, (pl.Datetime, pl.Date)):
        return frame.with_columns(seconds=raw.cast(pl.Datetime("us")).dt.epoch("us") / 1e6)
    if not (dtype.is_numeric() or isinstance(dtype, (pl.String, pl.Null))):
        raise StageError(f"{path}: column 'timestamp' is of type {dtype}; write seconds or ISO-8601 times")
    frame = frame.with_columns(seconds=raw.cast(pl.Float64, strict=False))
    if not isinstance(dtype, pl.String) or not frame["seconds"].null_count():
        return frame
    date, time, second, zone = (raw.str.extract_groups(_ISO_8601).struct.field(str(group)) for group in range(1, 5))
    spelled_out = pl.format(
        "{}T{}:{}{}", date, time.fill_null("00:00"), second.fill_null("00"), zone.replace("Z", None).fill_null("+0000")
    )
    moment = spelled_out.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", strict=False)
    return frame.with_columns(seconds=pl.coalesce("seconds", moment.dt.epoch("us") / 1e6))


def _index_in(known: list[str], column: str) -> pl.Expr:
    """Position in `known` of each value of the column, null where it is not in there."""
    return pl.col(column).cast(pl.Enum(known), strict=False).to_physical()


@dataclass(frozen=True)
class _Check:
    column: str
    reason: str
    is_broken: pl.Expr


def _without_bad_values(
    path: Path, frame: pl.DataFrame, catalogue: Catalogue, config: DataConfig, problems: Problems
) -> pl.DataFrame:
    """Add `broken`: the first rule, if any, that the row breaks by itself; report each row that has one."""
    ids = [check for column in ("user_id", "item_id") for check in _id_checks(column)]
    checks = [
        *ids,
        _Check("timestamp", "no timestamp", pl.col("timestamp").cast(pl.String).fill_null("") == ""),
        _Check("timestamp", "unreadable timestamp", pl.col("seconds").is_null()),
        _Check("timestamp", "timestamp not finite", ~pl.col("seconds").is_finite()),
        _Check("event_type", "unknown event type", pl.col("type").is_null()),
        _Check("item_id", "unknown item", pl.col("item").is_null()),
    ]
    if config.skip_bad_rows:
        # Otherwise the item's own row is reported, and its interactions are right once that is corrected.
        checks.append(_Check("item_id", "item was skipped", pl.col("item") >= len(catalogue.item_ids)))
    rules = [pl.when(check.is_broken).then(pl.lit(rule, pl.UInt8)) for rule, check in enumerate(checks)]
    frame = frame.with_columns(broken=pl.coalesce(rules))
    bad = frame.filter(_IS_BROKEN)
    for rule, check in enumerate(checks):
        _report(path, bad.filter(pl.col("broken") == rule), check.column, check.reason, problems)
    return frame


def _id_checks(column: str) -> tuple[_Check, ...]:
    value = pl.col(column)
    return (
        _Check(column, "empty id", value == ""),
        _Check(column, "id with outer whitespace", value != value.str.strip_chars()),
        _Check(column, "id too long", value.str.len_chars() > MAX_ID_CHARACTERS),
    )


def _report(path: Path, bad: pl.DataFrame, column: str, reason: str, problems: Problems, detail: str = "") -> None:
    """Report rows with the value of one column; `detail` names a column with what else is to be said."""
    problems.add_all(
        bad.select(
            "row",
            file=pl.lit(path.name),
            column=pl.lit(column),
            value=pl.col(column).cast(pl.String).fill_null(""),
            reason=pl.lit(reason),
            detail=pl.col(detail) if detail else pl.lit(""),
        ),
    )


def _without_duplicates(path: Path, frame: pl.DataFrame, problems: Problems) -> pl.DataFrame:
    """Break all but the first of the rows that share user, item, time and event type."""
    identity = ["user", "item", "seconds", "type"]
    is_repeated = ~_IS_BROKEN & ~pl.struct("broken", *identity).is_first_distinct()
    frame = frame.with_columns(is_repeated=is_repeated)
    repeated = frame.filter("is_repeated")
    if len(repeated):
        first = frame.filter(~_IS_BROKEN & ~pl.col("is_repeated")).select(*identity, first="row")
        repeated = repeated.join(first, on=identity, how="left", maintain_order="left")
        repeated = repeated.with_columns(detail=pl.format(f"the same as {_row_word(path.name)} {{}}", "first"))
        _report(path, repeated, "item_id", "duplicate interaction", problems, detail="detail")
    return _broken_where(frame, pl.col("is_repeated"))


def _without_one_event_users(
    path: Path, frame: pl.DataFrame, user_ids: list[str], config: DataConfig, problems: Problems
) -> pl.DataFrame:
    """Break the only training event of a user.

    Bad rows that will be corrected count as events, so that nobody is sent to correct what follows from them.
    """
    counts = ~_IS_BROKEN & _IS_TRAINING if config.skip_bad_rows else _IS_BROKEN | _IS_TRAINING
    num_events = np.bincount(frame.filter(counts)["user"].to_numpy(), minlength=len(user_ids))
    has_one = pl.Series(num_events == 1).gather(frame["user"])
    is_only = ~_IS_BROKEN & _IS_TRAINING & has_one
    _report(path, frame.filter(is_only), "user_id", "one-event user", problems)
    return _broken_where(frame, is_only)


def _broken_where(frame: pl.DataFrame, condition: pl.Expr) -> pl.DataFrame:
    return frame.with_columns(broken=pl.when(condition).then(pl.lit(255, pl.UInt8)).otherwise("broken"))


# From rows to the dataset


def k_core(users: npt.NDArray[np.int64], items: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.bool_]:
    """The largest set of events in which each user and each item has at least `k`, as a mask, (events,).

    Repeats count: two purchases of one item are two events.
    """
    kept = np.ones(len(users), np.bool_)
    while True:
        frequent_user = np.bincount(users[kept], minlength=1) >= k
        frequent_item = np.bincount(items[kept], minlength=1) >= k
        stays = frequent_user[users[kept]] & frequent_item[items[kept]]
        if stays.all():
            return kept
        kept[kept] = stays


def _ordered(catalogue: Catalogue, user_ids: list[str], events: Events, seed: int) -> Dataset:
    """Shuffle items and users, and order each user's events by time, those at the same time by a shuffle."""
    item_of_row, row_of_item = _shuffle(np.arange(len(catalogue.item_ids)), seed, 0)
    user_of_code, code_of_user = _shuffle(np.flatnonzero(np.bincount(events.users)), seed, 1)
    users = user_of_code[events.users]
    tie_breaker = np.random.default_rng((seed, 2)).permutation(len(events))
    keys = pl.DataFrame({"user": users, "timestamp": events.timestamps, "tie_breaker": tie_breaker})
    events = events.select(keys.select(order=pl.arg_sort_by(*keys.columns))["order"].to_numpy().astype(np.int64))
    lengths = np.bincount(users, minlength=len(code_of_user))
    return Dataset(
        item_ids=[catalogue.item_ids[row] for row in row_of_item],
        titles=[catalogue.titles[row] for row in row_of_item],
        categories=[catalogue.categories[row] for row in row_of_item],
        attributes=[catalogue.attributes[row] for row in row_of_item],
        user_ids=[user_ids[code] for code in code_of_user],
        sequences=Sequences(_offsets(lengths), item_of_row[events.items].astype(np.int32)),
        timestamps=events.timestamps,
        event_types=events.types,
    )


def _shuffle(
    codes: npt.NDArray[np.int64], seed: int, stream: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The new index of each code (valid at `codes` only), and the code at each new index."""
    shuffled = np.random.default_rng((seed, stream)).permutation(codes)
    index = np.zeros(codes.max(initial=-1) + 1, np.int64)
    index[shuffled] = np.arange(len(shuffled))
    return index, shuffled


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def _summarise(dataset: Dataset, interactions: Interactions, events: Events, problems: Problems) -> DataSummary:
    lengths, items = dataset.sequences.lengths, dataset.sequences.items
    pairs = np.repeat(np.arange(dataset.num_users), lengths) * dataset.num_items + items
    num_items_with_events = _num_distinct(items)
    num_pairs = pl.Series(pairs).n_unique()
    ignored = interactions.rows.filter(~_IS_TRAINING)["type"].to_physical().to_numpy()
    num_users_seen = interactions.rows["user"].n_unique()
    num_training_users = _num_distinct(events.users)
    return DataSummary(
        num_users=dataset.num_users,
        num_items=dataset.num_items,
        num_events=len(items),
        events_by_type=_count_types(dataset.event_types),
        mean_length=float(lengths.mean()),
        median_length=float(np.median(lengths)),
        max_length=int(lengths.max()),
        density=num_pairs / (dataset.num_users * dataset.num_items),
        repeat_share=1 - num_pairs / len(items),
        items_without_events=dataset.num_items - num_items_with_events,
        items_without_title=dataset.titles.count(""),
        training_only_users=int((lengths == 2).sum()),
        users_without_training_events=num_users_seen - num_training_users,
        ignored_events=_count_types(ignored),
        removed_by_k_core=RemovedByKCore(
            users=num_training_users - dataset.num_users,
            items=_num_distinct(events.items) - num_items_with_events,
            events=len(events) - len(items),
        ),
        skipped_rows=problems.counts(),
        cold_items=len(dataset.cold_items),
        cold_events=int(dataset.is_cold[items].sum()),
        cold_users=len(dataset.evaluation("cold").targets),
    )


def _with_cold_items(dataset: Dataset, config: DataConfig) -> Dataset:
    """The same with `cold_share` of the items that have events as cold ones.

    They are drawn, each as likely as another, from those that are some user's test target: the others would hold
    events back from training and have nobody to be evaluated on.
    """
    share, num_with_events = config.cold_share, _num_distinct(dataset.sequences.items)
    candidates = np.unique(dataset.evaluation("test").targets)
    count = round(share * num_with_events)
    if not count:
        raise StageError(
            f"data.cold_share={share} of {num_with_events:,} items with events is no item: raise it to at least "
            f"{1 / num_with_events:.6f}, or set 0 for no cold items"
        )
    if count > len(candidates):
        raise StageError(
            f"data.cold_share={share} of {num_with_events:,} items with events is {count:,}, and only "
            f"{len(candidates):,} are the last event of a user with at least three: lower it to at most "
            f"{len(candidates) / num_with_events:.6f}"
        )
    drawn = np.random.default_rng((config.seed, 3)).choice(candidates, count, replace=False)
    dataset = replace(dataset, cold_items=np.sort(drawn).astype(np.int64))
    _refuse_too_cold(dataset, config)
    return dataset


def _refuse_too_cold(dataset: Dataset, config: DataConfig) -> None:
    left = {
        "training sequence of two events": int((dataset.train().lengths >= 2).sum()),
        "user with a validation target": len(dataset.evaluation("validation").targets),
        "user with a test target": len(dataset.evaluation("test").targets),
        "cold user, whose last event is a cold item after events of others": len(dataset.evaluation("cold").targets),
    }
    if missing := [what for what, count in left.items() if not count]:
        raise StageError(
            f"data.cold_share={config.cold_share} holds {len(dataset.cold_items):,} items out of training and leaves "
            f"no {', no '.join(missing)}: lower it, or give more interactions"
        )


def _num_distinct(codes: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> int:
    return int(np.count_nonzero(np.bincount(codes)))


def _count_types(types: npt.NDArray[np.uint8]) -> dict[str, int]:
    counts = np.bincount(types, minlength=len(EVENT_TYPES))
    return {name: int(count) for name, count in zip(EVENT_TYPES, counts, strict=True) if count}


def _nothing_left(data_dir: Path, config: DataConfig, num_events: int, problems: Problems) -> str:
    skipped = ", ".join(f"{reason}: {count:,}" for reason, count in problems.counts().items()) or "none"
    return (
        f"{data_dir}: no event is left to train on. Valid training events ({', '.join(TRAINING_EVENT_TYPES)}): "
        f"{num_events:,}, after k_core={config.k_core}: 0. Rows skipped: {skipped}. "
        + ("Lower k_core." if num_events else "Correct the rows, or add interactions of these types.")
    )


# Tables


@dataclass(frozen=True)
class _Table:
    frame: pl.DataFrame
    """From CSV every column is a string."""
    rows: npt.NDArray[np.int64]  # (rows,), where a person finds each row: see `_place`


def _read_table(path: Path, name: FileName, problems: Problems) -> _Table:
    """The rows of a CSV or Parquet file that can be told apart, its columns checked."""
    return _read_csv(path, name, problems) if path.suffix == ".csv" else _read_parquet(path, name)


def _read_parquet(path: Path, name: FileName) -> _Table:
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StageError(f"{path} cannot be read as Parquet ({error}); write the file again") from error
    _check_columns(path, name, frame.columns)
    if frame.is_empty():
        raise StageError(_no_rows(path))
    return _Table(frame, np.arange(len(frame)))


def _read_csv(path: Path, name: FileName, problems: Problems) -> _Table:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    records = _csv_records(content)
    records = records.select(~records.is_blank)
    if not len(records):
        raise StageError(_no_rows(path))
    columns = _header(path, name, content[records.starts[0] : records.ends[0]])
    records = records.select(np.arange(1, len(records)))
    if not len(records):
        raise StageError(_no_rows(path))

    is_bad = records.has_misplaced_quote | (records.num_fields != len(columns))
    is_bad[_undecodable(content, records)] = True
    for record in np.flatnonzero(is_bad):
        row, line = int(records.lines[record]), content[records.starts[record] : records.ends[record]]
        if not _is_utf8(line):
            problems.add(path.name, row, "", _shown(line), "not UTF-8")
        elif records.has_misplaced_quote[record]:
            problems.add(path.name, row, "", _shown(line), "misplaced quote")
        else:
            detail = f"{records.num_fields[record]} instead of {len(columns)}"
            problems.add(path.name, row, "", _shown(line), "wrong number of fields", detail)

    good = records.select(~is_bad)
    body = good.joined(content)
    schema = dict.fromkeys(columns, pl.String)
    try:
        frame = pl.read_csv(body, has_header=False, schema=schema) if body else pl.DataFrame(schema=schema)
    except pl.exceptions.PolarsError as error:
        raise StageError(f"{path} cannot be read as CSV ({error}); write the file again") from error
    if len(frame) != len(good):
        raise StageError(f"{path} holds {len(good):,} rows but {len(frame):,} were read; write it again as plain CSV")
    return _Table(frame, good.lines)


def _header(path: Path, name: FileName, line: bytes) -> list[str]:
    if not _is_utf8(line):
        raise StageError(f"{path}: the header {_shown(line)!r} is not UTF-8; {RULES['not UTF-8'].remedy}")
    columns = next(csv.reader(io.StringIO(line.decode().removesuffix("\r"), newline="")))
    _check_columns(path, name, columns)
    return columns


def _check_columns(path: Path, name: FileName, columns: list[str]) -> None:
    required, optional = REQUIRED_COLUMNS[name], OPTIONAL_COLUMNS[name]
    remedy = f"the columns are {','.join(required)}[,{','.join(optional)}]" + (
        ", separated by commas, named in the first line" if path.suffix == ".csv" else ""
    )
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise StageError(f"{path} has column {repeated[0]!r} more than once; keep one: {remedy}")
    missing = [column for column in required if column not in columns]
    if missing:
        raise StageError(
            f"{path} has no column {' and no column '.join(map(repr, missing))} (it has {columns}); {remedy}"
        )
    if "" in columns:
        raise StageError(f"{path}: column {columns.index('') + 1} has no name; name or remove it: {remedy}")
    unknown = [column for column in columns if column not in (*required, *optional)]
    if unknown and name == "interactions":
        raise StageError(f"{path} has an unknown column {unknown[0]!r}; rename or remove it: {remedy}")


@dataclass(frozen=True)
class _CsvRecords:
    """Where the records of a CSV file are: a newline within a quoted field ends none."""

    starts: npt.NDArray[np.int64]  # (records,), byte offset
    ends: npt.NDArray[np.int64]  # (records,), byte offset of the newline
    lines: npt.NDArray[np.int64]  # (records,), number of the first line, from 1
    num_fields: npt.NDArray[np.int64]  # (records,)
    is_blank: npt.NDArray[np.bool_]  # (records,)
    has_misplaced_quote: npt.NDArray[np.bool_]  # (records,)

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "_CsvRecords":
        return _CsvRecords(*(getattr(self, name.name)[chosen] for name in fields(self)))

    def joined(self, content: bytes) -> bytes:
        """The bytes of these records and of nothing between them."""
        follows = self.starts[1:] == self.ends[:-1] + 1
        first, last = np.append(True, ~follows), np.append(~follows, True)
        runs = zip(self.starts[first], self.ends[last], strict=True) if len(self) else ()
        return b"".join(content[start:end] + b"\n" for start, end in runs)


_NEWLINE, _RETURN, _QUOTE, _COMMA = b'\n\r",'


def _csv_records(content: bytes) -> _CsvRecords:
    """Find the records without parsing them, by the positions of newlines, quotes and commas alone."""
    buffer = np.frombuffer(content, np.uint8)
    newlines = np.flatnonzero(buffer == _NEWLINE)
    if not content.endswith(b"\n"):
        newlines = np.append(newlines, len(buffer))
    line_starts = np.append(0, newlines[:-1] + 1)
    quotes = np.flatnonzero(buffer == _QUOTE)
    misplaced = _lines_with_misplaced_quote(buffer, quotes, line_starts)
    quotes = quotes[~np.isin(_line_of(quotes, line_starts), misplaced)]

    is_end = ~_is_inside(newlines, quotes)
    is_end[-1] = True
    ends = newlines[is_end]
    starts = np.append(0, ends[:-1] + 1)
    first_lines = np.append(0, np.flatnonzero(is_end)[:-1] + 1)
    commas = np.flatnonzero(buffer == _COMMA)
    commas = commas[~_is_inside(commas, quotes)]
    is_return = (ends - starts == 1) & (buffer[np.minimum(starts, len(buffer) - 1)] == _RETURN) if content else False
    return _CsvRecords(
        starts=starts,
        ends=ends,
        lines=first_lines + 1,
        num_fields=np.searchsorted(commas, ends) - np.searchsorted(commas, starts) + 1,
        is_blank=(ends == starts) | is_return,
        has_misplaced_quote=np.isin(first_lines, misplaced),
    )


def _is_inside(positions: npt.NDArray[np.int64], quotes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether an odd number of quotes comes before each position."""
    if not len(quotes):
        return np.zeros(len(positions), np.bool_)
    is_inside: npt.NDArray[np.bool_] = np.searchsorted(quotes, positions) % 2 == 1
    return is_inside


def _line_of(positions: npt.NDArray[np.int64], line_starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.searchsorted(line_starts, positions, side="right") - 1


def _lines_with_misplaced_quote(
    buffer: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], line_starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Lines (from 0) of a record in which a quote stands where none may, or that has no closing quote.

    Quotes open and close by turns. One may open at the beginning of a field, close at its end, and next to each other
    a closing and an opening one spell a quote. Where that fails, the first line of the record is given up and reading
    goes on, outside quotes, at the next one: so one stray quote costs one line and not the rest of the file.
    """
    if not len(quotes):
        return np.empty(0, np.int64)
    before = np.where(quotes > 0, buffer[quotes - 1], _NEWLINE)
    after = np.where(quotes + 1 < len(buffer), buffer[np.minimum(quotes + 1, len(buffer) - 1)], _NEWLINE)
    cannot_open = ~np.isin(before, (_NEWLINE, _COMMA, _QUOTE))
    cannot_close = ~np.isin(after, (_NEWLINE, _RETURN, _COMMA, _QUOTE))
    is_even = np.arange(len(quotes)) % 2 == 0
    # misplaced[p]: quotes that are wrong if those with an index of parity p open.
    misplaced = [np.flatnonzero(np.where(is_even == (p == 0), cannot_open, cannot_close)).tolist() for p in (0, 1)]
    quotes_before_line = np.searchsorted(quotes, line_starts)

    lines: list[int] = []
    opening = 0  # the quote at which reading goes on, outside quotes
    while opening < len(quotes):
        wrong = misplaced[opening % 2]
        found = bisect_left(wrong, opening)
        if found < len(wrong):
            quote = wrong[found]
        elif (len(quotes) - opening) % 2:
            quote = len(quotes) - 1
        else:
            break
        line = int(_line_of(quotes[quote : quote + 1], line_starts)[0])
        while (quotes_before_line[line] - opening) % 2 and quotes_before_line[line] > opening:
            line -= 1
        lines.append(line)
        opening = int(quotes_before_line[line + 1]) if line + 1 < len(line_starts) else len(quotes)
    return np.array(lines, np.int64)


def _undecodable(content: bytes, records: _CsvRecords) -> list[int]:
    """The records with bytes that are not UTF-8."""
    if _is_utf8(content):
        return []
    beyond_ascii = np.flatnonzero(np.frombuffer(content, np.uint8) >= 0x80)
    suspects = np.unique(np.searchsorted(records.starts, beyond_ascii, side="right") - 1)
    suspects = suspects[suspects >= 0]
    return [int(record) for record in suspects if not _is_utf8(content[records.starts[record] : records.ends[record]])]


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(line: bytes) -> str:
    return line[: 4 * NUM_VALUE_CHARACTERS_SHOWN].decode(errors="backslashreplace").strip()


def _no_rows(path: Path) -> str:
    return f"{path} is empty: it holds no rows; export it again"


def _write(path: Path, write: Callable[[io.BytesIO], object]) -> None:
    content = io.BytesIO()
    write(content)
    write_atomically(path, content.getvalue())
