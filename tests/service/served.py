"""The real application under the real uvicorn, in a process of its own, for tests that speak to its socket.

`python -m tests.service.served SETTINGS` serves on a free port, which it writes to stdout once it is ready; SETTINGS is
a JSON object. The engine answers at once.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.app import create_app
from service.logs import configure
from service.server import Server
from service.settings import Settings
from tests.service.engines import instant


@dataclass(frozen=True)
class Served:
    """A server process that listens on a port of 127.0.0.1, and the file with its log."""

    process: "subprocess.Popen[str]"
    port: int
    log: Path

    @property
    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024


@contextmanager
def serving(log: Path, **settings: Any) -> Iterator[Served]:
    """Start, use, stop."""
    command = [sys.executable, "-m", "tests.service.served", json.dumps(settings, default=str)]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            assert port, log.read_text()
            yield Served(process, int(port), log)
        finally:
            process.terminate()
            process.communicate(timeout=30)


def main() -> None:
    """Serve until SIGTERM."""
    settings = Settings(**json.loads(sys.argv[1]))
    configure(settings.log_level, settings.log_format)
    listener = socket.create_server(("127.0.0.1", 0))

    def announce() -> None:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    with suppress(KeyboardInterrupt, SystemExit):
        Server(create_app(settings, engine_factory=instant), announce).run(sockets=[listener])


if __name__ == "__main__":
    main()
