"""Parts of the server's replies, its errors, and middleware that limits requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import Any

from fastapi import Request

from fastvlm.inference.engine import Generation


class Refused(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code


class Left(Exception):
    """The client disconnected before its answer was complete."""


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Await `work` and return its result; cancel it if the client disconnects.

    Raises:
        Left: the client disconnected first.
    """
    task, watch = asyncio.ensure_future(work), asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Left
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict:
    clean = message.encode("utf-8", "replace").decode()  # a lone surrogate would break the reply
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def reason(generation: Generation) -> str:
    """Return OpenAI's `finish_reason` of an answer."""
    return "length" if generation.finish_reason == "length" else "stop"


def usage(generation: Generation) -> dict:
    prompt, completion = generation.num_prompt_tokens, len(generation.token_ids)
    details = {"cached_tokens": generation.num_reused_tokens, "image_tokens": generation.num_image_tokens}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }


def cost(generation: Generation, job: Any) -> dict:
    return {
        "image_tokens": generation.num_image_tokens,
        "reused_tokens": generation.num_reused_tokens,
        "queue_seconds": job.queue_seconds,
        "image_seconds": generation.image_seconds,
        "prefill_seconds": generation.prefill_seconds,
        "first_token_seconds": job.queue_seconds + generation.first_token_seconds,
        "tokens_per_second": generation.tokens_per_second,
    }


class BodyLimit:
    """Middleware that refuses bodies of more than `max_bytes`, by their Content-Length or, if that is missing or wrong,
    by counting, and bodies that take longer than `seconds` to arrive. `refusals` counts them by status."""

    def __init__(self, app: Any, *, max_bytes: int, seconds: float = 60.0, refusals: dict[int, int] | None = None):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds
        self.refusals = {} if refusals is None else refusals

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            return await refuse(send, 413, f"a request of more than {self.max_bytes} bytes", self.refusals)
        chunks, size, more = [], 0, scope["method"] in ("POST", "PUT", "PATCH")
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size, more = size + len(chunks[-1]), message.get("more_body", False)
                    if size > self.max_bytes:
                        return await refuse(send, 413, f"a request of more than {self.max_bytes} bytes", self.refusals)
        except TimeoutError:
            return await refuse(send, 408, f"the request did not come within {self.seconds:g} s", self.refusals)
        body = b"".join(chunks)
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> dict:
            return next(given, None) or await receive()

        return await self.app(scope, replay, send)


class RequestLimit:
    """Middleware that refuses requests beyond `max_requests` at once; idle connections do not count. `refusals` counts
    them by status."""

    def __init__(self, app: Any, *, max_requests: int, refusals: dict[int, int] | None = None):
        self.app, self.max_requests, self.num_requests = app, max_requests, 0
        self.refusals = {} if refusals is None else refusals

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.num_requests >= self.max_requests:
            message = f"the server has {self.max_requests} requests at once; try again soon"
            again = [(b"retry-after", b"1")]
            return await refuse(send, 503, message, self.refusals, kind="server_error", headers=again)
        self.num_requests += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            self.num_requests -= 1


async def refuse(
    send: Any,
    status: int,
    message: str,
    refusals: dict[int, int],
    *,
    kind: str = "invalid_request_error",
    headers: Sequence = (),
) -> None:
    """Send an error reply in place of the application, and close the connection, as its body may not have been read."""
    refusals[status] = refusals.get(status, 0) + 1
    body = json.dumps(error_body(message, kind=kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
