"""The changes of the catalogue, in Redis: what was put and deleted since the bundles were published.

One Lua script makes a change: it takes the next epoch, writes the item's latest change, and tells the stream. So the
hash is the truth, at one epoch, and the stream only saves reading it again: whoever missed a part of it (it is trimmed)
reads the hash anew. Acknowledged means stored, as for histories. Knows nothing of SIDs, bundles or ranks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.redis_keys import DEFAULT_NAMESPACE, catalog_keys

_STREAM_LENGTH = 10_000
"""Changes that a replica may be behind before it reads everything anew."""
_BATCH = 1_000

_CHANGE = """
-- KEYS  items, meta, changes: of the catalogue
-- ARGV  item, what is put (empty: it is deleted), the caller's epoch, 1 if the caller knows the item, stream length,
--       where the SID was assigned: the epoch at which it was free, and how the body of whoever has it now would say so
-- Returns the change's epoch, 0 if there is nothing to delete, or minus the present epoch if the SID was taken since.
local item, body, epoch = ARGV[1], ARGV[2], tonumber(ARGV[3])

local function is_taken_since(free_at, needle)
  local newest, first = '+', 0
  while true do
    local entries = redis.call('XREVRANGE', KEYS[3], newest, '-', 'COUNT', 100)
    for _, entry in ipairs(entries) do
      local fields = {}
      for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
      first = tonumber(string.match(fields['change'], '^%d+'))
      if first <= free_at then return false end
      if fields['item'] ~= item and string.find(fields['change'], needle, 1, true) then return true end
      newest = '(' .. entry[1]
    end
    if #entries < 100 then return first == 0 or first > free_at + 1 end  -- what was trimmed may have taken it
  end
end

if ARGV[6] ~= '' then
  local present = tonumber(redis.call('HGET', KEYS[2], 'epoch') or 0)
  if present > tonumber(ARGV[6]) and is_taken_since(tonumber(ARGV[6]), ARGV[7]) then return -present end
