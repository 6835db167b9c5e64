"""What each user was last known to have seen, disliked or hidden: so much is still kept from them while Redis is down.

In this process alone, for the users of late. What another replica was told since is not known here.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.event_types import EXCLUDING, IN_HISTORY, EventType

_NOBODY_KNOWS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Hidden:
    """Items not to recommend: `seen` unless the request wants them again, `excluded` whatever it wants."""

    seen: frozenset[str] = _NOBODY_KNOWS
    excluded: frozenset[str] = _NOBODY_KNOWS


@dataclass(frozen=True)
class _Kept:
    text: str  # JSON: a thousand ids are 10 kB so, and 90 kB as a set of strings
    until: float
    num_told: int


class LastKnown:
    """By (namespace, user id), the least recently used users dropped; 0 users: nothing is remembered."""

    def __init__(
        self, max_users: int = 10_000, ttl_s: float = 3_600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_users = max_users
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self.num_told = 0
        """How often `tell` was called: whoever reads a state notes it before, for `put`."""

    def put(self, user: tuple[str, str], text: str, num_told_before: int) -> None:
        """What Redis said: `[[seen], [excluded]]` in JSON. Events acknowledged meanwhile may be missing, and stay."""
        kept = self._kept.get(user)
        if kept is not None and kept.num_told > num_told_before:
            self._keep(user, _written(_union(_read(text), _read(kept.text))), kept.num_told)
        else:
            self._keep(user, text, 0)

    def tell(self, user: tuple[str, str], events: Iterable[tuple[EventType, str]]) -> None:
        """Acknowledged events: their type and item."""
        seen, excluded = set(), set()
        for event_type, item_id in events:
            if event_type in EXCLUDING:
                excluded.add(item_id)
            elif event_type in IN_HISTORY:
                seen.add(item_id)
        if seen or excluded:
            self.num_told += 1
            known = _union(self.get(user), Hidden(frozenset(seen), frozenset(excluded)))
            self._keep(user, _written(known), self.num_told)

    def get(self, user: tuple[str, str]) -> Hidden:
        """What is known; nothing of a user that was not met for the time to live."""
        kept = self._kept.get(user)
        if kept is None:
            return Hidden()
        if self._clock() >= kept.until:
            del self._kept[user]
            return Hidden()
        return _read(kept.text)

    def forget(self, user: tuple[str, str]) -> None:
        """The user is erased."""
        self._kept.pop(user, None)

    def _keep(self, user: tuple[str, str], text: str, num_told: int) -> None:
        self._kept[user] = _Kept(text, self._clock() + self._ttl_s, num_told)
        self._kept.move_to_end(user)
        while len(self._kept) > self._max_users:
            self._kept.popitem(last=False)


def _read(text: str) -> Hidden:
    return Hidden(*map(frozenset, json.loads(text)))


def _written(hidden: Hidden) -> str:
    return json.dumps([list(hidden.seen), list(hidden.excluded)])


def _union(one: Hidden, other: Hidden) -> Hidden:
    return Hidden(one.seen | other.seen, one.excluded | other.excluded)
