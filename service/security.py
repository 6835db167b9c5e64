"""API keys: stored as sha256, compared in constant time, never logged."""

import hashlib
import hmac

from service.errors import UnauthorizedProblem


def hash_key(key: str) -> str:
    """The hex sha256 that settings hold for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """The accepted keys. With none configured every caller is accepted, and the service binds to loopback only."""

    def __init__(self, hashes: tuple[str, ...]) -> None:
        self._hashes = hashes

    def check(self, key: str | None) -> None:
        """`UnauthorizedProblem` unless the key is one of ours. Every hash is compared, whichever matches."""
        if not self._hashes:
            return
        presented = hash_key(key or "")
        matches = [hmac.compare_digest(presented, known) for known in self._hashes]
        if key is None or not any(matches):
            raise UnauthorizedProblem("this service needs an API key in the header x-api-key")
