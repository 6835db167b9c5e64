"""What was served and what came of it, as files: the next training set, and the log for off-policy evaluation.

`sidrec-serve export` writes a folder that `sidrec-train pipeline --data` reads: every stored history as
`interactions.csv`, and the catalogue with its live changes as `items.csv`; beside them, where answers were logged
(`served_log`), `served.csv`, one row an item shown. It reads while the service runs. Memory holds the changes of the
catalogue, a hash of each user's key, the logged outcomes, and some hundred users at a time.

What the data stage of training would refuse is left out here, and counted.
"""

import asyncio
import csv
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

from redis.asyncio import Redis

from semantic_ids.bundle import Bundle
from service.event_types import EventType
from service.histories import HistoryEntry, read_histories
from service.item_store import ItemPut, ItemStore
from service.live_catalog import holds_in
from service.redis_keys import history_pattern, user_of_history
from service.served_log import ServedAnswer, read_answers, read_outcomes

_SCAN_COUNT = 1_000
_READ_USERS = 200
"""Histories of one round trip: at most a million entries."""
_MAX_ID_CHARACTERS = 128
_CATEGORY_SEPARATOR = "|"
_STORE_TIMEOUT_S = 60.0

GONE = "events of items that no longer exist"
REPEATED = "events that repeat another in everything"
UNUSABLE = "items and users whose ids training refuses"
OF_UNUSABLE = "events of such items and users"
LONELY = "users with a single event"

_INTERACTIONS = ("user_id", "item_id", "timestamp", "event_type")
_ITEMS = ("item_id", "title", "categories")
_SERVED = (
    *("recommendation_id", "at", "tenant", "user", "bundle", "catalog_epoch", "experiment", "source", "reason"),
    *("rank", "item_id", "score", "propensity", "item_source"),
    *(event_type.value for event_type in EventType),
)

OnProgress = Callable[[int], None]
"""Told of how many more keys have been looked at, about."""


class ExportError(Exception):
    """There is nothing to export, or nowhere to put it; the text says which."""


@dataclass
class Exported:
    """What the folder holds, and what was left out of it."""

    users: int = 0
    events: int = 0
    items: int = 0
    answers: int = 0
    shown_items: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Wanted:
    """What is to be exported."""

    tenant: str | None = None
    """None: all tenants, a user then being called `<tenant>/<user>`."""
    since: float | None = None
    """Seconds since 1970: no event or answer before it."""


async def export(
    redis: Redis, bundle: Bundle, out: Path, wanted: Wanted, on_progress: OnProgress | None = None
) -> Exported:
    """Write the folder `out`, whole or not at all.

    `redis` decodes responses. Raises `ExportError` if `out` exists or nothing is stored; `HistoryUnavailableError`,
    `ItemStoreError` or `RedisError` if Redis fails; `OSError`.
    """
    if await asyncio.to_thread(os.path.lexists, out):
        raise ExportError(f"{out} exists, and nothing is overwritten: name another folder, or move it away")
    if (await redis.info("cluster")).get("cluster_enabled"):
        raise ExportError("this Redis is one node of a cluster and knows a part of the users: name a single server")
    exported = Exported()
    staging = await asyncio.to_thread(_make_staging, out)
    try:
        items = await _LiveItems.read(redis, bundle)
        exported.items = await asyncio.to_thread(_write_items, staging, items, exported.left_out)
        await _write_histories(redis, staging, items, wanted, exported, on_progress)
        await _write_served(redis, staging, wanted, exported)
        if not exported.events and not exported.answers:
            raise ExportError(_nothing_to_export(wanted, exported))
        await asyncio.to_thread(_finish, staging, out)
    finally:
        await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
    return exported


