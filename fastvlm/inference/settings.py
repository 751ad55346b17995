"""The server's settings and limits."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAY_BE_ZERO = ("max_waiting", "port", "max_images", "image_store_mb", "prefix_store_mb")


@dataclass(frozen=True)
class Settings:
    """Settings of the server.

    Args:
        run: a run directory or the folder of a saved model.
        name: the model's name in the API; the folder's name by default.
        host, port: address to listen on.
        device: torch's name of the device that the model runs on: cpu, cuda, cuda:1.
        levers: see `fastvlm.inference.levers`.
        max_rows: answers generated at once.
        max_waiting: questions that may wait; further ones are answered 503.
        max_images: per request.
        max_image_bytes, max_pixels: per image.
        max_body_bytes: per request.
        max_prompt_tokens: text and images of a request; longer prompts are refused before the model runs.
        max_new_tokens: per answer; a client that asks for more gets `finish_reason` length at this limit.
        default_new_tokens: limit of an answer if the client sets none.
        allow_hosts: comma-separated hosts that images may be fetched from; none by default.
        allow_private: let these hosts have private addresses.
        fetch_seconds: time limit for fetching all images of a request, look-ups and connections included.
        origins: comma-separated origins whose pages may call the server (CORS).
        image_store_mb, prefix_store_mb: MiB for images and prefixes kept between questions.
    """

    run: str = ""
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "cpu"
    levers: str = ""
    max_rows: int = 8
    max_waiting: int = 64
    max_images: int = 8
    max_image_bytes: int = 10 * 2**20
    max_pixels: int = 40_000_000
    max_body_bytes: int = 32 * 2**20
    max_prompt_tokens: int = 16384
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    allow_hosts: str = ""
    allow_private: bool = False
    fetch_seconds: float = 10.0
    origins: str = ""
    image_store_mb: int = 256
    prefix_store_mb: int = 256

    @property
    def max_requests(self) -> int:
        """Concurrent requests: those being answered, those that wait, and a margin for the page and for refusals."""
        return self.max_rows + self.max_waiting + 64


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Parse `key=value` arguments.

    Raises:
        ValueError: an unknown key, a value of the wrong type or below the minimum, or no `run`.
    """
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key not in fields or not equals:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]}=?" if near else f"keys are {', '.join(fields)}"
            raise ValueError(f"{argument}: {hint}")
        kind = type(fields[key].default)
        try:
            values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ValueError(f"{argument}: {key} takes {'true or false' if kind is bool else kind.__name__}") from None
        least = 0 if key in MAY_BE_ZERO else 1
        if kind in (int, float) and values[key] < least:
            raise ValueError(f"{argument}: {key} must be at least {least}")
        if key == "port" and values[key] > 65535:
            raise ValueError(f"{argument}: port must be at most 65535")
    if not values.get("run"):
        raise ValueError("run=DIR names the run to serve, e.g. run=runs/latest; see --help")
    return Settings(**values)
