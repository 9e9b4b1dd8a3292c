"""What a request must pass before anybody reads it: key, how many there are, and size of its body."""

from __future__ import annotations

import asyncio
import hmac
import http

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import QueueFull
from .errors import ApiError, refusal
from .metrics import Metrics
from .options import ServeOptions

__all__ = ["OPEN", "Gate"]

OPEN = ("/health",)  # probes bear no keys
BODY_SECONDS = 30.0  # between two pieces of a body: who is slower keeps others out


class Gate:
    """ASGI middleware.

    Args:
        most: bodies that may be read or answered at a time.
    """

    def __init__(self, app: ASGIApp, *, options: ServeOptions, metrics: Metrics, most: int) -> None:
        self._app, self._options, self._metrics, self._most = app, options, metrics, most
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or answer with an error."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= http.HTTPStatus.BAD_REQUEST:
                self._metrics.refused(message["status"])
            await send(message)

        try:
            self._check_key(headers.get(b"authorization", b""))
            self._check_size(headers.get(b"content-length", b"0"))
            if scope["method"] == "POST" and self._inside >= self._most:
                raise refusal(QueueFull("too many requests at a time; try again later"))
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        self._inside += scope["method"] == "POST"
        try:
            await self._app(scope, self._limited(receive), counted)
        finally:
            self._inside -= scope["method"] == "POST"

    def _check_key(self, authorization: bytes) -> None:
        key = self._options.api_key
        if key is not None and not hmac.compare_digest(authorization, b"Bearer " + key.encode("ascii")):
            raise ApiError(401, "wrong or no API key: send it as Authorization: Bearer KEY", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    def _check_size(self, length: bytes) -> None:
        if length.isdigit() and int(length) > self._options.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        most = self._options.max_body_bytes
        return ApiError(413, f"the body is larger than {most} bytes, the most that this server takes; send fewer or smaller images")

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` that counts what it gets, and does not wait for a body for ever."""
        read, whole = 0, False

        async def limited() -> Message:
            nonlocal read, whole
            if whole:  # then it waits for the client to go away
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except TimeoutError:
                raise ApiError(408, f"nothing came of the body for {BODY_SECONDS:g} s", headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if read > self._options.max_body_bytes:
                    raise self._too_large()
            return message

        return limited
