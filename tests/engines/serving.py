"""A real server on loopback for tests, in a thread of this process so that they can look at its batcher."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
import uvicorn
from PIL import Image
from vflow.engines import Batcher, BatcherStats
from vflow.engines.serve.app import create_app
from vflow.engines.serve.options import ServeOptions

MODEL = "stand-in"
PATIENCE = 30.0  # seconds that a test waits for what must happen; reached only where it is red


@contextmanager
def serving(batcher: Batcher, options: ServeOptions | None = None) -> Iterator[str]:
    """The server's address, such as ``http://127.0.0.1:41234``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(batcher, options), log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server hangs"


def client(address: str, **options: Any) -> openai.OpenAI:
    """The official client; it would try again by itself what a test is about."""
    return openai.OpenAI(base_url=f"{address}/v1", max_retries=0, **{"api_key": "none", "timeout": PATIENCE, **options})


def wait_until(true: Callable[[], Any]) -> None:
    """Wait for what must come true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def wait_until_idle(batcher: Batcher) -> BatcherStats:
    """All slots free and nobody waiting."""
    wait_until(lambda: batcher.stats().active == batcher.stats().queued == 0)
    return batcher.stats()


def data_url(image: np.ndarray, kind: str = "PNG") -> str:
    """uint8 [height, width, 3] as a data: URL."""
    return encoded_url(image_bytes(image, kind), kind)


def image_bytes(image: np.ndarray, kind: str = "PNG") -> bytes:
    """uint8 [height, width, 3] as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def encoded_url(content: bytes, kind: str = "PNG") -> str:
    """Bytes as a data: URL."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    """A user message of images and a text."""
    return {"role": "user", "content": [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]}
