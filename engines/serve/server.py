"""uvicorn, one process, and what happens when it is asked to stop: requests that were taken are answered, new ones get 503, then exit code 0."""

from __future__ import annotations

import socket
from collections.abc import Callable
from threading import Thread
from types import FrameType

import uvicorn

from ..batcher import Batcher
from ..errors import EngineError
from .app import create_app
from .options import ServeOptions

__all__ = ["listen", "serve"]

FLUSH_SECONDS = 5  # for responses that are complete to reach their clients
MAX_PORT = 65_535


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        EngineError: the address is in use, or not this machine's.
    """
    if not 0 <= port <= MAX_PORT:
        raise EngineError(f"port must be in 0..{MAX_PORT}, got {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128)
    except (OSError, UnicodeError) as error:
        raise EngineError(f"cannot listen on {host} port {port} ({error}); choose another --host or --port") from None


def serve(batcher: Batcher, listener: socket.socket, options: ServeOptions, *, drain: float, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then give requests that were taken ``drain`` seconds; a second signal ends them at once. Closes the batcher."""
    config = uvicorn.Config(
        create_app(batcher, options),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    try:
        _DrainingServer(config, batcher, drain, on_ready).run(sockets=[listener])
    finally:
        batcher.close()


class _DrainingServer(uvicorn.Server):
    """Goes on listening while it drains, so that a load balancer reads 503 from /health rather than nothing."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher, drain: float, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._batcher, self._seconds, self._on_ready = batcher, drain, on_ready
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say when it is done."""
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; unlike uvicorn's own, it is not raised once more in the end, since this is the usual way to stop."""
        if self._draining:
            self.should_exit = self.force_exit = True
        else:
            self._draining = True
            Thread(target=self._drain, name="vflow drain", daemon=True).start()

    def _drain(self) -> None:
        self._batcher.close(self._seconds)
        self.should_exit = True
