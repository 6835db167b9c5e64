"""Celery: SIDs for new items, in this process and through a real worker with a real broker."""

import asyncio
import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from semantic_ids.bundle import Bundle, activate, publish
from semantic_ids.quantizer import DenseLayer, ResidualQuantizer
from service.celery_app import ENCODE_QUEUE, THINK_QUEUE, make_celery
from service.redis_keys import user_keys
from service.settings import Settings
from service.tasks import NewItem
from tests.service.running import Service, running, until
from tests.service.thinking import RATIONALE, publish_thinking
from tests.service.world import BY_ID, ENCODER_DIMENSION, ITEM_IDS, SPACE, make_parts, scores_of

ROOT = Path(__file__).parents[2]


def new_item(item_id: str, title: str) -> NewItem:
    return {"item_id": item_id, "title": title, "categories": ["Beauty > Hair Care"], "attributes": {"brand": "Acme"}}


NEW_ITEMS = [new_item(f"new-{number}", title) for number, title in enumerate(["Shampoo", "Chess set", "Comb", "Comb"])]


def assert_new_sids(answer: dict[str, Any], bundle: Bundle) -> None:
    """Legal, distinct, and of no item of the catalogue."""
    assert answer["bundle"] == bundle.bundle_id
    assert set(answer["sids"]) == {item["item_id"] for item in NEW_ITEMS}
    sids = [SPACE.parse(sid) for sid in answer["sids"].values()]
    assert len(set(sids)) == len(sids)
    assert not set(sids) & {item.codes for item in BY_ID.values()}


