"""What each user did: histories, seen and excluded items, and the ids of events already taken, in Redis.

`/events` writes here, `/recommend` reads here; `sidrec-serve import-histories` fills it from the training data. Knows
nothing of catalogues, bundles or prompts: item ids are opaque, and whether an item still exists is decided elsewhere.

What is promised:

- **Acknowledged means stored.** `record` returns only when Redis has answered for every event; with `appendfsync
  always` Redis answers after the fsync. If anything fails the whole call raises `HistoryUnavailableError`, although
  some of its events may have been stored: the caller sends all of them again, and their ids make that safe.
- **All or nothing per user and call.** One Lua script takes a user's events. Redis checks memory and writability at a
  script's first write only, and the first write here is one that Redis refuses when memory is out, so a script never
  stops halfway for want of memory. Should it stop for another reason (a key of a foreign type), an event's id is
  written after its effects: a retry may then repeat an effect, it never loses one.
- **Idempotent.** An event is a duplicate if its id is among the user's `max_event_ids` most recently accepted ones;
  with a `ttl_s`, only while the user had an event within that time. A lost answer can be followed by the client's own
  retry inside one call, so `False` means "is stored already", perhaps by this very call.
- **Seen is for ever.** The seen and excluded sets are keys of their own and are not cut with the history; only the
  user's time to live, where one is set, ends them, together with everything else of that user.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b, sha1
from math import isfinite
from typing import Any, NamedTuple

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import DataError, NoScriptError, RedisError, ResponseError

from service.event_types import EXCLUDING, IN_HISTORY
from service.event_types import EventType as EventType  # noqa: PLC0414 - a word of this module's too
from service.last_known import Hidden
from service.redis_keys import DEFAULT_NAMESPACE, UserKeys, user_keys
from service.shared_connection import ConnectionLostError, SharedConnection, packed

_IMPORT_CALL_EVENTS = 1_000
"""Most events of one script call in an import: Redis serves nobody else meanwhile (about 5 ms)."""
_IMPORT_BATCH_EVENTS = 5_000
"""Events of one round trip in an import: few round trips, and none near a time-out of a second."""


class HistoryUnavailableError(Exception):
    """Redis did not answer, or refused (loading, read-only, out of memory, disk error): nothing may be assumed.

    The text names only the kind of failure, so that it may be shown; `__cause__` has the rest.
    """


class HistoryTimeoutError(HistoryUnavailableError):
    """Not in the time that there was, which may have been too short."""


@dataclass(frozen=True)
class Event:
    """One thing that happened, as the client tells it; `timestamp` in seconds since 1970."""

    event_id: str
    user_id: str
    item_id: str
    event_type: EventType
    timestamp: float
    recommendation_id: str | None = None


class HistoryEntry(NamedTuple):
    """One item of a user's history."""

    item_id: str
    timestamp: float
    event_type: EventType


@dataclass(frozen=True)
class UserState:
    """Everything that a recommendation needs to know of a user, read at one instant."""

    items: list[str]
    """Of the history, oldest first: the newest that are stored, by (timestamp, arrival)."""
    total: int
    """History events ever accepted, also those no longer stored: where the prompt's window stands."""
    seen: frozenset[str]
    excluded: frozenset[str]
    hidden_json: str = field(default="", repr=False, compare=False)
    """`[[seen], [excluded]]` as Redis wrote it, for who keeps it."""


class _Effect(StrEnum):
    """What the script does with an event."""

    HISTORY = "history"
    SEEN = "seen"
    EXCLUDE = "exclude"
    NONE = "none"


_EFFECTS = {
    **dict.fromkeys(EventType, _Effect.NONE),
    **dict.fromkeys(IN_HISTORY, _Effect.HISTORY),
    **dict.fromkeys(EXCLUDING, _Effect.EXCLUDE),
}
_TYPES = {one.value: one for one in EventType}  # reading by value: `EventType(value)` takes five times as long

