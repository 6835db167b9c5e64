"""How Celery is set up, for whoever sends tasks and for the workers: queues and promises, and no task."""

from celery import Celery

from service.settings import Settings

ENCODE_QUEUE = "encode"
THINK_QUEUE = "think"

ASSIGN_SIDS = "sidrec.assign_sids"
THINK_AHEAD = "sidrec.think_ahead"


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
        task_routes={ASSIGN_SIDS: {"queue": ENCODE_QUEUE}, THINK_AHEAD: {"queue": THINK_QUEUE}},
        task_time_limit=600,
        result_expires=86_400,
        broker_connection_retry_on_startup=True,
    )
    return celery
