"""Schemathesis against the running service, over HTTP: `python -m tests.service.contract --minutes 10`.

All checks and all phases, the stateful one too, on a tiny bundle with the real local engine and a Redis of its own.
Exits with Schemathesis' status; the log of requests is in the folder that is printed first.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI

from service.security import hash_key
from tests.service.thinking import publish_thinking

KEY = "the key of the contract test"
_CONFIG = Path(__file__).with_name("schemathesis.toml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("more", nargs="*", help="further arguments of `schemathesis run`, after --")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sidrec-contract-"))
    sys.stdout.write(f"{folder}\n")
    bundles = publish_thinking(folder).path.parent  # one that can reason: `reasoning: "on"` is refused by others
    port = _free_port()
    environment = _without_settings() | {
        "SIDREC_BUNDLES": str(bundles),
        "SIDREC_DATA_DIR": str(folder / "redis"),
        "SIDREC_THINK_MAX_SECONDS": "0.1",
        "SIDREC_PORT": str(port),
        "SIDREC_API_KEY_HASHES": hash_key(KEY),
        "SIDREC_ADMIN_KEY_HASHES": hash_key(KEY),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen([sys.executable, "-m", "service", "run"], env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, service)
        bounds = ["--max-time", str(max(1, round(arguments.minutes * 60)))]
        if arguments.seed is not None:
            bounds += ["--seed", str(arguments.seed)]
        return schemathesis(url, folder / "report", *bounds, *arguments.more).returncode
    finally:
        service.terminate()
        service.wait(60)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application on a socket, in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), app.state.startup_error
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def schemathesis(url: str, report: Path, *options: str, capture: bool = False) -> "subprocess.CompletedProcess[str]":
    """All checks, all phases, on a service that knows `KEY`."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "--no-color", "--config-file", str(_CONFIG),
        "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing,stateful",
        "--continue-on-failure", "--header", f"x-api-key:{KEY}", "--request-timeout", "90",
        "--report", "ndjson", "--report-dir", str(report),
    ]  # fmt: skip
    report.mkdir()  # what it keeps between runs goes there too
    here = {"SCHEMATHESIS_HOOKS": "tests.service.schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [*command, *options], env=os.environ | here, cwd=report, check=False, text=True, capture_output=capture
    )


def _wait_until_ready(url: str, service: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and service.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the service did not become ready; see service.log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SIDREC_")}


if __name__ == "__main__":
    sys.exit(main())
