"""The HTTP application: OpenAI's chat completions over a batcher. Whatever takes time runs in the batcher's threads or in a few of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ..batcher import Batcher
from ..errors import EngineError, RequestCancelled, ShuttingDown
from ..manifest import Engine
from ..results import GenerationResult
from ..sampling import SamplingParams
from ..ticket import Outcome, Ticket
from .errors import ApiError, add_error_handlers, failure, refusal
from .gate import OPEN, Gate
from .images import read_messages
from .metrics import Metrics
from .options import ServeOptions
from .schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    StageCount,
    Usage,
    VFlowOptions,
    Visual,
)

__all__ = ["create_app"]

READERS = 2  # requests whose images are decoded at a time: each may hold max_image_pixels several times over
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)}

Events = asyncio.Queue[str | Outcome]
log = logging.getLogger("vflow.serve")


def create_app(batcher: Batcher, options: ServeOptions | None = None) -> FastAPI:
    """The application over a batcher, which stays the caller's to close."""
    options = options or ServeOptions()
    metrics = Metrics(batcher)
    card = ModelCard(id=options.model or model_name(batcher.engine), created=int(time.time()))
    readers = CapacityLimiter(READERS)
    app = FastAPI(title="vflow-export serve", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, options=options, metrics=metrics, most=batcher.slots + batcher.queue_limit + READERS)
    add_error_handlers(app)
    describe_truly(app, options)

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Any:
        """Whether requests are taken: 200, or 503 from the moment on that the server is asked to stop."""
        return JSONResponse(Health(status="draining").model_dump(), 503) if batcher.closing else Health(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: ERRORS[401]})
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> ModelList:
        """The one model."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", responses={status: ERRORS[status] for status in (401, 404)})
    async def model(model: str) -> ModelCard:
        """The model of this name."""
        check_model(model)
        return card

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **ERRORS},
    )
    async def chat(body: ChatCompletionRequest, request: Request) -> Any:
        """Answer messages, whole or, with ``stream``, in events of ``chat.completion.chunk``."""
        began = time.perf_counter()
        check_model(body.model)
        ticket, events = await submit(body)
        reply = Reply(batcher.engine, card.id)
        async with cancelled_on_disconnect(request, ticket):
            event = await events.get()  # before any header: what fails by now has a status of its own
            while not body.stream and isinstance(event, str):
                event = await events.get()
        if isinstance(event, EngineError):
            log_failure(event)
            raise failure(event)
        if isinstance(event, GenerationResult) and not body.stream:
            metrics.answered(event, time.perf_counter() - began)
            return reply.whole(event)
        return StreamingResponse(stream(body, reply, event, events, ticket, began), media_type="text/event-stream")

    def check_model(name: str) -> None:
        if name != card.id:
            raise ApiError(404, f"model {name!r} is not served here; use {card.id!r}", param="model", code="model_not_found")

    async def submit(body: ChatCompletionRequest) -> tuple[Ticket, Events]:
        loop, events = asyncio.get_running_loop(), Events()
        extras = body.vflow or VFlowOptions()

        def pass_on(event: str | Outcome) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def read_and_submit() -> Ticket:
            messages, images = read_messages(body.messages, options)
            sampling = SamplingParams(
                temperature=body.temperature or 0.0, top_k=extras.top_k, top_p=1.0 if body.top_p is None else body.top_p, seed=body.seed
            )
            return batcher.submit(
                messages,
                images,
                max_new_tokens=body.longest,
                sampling=sampling,
                stop=body.stops,
                keep_scale=extras.keep_scale,
                max_pixels=extras.max_pixels,
                timeout=options.timeout,
                on_event=pass_on,
            )

        try:
            return await anyio.to_thread.run_sync(read_and_submit, limiter=readers), events
        except EngineError as error:
            raise refusal(error) from None

    async def stream(
        body: ChatCompletionRequest, reply: Reply, event: str | Outcome, events: Events, ticket: Ticket, began: float
    ) -> AsyncIterator[str]:
        try:
            yield reply.event([ChunkChoice(delta=Delta(role="assistant", content=""))])
            while isinstance(event, str):
                yield reply.event([ChunkChoice(delta=Delta(content=event))])
                event = await events.get()
            if isinstance(event, EngineError):
                log_failure(event)
                yield f"data: {failure(event).body.model_dump_json()}\n\n"
                return
            metrics.answered(event, time.perf_counter() - began)
            yield reply.event([ChunkChoice(delta=Delta(), finish_reason=event.finish_reason)], vflow=visual(event))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield reply.event([], usage=usage(event))
            yield "data: [DONE]\n\n"
        finally:
            ticket.cancel()  # the client has gone, if this is not the end

    return app


@asynccontextmanager
async def cancelled_on_disconnect(request: Request, ticket: Ticket) -> AsyncIterator[None]:
    """Cancel the ticket as soon as the client has gone: its last event comes then."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


class Reply:
    """What the responses to one request have in common."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": engine.model_fingerprint,
        }

    def whole(self, result: GenerationResult) -> ChatCompletion:
        """The answer at once."""
        choice = Choice(message=AnswerMessage(content=result.text), finish_reason=result.finish_reason)
        return ChatCompletion(**self._common, choices=[choice], usage=usage(result), vflow=visual(result))

    def event(self, choices: list[ChunkChoice], **rest: Any) -> str:
        """One event of a stream."""
        values = ChatCompletionChunk(**self._common, choices=choices, **rest).model_dump(exclude_none=True)
        for choice in values["choices"]:
            choice.setdefault("finish_reason", None)  # OpenAI says it in every chunk, and clients look for it
        return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def usage(result: GenerationResult) -> Usage:
    """Tokens of a request."""
    prompt, answer = result.prompt_tokens, len(result.token_ids)
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


def visual(result: GenerationResult) -> Visual:
    """Visual tokens of a request before and after pruning."""
    stages = [StageCount(part=stage.part, layer=stage.layer, kept=stage.kept) for stage in result.stages]
    return Visual(
        visual_tokens=result.visual_tokens,
        visual_tokens_kept=result.visual_tokens_kept,
        stages=stages,
        ttft_s=result.ttft_s,
        tokens_per_s=result.tokens_per_s,
    )


def model_name(engine: Engine) -> str:
    """As in the manifest; of a checkpoint folder only its name."""
    path = PurePath(engine.model_name)
    return path.name if path.is_absolute() else engine.model_name


def log_failure(error: EngineError) -> None:
    """Failures are the server's; that a client has gone, or the server is asked to stop, is none."""
    if not isinstance(error, (RequestCancelled, ShuttingDown)):
        log.warning("a request failed: %s", error)


def describe_truly(app: FastAPI, options: ServeOptions) -> None:
    """Correct FastAPI's OpenAPI document: invalid requests get 400, not 422, and the key is asked for outside of the application."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version="1", routes=app.routes)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            if options.api_key is not None:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
                for path in OPEN:
                    document["paths"][path]["get"]["security"] = []
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend its schema
