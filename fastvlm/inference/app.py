"""The FastAPI application: routes and error replies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from fastvlm.inference.description import describe_server
from fastvlm.inference.engine import Engine
from fastvlm.inference.protocol import (
    AttentionReply,
    AttentionRequest,
    ChatCompletion,
    ChatRequest,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    place,
)
from fastvlm.inference.replies import BodyLimit, Left, Refused, RequestLimit, error_body, unless_gone
from fastvlm.inference.service import Service
from fastvlm.inference.settings import Settings

PAGE = Path(__file__).parent / "page"
WRONG = {status: {"model": ErrorReply} for status in (400, 404, 413, 503)}
STREAMED = {200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, its chunks."}}
log = logging.getLogger("fastvlm.server")


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """Return the application that serves an engine; its scheduler stops when the application does."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.scheduler.stop)

    app = FastAPI(title="fastvlm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=None)
    app.state.scheduler = service.scheduler
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, refusals=service.refusals)
    app.add_middleware(RequestLimit, max_requests=settings.max_requests, refusals=service.refusals)
    if settings.origins:  # added last, so outermost: refusals of the two above carry its headers, too
        origins = [origin.strip() for origin in settings.origins.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    add_errors(app, service)
    add_api(app, service)
    add_page(app)
    describe_server(app, name=service.name, settings=settings)
    return app


def add_errors(app: FastAPI, service: Service) -> None:
    """Reply to every error with OpenAI's error body and a one-line message."""

    def reply(status: int, message: str, *, kind: str = "invalid_request_error", headers=None, **more) -> Response:
        service.refusals[status] = service.refusals.get(status, 0) + 1
        headers = headers or ({"Retry-After": "1"} if status == 503 else None)
        return JSONResponse(error_body(message, kind=kind, **more), status_code=status, headers=headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return reply(error.status, error.message, kind=error.kind, code=error.code)

    @app.exception_handler(Left)
    async def left(_: Request, error: Left) -> Response:
        service.num_left += 1
        return Response(status_code=499)  # nginx's code for "client closed request"

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = place(first).encode("utf-8", "replace").decode()[:200]
        said = "this server does not know it, or does not do it" if first["type"] == "extra_forbidden" else first["msg"]
        return reply(400, f"{where or 'body'}: {said}", param=where or None)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return reply(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return reply(500, "the server failed; its log says why", kind="server_error")


def add_api(app: FastAPI, service: Service) -> None:
    """Add OpenAI's routes, `/v1/attention`, and `/health` and `/metrics` for operators."""

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=WRONG | STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation; with `stream`, as server-sent events that end with [DONE]."""
        images, input_ids = await unless_gone(request, service.prepare(body))
        asked = service.ask(body, images, input_ids)
        try:
            # Wait for the first event, so that an invalid question gets its own status code.
            first = await unless_gone(request, asked.next())
            if not body.stream:
                return await unless_gone(request, service.whole(asked, first))
        except BaseException:
            asked.job.cancel()
            raise
        apart = body.stream_options is not None and body.stream_options.include_usage
        events = service.stream(asked, first, usage_apart=apart)
        end = BackgroundTask(service.end, asked)  # not in `events`, which never begins if the client is gone by now
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers, background=end)

    @app.post("/v1/attention", response_model=AttentionReply, responses=WRONG)
    async def attention(body: AttentionRequest, request: Request) -> Any:
        """Return the image regions that an answer attends to; the conversation ends with that answer."""
        return await unless_gone(request, service.attention(body))

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> Any:
        return {"data": [service.card()]}

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=WRONG)
    async def model(model: str) -> Any:
        service.check_model(model)
        return service.card()

    @app.get("/health", response_model=Health)
    async def health() -> Any:
        scheduler = service.scheduler
        return {"model": service.name, "active": scheduler.num_active, "waiting": scheduler.num_waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Return metrics in Prometheus' text format."""
        return service.metrics()


def add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        policy = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; frame-ancestors 'none'"
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": policy})

    @app.get("/{file}", include_in_schema=False)
    async def asset(file: str) -> Response:
        if file not in ("page.js", "page.css"):
            raise HTTPException(404, "there is nothing here")
        return FileResponse(PAGE / file)
