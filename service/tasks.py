"""Celery: what may take longer than a request. Importing this loads no torch; the workers of the queues do.

celery -A service.tasks worker --queues encode --concurrency 1 --pool solo
celery -A service.tasks worker --queues think --concurrency 1 --pool solo
"""

from functools import cache
from typing import Any, TypedDict

from semantic_ids.bundle import Bundle
from semantic_ids.text_encoder import item_text
from service.celery_app import ASSIGN_SIDS, THINK_AHEAD, make_celery
from service.encoding import encode_texts
from service.settings import Settings
from service.thinker import Outcome, Thinker


class NewItem(TypedDict):
    """An item that the catalogue does not hold yet."""

    item_id: str
    title: str
    categories: list[str]
    attributes: dict[str, str]


settings = Settings()
app = make_celery(settings)


@app.task(name=ASSIGN_SIDS)  # type: ignore[untyped-decorator]
def assign_sids(items: list[NewItem]) -> dict[str, Any]:
    """SIDs for new items, from the current bundle's text encoder and quantiser.

    Returns `{"bundle": id, "sids": {item_id: SID}}`: SIDs that no item of the bundle's catalogue has, and no two alike.
    """
    bundle = Bundle.load_current(settings.bundles)
    if len({item["item_id"] for item in items}) < len(items):
        raise ValueError("an item id appears more than once: each new item gets one SID")
    known = [item["item_id"] for item in items if bundle.catalog.rank_of(item["item_id"]) is not None]
    if known:
        raise ValueError(
            f"the catalogue already holds {known[0]!r} (and {len(known) - 1} more): only new items get SIDs here"
        )
    texts = [item_text(item["title"], item["categories"], item["attributes"]) for item in items]
    vectors = encode_texts(bundle.manifest.text_encoder, texts)
    codes = bundle.quantizer.assign_new(vectors, bundle.catalog.trie)
    sids = {item["item_id"]: bundle.manifest.space.format(sid) for item, sid in zip(items, codes, strict=True)}
    return {"bundle": bundle.bundle_id, "sids": sids}


@app.task(name=THINK_AHEAD, ignore_result=True)  # type: ignore[untyped-decorator]
def think_ahead(tenant: str, user_id: str, bundle_id: str) -> Outcome:
    """A bundle's thought about a user, kept for the request that wants it. Doing it again changes nothing."""
    return _thinker().think(tenant, user_id, bundle_id)


@cache
def _thinker() -> Thinker:
    """This process's own; made at its first thought."""
    from service.app import make_engine  # noqa: PLC0415 - the worker of another queue needs no web framework

    return Thinker(settings, make_engine)
