"""API keys: stored as sha256, compared in constant time, never logged."""

import hashlib
import hmac

from service.errors import ForbiddenProblem, UnauthorizedProblem


def hash_key(key: str) -> str:
    """The hex sha256 that settings hold for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The accepted keys: callers', and administrators', which open everything.

    With none configured at all everybody may do everything, and the service binds to loopback only.
    """

    def __init__(self, callers: tuple[str, ...], admins: tuple[str, ...] = ()) -> None:
        self._callers = callers
        self._admins = admins

    def check(self, key: str | None) -> None:
        """`UnauthorizedProblem` unless the key is one of ours."""
        if (self._callers or self._admins) and not _holds(self._callers + self._admins, key):
            raise UnauthorizedProblem("this service needs an API key in the header x-api-key")

    def check_admin(self, key: str | None) -> None:
        """`ForbiddenProblem` for a caller's key, `UnauthorizedProblem` for none of ours."""
        self.check(key)
        if (self._callers or self._admins) and not _holds(self._admins, key):
            raise ForbiddenProblem(
                "this needs an administrator's key (SIDREC_ADMIN_KEY_HASHES) in the header x-api-key"
            )


def _holds(hashes: tuple[str, ...], key: str | None) -> bool:
    """Every hash is compared, whichever matches, so that the time tells nothing."""
    presented = hash_key(key or "")
    matches = [hmac.compare_digest(presented, known) for known in hashes]
    return key is not None and True in matches
