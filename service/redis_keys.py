"""The names of every Redis key, and nothing else: no other module writes one.

All keys start with `sidrec:`. The keys of one user share a Redis Cluster hash tag, so that one script, one transaction
and one UNLINK can touch them all: `sidrec:{<namespace>:<user>}:<what>`. Namespace and user are percent-encoded, so that
no brace, colon, space or foreign script in a user id can move the tag or meet another user's keys.
"""

import re
from dataclasses import dataclass, fields
from typing import NamedTuple
from urllib.parse import quote, unquote

PREFIX = "sidrec"
DEFAULT_NAMESPACE = "default"
"""The namespace of a key without a tenant: the namespace of a user is the tenant of the key that asks."""


class UserKeys(NamedTuple):
    """Every key that holds anything of one user: to erase them all is to erase the user. The KEYS of the scripts."""

    history: str
    """ZSET: `<arrival>:<event type>:<item>` by timestamp."""
    seen: str
    """SET of items."""
    excluded: str
    """SET of items."""
    event_ids: str
    """ZSET: event id by arrival."""
    import_ids: str
    """ZSET: id derived from an imported entry, by arrival; apart, so that live events never push them out."""
    meta: str
    """HASH of counters."""
    thought: str
    """STRING: the user's last thought, as JSON; expires by itself."""
    think_ahead: str
    """STRING: there while a worker is asked to think for the user; expires by itself."""


_OF_USER = tuple(name.replace("_", "-") for name in UserKeys._fields)


def user_keys(user_id: str, namespace: str = DEFAULT_NAMESPACE) -> UserKeys:
    """The keys of one user; different (namespace, user) pairs never share one."""
    tag = f"{_encoded(namespace)}:{_encoded(user_id)}"
    return UserKeys(*[f"{PREFIX}:{{{tag}}}:{what}" for what in _OF_USER])


def history_pattern(namespace: str | None = None) -> str:
    """What SCAN matches: the histories of all users of a namespace, or of every one."""
    tag = "*" if namespace is None else f"{_encoded(namespace)}:*"
    return f"{PREFIX}:{{{tag}}}:history"


def user_of_history(key: str) -> tuple[str, str] | None:
    """(namespace, user) of the key `UserKeys.history`; None for any other key."""
    found = _HISTORY.fullmatch(key)
    if found is None:
        return None
    namespace, user_id = (unquote(part, errors="surrogatepass") for part in found.groups())
    return namespace, user_id


_HISTORY = re.compile(re.escape(PREFIX) + r":\{([^{}:]+):([^{}:]+)\}:history")


def _encoded(text: str) -> str:
    """ASCII letters, digits and `_.-~%` only; `surrogatepass` because JSON can carry a lone surrogate."""
    return quote(text, safe="", errors="surrogatepass")


def rate_limit_key(key_id: str) -> str:
    """When the bucket of an API key is full again; shared by all replicas."""
    return f"{PREFIX}:rate:{_encoded(key_id)}"


def import_marker(content_sha256: str, namespace: str = DEFAULT_NAMESPACE) -> str:
    """Set once a histories file of this content was imported whole."""
    return f"{PREFIX}:imported:{_encoded(namespace)}:{content_sha256}"


@dataclass(frozen=True)
class CatalogKeys:
    """Every key of the live catalogue; one hash tag, which no user has: theirs hold a colon."""

    items: str
    """HASH: item → its latest change."""
    meta: str
    """HASH: `epoch`."""
    changes: str
    """STREAM of the latest changes, to be followed."""

    def sids(self, bundle_id: str) -> str:
        """HASH of one bundle: change → the SID that an item got there which was put for another bundle."""
        return f"{self.items}:sids:{_encoded(bundle_id)}"


def catalog_keys(namespace: str = DEFAULT_NAMESPACE) -> CatalogKeys:
    """The keys of the live catalogue."""
    return CatalogKeys(*(f"{PREFIX}:{{{_encoded(namespace)}}}:catalog-{one.name}" for one in fields(CatalogKeys)))


def exposure_stream(namespace: str = DEFAULT_NAMESPACE) -> str:
    """STREAM: one entry for each exposure; its `variants` are as in a link."""
    return f"{PREFIX}:exposures:{_encoded(namespace)}"


def served_stream(namespace: str = DEFAULT_NAMESPACE) -> str:
    """STREAM: one entry for each answer that was served."""
    return f"{PREFIX}:served:{_encoded(namespace)}"


def outcome_stream(namespace: str = DEFAULT_NAMESPACE) -> str:
    """STREAM: one entry for each event that names a recommendation."""
    return f"{PREFIX}:outcomes:{_encoded(namespace)}"


def served_entries_key(namespace: str, unit: str) -> str:
    """ZSET: a user's entries in the two streams, by time: what erasing the user deletes there."""
    return f"{PREFIX}:{{{_encoded(namespace)}:served:{_encoded(unit)}}}:entries"


def unit_key_name(namespace: str = DEFAULT_NAMESPACE) -> str:
    """STRING: the deployment's key for hashes of user ids."""
    return f"{PREFIX}:experiments:{_encoded(namespace)}:unit-key"


def experiment_names_key(namespace: str) -> str:
    """SET: every experiment that was ever counted."""
    return f"{PREFIX}:experiments:{_encoded(namespace)}:names"


def exposure_link_key(namespace: str, recommendation_id: str) -> str:
    """STRING: `<experiment>/<variant>` of a recommendation, separated by spaces."""
    return f"{PREFIX}:exposure:{{{_encoded(namespace)}:{_encoded(recommendation_id)}}}"


def experiment_shard_keys(namespace: str, experiment: str, shard: int) -> tuple[str, str]:
    """Two HASHes: counts by unit; sums over units, by `<variant>:<name>`."""
    tag = f"{_encoded(namespace)}:experiment:{_encoded(experiment)}:{shard}"
    return f"{PREFIX}:{{{tag}}}:units", f"{PREFIX}:{{{tag}}}:sums"


def experiment_guardrails_key(namespace: str, experiment: str) -> str:
    """HASH: `<variant>:degraded`, and `<variant>:<latency bucket>`."""
    return f"{PREFIX}:{{{_encoded(namespace)}:experiment:{_encoded(experiment)}}}:guardrails"


def experiments_config_key(namespace: str = DEFAULT_NAMESPACE) -> str:
    """STRING: the experiments as JSON, where no file decides."""
    return f"{PREFIX}:experiments:{_encoded(namespace)}:config"