@contextmanager
def imported_tasks(bundles: Path) -> Iterator[ModuleType]:
    """The module as a worker imports it: its settings are those of the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDREC_BUNDLES", str(bundles))
        patch.delitem(sys.modules, "service.tasks")
        yield importlib.import_module("service.tasks")


@pytest.fixture(scope="module")
def tasks(bundles: Path) -> Iterator[ModuleType]:
    with imported_tasks(bundles) as module:
        yield module


def test_new_items_get_sids_that_are_legal_distinct_and_free(tasks: ModuleType, bundle: Bundle):
    answer = tasks.assign_sids(NEW_ITEMS)
    assert_new_sids(answer, bundle)
    assert tasks.assign_sids(NEW_ITEMS) == answer, "the same items get the same SIDs"
    prefixes = [SPACE.parse(answer["sids"][f"new-{number}"])[:-1] for number in (2, 3)]
    assert prefixes[0] == prefixes[1], "the same text differs in the last code alone"


def test_new_items_get_sids_through_the_encoder_of_the_quantiser(tmp_path: Path):
    rng = np.random.default_rng(0)
    layers = tuple(
        DenseLayer(rng.normal(0, into**-0.5, (out, into)).astype(np.float32), np.zeros(out, np.float32))
        for into, out in ((ENCODER_DIMENSION, 64), (64, 16))
    )
    quantizer = ResidualQuantizer(
        mean=np.zeros(ENCODER_DIMENSION, np.float32),
        scale=np.full(ENCODER_DIMENSION, 0.05, np.float32),
        codebooks=rng.normal(0, 0.5, (SPACE.num_levels, SPACE.codebook_size, 16)).astype(np.float32),
        layers=layers,
    )
    bundles = tmp_path / "bundles"
    bundle = publish(bundles, replace(make_parts(tmp_path / "model"), quantizer=quantizer), lambda _bundle: None)
    with imported_tasks(bundles) as tasks:
        assert_new_sids(tasks.assign_sids(NEW_ITEMS), bundle)


def test_a_known_item_is_refused(tasks: ModuleType):
    with pytest.raises(ValueError, match=r"already holds .* \(and 1 more\)"):
        tasks.assign_sids([NEW_ITEMS[0], new_item(ITEM_IDS[0], "Old"), new_item(ITEM_IDS[1], "Old")])


def test_each_task_goes_to_its_own_queue_as_json():
    conf = make_celery(Settings()).conf
    assert conf.task_routes == {
        "sidrec.assign_sids": {"queue": ENCODE_QUEUE},
        "sidrec.think_ahead": {"queue": THINK_QUEUE},
    }
    assert (conf.task_serializer, conf.result_serializer, conf.accept_content) == ("json", "json", ["json"])
    assert conf.task_acks_late


def test_importing_tasks_and_the_application_loads_no_torch():
    code = "import sys, service.tasks, service.app, service.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    """A Redis server on a free TCP port of this machine: Celery takes no other kind of address without options."""
    from service.redis_server import _redis_server_binary

    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    command = [str(_redis_server_binary(tmp_path)), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as server:
        with Redis(port=port) as client:
            give_up_at = time.monotonic() + 15
            while not _answers(client):
                assert time.monotonic() < give_up_at
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
        server.terminate()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisConnectionError:
        return False


@contextmanager
def worker(queue: str, broker: str, log_path: Path, **environment: str) -> Iterator[None]:
    """A real one; what it logged is told of whatever fails meanwhile."""
    command = [sys.executable, "-m", "celery", "-A", "service.tasks", "worker", "--queues", queue]
    addresses = {"SIDREC_CELERY_BROKER_URL": f"{broker}/1", "SIDREC_CELERY_RESULT_URL": f"{broker}/2"}
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            [*command, "--concurrency", "1", "--pool", "solo", "--loglevel", "info", "--without-gossip"],
            cwd=ROOT,
            env=os.environ | addresses | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            yield
        except BaseException as error:
            error.add_note(log_path.read_text())
            raise
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_a_worker_does_it_end_to_end(broker: str, bundles: Path, bundle: Bundle, tmp_path: Path):
    with worker(ENCODE_QUEUE, broker, tmp_path / "worker.log", SIDREC_BUNDLES=str(bundles)):
        client = make_celery(Settings(celery_broker_url=f"{broker}/1", celery_result_url=f"{broker}/2"))
        try:
            result = client.send_task("sidrec.assign_sids", [NEW_ITEMS])
            refused = client.send_task("sidrec.assign_sids", [[new_item(ITEM_IDS[0], "Old")]])
            assert_new_sids(result.get(timeout=90), bundle)
            with pytest.raises(ValueError, match="only new items get SIDs here"):
                refused.get(timeout=30)
        finally:
            client.close()


async def test_a_worker_thinks_ahead_so_that_the_next_rationale_is_there(broker: str, reciting: Bundle, tmp_path: Path):
    """One user of the current bundle, and one of an experiment's."""
    data_dir, bundles = tmp_path / "redis", tmp_path / "bundles"
    shutil.copytree(reciting.path, bundles / reciting.bundle_id)
    beside = publish_thinking(bundles, "Other.").bundle_id
    activate(bundles, reciting.bundle_id)
    settings = Settings(bundles=bundles, data_dir=data_dir, think_ahead=True, celery_broker_url=f"{broker}/1")
    async with running(settings) as service:
        user_id, other_id = await users_of_each_variant(service, {"bundle": beside, "rationale": True})
        with worker(THINK_QUEUE, broker, tmp_path / "log", SIDREC_BUNDLES=str(bundles), SIDREC_DATA_DIR=str(data_dir)):
            await service.clicks(user_id, *ITEM_IDS[:3])
            await service.clicks(other_id, *ITEM_IDS[:3])
            for _ in range(900):
                if await service.state.redis.exists(*(user_keys(one).thought for one in (user_id, other_id))) == 2:
                    break
                await asyncio.sleep(0.1)
        other = await service.recommend(user_id=other_id)
        answer = await service.recommend(user_id=user_id, include_rationale=True)
        thinking = await service.recommend(user_id=user_id, reasoning="on", include_rationale=True)
        hits = service.state.metrics.registry.get_sample_value("sidrec_thought_cache_total", {"outcome": "hit"})
        assert await service.state.redis.get(user_keys(user_id).think_ahead) is None
    assert (other["versions"]["bundle"], other["rationale"]) == (beside, "Other.")
    assert answer["rationale"] == thinking["rationale"] == RATIONALE
    assert scores_of(answer) == scores_of(thinking)
    assert hits == 3


async def users_of_each_variant(service: Service, overrides: dict[str, Any]) -> tuple[str, str]:
    """Begin an experiment, and name a user of its control and one of the variant with these overrides."""
    variants = [{"name": "control", "control": True}, {"name": "new", "overrides": overrides}]
    content = {"name": "e", "traffic": [0.0, 1.0], "variants": variants}
    assert (await service.http.put("/experiments/e", json=content)).status_code == 200
    await until(lambda: not service.state.experiments.waiting)
    found: dict[str, str] = {}
    for number in range(50):
        answer = await service.recommend(user_id=f"user {number}")
        found.setdefault(answer["experiment"]["variant"], answer["user_id"])
    return found["control"], found["new"]
