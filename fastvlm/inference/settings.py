"""What the server may be told, and the limits it keeps."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAY_BE_ZERO = ("max_waiting", "port", "max_images", "image_store_mb", "prefix_store_mb")


@dataclass(frozen=True)
class Settings:
    """
    Args:
        run: a run directory or a saved model's folder.
        name: what clients call the model; the folder's name by default.
        levers: see `fastvlm.inference.levers`.
        max_rows: answers written side by side.
        max_waiting: questions that may wait; one more is answered 503.
        max_images: of a request.
        max_image_bytes, max_pixels: of an image.
        max_body_bytes: of a request.
        max_prompt_tokens: of a request's text and images; what is longer is refused before it is computed.
        max_new_tokens: of an answer; where a client asks for more it ends there, with `finish_reason` length.
        default_new_tokens: where a client asks for nothing.
        allow_hosts: comma-separated hosts that images may be fetched from; none by default.
        allow_private: let those hosts lie in a private network.
        fetch_seconds: for all of a request's images from elsewhere, names and connections included.
        origins: comma-separated origins whose pages may call the server (CORS).
        image_store_mb, prefix_store_mb: memory for what is kept between questions.
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
        """Requests at once: those that are answered, those that wait, and room for the page and for refusals."""
        return self.max_rows + self.max_waiting + 64


def parse_settings(arguments: Sequence[str]) -> Settings:
    """`key=value` arguments.

    Raises:
        ValueError: an unknown key, or a value of another kind.
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
    if not values.get("run"):
        raise ValueError("run=DIR names the run to serve, e.g. run=runs/latest; see --help")
    return Settings(**values)
