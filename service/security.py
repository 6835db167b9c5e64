"""API keys: stored as sha256, compared in constant time, never logged. Each sees the users of one tenant."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import ForbiddenProblem, UnauthorizedProblem
from service.redis_keys import DEFAULT_NAMESPACE

_KEY_ID_DIGITS = 12  # 48 bits: no two of a service's keys share them, and nobody finds a key from them


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    tenant: str
    """The namespace of the users that this caller may read and write."""
    is_admin: bool
    key_id: str
    """The first digits of the key's hash, for metrics and logs."""


ANYBODY = Caller(DEFAULT_NAMESPACE, is_admin=True, key_id="none")
"""Every caller, where no keys are configured."""


def hash_key(key: str) -> str:
    """The hex sha256 that settings hold for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The accepted keys, `<sha256>` or `<sha256>:<tenant>`: callers', and administrators', which open everything.

    With none configured at all everybody may do everything, and the service binds to loopback only.
    """

    def __init__(self, callers: Sequence[str], admins: Sequence[str] = ()) -> None:
        known = [(record, False) for record in callers] + [(record, True) for record in admins]
        self._known = [_parse(record, is_admin) for record, is_admin in known]

    def check(self, key: str | None) -> Caller:
        """Whose key this is; `UnauthorizedProblem` unless it is one of ours."""
        if not self._known:
            return ANYBODY
        caller = self._find(key)
        if caller is None:
            raise UnauthorizedProblem("this service needs an API key in the header x-api-key")
        return caller

    def check_admin(self, key: str | None) -> Caller:
        """`ForbiddenProblem` for a caller's key, `UnauthorizedProblem` for none of ours."""
        return require_admin(self.check(key))

    def _find(self, key: str | None) -> Caller | None:
        """Every hash is compared, whichever matches, so that the time tells nothing."""
        presented = hash_key(key or "")
        found: Caller | None = None
        for known, caller in self._known:
            if hmac.compare_digest(presented, known):
                found = caller  # a key listed as both is an administrator's: those come last
        return found if key is not None else None


def require_admin(caller: Caller) -> Caller:
    """The caller, if an administrator; `ForbiddenProblem` otherwise."""
    if not caller.is_admin:
        raise ForbiddenProblem("this needs an administrator's key (SIDREC_ADMIN_KEY_HASHES) in the header x-api-key")
    return caller


def _parse(record: str, is_admin: bool) -> tuple[str, Caller]:
    digest, _, tenant = record.partition(":")
    return digest, Caller(tenant or DEFAULT_NAMESPACE, is_admin, digest[:_KEY_ID_DIGITS])
