"""Schemas of the server's requests and replies: OpenAI's chat completions, as far as they apply to a model that reads
images and writes text, plus the timings of an answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# Tags for values that have several forms; pydantic includes them in the location of an error.
FORMS = TEXT, LIST, IMAGE = "<text>", "<list>", "<image>"


def place(error: dict[str, Any]) -> str:
    """Return the location of a validation error as a client would write it: messages.0.content.1.image_url."""
    parts = [part for part in error["loc"] if part != "body"]
    unknown = parts[-1:] if error["type"] == "extra_forbidden" else []  # may have any name, even that of a tag
    known = parts[: len(parts) - len(unknown)]
    return ".".join(str(part) for part in [*(part for part in known if part not in FORMS), *unknown])


def text_or_list(expected: str) -> Discriminator:
    """Choose the form of a value by its type, so that errors inside it are reported for that form only."""
    return Discriminator(
        lambda value: {str: TEXT, list: LIST}.get(type(value)),
        custom_error_type="text_or_list",
        custom_error_message=f"Input should be {expected}",
    )


def kind_of_part(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return {"text": TEXT, "image_url": IMAGE}.get(kind) if isinstance(kind, str) else None


class Strict(BaseModel):
    """Base of all request schemas: unknown fields are errors that name the field, so that nothing that could change an
    answer is silently ignored. A null in an optional field counts as absent."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def asks_for_something(cls, given: Any) -> Any:
        needed = [name for name, field in cls.model_fields.items() if field.is_required()]
        if not isinstance(given, dict | cls):
            fields = f" with {', '.join(needed)}" if needed else ""
            raise PydanticCustomError("object", "Input should be an object{fields}", {"fields": fields})
        if isinstance(given, cls):
            return given
        return {key: value for key, value in given.items() if value is not None or key in needed}


class ImageURL(Strict):
    url: Annotated[str, Field(description="data:image/...;base64,... or an allowed http(s) address")]
    detail: Annotated[
        Literal["auto", "low", "high"],
        Field(description="taken and without effect: an image is always read as the model was trained to read it"),
    ] = "auto"


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[
    Annotated[TextPart, Tag(TEXT)] | Annotated[ImagePart, Tag(IMAGE)],
    Discriminator(
        kind_of_part,
        custom_error_type="kind_of_part",
        custom_error_message="Input should be a part whose type is 'text' or 'image_url'",
    ),
]
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[Part], Tag(LIST)],
    text_or_list("a text or a list of parts"),
]
Stop = Annotated[
    Annotated[Name, Tag(TEXT)] | Annotated[list[Name], Field(max_length=4), Tag(LIST)],
    text_or_list("a text or a list of up to 4 texts"),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Annotated[bool, Field(description="without effect: no chunk is padded")] = False


class Plain(Strict):
    type: Literal["text"]


One = Annotated[float, Field(ge=1, le=1)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Unsupported(Strict):
    """Unsupported fields of OpenAI's API and of other servers that would change the answer. Clients send them with
    their neutral value; only that value is accepted."""

    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    repetition_penalty: One = None
    length_penalty: One = None
    min_p: Zero = None
    typical_p: One = None
    min_tokens: Literal[0] | None = None
    ignore_eos: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: Plain | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None


class Harmless(Strict):
    """Fields of OpenAI's API about accounts, storage and speed: accepted, without effect."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    parallel_tool_calls: Any = None


class ChatRequest(Unsupported, Harmless):
    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, description="0 keeps only the most probable token")] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000, description="0 and -1 keep every token")] | None = None
    stop: Stop | None = None
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
        """Return the conversation as a record for the engine, and the URLs of its images in order."""
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
    """Token counts and timings of an answer; seconds are wall time."""

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
    """For every image: the answer's attention on each region, and the regions that each visual token represents."""

    images: list[ImageAttention]
