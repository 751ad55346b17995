"""Fill in the server's OpenAPI description (/openapi.json): model name, limits, and example requests that work."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from fastvlm.inference.settings import Settings

# A red square on white, 8 x 8 pixels.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQMAAAD+wSzIAAAABlBMVEX////IHh7kMBY6AAAAGElEQVR42mNgYGBg"
    "sGFiYGJgYmBgYGAAAALUAEMQ6XlWAAAAAElFTkSuQmCC"
)


def describe_server(app: FastAPI, *, name: str, settings: Settings) -> None:
    """Make an application's OpenAPI description specific to this server."""
    write = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            complete(write(), name=name, settings=settings)
        return app.openapi_schema

    app.openapi = openapi


def complete(schema: dict[str, Any], *, name: str, settings: Settings) -> None:
    """Add the model name, limits and examples to an OpenAPI schema in place."""
    for request in ("ChatRequest", "AttentionRequest"):
        fields = schema["components"]["schemas"][request]["properties"]
        fields["model"] = {"type": "string", "enum": [name], "title": "Model"}
        for bound in ("max_tokens", "max_completion_tokens"):
            fields[bound]["description"] = f"an answer ends at {settings.max_new_tokens} in any case"
    content: list[dict] = [{"type": "text", "text": "What is shown?"}]
    if settings.max_images:
        content.insert(0, {"type": "image_url", "image_url": {"url": PICTURE}})
    question = {"role": "user", "content": content}
    short = {"model": name, "max_tokens": 1}
    examples = {"/v1/chat/completions": {**short, "messages": [question]}}
    if settings.max_images:
        answer = {"role": "assistant", "content": "a square"}
        examples["/v1/attention"] = {**short, "messages": [question, answer]}
    for path, example in examples.items():
        schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] = example
