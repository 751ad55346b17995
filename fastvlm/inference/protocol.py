"""The server's requests and replies: OpenAI's chat completions, as far as a model that reads images and writes text
has them, with what an answer cost beside the usage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Loose(BaseModel):
    """Clients send more than is known here; what would change the answer and is not supported is refused by name."""

    model_config = ConfigDict(extra="ignore")


class ImageURL(Loose):
    url: Annotated[str, Field(description="data:image/...;base64,... or an allowed http(s) address")]
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Loose):
    type: Literal["text"]
    text: str


class ImagePart(Loose):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(Loose):
    include_usage: bool = False


class Unsupported(Loose):
    """Fields of the original that would change the answer: only the values that ask for nothing are taken."""

    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class ChatRequest(Unsupported):
    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    stop: Name | Annotated[list[Name], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("messages")
    @classmethod
    def speaks(cls, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message.content is None and message.role != "assistant":
                raise ValueError(f"a {message.role} message needs content")
            parts = message.content if isinstance(message.content, list) else []
            if message.role != "user" and any(isinstance(part, ImagePart) for part in parts):
                raise ValueError("only user messages may hold images")
        return messages

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def record(self) -> tuple[dict, list[str]]:
        """The conversation as the engine takes it, and the addresses of its images in order."""
        urls: list[str] = []
        messages = []
        for message in self.messages:
            content: str | list[dict] = message.content if isinstance(message.content, str) else []
            if isinstance(message.content, list):
                for part in message.content:
                    if isinstance(part, ImagePart):
                        urls.append(part.image_url.url)
                        content.append({"type": "image"})
                    else:
                        content.append({"type": "text", "text": part.text})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        return {"messages": messages}, urls


class Cost(BaseModel):
    """What an answer took; seconds are wall time."""

    image_tokens: int
    reused_tokens: int
    queue_seconds: float
    image_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    tokens_per_second: float


class PromptDetails(BaseModel):
    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    fastvlm: Cost


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fastvlm"
    image_size: int
    tokens_per_view: int
    fit: str
    context_length: int | None
    max_images: int
    max_prompt_tokens: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    active: int
    waiting: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class AttentionRequest(ChatRequest):
    """A conversation that ends with the assistant's answer."""


class ImageAttention(BaseModel):
    rows: int
    columns: int
    answer: list[float]
    tokens: list[list[float]]


class AttentionReply(BaseModel):
    """For every image: how much the answer looked at each region, and which regions each visual token stands for."""

    images: list[ImageAttention]
