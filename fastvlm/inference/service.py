"""The logic behind the server's routes: turns requests into scheduler jobs, and their events into replies."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastvlm.inference.attention import attend
from fastvlm.inference.clock import peak_bytes, percentiles
from fastvlm.inference.engine import Engine
from fastvlm.inference.protocol import AttentionRequest, ChatRequest
from fastvlm.inference.reading import Reader
from fastvlm.inference.replies import Refused, cost, error_body, reason, usage
from fastvlm.inference.sampling import Sampling
from fastvlm.inference.scheduler import Busy, Job, Scheduler, Stopped
from fastvlm.inference.settings import Settings

log = logging.getLogger("fastvlm.server")


class Asked:
    """A question accepted by the scheduler: its job and the queue of its events."""

    def __init__(self, service: Service, job: Job, events: asyncio.Queue):
        self.service, self.job, self.events = service, job, events
        self.ended = False  # everything of its reply was sent

    async def next(self) -> tuple[str, Any]:
        """Wait for the next event: ("text", piece) or ("done", Generation).

        Raises:
            Refused: the question is invalid, or the server is stopping.
        """
        kind, value = await self.events.get()
        if kind == "error":
            raise refusal(value)
        if kind == "done":
            self.service.saw_first_token(value.first_token_seconds)
        return kind, value


class Service:
    """An engine with its scheduler and request reader, within the limits of `settings`."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.name = settings.name or Path(settings.run).resolve().name or "fastvlm"
        self.created = int(time.time())
        self.scheduler = Scheduler(engine, max_rows=settings.max_rows, max_waiting=settings.max_waiting)
        self.reader = Reader(engine, settings)
        self.refusals: dict[int, int] = {}  # by HTTP status
        self.num_left = 0  # clients that disconnected before their answer was complete
        self._first_tokens: list[float] = []  # seconds, of the last thousand answers

    def saw_first_token(self, seconds: float) -> None:
        self._first_tokens.append(seconds)
        del self._first_tokens[:-1000]

    # ----------------------------------------------------------------------------------------------------- questions

    async def prepare(self, body: ChatRequest | AttentionRequest) -> tuple[list, list[int]]:
        """Return a request's images as views and its prompt as ids; runs in threads, off the event loop.

        Raises:
            Refused: an unknown model, too many images, a prompt that is too long, or an unreadable image.
        """
        limits = self.settings
        self.check_model(body.model)
        record, urls = body.record()
        if len(urls) > limits.max_images:
            raise Refused(400, f"{len(urls)} images, more than the {limits.max_images} a request may have")
        # For an attention request the prompt contains the answer, which may be as long as this server generates.
        most = limits.max_prompt_tokens + (limits.max_new_tokens if isinstance(body, AttentionRequest) else 0)
        try:
            return await self.reader.read(record, urls, max_tokens=most)
        except ValueError as error:
            raise Refused(400, str(error).splitlines()[0]) from None

    def ask(self, body: ChatRequest, images: Sequence, input_ids: list[int]) -> Asked:
        """Submit a question prepared by `prepare` to the scheduler.

        Raises:
            Refused: the queue is full.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(kind: str, value: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (kind, value))

        seed = body.seed if body.seed is not None else random.getrandbits(62)
        top_p = 1.0 if body.top_p is None else body.top_p
        job = Job(
            record={"input_ids": input_ids},
            images=images,
            sampling=Sampling(body.temperature or 0.0, max(body.top_k or 0, 0), top_p),
            max_new_tokens=self._room(body, len(input_ids)),
            stop=body.stop_strings,
            seed=seed % 2**63,
            tell=tell,
        )
        try:
            return Asked(self, self.scheduler.submit(job), events)
        except Busy:
            raise busy() from None

    def _room(self, body: ChatRequest, length: int) -> int:
        """Return the token limit of an answer: the least of what the request, the server and the model allow.

        If the prompt leaves no room it is 1, and the engine raises the error.
        """
        asked = body.max_completion_tokens or body.max_tokens or self.settings.default_new_tokens
        room, limit = min(asked, self.settings.max_new_tokens), self.engine.model.llm.max_positions
        return room if limit is None else max(1, min(room, limit - length))

    # ------------------------------------------------------------------------------------------------------- replies

    def opening(self) -> dict:
        """Return the fields that all chunks of a reply share."""
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}

    async def whole(self, asked: Asked, first: tuple[str, Any]) -> dict:
        """Return a complete reply; `first` is the job's first event."""
        pieces = []
        kind, value = first
        while kind == "text":
            pieces.append(value)
            kind, value = await asked.next()
        message = {"role": "assistant", "content": "".join(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": reason(value)}
        return self.opening() | {"choices": [choice], "usage": usage(value), "fastvlm": cost(value, asked.job)}

    async def stream(self, asked: Asked, first: tuple[str, Any], *, usage_apart: bool) -> AsyncIterator[str]:
        """Yield server-sent events up to [DONE]; afterwards `end` must be called, even if nothing was read.

        Args:
            first: the job's first event.
            usage_apart: send the usage in a chunk of its own, instead of with the last chunk of the answer.
        """
        opening = self.opening() | {"object": "chat.completion.chunk"}

        def event(delta: dict, finish: str | None = None, **more) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return f"data: {json.dumps(opening | {'choices': [choice]} | more)}\n\n"

        try:
            yield event({"role": "assistant", "content": ""})
            kind, value = first
            while kind == "text":
                yield event({"content": value})
                kind, value = await asked.next()
            spent = {"fastvlm": cost(value, asked.job)}
            yield event({}, reason(value), **spent, **({} if usage_apart else {"usage": usage(value)}))
            if usage_apart:
                yield f"data: {json.dumps(opening | {'choices': [], 'usage': usage(value)})}\n\n"
            yield "data: [DONE]\n\n"
            asked.ended = True
        except Refused as error:  # headers have been sent, so the error becomes an event
            asked.ended = True
            yield f"data: {json.dumps(error_body(error.message, kind=error.kind, code=error.code))}\n\n"
        except Exception as error:  # noqa: BLE001  likewise
            asked.ended = True
            log.error("a stream failed", exc_info=error)
            yield f"data: {json.dumps(error_body('the server failed; its log says why', kind='server_error'))}\n\n"

    async def end(self, asked: Asked) -> None:
        """End a streamed reply: cancel its job, and count the client if it left before the last event."""
        self.num_left += not asked.ended
        asked.job.cancel()

    async def attention(self, body: AttentionRequest) -> dict:
        """Return how the answer's attention is shared among image regions, and the regions behind each visual token.

        Raises:
            Refused: no image, an invalid conversation, or a busy server.
        """
        images, _ = await self.prepare(body)
        if not images:
            raise Refused(400, "there is no image whose regions could be shown")
        try:
            views = await self.scheduler.call(attend(self.engine, body.record()[0], images))
        except Busy:
            raise busy() from None
        except (ValueError, Stopped) as error:
            raise refusal(error) from None
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

    def check_model(self, model: str) -> None:
        """Check that this server has a model.

        Raises:
            Refused: it has not.
        """
        if model != self.name:
            served = f"this server has {self.name}"
            raise Refused(404, f"model {model!a} does not exist; {served}", code="model_not_found")

    def card(self) -> dict:
        """Return the model's entry in `/v1/models`."""
        return {
            "id": self.name,
            "created": self.created,
            "image_size": self.engine.image_size,
            "tokens_per_view": self.engine.tokens_per_image,
            "fit": self.engine.transform.fit,
            "context_length": self.engine.model.llm.max_positions,
            "max_images": self.settings.max_images,
            "max_prompt_tokens": self.settings.max_prompt_tokens,
        }

    def metrics(self) -> str:
        """Return counters and gauges in Prometheus' text format."""
        engine, scheduler = self.engine, self.scheduler
        values = {
            "answers_total": scheduler.num_done,
            "answers_cancelled_total": scheduler.num_cancelled,
            "answer_tokens_total": scheduler.num_tokens,
            "clients_left_total": self.num_left,
            "active": scheduler.num_active,
            "waiting": scheduler.num_waiting,
            "file_store_bytes": engine.files.num_bytes,
            "file_store_hits_total": engine.files.hits,
            "image_store_bytes": engine.images.num_bytes,
            "image_store_hits_total": engine.images.hits,
            "prefix_store_bytes": engine.prefixes.num_bytes,
            "prefix_store_hits_total": engine.prefixes.hits,
            **({"prefix_store_positions": most} if (most := engine.prefixes.max_positions) is not None else {}),
            "peak_memory_bytes": peak_bytes(engine.device),
            **{f"refused_{status}_total": count for status, count in self.refusals.items()},
        }
        if self._first_tokens:
            values |= {f"first_token_seconds_{key}": value for key, value in percentiles(self._first_tokens).items()}
        lines = [
            f"# TYPE fastvlm_{k} {'counter' if k.endswith('_total') else 'gauge'}\nfastvlm_{k} {v}"
            for k, v in values.items()
        ]
        return "\n".join(lines) + "\n"


def refusal(error: Exception) -> Exception:
    """Convert an error to the one a client gets: 400 for its mistakes, 503 on shutdown, else unchanged (a 500)."""
    if isinstance(error, ValueError):
        return Refused(400, str(error).splitlines()[0])
    return Refused(503, str(error), kind="server_error", code="stopped") if isinstance(error, Stopped) else error


def busy() -> Refused:
    return Refused(503, "the server is busy; try again soon", kind="server_error", code="busy")
