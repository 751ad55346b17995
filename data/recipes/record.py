"""What a recipe yields, and the few steps every recipe of conversations shares.

A recipe is a module `data/recipes/<name>.py` with

    SPLITS = {"train": ..., "val": ...}                    # the splits the data set has
    def parts(path, *, split, <options>) -> list[Part]     # how the work is cut: one part, one shard
    def convert(part) -> Iterator[Record | Dropped]        # a pure function of the part, run in a worker process

and one of

    HUB = True                                             # `path` may be a hub id whose rows `datasets` reads
    HUB_FILES = ("rows.json", ...)                         # it may be one whose first of these files holds the rows
    NOT_ON_HUB = "get it from ..."                         # what to do instead

`parts` may take `rows`, the rows of a shard; its other keyword arguments are keys of the command line, and their
defaults give the types. Modules are imported for `--help`: import pyarrow, PIL and the like inside the functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARKER = "<image>"
ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "observation": "user",  # a tool's result: read, never learned
    "tool": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
}
NO_ROLE = "unknown role"
NO_TURNS = "no turns"
EMPTY = "empty turn"
NO_ANSWER = "no answer"
ORDER = "turns do not alternate"
MISMATCH = "another number of <image> than of images"
NOT_TEXT = "text is not a string"
BAD_ROW = "row lacks a key or holds another type"
IMAGE_MISSING = "image missing"
FIRST_LEFT_OUT = "first turn is an answer: left out"
LAST_LEFT_OUT = "last question without an answer: left out"
# What a row raises whose values are of other types than the layout's.
ODD_ROW = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError)


@dataclass
class Part:
    """The rows of one shard; small and picklable."""

    path: str  # the file (or folder, or hub id) the rows come from
    start: int = 0  # rows start .. stop
    stop: int = 0
    options: dict = field(default_factory=dict)  # what `convert` needs: image root, split, ...


@dataclass
class Record:
    """A sample to write.

    Args:
        key: unique over the split, `[a-z0-9_-]+`; see `make_key`.
        record: `messages` or `document`, with `id` (the original one, as it was), `source` and `meta`.
        images: encoded files in the order of the image parts; a Path is read by the framework, and a missing file
            drops the record as "image missing".
        notes: what was mended or left out inside the record, in the same words each time: they are counted.
    """

    key: str
    record: dict
    images: list[bytes | Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Dropped:
    """A row that gives no sample. The reason is short and the same for the same fault: reasons are counted."""

    id: str
    reason: str


class Unusable(ValueError):
    """A row's fault, in the words that are counted; a recipe turns it into `Dropped`."""


def guard_row(made: Iterable[Record | Dropped], id: object) -> Iterator[Record | Dropped]:
    """What is made of one row; where that fails for its types, the row is dropped and no other one with it."""
    try:
        yield from made
    except ODD_ROW:
        yield Dropped(str(id), BAD_ROW)


def make_key(id: object, *row: int) -> str:
    """A sample's key: the original id, as far as a key may hold it, and the row's number, which makes it unique.

    `make_key("GCC_train_000017", 4)` is "gcc_train_000017-4". Where rows are counted per file or several samples come
    from one row, give every number, always as many: `make_key(id, file, row)`.
    """
    # Tar names of more than 100 characters take a second header; the images' suffixes need some of them too.
    word = re.sub(r"[^a-z0-9_-]+", "-", str(id if id is not None else "").lower())[:60].strip("-") or "row"
    return "-".join([word, *map(str, row)])


def split_markers(text: str, *, marker: str = MARKER) -> list[dict]:
    """Cut a text at every `<image>` into image and text parts, in their order.

    A line break directly beside a marker only sets the picture on a line of its own and goes with it ("<image>\\nQ" is
    an image and "Q"), so that a question reads the same whichever layout it came in. Nothing else is changed; pieces
    without a character are left out.
    """
    pieces = text.split(marker)
    parts: list[dict] = []
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if i < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def count_image_parts(messages: Iterable[dict]) -> int:
    contents = [message["content"] for message in messages]
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def make_messages(
    turns: Sequence[tuple[object, object]], *, num_images: int, images_first: bool = False
) -> tuple[list[dict], list[str]]:
    """Turn `(role, content)` pairs into messages that alternate, with the images at their places.

    Args:
        turns: roles as in any of the layouts (human, gpt, user, function_call, ...); content is a text, with `<image>`
            at the images' places, or a list of parts.
        num_images: how many images the row has; as many image parts must come out.
        images_first: where no turn holds a marker, all images precede the first question (layouts without markers).

    Returns:
        The messages and the notes on what was left out (a first turn that is an answer, a last one that has none).

    Raises:
        Unusable: an unknown role, an empty turn, turns that do not alternate, no answer, or another number of image
            parts than of images.
    """
    messages: list[dict] = []
    notes: list[str] = []
    for role, content in turns:
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise Unusable(NO_ROLE)
        if not isinstance(content, str) and not (isinstance(content, list) and all(map(is_part, content))):
            raise Unusable(NOT_TEXT)
        messages.append({"role": role, "content": split_markers(content) if isinstance(content, str) else content})
    if images_first and not count_image_parts(messages):
        for message in [m for m in messages if m["role"] == "user"][:1]:
            message["content"] = [{"type": "image"}] * num_images + message["content"]
    if messages and messages[0]["role"] == "system" and is_empty(messages[0]):
        messages = messages[1:]
    if not messages:
        raise Unusable(NO_TURNS)
    if any(is_empty(message) for message in messages):
        raise Unusable(EMPTY)
    head = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(head) :]
    # As LLaVA's and Vicuna's own loaders do; an image in a turn left out is a mismatch below.
    if body and body[0]["role"] == "assistant":
        body = body[1:]
        notes.append(FIRST_LEFT_OUT)
    if len(body) > 1 and body[-1]["role"] == "user":
        body = body[:-1]
        notes.append(LAST_LEFT_OUT)
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(body)):
        raise Unusable(ORDER)
    if len(body) < 2:
        raise Unusable(NO_ANSWER)
    messages = head + body
    if count_image_parts(messages) != num_images:
        raise Unusable(MISMATCH)
    for message in messages:
        if all(part["type"] == "text" for part in message["content"]):
            message["content"] = "".join(part["text"] for part in message["content"])
    return messages, notes


def is_part(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def is_empty(message: dict) -> bool:
    return not any(part["type"] == "image" or part["text"].strip() for part in message["content"])


def keep_texts(turns: Iterable[tuple[object, object]]) -> list[tuple[object, object]]:
    """Turns whose texts stay as they are: `<image>` in what somebody typed is no image."""
    return [(role, [{"type": "text", "text": text}] if isinstance(text, str) else text) for role, text in turns]


def make_turns(rows: object, *, role: str = "from", text: str = "value") -> list[tuple[object, object]]:
    """(role, content) pairs of a list of objects such as `{"from": "human", "value": "Q"}`.

    Raises:
        Unusable: not a list of objects with these keys.
    """
    if not isinstance(rows, list) or not rows:
        raise Unusable(NO_TURNS)
    if not all(isinstance(row, dict) and role in row and text in row for row in rows):
        raise Unusable(f"a turn has no {role} or no {text}")
    return [(row[role], row[text]) for row in rows]