_RECORD = """
-- KEYS  history, seen, excluded, event ids, import ids, meta, and others that are not touched: of one user
-- ARGV  max_stored, max_event_ids, ttl_s (0: none), number of the key with the ids of this call;
--       then for each event: id, effect, type, item, timestamp
-- Returns for each event 1 (new) or 0 (its id is known, or it has none: its effect is idempotent anyway).
local history, seen, excluded, meta = KEYS[1], KEYS[2], KEYS[3], KEYS[6]
local max_stored, max_event_ids, ttl_s = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local known_ids = KEYS[tonumber(ARGV[4])]

local function add(command, key, args)
  for first = 1, #args, 1000 do  -- unpack has a limit; even, as ZADD takes pairs
    redis.call(command, key, unpack(args, first, math.min(first + 999, #args)))
  end
end

local replies, effective, taken = {}, {}, {}
for i = 5, #ARGV, 5 do
  local event_id = ARGV[i]
  local is_new = event_id ~= '' and not taken[event_id] and not redis.call('ZSCORE', known_ids, event_id)
  taken[event_id] = true
  if is_new or event_id == '' then effective[#effective + 1] = i end
  replies[#replies + 1] = is_new and 1 or 0
end

if #effective > 0 then
  local arrival = redis.call('HINCRBY', meta, 'arrivals', #effective) - #effective
  local entries, seen_items, excluded_items, ids = {}, {}, {}, {}
  for _, i in ipairs(effective) do
    arrival = arrival + 1
    local event_id, effect, event_type, item_id, timestamp = unpack(ARGV, i, i + 4)
    if effect == 'history' then
      -- ZSET members of one score stand in byte order: the padded arrival number breaks ties of the timestamp
      entries[#entries + 1] = timestamp
      entries[#entries + 1] = string.format('%016d:', arrival) .. event_type .. ':' .. item_id
    end
    if effect == 'history' or effect == 'seen' then seen_items[#seen_items + 1] = item_id end
    if effect == 'exclude' then excluded_items[#excluded_items + 1] = item_id end
    if event_id ~= '' then
      ids[#ids + 1] = arrival
      ids[#ids + 1] = event_id
    end
  end
  add('ZADD', history, entries)
  add('SADD', seen, seen_items)
  add('SADD', excluded, excluded_items)
  if #entries > 0 then redis.call('HINCRBY', meta, 'history', #entries / 2) end
  add('ZADD', known_ids, ids)
  redis.call('ZREMRANGEBYRANK', history, 0, -max_stored - 1)
  redis.call('ZREMRANGEBYRANK', known_ids, 0, -max_event_ids - 1)
end
for i = 1, 6 do  -- the keys after them have lives of their own
  if ttl_s > 0 then redis.call('EXPIRE', KEYS[i], ttl_s) else redis.call('PERSIST', KEYS[i]) end
end
return replies
"""
_EVENT_IDS_KEY, _IMPORT_IDS_KEY = "4", "5"

_LOAD = """
-- KEYS  history, seen, excluded, meta; ARGV  the most entries
-- Returns two lines of JSON: [[entry, ...], total] and [[seen], [excluded]], where an empty list may be {}.
local history = {
  redis.call('ZRANGE', KEYS[1], -tonumber(ARGV[1]), -1),
  tonumber(redis.call('HGET', KEYS[4], 'history') or 0)
}
local hidden = {redis.call('SMEMBERS', KEYS[2]), redis.call('SMEMBERS', KEYS[3])}
return cjson.encode(history) .. '\\n' .. cjson.encode(hidden)
"""
_SINCE = """
-- KEYS  history; ARGV  the earliest timestamp. Returns JSON as above: [entry, timestamp, entry, ...], or {} for none.
return cjson.encode(redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'WITHSCORES'))
"""
# A script, not MULTI: when memory is out Redis 6.2 refuses even reads in a transaction, and a user must stay readable.
# JSON: redis-py parses a reply string by string, which for 1,000 entries and 1,000 seen items took 12 ms of the event
# loop; this takes 3 ms (measured without hiredis, and it helps no further).
_SHA = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in (_RECORD, _LOAD)}


@dataclass(frozen=True)
class _ScriptCall:
    keys: UserKeys
    args: list[str]


