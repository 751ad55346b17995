"""Backends of the terminal chat: an engine in this process, or a server."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from fastvlm.inference.engine import Engine


@dataclass(frozen=True)
class Spent:
    """An answer with its token counts and timings."""

    text: str
    num_images: int
    image_tokens: int
    image_seconds: float
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    answer_tokens: int
    tokens_per_second: float

    def line(self) -> str:
        """Return a line with the tokens and milliseconds of images, prompt and answer."""
        image = "no image"
        if self.num_images:
            image = f"{self.num_images} image{'s' * (self.num_images > 1)}: {self.image_tokens} tokens, "
            image += f"{1000 * self.image_seconds:.1f} ms"
        reused = f" ({self.reused_tokens} known)" if self.reused_tokens else ""
        return (
            f"[{image} | prompt: {self.prompt_tokens} tokens{reused}, {1000 * self.prefill_seconds:.1f} ms | "
            f"answer: {self.answer_tokens} tokens, {self.tokens_per_second:.0f} tokens/s]"
        )


class Local:
    """Answers with an engine, whose stores keep images and turns between questions."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def ask(self, messages: Sequence[dict], images: Sequence[bytes], options: dict) -> Generator[str, None, Spent]:
        """Yield pieces of the answer as they are generated; return the `Spent`.

        Args:
            messages: those of a record, with `{"type": "image"}` parts.
            images: encoded image files for these parts, in order.
            options: of `Engine.generate`.
        """
        generation = yield from self.engine.stream(
            {"messages": list(messages)}, self.engine.read_images(images), **options
        )
        return Spent(
            text=generation.text,
            num_images=len(images),
            image_tokens=generation.num_image_tokens,
            image_seconds=generation.image_seconds,
            prompt_tokens=generation.num_prompt_tokens,
            reused_tokens=generation.num_reused_tokens,
            prefill_seconds=generation.prefill_seconds,
            answer_tokens=len(generation.token_ids),
            tokens_per_second=generation.tokens_per_second,
        )


class Remote:
    """Answers through a server with OpenAI's chat completions API.

    Raises:
        ValueError: the address is invalid, no server answers, or it lists no model.
    """

    def __init__(self, address: str, *, timeout: float = 600.0):
        try:
            parts = urlsplit(address if "//" in address else f"http://{address}")
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # invalid port, unbalanced bracket
            known = False
        if not known:
            raise ValueError(f"{address}: not a server's address; it looks like http://127.0.0.1:8000")
        self.address, self.timeout = address.rstrip("/"), timeout
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        secure = parts.scheme == "https"
        self._connect = lambda: (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
            parts.hostname, parts.port, timeout=timeout
        )
        listed = self._request("GET", "/v1/models").read()
        try:
            self.model: str = json.loads(listed)["data"][0]["id"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{address}: /v1/models lists no model; is it an OpenAI-compatible server?") from None

    def ask(self, messages: Sequence[dict], images: Sequence[bytes], options: dict) -> Generator[str, None, Spent]:
        """See `Local.ask`; options have the same names.

        Raises:
            ValueError: the server refuses the request or the connection breaks.
        """
        body = {
            "model": self.model,
            "messages": to_openai(messages, images),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": options["max_new_tokens"],
            **{key: options[key] for key in ("temperature", "top_k", "top_p", "seed") if key in options},
            **({"stop": list(options["stop"])} if options.get("stop") else {}),
        }
        reply = self._request("POST", "/v1/chat/completions", json.dumps(body))
        pieces, usage, cost = [], {}, {}
        try:
            for raw in reply:
                line = raw.decode().strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(f"{self.address}: {chunk['error']['message']}")
                usage, cost = chunk.get("usage") or usage, chunk.get("fastvlm") or cost
                piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
                if piece:
                    pieces.append(piece)
                    yield piece
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise ValueError(f"{self.address} broke off ({type(error).__name__})") from None
        finally:
            reply.close()
        return Spent(
            text="".join(pieces),
            num_images=len(images),
            image_tokens=cost.get("image_tokens", 0),
            image_seconds=cost.get("image_seconds", 0.0),
            prompt_tokens=usage.get("prompt_tokens", 0),
            reused_tokens=cost.get("reused_tokens", 0),
            prefill_seconds=cost.get("prefill_seconds", 0.0),
            answer_tokens=usage.get("completion_tokens", 0),
            tokens_per_second=cost.get("tokens_per_second", 0.0),
        )

    def _request(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        connection = self._connect()
        try:
            connection.request(method, self.path + path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status == 200:
                return reply
            said = reply.read()
        except (OSError, socket.gaierror, http.client.HTTPException) as error:
            raise ValueError(f"{self.address}: no server answers there ({error})") from None
        try:
            message = json.loads(said)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {reply.status}"
        raise ValueError(f"{self.address}: {message}")


def to_openai(messages: Sequence[dict], images: Sequence[bytes]) -> list[dict]:
    """Convert messages to OpenAI's format, with their images as data URLs."""
    waiting = iter(images)

    def part(given: dict) -> dict:
        if given["type"] == "image":
            return {"type": "image_url", "image_url": {"url": to_data_url(next(waiting))}}
        return given

    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [part(p) for p in m["content"]]}
        for m in messages
    ]


def from_openai(messages: Sequence[dict]) -> tuple[list[dict], list[bytes]]:
    """Invert `to_openai`: return messages and the images they contain.

    Raises:
        ValueError: an image is not a data URL, or the messages are not pairs of question and answer.
    """
    images: list[bytes] = []

    def part(given: dict) -> dict:
        shown = given["type"] == "image_url"
        said = given["image_url"]["url"] if shown else given["text"]
        if not isinstance(said, str):
            raise TypeError
        if not shown:
            return {"type": "text", "text": said}
        head, comma, data = said.partition(";base64,")
        if not comma:
            raise ValueError(f"an image that is not inside the file ({head[:60]})")
        images.append(base64.b64decode(data))
        return {"type": "image"}

    try:
        turns = [
            {
                "role": m["role"],
                "content": m["content"] if isinstance(m["content"], str) else [part(p) for p in m["content"]],
            }
            for m in messages
        ]
    except (KeyError, TypeError):
        raise ValueError("no messages as a chat has them") from None
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("its messages are not questions, each with its answer")
    return turns, images


def to_data_url(data: bytes) -> str:
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
    kind = next((name for start, name in kinds.items() if data.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
