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
"""What enters a history, and so moves a prompt."""