class Histories:
    """The store; one Redis round trip for each method but the import.

    max_stored: history entries kept per user, the newest by (timestamp, arrival).
    ttl_s: a user without any event for so long is forgotten; None keeps users for ever. The next event of a user
    applies a changed setting.
    max_event_ids: event ids remembered per user; at least `max_stored`, which the import relies on.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_stored: int = 1_000,
        ttl_s: int | None = None,
        max_event_ids: int = 5_000,
    ) -> None:
        if not 1 <= max_stored <= max_event_ids:
            raise ValueError(f"max_stored {max_stored} must lie in 1..max_event_ids ({max_event_ids}): set one of them")
        if ttl_s is not None and ttl_s < 1:
            raise ValueError(f"ttl_s {ttl_s} must be at least 1, or None to keep users for ever")
        self._redis = redis
        self._reads = SharedConnection(redis)
        self._namespace = namespace
        self._max_stored = max_stored
        self._settings = [str(max_stored), str(max_event_ids), str(ttl_s or 0)]

    def of(self, namespace: str) -> "Histories":
        """The same store for the users of another tenant, on the same connections."""
        if namespace == self._namespace:
            return self
        view = copy(self)
        view._namespace = namespace
        return view

    async def record(self, events: Sequence[Event]) -> list[bool]:
        """For each event, in the given order: True if it is new and now stored, False if its id was stored before.

        Purchases, clicks and likes enter the history and the seen set; dislikes and hides the excluded set;
        impressions leave only their id. Events of one user take effect in the given order.

        Raises HistoryUnavailableError (send all of them again), and ValueError for an empty event id or a timestamp
        that is not finite, before anything is stored.
        """
        of_user: dict[str, list[int]] = {}
        for index, event in enumerate(events):
            of_user.setdefault(event.user_id, []).append(index)
        calls = [
            self._script_call(user_id, _EVENT_IDS_KEY, (_event_args(events[index]) for index in indices))
            for user_id, indices in of_user.items()
        ]
        accepted = [False] * len(events)
        for indices, reply in zip(of_user.values(), await self._run(_RECORD, calls), strict=True):
            for index, is_new in zip(indices, reply, strict=True):
                accepted[index] = is_new == 1
        return accepted

    async def load(self, user_id: str, *, last: int | None = None, timeout_s: float | None = None) -> UserState:
        """The user's state at one instant; an unknown user has an empty one.

        Of the history no more than the `last` entries. `HistoryTimeoutError` after `timeout_s`, or after the time-out
        of the client's sockets if that is shorter.
        """
        keys, most = self._keys(user_id), min(last or self._max_stored, self._max_stored)
        command = packed(("EVALSHA", _SHA[_LOAD], "4", keys.history, keys.seen, keys.excluded, keys.meta, str(most)))
        within_s = min((one for one in (timeout_s, self._reads.timeout_s) if one is not None), default=None)
        with _typed_failure():
            async with asyncio.timeout(within_s):
                reply = await self._read(command)
        history, _, hidden = reply.partition("\n")  # JSON has none within
        entries, total = json.loads(history)
        seen, excluded = json.loads(hidden)
        items = [entry.split(":", 2)[2] for entry in entries]  # as `_RECORD` writes them
        return UserState(items, total, frozenset(seen), frozenset(excluded), hidden)

    async def history(self, user_id: str) -> list[HistoryEntry]:
        """The user's history alone, oldest first."""
        with _typed_failure():
            scored = await self._redis.zrange(self._keys(user_id).history, -self._max_stored, -1, withscores=True)
        return _entries(scored)

    def last_known(self, user_id: str) -> Hidden:
        """What this process remembers of the user's seen and excluded items, for when Redis cannot be asked."""
        return Hidden()

    async def erase(self, user_id: str) -> int:
        """Forget the user: every key goes. Returns how many there were."""
        with _typed_failure():
            return int(await self._redis.unlink(*self._keys(user_id)))

    async def import_histories(
        self,
        histories: Iterable[tuple[str, Sequence[HistoryEntry]]],
        on_progress: Callable[[int], None] | None = None,
    ) -> int:
        """Load whole histories; returns how many entries were recorded. To import the same again changes nothing.

        An entry is known again by its content among the entries imported before, so a longer version of an imported
        history adds only what is new; an event that came in by `record` as well is not recognised. Of each history the
        newest `max_stored` entries are recorded and count in `total`; the older ones, which would be cut at once, only
        enter the seen set. `on_progress` gets the number of entries of each finished batch.
        """
        num_recorded = 0
        calls: list[_ScriptCall] = []
        num_waiting = 0

        async def flush() -> int:
            nonlocal num_waiting
            replies = await self._run(_RECORD, calls)
            calls.clear()
            if on_progress is not None and num_waiting:
                on_progress(num_waiting)
            num_waiting = 0
            return sum(sum(reply) for reply in replies)

        for user_id, entries in histories:
            args = list(self._import_args(entries))
            for start in range(0, len(args), _IMPORT_CALL_EVENTS):
                chunk = args[start : start + _IMPORT_CALL_EVENTS]
                calls.append(self._script_call(user_id, _IMPORT_IDS_KEY, chunk))
                num_waiting += len(chunk)
                if num_waiting >= _IMPORT_BATCH_EVENTS:
                    num_recorded += await flush()
        return num_recorded + await flush()

    async def _read(self, command: bytes) -> str:
        """What `_LOAD` answers."""
        try:
            return str(await self._reads.ask(command))
        except NoScriptError:
            await self._reads.ask(packed(("SCRIPT", "LOAD", _LOAD)))
        except ConnectionLostError:
            pass
        return str(await _retry().call_with_retry(lambda: self._reads.ask(command), _try_again))

    def _keys(self, user_id: str) -> UserKeys:
        return user_keys(user_id, self._namespace)

    def _script_call(self, user_id: str, ids_key: str, event_args: Iterable[tuple[str, ...]]) -> _ScriptCall:
        args = [*self._settings, ids_key, *(arg for one in event_args for arg in one)]
        return _ScriptCall(self._keys(user_id), args)

    def _import_args(self, entries: Sequence[HistoryEntry]) -> Iterator[tuple[str, ...]]:
        in_time = sorted(entries, key=lambda entry: entry.timestamp)
        first_stored = len(in_time) - self._max_stored
        num_alike: Counter[HistoryEntry] = Counter()
        for position, entry in enumerate(in_time):
            effect = _EFFECTS[entry.event_type]
            if effect is _Effect.HISTORY and position >= first_stored:
                num_alike[entry] += 1
                yield _entry_args(_imported_id(entry, num_alike[entry]), effect, entry)
            else:
                yield _entry_args("", _Effect.SEEN if effect is _Effect.HISTORY else effect, entry)

    async def _run(self, script: str, calls: list[_ScriptCall]) -> list[Any]:
        """The replies of the script calls, in order, by one round trip (two more if Redis did not know the script)."""
        if not calls:
            return []
        with _typed_failure():
            replies = await self._evalsha(script, calls)
            unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:
                await self._redis.script_load(script)
                again = await self._evalsha(script, [calls[index] for index in unknown])
                for index, reply in zip(unknown, again, strict=True):
                    replies[index] = reply
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies

    async def _evalsha(self, script: str, calls: list[_ScriptCall]) -> list[Any]:
        # Not AsyncScript on a pipeline: it asks SCRIPT EXISTS before every execution, a second round trip.
        sha = _SHA[script]
        if len(calls) == 1:  # a pipeline's bookkeeping would cost 50 µs
            names = calls[0].keys
            try:
                return [await self._redis.evalsha(sha, len(names), *names, *calls[0].args)]
            except ResponseError as refusal:
                return [refusal]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for call in calls:
                names = call.keys
                pipeline.evalsha(sha, len(names), *names, *call.args)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies


