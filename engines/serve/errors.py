"""Errors over HTTP, all in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import http
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import EngineError, QueueFull, RequestCancelled, RequestTimeout, ShuttingDown
from .schema import ErrorBody, ErrorDetail

__all__ = ["ApiError", "add_error_handlers", "failure", "refusal"]

RETRY_AFTER = 1  # seconds: a queue moves whenever one of its requests ends
CLIENT_GONE = 499  # nginx's number; nobody is there to read it but the metrics


class ApiError(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        """As an HTTP response."""
        return JSONResponse(self.body.model_dump(), self.status_code, self.headers)


def refusal(error: EngineError) -> ApiError:
    """Why a request was not taken."""
    retry = {"Retry-After": str(RETRY_AFTER)}
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=retry)
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), kind="server_error", code="shutting_down", headers=retry)
    return ApiError(400, str(error))


def failure(error: EngineError) -> ApiError:
    """Why a request that was taken was not answered."""
    if isinstance(error, RequestTimeout):
        return ApiError(504, str(error), kind="server_error", code="timeout")
    if isinstance(error, ShuttingDown):
        return refusal(error)
    if isinstance(error, RequestCancelled):
        return ApiError(CLIENT_GONE, str(error))
    return ApiError(500, str(error), kind="server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Whatever is raised becomes OpenAI's shape."""

    def of_api(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    def of_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # Of a union, the member that was meant: what is of its type, if anything is.
        deepest = max(error.errors(), key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
        param, last = _param(deepest["loc"]), str(deepest["loc"][-1])
        # The name of a union's member, such as list[…], is no field.
        where = [] if param is None else [param] if last == param or not last.isidentifier() else [param, last]
        what = "unknown field, or one that this server does not have; leave it out" if deepest["type"] == "extra_forbidden" else deepest["msg"]
        return ApiError(400, ": ".join([*where, what]), param=param).response()

    def of_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail) if error.detail != http.HTTPStatus(error.status_code).phrase else f"{error.detail}: see /openapi.json"
        return ApiError(error.status_code, message, headers=error.headers).response()

    def of_anything(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"internal error ({type(error).__name__}); the server's log says more", kind="server_error").response()

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, of_anything)


def _param(location: tuple[int | str, ...]) -> str | None:
    """The field, and which of its items: ``messages[0]`` from pydantic's ("body", "messages", 0, "user", "content", "str")."""
    if len(location) < 2 or isinstance(location[1], int):  # the whole body, or a place in what is not JSON
        return None
    return f"{location[1]}[{location[2]}]" if len(location) > 2 and isinstance(location[2], int) else str(location[1])
