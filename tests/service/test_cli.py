"""`sidrec-serve` as a process: real ports, real signals, and messages for people."""

import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from semantic_ids.bundle import Bundle
from service.histories import Histories, connect
from service.redis_server import EmbeddedRedis
from service.security import hash_key
from tests.service.world import ITEM_IDS

ROOT = Path(__file__).parents[2]
SERVE = (sys.executable, "-m", "service")
KEY = "correct-horse-battery"


@pytest.fixture
def env(bundles: Path, tmp_path: Path) -> dict[str, str]:
    """A bundle, a Redis of the test's own, and any free port."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SIDREC_")}
    return inherited | {
        "SIDREC_BUNDLES": str(bundles),
        "SIDREC_DATA_DIR": str(tmp_path / "redis"),
        "SIDREC_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }


def serve(env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [*SERVE, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    """Exit code 1 and one plain line."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.stderr.splitlines()[-1] == line, "nothing comes after the message"
    for part in told:
        assert part in line
    assert done.stdout == ""


@dataclass
class Process:
    """A service in a process of its own."""

    popen: subprocess.Popen[str]
    stderr: list[str] = field(default_factory=list)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in what it has written."""
        give_up_at = time.monotonic() + 60
        while (found := re.search(pattern, "".join(self.stderr))) is None:
            assert self.popen.poll() is None, "".join(self.stderr)
            assert time.monotonic() < give_up_at, "".join(self.stderr)
            time.sleep(0.02)
        return found

    def address(self) -> str:
        """Where it answers, once it does."""
        address = self.wait_for(r"Serving bundle \S+ on (http://[\d.]+:\d+)")[1]
        self.wait_for(rf"in a browser: {re.escape(address)}/console\n")
        give_up_at = time.monotonic() + 20
        while True:
            try:
                assert httpx.get(f"{address}/health/ready").status_code == 200
            except httpx.ConnectError:
                assert time.monotonic() < give_up_at
                time.sleep(0.02)
            else:
                return address

    def end(self, with_signal: signal.Signals) -> int:
        """Its exit code after a signal."""
        self.popen.send_signal(with_signal)
        return self.popen.wait(timeout=30)


@contextmanager
def serving(env: dict[str, str], *options: str | Path) -> Iterator[Process]:
    command = [*SERVE, "run", *map(str, options)]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as popen:
        process = Process(popen)
        assert popen.stderr is not None
        reader = threading.Thread(target=process.stderr.extend, args=(popen.stderr,))
        reader.start()
        try:
            yield process
        finally:
            popen.kill()
            popen.wait()
            reader.join()


def has_redis(data_dir: str) -> bool:
    """Whether a server lives on the directory: it holds the lock as long as it does."""
    with (Path(data_dir) / "redis.lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def write_histories(file: Path) -> Path:
    users = {"it's me": [[ITEM_IDS[0], 1.0, "click"], [ITEM_IDS[0], 1.5, "like"], [ITEM_IDS[1], 2, "purchase"]]}
    users |= {f"user-{number}": [[ITEM_IDS[number], 3.0, "click"]] for number in range(5)}
    file.write_text("".join(f"{json.dumps({'user_id': user, 'events': events})}\n" for user, events in users.items()))
    return file


def test_help_teaches_the_commands_and_the_settings():
    done = serve(dict(os.environ), "--help")
    assert done.returncode == 0
    for word in ("run", "import-histories", "hash-key", "SIDREC_BUNDLES", "SIDREC_REDIS_URL", "SIDREC_API_KEY_HASHES"):
        assert word in done.stdout


def test_hash_key_prints_the_hash_alone_on_stdout(env: dict[str, str]):
    done = serve(env, "hash-key", KEY)
    assert (done.returncode, done.stdout) == (0, f"{hash_key(KEY)}\n")

    made = serve(env, "hash-key")
    key = made.stderr.split()[-1]
    assert len(key) >= 32
    assert made.stdout == f"{hash_key(key)}\n"


def test_run_with_keys_serves_until_ctrl_c_and_leaves_nothing_behind(env: dict[str, str], bundle: Bundle):
    env |= {"SIDREC_API_KEY_HASHES": hash_key(KEY), "SIDREC_HOST": "0.0.0.0", "SIDREC_LOG_LEVEL": "debug"}
    with serving(env) as process:
        address = process.address().replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}/versions").status_code == 401
        assert httpx.get(f"{address}/versions", headers={"x-api-key": "nearly-right"}).status_code == 401
        with httpx.Client(base_url=address, headers={"x-api-key": KEY}) as client:
            assert client.get("/versions").json()["bundle"] == bundle.bundle_id
            answer = client.post("/recommend", json={"history": [ITEM_IDS[0]], "deadline_ms": 60_000})
            assert answer.json()["source"] == "model"
            assert client.post("/recommend", content=b"{").status_code == 415
        assert has_redis(env["SIDREC_DATA_DIR"])
        assert process.end(signal.SIGINT) == 0
        assert not has_redis(env["SIDREC_DATA_DIR"])
    written = "".join(process.stderr)
    assert "Traceback" not in written
    assert KEY not in written
    assert "nearly-right" not in written
    assert '"event": "stopping"' in written


def test_run_prints_calls_that_work_and_a_second_service_finds_the_port_taken(env: dict[str, str], tmp_path: Path):
    histories = write_histories(tmp_path / "histories.jsonl")
    assert serve(env, "import-histories", histories).returncode == 0
    with serving(env, "--examples", histories) as process:
        address = process.address()
        process.wait_for("/rerank .*\n")
        calls = [shlex.split(line) for line in "".join(process.stderr).splitlines() if line.startswith("curl ")]
        assert len(calls) == 2
        for call in calls:
            url, header, body = call[2], call[4], call[6]
            response = httpx.post(url, content=body, headers=dict([header.split(": ")]), timeout=30)
            assert response.status_code == 200, response.text
            assert response.json()["user_id"] == "it's me"
            assert response.json()["source"] == "model"

        port = address.rpartition(":")[2]
        assert_refused(serve(env | {"SIDREC_PORT": port}, "run"), f"127.0.0.1:{port}", "in use", "SIDREC_PORT")

        assert process.end(signal.SIGTERM) in {0, -signal.SIGTERM}
        assert not has_redis(env["SIDREC_DATA_DIR"])
    assert "Traceback" not in "".join(process.stderr)


def test_run_without_a_bundle_names_the_remedy(env: dict[str, str], tmp_path: Path):
    done = serve(env | {"SIDREC_BUNDLES": str(tmp_path)}, "run")
    assert_refused(done, "could not start", "no bundle is published", str(tmp_path), "sidrec-train pipeline")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SIDREC_HOST", "0.0.0.0", "loopback only"),
        ("SIDREC_PORT", "70000", "SIDREC_PORT"),
        ("SIDREC_API_KEY_HASHES", "not-a-hash", "hash-key"),
        ("SIDREC_REDIS_URL", "nonsense", "SIDREC_REDIS_URL"),
    ],
)
def test_run_refuses_a_bad_setting_by_name(env: dict[str, str], name: str, value: str, told: str):
    done = serve(env | {name: value}, "run")
    assert_refused(done, told)
    if name == "SIDREC_API_KEY_HASHES":
        assert "not-a-hash" not in done.stderr, "it may be the key itself"


@pytest.mark.parametrize("content", [None, ""])
def test_run_with_examples_that_are_none_says_so_before_it_starts(
    env: dict[str, str], tmp_path: Path, content: str | None
):
    file = tmp_path / "histories.jsonl"
    if content is not None:
        file.write_text(content)
    assert_refused(serve(env, "run", "--examples", file), str(file), "sidrec-train")


async def test_importing_twice_leaves_one_copy(env: dict[str, str], tmp_path: Path):
    histories = write_histories(tmp_path / "histories.jsonl")
    first, second = serve(env, "import-histories", histories), serve(env, "import-histories", histories)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "nothing to do" in second.stderr
    assert not has_redis(env["SIDREC_DATA_DIR"])

    server = EmbeddedRedis(Path(env["SIDREC_DATA_DIR"]))
    client = connect(await server.start(), timeout_s=5, max_connections=1)
    imported = Histories(client)
    stored = await imported.load("it's me")
    assert stored.items == [ITEM_IDS[0], ITEM_IDS[0], ITEM_IDS[1]]
    assert stored.total == 3
    assert (await imported.load("user-4")).items == [ITEM_IDS[4]]
    await client.aclose()
    await server.stop()


async def test_an_import_is_one_tenants(env: dict[str, str], tmp_path: Path):
    histories = write_histories(tmp_path / "histories.jsonl")
    assert_refused(serve(env, "import-histories", histories, "--tenant", "My Shop"), "'My Shop'", "a-z, 0-9 and -")
    for tenant in ("shop", "news"):
        done = serve(env, "import-histories", histories, "--tenant", tenant)
        assert done.returncode == 0, done.stderr
        assert "nothing to do" not in done.stderr

    server = EmbeddedRedis(Path(env["SIDREC_DATA_DIR"]))
    client = connect(await server.start(), timeout_s=5, max_connections=1)
    stored = Histories(client)
    totals = [(await stored.of(tenant).load("it's me")).total for tenant in ("shop", "news", "default")]
    assert totals == [3, 3, 0]
    await client.aclose()
    await server.stop()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b'{"user_id": "u", "events": [["B1", NaN, "click"]]}',
        b'{"user_id": "u", "events": [["B1", 1.0, "buy"]]}',
        b'{"user_id": "\xff", "events": []}',
    ],
)
def test_import_names_the_bad_line_and_imports_nothing(env: dict[str, str], tmp_path: Path, line: bytes):
    file = tmp_path / "histories.jsonl"
    file.write_bytes(b'{"user_id": "good", "events": [["B1", 1.0, "click"]]}\n' + line + b"\n")
    assert_refused(serve(env, "import-histories", file), f"{file}, line 2", "sidrec-train publish")
    assert not has_redis(env["SIDREC_DATA_DIR"])


def test_import_without_a_file_or_a_redis_says_so(env: dict[str, str], tmp_path: Path):
    assert_refused(serve(env, "import-histories", tmp_path / "none.jsonl"), "does not exist", "sidrec-train pipeline")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    dead = env | {"SIDREC_REDIS_URL": f"redis://127.0.0.1:{port}"}
    assert_refused(serve(dead, "import-histories", write_histories(tmp_path / "h.jsonl")), "not imported", "again")