async def read_histories(
    redis: Redis, users: Sequence[tuple[str, str]], since: float | None = None
) -> list[list[HistoryEntry]]:
    """The whole stored histories of (namespace, user) pairs, oldest first, from `since` on; one round trip."""
    with _typed_failure():
        async with redis.pipeline(transaction=False) as pipeline:
            for namespace, user_id in users:
                key = user_keys(user_id, namespace).history
                pipeline.eval(_SINCE, 1, key, "-inf" if since is None else repr(float(since)))
            replies = [json.loads(reply) for reply in await pipeline.execute()]
    return [_entries(zip(flat[::2], flat[1::2], strict=True) if flat else ()) for flat in replies]


def connect(url: str, *, timeout_s: float, max_connections: int) -> Redis:
    """A client for `redis://`, `rediss://` or `unix://`; close it with `aclose()`. Connects at the first command.

    `timeout_s` bounds each of: connecting, one answer, waiting for a free connection. A lost connection is tried again
    for about half a second (a supervised restart is faster as a rule); a time-out is not, as it has cost enough.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        decode_responses=True,
        retry=_retry(),
    )
    return Redis.from_pool(pool)


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=0.1, base=0.02), 2, supported_errors=(RedisConnectionError,))


async def _try_again(_error: Exception) -> None:
    """Nothing is to be done before that."""


@contextmanager
def _typed_failure() -> Iterator[None]:
    # Every refusal, not a list of known ones: within a script Redis words OOM, READONLY and MISCONF as plain errors.
    try:
        yield
    except DataError:
        raise
    except TimeoutError as error:
        raise HistoryTimeoutError("the history store has not answered in time") from error
    except (RedisError, OSError) as error:
        raise HistoryUnavailableError(f"the history store is unavailable ({type(error).__name__})") from error


def _event_args(event: Event) -> tuple[str, ...]:
    if not event.event_id:
        raise ValueError(f"an event of user {event.user_id!r} on item {event.item_id!r} has an empty event_id")
    entry = HistoryEntry(event.item_id, event.timestamp, event.event_type)
    return _entry_args(event.event_id, _EFFECTS[event.event_type], entry)


def _entry_args(event_id: str, effect: _Effect, entry: HistoryEntry) -> tuple[str, ...]:
    if not isfinite(entry.timestamp):
        raise ValueError(f"timestamp {entry.timestamp} of item {entry.item_id!r} is not a finite number of seconds")
    # repr: the shortest text that reads back as the same float
    return event_id, effect.value, entry.event_type.value, entry.item_id, repr(float(entry.timestamp))


def _imported_id(entry: HistoryEntry, occurrence: int) -> str:
    content = f"{entry.item_id}\0{float(entry.timestamp)!r}\0{entry.event_type}\0{occurrence}"
    return f"import:{blake2b(content.encode(), digest_size=12).hexdigest()}"


def _entries(scored: Iterable[Any]) -> list[HistoryEntry]:
    entries = []
    for member, timestamp in scored:
        _arrival, event_type, item_id = member.split(":", 2)
        entries.append(HistoryEntry(item_id, float(timestamp), _TYPES[event_type]))
    return entries
