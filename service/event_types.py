"""What a user can do with an item: a word of the HTTP contract, and of the store."""

from enum import StrEnum


class EventType(StrEnum):
    """What a user did with an item."""

    IMPRESSION = "impression"
    CLICK = "click"
    PURCHASE = "purchase"
    LIKE = "like"
    DISLIKE = "dislike"
    HIDE = "hide"


IN_HISTORY = frozenset({EventType.CLICK, EventType.PURCHASE, EventType.LIKE})
"""What enters a history and the seen set, and so moves a prompt."""

EXCLUDING = frozenset({EventType.DISLIKE, EventType.HIDE})
"""What keeps an item from the user, and is no taste that a prompt shows."""