class _LiveItems:
    """The bundle's items, less those that were deleted, with those that were put. SIDs play no part."""

    def __init__(self, bundle: Bundle, put: Mapping[str, ItemPut], deleted: frozenset[str]) -> None:
        self._catalog = bundle.catalog
        self._put = put
        self._deleted = deleted

    @classmethod
    async def read(cls, redis: Redis, bundle: Bundle) -> "_LiveItems":
        changes = (await ItemStore(redis, timeout_s=_STORE_TIMEOUT_S).snapshot()).changes
        put = {one.item_id: one.put for one in changes if one.put and holds_in(bundle, one.item_id, one.put)}
        return cls(bundle, put, frozenset(one.item_id for one in changes if one.put is None))

    def __iter__(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """(item, title, category paths)."""
        catalog = self._catalog
        for rank, item_id in enumerate(catalog.item_ids):
            if item_id not in self._put and item_id not in self._deleted:
                yield item_id, catalog.titles[rank], catalog.categories_of(rank)
        for item_id, put in self._put.items():
            yield item_id, put.title, put.categories

    @property
    def has_bars(self) -> bool:
        """Whether a category's name holds what separates categories in CSV."""
        names = (*self._catalog.category_names, *(path for put in self._put.values() for path in put.categories))
        return any(_CATEGORY_SEPARATOR in name for name in names)

    def missing(self, item_ids: set[str]) -> set[str]:
        """Those that do not exist."""
        _, unknown = self._catalog.ranks_of(item_ids)
        return {item_id for item_id in unknown if item_id not in self._put} | (item_ids & self._deleted)


def _write_items(staging: Path, items: _LiveItems, left_out: Counter[str]) -> int:
    """As CSV; as JSON lines where a category holds a bar, which CSV would part in two."""
    num_items, as_json = 0, items.has_bars
    with _synced(staging / ("items.jsonl" if as_json else "items.csv")) as file:
        table = csv.writer(file, lineterminator="\n")
        if not as_json:
            table.writerow(_ITEMS)
        for item_id, title, categories in items:
            if not _is_usable(item_id):
                left_out[UNUSABLE] += 1
                continue
            num_items += 1
            if as_json:
                row = {"item_id": item_id, "title": title, "categories": list(categories)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                table.writerow((item_id, title, _CATEGORY_SEPARATOR.join(categories)))
    return num_items


async def _write_histories(
    redis: Redis, staging: Path, items: _LiveItems, wanted: Wanted, exported: Exported, on_progress: OnProgress | None
) -> None:
    with _synced(staging / "interactions.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_INTERACTIONS)
        async for users in _users(redis, wanted.tenant, on_progress):
            for start in range(0, len(users), _READ_USERS):
                some = users[start : start + _READ_USERS]
                histories = await read_histories(redis, some, wanted.since)
                named = [_user_name(wanted, *user) for user in some]
                rows = await asyncio.to_thread(_rows, items, list(zip(named, histories, strict=True)), exported)
                await asyncio.to_thread(table.writerows, rows)


async def _users(
    redis: Redis, tenant: str | None, on_progress: OnProgress | None
) -> AsyncIterator[list[tuple[str, str]]]:
    """(namespace, user) of every history that is there all the while, each once; SCAN may repeat a key."""
    told: set[bytes] = set()
    cursor = 0
    while True:
        cursor, keys = await redis.scan(cursor, match=history_pattern(tenant), count=_SCAN_COUNT)
        new = []
        for key in map(str, keys):
            digest = blake2b(key.encode(), digest_size=8).digest()
            if digest not in told and (user := user_of_history(key)) is not None:
                new.append(user)
            told.add(digest)
        if new:
            yield new
        if on_progress is not None:
            on_progress(_SCAN_COUNT)
        if not cursor:
            return


def _user_name(wanted: Wanted, tenant: str, user_id: str) -> str:
    """What the user is called: with all tenants, by the tenant too, and by a hash where that would be too long."""
    if wanted.tenant is not None:
        return user_id
    name = f"{tenant}/{user_id}"
    if len(name) <= _MAX_ID_CHARACTERS:
        return name
    return f"{tenant}/{blake2b(user_id.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def _rows(
    items: _LiveItems, histories: Sequence[tuple[str, list[HistoryEntry]]], exported: Exported
) -> list[tuple[str, str, str, str]]:
    """The rows of some users' histories, oldest first; counts them."""
    left_out = exported.left_out
    item_ids = {entry.item_id for _, entries in histories for entry in entries}
    missing = items.missing(item_ids)
    unusable = {item_id for item_id in item_ids - missing if not _is_usable(item_id)}
    rows = []
    for name, entries in histories:
        if not entries:
            continue
        if not _is_usable(name):
            left_out[UNUSABLE] += 1
            left_out[OF_UNUSABLE] += len(entries)
            continue
        kept: dict[HistoryEntry, None] = {}
        for entry in entries:
            if entry.item_id in missing:
                left_out[GONE] += 1
            elif entry.item_id in unusable:
                left_out[OF_UNUSABLE] += 1
            elif entry in kept:
                left_out[REPEATED] += 1
            else:
                kept[entry] = None
        if len(kept) == 1:  # nothing follows from it, and training would stop at it
            left_out[LONELY] += 1
        elif kept:
            exported.users += 1
            exported.events += len(kept)
            rows += [(name, one.item_id, repr(one.timestamp), one.event_type.value) for one in kept]
    return rows


async def _write_served(redis: Redis, staging: Path, wanted: Wanted, exported: Exported) -> None:
    """One row for each item shown, with how often what happened to it."""
    outcomes: defaultdict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
    async for page in read_outcomes(redis):
        for one in page:
            if wanted.tenant in (None, one.tenant):
                outcomes[one.tenant, one.recommendation_id][one.item_id, f"{one.unit} {one.event_type}"] += 1
    with _synced(staging / "served.csv") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_SERVED)
        async for answers in read_answers(redis):
            for answer in answers:
                if wanted.tenant in (None, answer.tenant) and answer.at >= (wanted.since or 0.0):
                    found = outcomes.get((answer.tenant, answer.recommendation_id), Counter())
                    table.writerows(_shown(answer, found))
                    exported.answers += 1
                    exported.shown_items += len(answer.items)
    if not exported.answers:
        await asyncio.to_thread((staging / "served.csv").unlink)


def _shown(answer: ServedAnswer, outcomes: Counter[tuple[str, str]]) -> Iterator[tuple[object, ...]]:
    """An outcome counts if it is of the user whom the answer was for; of anybody, where it was for nobody."""
    counts: Counter[tuple[str, str]] = Counter()
    for (item_id, what), number in outcomes.items():
        unit, _, event_type = what.partition(" ")
        if answer.unit in ("", unit):
            counts[item_id, event_type] += number
    of_answer = (
        *(answer.recommendation_id, repr(answer.at), answer.tenant, answer.unit, answer.bundle, answer.catalog_epoch),
        *(answer.experiment or "", answer.source, answer.reason or ""),
    )
    for rank, shown in enumerate(answer.items, start=1):
        score = "" if shown.score is None else repr(shown.score)
        happened = (counts[shown.item_id, event_type.value] for event_type in EventType)
        yield (*of_answer, rank, shown.item_id, score, repr(shown.propensity), shown.source, *happened)


def _is_usable(identity: str) -> bool:
    """Whether training takes the id: UTF-8 of at most 128 characters, without whitespace at its ends."""
    if len(identity) > _MAX_ID_CHARACTERS or identity != identity.strip():
        return False
    try:
        identity.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _nothing_to_export(wanted: Wanted, exported: Exported) -> str:
    whose = "of any tenant" if wanted.tenant is None else f"of the tenant {wanted.tenant!r}"
    since = "" if wanted.since is None else " in the time asked for"
    left = ", ".join(f"{count:,} {what}" for what, count in exported.left_out.items() if what != UNUSABLE)
    return (
        f"no event {whose} is stored in this Redis{since} that training could use (left out: {left or 'nothing'}): "
        "check SIDREC_REDIS_URL or SIDREC_DATA_DIR, and --tenant"
    )


def _make_staging(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # for its owner alone, as users' data are


def _finish(staging: Path, out: Path) -> None:
    _sync_folder(staging)
    staging.rename(out)
    _sync_folder(out.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _synced(path: Path) -> Iterator[TextIO]:
    """A new text file, on disk when this ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
