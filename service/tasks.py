"""Celery: what may take longer than a request. Importing this loads no torch; the `encode` queue's worker does.

celery -A service.tasks worker --queues encode --concurrency 1 --pool solo
"""

from typing import Any, TypedDict

from celery import Celery

from semantic_ids.bundle import Bundle
from semantic_ids.text_encoder import item_text
from service.encoding import encode_texts
from service.settings import Settings

ENCODE_QUEUE = "encode"


class NewItem(TypedDict):
    """An item that the catalogue does not hold yet."""

    item_id: str
    title: str
    categories: list[str]
    attributes: dict[str, str]


def make_celery(settings: Settings) -> Celery:
    """JSON only; a task is acknowledged when it is done, so that a killed worker's is done again."""
    celery = Celery("sidrec", broker=settings.celery_broker_url, backend=settings.celery_result_url)
    celery.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        task_default_queue="sidrec",
        task_routes={"sidrec.assign_sids": {"queue": ENCODE_QUEUE}},
        task_time_limit=600,
        result_expires=86_400,
        broker_connection_retry_on_startup=True,
    )
    return celery


settings = Settings()
app = make_celery(settings)


@app.task(name="sidrec.assign_sids")  # type: ignore[untyped-decorator]
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