end
local before = redis.call('HGET', KEYS[1], item)
local arrival, body_before
if before then arrival, body_before = string.match(before, '^%d+:(%d+):(.*)$') end
if body == '' and (body_before == '' or (not before and ARGV[4] ~= '1')) then return 0 end
epoch = math.max(epoch, tonumber(redis.call('HGET', KEYS[2], 'epoch') or 0)) + 1
local number = string.format('%d', epoch)
-- an item keeps its place in the order of arrival until it is deleted
if not arrival or body_before == '' then arrival = number end
local change = number .. ':' .. arrival .. ':' .. body
redis.call('HSET', KEYS[1], item, change)
redis.call('HSET', KEYS[2], 'epoch', number)
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'item', item, 'change', change)
return epoch
"""

_SNAPSHOT = """
-- KEYS  as above. Returns JSON: [epoch, the stream's last entry, [item, change, item, ...]]; an empty list may be {}.
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
return cjson.encode({
  tonumber(redis.call('HGET', KEYS[2], 'epoch') or 0), last[1] and last[1][1] or '0-0', redis.call('HGETALL', KEYS[1])
})
"""


class ItemStoreError(Exception):
    """Redis did not answer, or refused; the text names only the kind of failure."""


class SidTakenError(Exception):
    """The SID that was free at the epoch that it was chosen at is not any more."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"another item has taken the SID by epoch {epoch}")
        self.epoch = epoch
        """A catalogue of this epoch knows who has it."""


class ItemPut(BaseModel):
    """What an item became, and for which bundle: its codes mean nothing in another one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    categories: tuple[str, ...]
    codes: tuple[int, ...]
    bundle: str
    at: float  # seconds since 1970


@dataclass(frozen=True)
class ItemChange:
    """The latest change of an item."""

    item_id: str
    epoch: int
    """The one that the change made; no two changes have the same."""
    arrival: int
    """The epoch of its first put since it was last deleted: the order in which every replica puts the items."""
    put: ItemPut | None
    """None: it was deleted."""


@dataclass(frozen=True)
class Snapshot:
    """Everything at one epoch."""

    epoch: int
    position: str
    """Of the stream: what comes after it comes after this epoch."""
    changes: list[ItemChange]


class ItemStore:
    """One Redis round trip for each method."""

    def __init__(self, redis: Redis, *, timeout_s: float, namespace: str = DEFAULT_NAMESPACE) -> None:
        self._redis = redis
        self._keys = catalog_keys(namespace)
        self._block_ms = max(1, round(500 * timeout_s))  # an answer comes well within the connection's time-out

    async def put(self, item_id: str, put: ItemPut, *, epoch: int, free_at: int | None = None) -> int:
        """Store what an item became; the change's epoch, beyond the caller's own.

        With `free_at`, the epoch at which nobody had its SID: `SidTakenError` if anybody was given it since.
        """
        stored = await self._change(item_id, put.model_dump_json(), epoch, is_known=True, free_at=free_at, put=put)
        if stored < 0:
            raise SidTakenError(-stored)
        return stored

    async def delete(self, item_id: str, *, epoch: int, is_known: bool) -> int | None:
        """Store that an item is gone; None if it was deleted already, or is neither stored nor known to the caller."""
        return await self._change(item_id, "", epoch, is_known=is_known) or None

    async def snapshot(self) -> Snapshot:
        """Every change, consistent with the epoch and the stream's position."""
        with _typed_failure():
            reply = await self._redis.eval(_SNAPSHOT, 3, *self._names())
        epoch, position, flat = json.loads(reply)
        pairs = zip(flat[::2], flat[1::2], strict=True) if flat else ()
        return Snapshot(int(epoch), position, [_parsed(item_id, change) for item_id, change in pairs])

    async def epoch(self) -> int:
        """The epoch of the latest change; 0 before the first."""
        with _typed_failure():
            return int(await self._redis.hget(self._keys.meta, "epoch") or 0)

    async def changes_after(self, position: str) -> tuple[list[ItemChange], str]:
        """The stream from a position on, and the next position; waits a moment if there is nothing new."""
        with _typed_failure():
            reply: Any = await self._redis.xread({self._keys.changes: position}, count=_BATCH, block=self._block_ms)
        if not reply:
            return [], position
        ((_, entries),) = reply
        return [_parsed(entry["item"], entry["change"]) for _, entry in entries], entries[-1][0]

    async def agree_on_sids(self, bundle_id: str, proposed: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
        """The codes of changes, by epoch, in a bundle that they were not made for: whoever proposed first wins."""
        with _typed_failure():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for epoch, codes in proposed.items():
                    pipeline.hsetnx(self._keys.sids(bundle_id), str(epoch), json.dumps(list(codes)))
                await pipeline.execute()
        return await self.sids(bundle_id, list(proposed))

    async def sids(self, bundle_id: str, epochs: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """What was agreed on."""
        if not epochs:
            return {}
        with _typed_failure():
            found = await self._redis.hmget(self._keys.sids(bundle_id), [str(epoch) for epoch in epochs])
        return {epoch: tuple(json.loads(codes)) for epoch, codes in zip(epochs, found, strict=True) if codes}

    async def _change(
        self,
        item_id: str,
        body: str,
        epoch: int,
        *,
        is_known: bool,
        free_at: int | None = None,
        put: ItemPut | None = None,
    ) -> int:
        claim = ("", "") if free_at is None or put is None else (str(free_at), _claim_on(put))
        args = (item_id, body, str(epoch), str(int(is_known)), str(_STREAM_LENGTH), *claim)
        with _typed_failure():
            return int(await self._redis.eval(_CHANGE, 3, *self._names(), *args))

    def _names(self) -> tuple[str, str, str]:
        return self._keys.items, self._keys.meta, self._keys.changes


def _claim_on(put: ItemPut) -> str:
    """What the JSON of every put with this SID holds, and no other: within a text the quotes would be escaped."""
    return f'"codes":{json.dumps(list(put.codes), separators=(",", ":"))},"bundle":{json.dumps(put.bundle)},'


def _parsed(item_id: str, change: str) -> ItemChange:
    epoch, arrival, body = change.split(":", 2)
    return ItemChange(item_id, int(epoch), int(arrival), ItemPut.model_validate_json(body) if body else None)


@contextmanager
def _typed_failure() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise ItemStoreError(f"the store of item changes is unavailable ({type(error).__name__})") from error
