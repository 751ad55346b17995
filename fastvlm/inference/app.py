"""The server's application: requests in, the scheduler's answers out."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from fastvlm.data.decode import measure_image
from fastvlm.inference.attention import attend
from fastvlm.inference.clock import peak_bytes, percentiles
from fastvlm.inference.engine import Engine
from fastvlm.inference.fetching import ImageFetcher
from fastvlm.inference.protocol import (
    AttentionReply,
    AttentionRequest,
    ChatCompletion,
    ChatRequest,
    ErrorReply,
    Health,
    ModelList,
)
from fastvlm.inference.replies import BodyLimit, Refused, cost, error_body, reason, usage
from fastvlm.inference.sampling import Sampling
from fastvlm.inference.scheduler import Busy, Job, Scheduler
from fastvlm.inference.settings import Settings

PAGE = Path(__file__).parent / "page"
log = logging.getLogger("fastvlm.server")


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application around an engine; its scheduler starts and ends with it."""
    scheduler = Scheduler(engine, max_rows=settings.max_rows, max_waiting=settings.max_waiting)
    fetch = ImageFetcher(
        hosts=[host.strip() for host in settings.allow_hosts.split(",") if host.strip()],
        max_bytes=settings.max_image_bytes,
        timeout=settings.fetch_seconds,
        private=settings.allow_private,
    )
    counts: dict[str, float] = {}
    created, name = int(time.time()), settings.name or Path(settings.run).resolve().name or "fastvlm"
    first_tokens: list[float] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.stop)

    wrong = {status: {"model": ErrorReply} for status in (400, 404, 413, 503)}
    app = FastAPI(title="fastvlm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=None)
    app.state.scheduler = scheduler
    if settings.origins:
        origins = [origin.strip() for origin in settings.origins.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    # -------------------------------------------------------------------------------------------------------- errors

    def reply_error(status: int, message: str, *, kind: str = "invalid_request_error", **more) -> Response:
        key = f"refused_{status}"
        counts[key] = counts.get(key, 0) + 1
        headers = more.pop("headers", None) or ({"Retry-After": "1"} if status == 503 else None)
        return JSONResponse(error_body(message, kind=kind, **more), status_code=status, headers=headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return reply_error(error.status, error.message, kind=error.kind, code=error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        where = where.encode("utf-8", "replace").decode()[:200]
        return reply_error(400, f"{where or 'body'}: {first['msg']}", param=where or None)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return reply_error(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return reply_error(500, "the server failed; its log says why", kind="server_error")

    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)

    # ------------------------------------------------------------------------------------------------------ requests

    async def prepare(body: ChatRequest) -> tuple[dict, list]:
        """Record and views of a request; files are read in threads, the event loop goes on."""
        if body.model != name:
            served = f"this server has {name}"
            raise Refused(404, f"model {body.model!a} does not exist; {served}", code="model_not_found")
        record, urls = body.record()
        if len(urls) > settings.max_images:
            raise Refused(400, f"{len(urls)} images, more than the {settings.max_images} a request may have")

        def read() -> list:
            files = [fetch(url) for url in urls]
            for data in files:
                width, height = measure_image(data)
                if width * height > settings.max_pixels:
                    raise ValueError(f"an image of {width} x {height} pixels, more than {settings.max_pixels}")
            return engine.read_images(files)

        try:
            return record, await asyncio.to_thread(read)
        except ValueError as error:
            raise Refused(400, str(error).splitlines()[0]) from None

    def enqueue(body: ChatRequest, record: dict, images: Sequence) -> tuple[Job, asyncio.Queue]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(kind: str, value: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (kind, value))

        asked = body.max_completion_tokens or body.max_tokens
        if asked is not None and asked > settings.max_new_tokens:
            raise Refused(400, f"max_tokens={asked} is more than the {settings.max_new_tokens} this server writes")
        seed = body.seed if body.seed is not None else random.getrandbits(62)
        job = Job(
            record=record,
            images=images,
            sampling=Sampling(body.temperature or 0.0, body.top_k or 0, 1.0 if body.top_p is None else body.top_p),
            max_new_tokens=asked or room(settings.default_new_tokens),
            stop=body.stop_strings,
            seed=seed % 2**63,
            tell=tell,
        )
        try:
            return scheduler.submit(job), events
        except Busy:
            raise Refused(503, "the server is busy; try again soon", kind="server_error", code="busy") from None

    def room(wanted: int) -> int:
        limit = engine.model.llm.max_positions
        return wanted if limit is None else max(1, min(wanted, limit // 4))

    async def next_event(events: asyncio.Queue) -> tuple[str, Any]:
        kind, value = await events.get()
        if kind == "error":
            if isinstance(value, ValueError):
                raise Refused(400, str(value).splitlines()[0])
            raise value
        if kind == "done":
            first_tokens.append(value.first_token_seconds)
            del first_tokens[:-1000]
        return kind, value

    # -------------------------------------------------------------------------------------------------------- routes

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=wrong)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answers a conversation; with `stream`, as server-sent events that end in [DONE]."""
        record, images = await prepare(body)
        job, events = enqueue(body, record, images)
        gone = asyncio.create_task(until_gone(request, job))
        try:
            first = await next_event(events)  # a question that cannot be asked is refused before anything is sent
            reply = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
            if body.stream:
                chunks = stream(body, job, events, first, reply)
                return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            pieces = []
            kind, value = first
            while kind == "text":
                pieces.append(value)
                kind, value = await next_event(events)
            message = {"role": "assistant", "content": "".join(pieces)}
            choice = {"index": 0, "message": message, "finish_reason": reason(value)}
            return reply | {"choices": [choice], "usage": usage(value), "fastvlm": cost(value, job)}
        except BaseException:
            job.cancel()
            raise
        finally:
            if not body.stream:
                gone.cancel()

    async def until_gone(request: Request, job: Job) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        job.cancel()
        job.tell("error", ConnectionResetError("the client left"))

    async def stream(body: ChatRequest, job: Job, events: asyncio.Queue, first, reply: dict) -> AsyncIterator[str]:
        """Chunks; a client that leaves closes the generator, which cancels the job."""

        def event(delta: dict, finish: str | None = None, **more) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = reply | {"object": "chat.completion.chunk", "choices": [choice]} | more
            return f"data: {json.dumps(chunk)}\n\n"

        finished = False
        try:
            yield event({"role": "assistant", "content": ""})
            kind, value = first
            while kind == "text":
                yield event({"content": value})
                kind, value = await next_event(events)
            spent = {"fastvlm": cost(value, job)}
            apart = body.stream_options is not None and body.stream_options.include_usage
            yield event({}, reason(value), **spent, **({} if apart else {"usage": usage(value)}))
            if apart:
                last = {"object": "chat.completion.chunk", "choices": [], "usage": usage(value)}
                yield f"data: {json.dumps(reply | last)}\n\n"
            yield "data: [DONE]\n\n"
            finished = True
        except ConnectionResetError:
            pass
        except Exception as error:  # noqa: BLE001  the headers are sent: the error goes where the client listens
            log.error("a stream failed", exc_info=error)
            yield f"data: {json.dumps(error_body('the server failed; its log says why', kind='server_error'))}\n\n"
        finally:
            if not finished:
                job.cancel()

    @app.post("/v1/attention", response_model=AttentionReply, responses=wrong)
    async def attention(body: AttentionRequest) -> Any:
        """Which image regions an answer looked at: the conversation ends with that answer."""
        record, images = await prepare(body)
        if not images:
            raise Refused(400, "there is no image whose regions could be shown")
        try:
            views = await scheduler.call(lambda: attend(engine, record, images))
        except Busy:
            raise Refused(503, "the server is busy; try again soon", kind="server_error", code="busy") from None
        except ValueError as error:
            raise Refused(400, str(error).splitlines()[0]) from None
        rounded = lambda tensor: [[round(v, 5) for v in row] for row in tensor.tolist()]
        return {
            "images": [
                {
                    "rows": view.rows,
                    "columns": view.columns,
                    "answer": rounded(view.answer[None])[0],
                    "tokens": rounded(view.tokens),
                }
                for view in views
            ]
        }

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> Any:
        card = {
            "id": name,
            "created": created,
            "image_size": engine.image_size,
            "tokens_per_view": engine.tokens_per_image,
            "fit": engine.transform.fit,
            "context_length": engine.model.llm.max_positions,
            "max_images": settings.max_images,
        }
        return {"data": [card]}

    @app.get("/health", response_model=Health)
    async def health() -> Any:
        return {"model": name, "active": scheduler.num_active, "waiting": scheduler.num_waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Prometheus' text format."""

        values = {
            "answers_total": scheduler.num_done,
            "answers_cancelled_total": scheduler.num_cancelled,
            "answer_tokens_total": scheduler.num_tokens,
            "active": scheduler.num_active,
            "waiting": scheduler.num_waiting,
            "file_store_bytes": engine.files.num_bytes,
            "file_store_hits_total": engine.files.hits,
            "image_store_bytes": engine.images.num_bytes,
            "image_store_hits_total": engine.images.hits,
            "prefix_store_bytes": engine.prefixes.num_bytes,
            "prefix_store_hits_total": engine.prefixes.hits,
            "peak_memory_bytes": peak_bytes(engine.device),
            **{f"{key}_total": value for key, value in counts.items()},
        }
        if first_tokens:
            values |= {f"first_token_seconds_{key}": value for key, value in percentiles(first_tokens).items()}
        lines = [
            f"# TYPE fastvlm_{k} {'counter' if k.endswith('_total') else 'gauge'}\nfastvlm_{k} {v}"
            for k, v in values.items()
        ]
        return "\n".join(lines) + "\n"

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        policy = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; frame-ancestors 'none'"
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": policy})

    @app.get("/{file}", include_in_schema=False)
    async def asset(file: str) -> Response:
        if file not in ("page.js", "page.css"):
            raise HTTPException(404, "there is nothing here")
        return FileResponse(PAGE / file)

    return app
