"""Data classes that recipes yield, and the steps that all recipes for conversations share.

A recipe is a module `data/recipes/<name>.py` with

    SPLITS = {"train": ..., "val": ...}                    # the splits the data set has
    def parts(path, *, split, <options>) -> list[Part]     # how the work is divided: each part becomes one shard
    def convert(part) -> Iterator[Record | Dropped]        # a pure function of the part, run in a worker process

and one of

    HUB = True                                             # `path` may be a hub id whose rows `datasets` reads
    HUB_FILES = ("rows.json", ...)                         # `path` may be a hub id; its first such file has the rows
    NOT_ON_HUB = "get it from ..."                         # `path` cannot be a hub id; says what to do instead

`parts` may take `rows`, the number of rows per shard. Its other keyword arguments are keys of the command line; their
defaults give the types. `--help` imports every recipe, so import pyarrow, PIL and the like inside functions.
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
# Raised while converting a row whose values have unexpected types.
ODD_ROW = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError)


@dataclass
class Part:
    """The rows that one shard is made from; small and picklable."""

    path: str  # the file (or folder, or hub id) the rows come from
    start: int = 0  # first row
    stop: int = 0  # one past the last row
    options: dict = field(default_factory=dict)  # what `convert` needs: image folders, split, ...


@dataclass
class Record:
    """A sample to write.

    Args:
        key: unique within the split, `[a-z0-9_-]+`; see `make_key`.
        record: `messages` or `document`, with `id` (the original id, unchanged), `source` and `meta`.
        images: encoded files in the order of the image parts. A Path is read when the shard is written; if the file is
            missing, the record is dropped as "image missing".
        notes: what was repaired or left out inside the record. Notes are counted, so use the same words each time.
    """

    key: str
    record: dict
    images: list[bytes | Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Dropped:
    """A row that yields no sample. Reasons are counted, so each fault has one short, fixed wording."""

    id: str
    reason: str


class Unusable(ValueError):
    """Raised with the reason why a row is unusable; a recipe turns it into `Dropped`."""


def guard_row(made: Iterable[Record | Dropped], id: object) -> Iterator[Record | Dropped]:
    """Yield the records made from one row; if its values have unexpected types, drop this row only."""
    try:
        yield from made
    except ODD_ROW:
        yield Dropped(str(id), BAD_ROW)


def make_key(id: object, *row: int) -> str:
    """Return a sample's key: the original id, restricted to valid characters, and the row number, which is unique.

    `make_key("GCC_train_000017", 4)` is "gcc_train_000017-4". If rows are numbered per file, or a row yields several
    samples, pass every number, and the same count of them each time: `make_key(id, file, row)`.
    """
    # Tar names of more than 100 characters need a second header, and image suffixes take some of the 100.
    word = re.sub(r"[^a-z0-9_-]+", "-", str(id if id is not None else "").lower())[:60].strip("-") or "row"
    return "-".join([word, *map(str, row)])


def split_markers(text: str, *, marker: str = MARKER) -> list[dict]:
    """Split a text at every `<image>` into image and text parts, in order.

    A line break directly beside a marker is removed with it ("<image>\\nQ" is an image and "Q"), so a question reads
    the same in every layout. Nothing else changes; empty pieces are left out.
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
    """Convert `(role, content)` pairs to alternating messages with image parts at the images' positions.

    Args:
        turns: roles are any key of ROLES (human, gpt, user, function_call, ...); content is a string with `<image>`
            markers or a list of parts.
        num_images: number of images of the row, which must equal the number of image parts.
        images_first: for layouts without markers: if no turn has a marker, put all images before the first question.

    Returns:
        The messages, and notes on what was left out (a first turn that is an answer, a last one without an answer).

    Raises:
        Unusable: a role is unknown, a turn is empty, turns do not alternate, there is no answer, or the numbers of
            image parts and images differ.
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
    # As LLaVA's and Vicuna's own loaders do. If the removed turn held an image, the count below does not match.
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
    """Wrap strings as text parts, so that `<image>` in text that somebody typed is not taken for an image."""
    return [(role, [{"type": "text", "text": text}] if isinstance(text, str) else text) for role, text in turns]


def make_turns(rows: object, *, role: str = "from", text: str = "value") -> list[tuple[object, object]]:
    """Return the (role, content) pairs of a list of objects such as `{"from": "human", "value": "Q"}`.

    Raises:
        Unusable: `rows` is not a non-empty list of objects with these keys.
    """
    if not isinstance(rows, list) or not rows:
        raise Unusable(NO_TURNS)
    if not all(isinstance(row, dict) and role in row and text in row for row in rows):
        raise Unusable(f"a turn has no {role} or no {text}")
    return [(row[role], row[text]) for row in rows]
