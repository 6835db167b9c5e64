"""uvicorn as this service runs it."""

import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from service.http_protocol import BoundedHttp
from service.memory import keep_one_heap, settle


class Server(uvicorn.Server):
    """Serves an application on a socket that is already bound, and says when connections are accepted."""

    def __init__(self, app: FastAPI, on_listening: Callable[[], None]) -> None:
        keep_one_heap()
        # Requests are in the metrics, faults in our own log; uvicorn's lines would say both again.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        # Kept longer than clients and proxies keep theirs, so that no request meets a connection that just closed.
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http=BoundedHttp,
                ws="none",
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=20,
                timeout_keep_alive=75,
            )
        )
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        await super().startup(sockets=sockets)
        if self.started:
            settle()
            self._on_listening()
