"""Encoding of records (`messages` or `document`) as token ids and labels.

In a conversation, exactly the assistant's tokens are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastvlm.tokens import IGNORE_INDEX, ROLES, Tokenizer


@dataclass
class Text:
    """The token ids of a record's text, without those of images and what the template puts around them.

    They depend only on the record and the tokenizer, so they can be stored.
    """

    ids: np.ndarray  # int (T,)
    turns: np.ndarray  # int: where learned tokens begin, end, begin again, ...
    image_at: np.ndarray  # int, ascending: number of ids before each image
    document: bool = False


@dataclass
class Encoded:
    """Ids and labels, with the slots of every image."""

    input_ids: list[int]
    labels: list[int]
    num_images: int
    truncated: int = 0  # tokens cut off at the end


def tokenise(record: dict, tokenizer: Tokenizer, *, prompt: bool = False) -> Text:
    """Tokenise the text of a record's `messages` or `document`; see `encode_record`.

    Raises:
        ValueError: neither or both keys, or an unknown role or part.
    """
    ids: list[int] = []
    turns: list[int] = []
    image_at: list[int] = []
    template = tokenizer.template
    space = ""  # that ends a piece of the template, and is encoded with what follows it

    def add(new: list[int], learned: bool) -> None:
        if new and learned != len(turns) % 2:
            turns.append(len(ids))
        ids.extend(new)

    def add_piece(piece: str, *, whole: bool = False) -> None:
        nonlocal space
        text = piece if whole else piece.removesuffix(" ")
        if text or whole:
            add(tokenizer.encode_template(text, space=space), False)
            space = ""
        if text != piece:
            space = " "

    def add_parts(content, learned: bool) -> None:
        nonlocal space
        for part in parts_of(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                image_at.append(len(ids))
            elif kind == "text" and isinstance(part.get("text"), str):
                add(tokenizer.encode_text(part["text"], space=space), learned)
                space = ""
            else:
                raise ValueError(f"a part must be an image or a text, not {part!r:.80}")

    if ("messages" in record) == ("document" in record):
        raise ValueError("a record needs exactly one of `messages` and `document`")
    add(tokenizer.encode_template(template.start), False)
    if "document" in record:
        add_parts(record["document"], True)
        if not prompt:
            add([tokenizer.document_end_id], True)
    else:
        for message in record["messages"]:
            role = message.get("role")
            if role not in ROLES:
                raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
            before = template.before[role]
            if wordless := not words_open(message["content"]):
                before = before if template.space_before_image else before.removesuffix(" ")
            add_piece(before, whole=wordless)
            add_parts(message["content"], role == "assistant")
            if role == "assistant":
                add([tokenizer.end_id], True)
            if role != "system":
                add_piece(template.after[role])
            else:  # ends by itself, because `with_system_text` puts it before any other
                own = template.after[role]
                add_piece(own.removesuffix(" ") if tokenizer.writes_space else own, whole=True)
        if prompt:
            add_piece(template.before["assistant"])
        else:
            add(tokenizer.encode_template(space), False)
    numbers = (np.array(values, dtype=np.int32) for values in (ids, turns, image_at))
    return Text(*numbers, document="document" in record)


def parts_of(content: str | Sequence) -> list:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def words_open(content: str | Sequence) -> bool:
    """Whether a turn begins with words; otherwise with an image, or with nothing."""
    first = next(iter(parts_of(content)), None)
    return isinstance(first, dict) and bool(first.get("text"))


def lay_out(
    text: Text, tokenizer: Tokenizer, *, tokens_per_image: int | Sequence[int], max_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Insert the image slots into a text; return int32 ids and labels, whole images, and tokens cut off.

    See `encode_record`.

    Raises:
        ValueError: slots for another number of images.
    """
    places, turns, ids = text.image_at.tolist(), text.turns.tolist(), text.ids
    slots = [tokens_per_image] * len(places) if isinstance(tokens_per_image, int) else tokens_per_image
    if len(slots) != len(places):
        raise ValueError(f"the record has {len(places)} image parts and slots for {len(slots)} images")
    before, after = (tokenizer.encode_template(piece) for piece in tokenizer.template.image)
    length = len(ids) + sum(slots) + len(places) * (len(before) + len(after))
    wide, labels = np.empty(length, dtype=np.int32), np.full(length, IGNORE_INDEX, dtype=np.int32)
    turns.append(len(ids))  # closes the last learned span if it is still open
    ends: list[tuple[int, int]] = []  # (first slot, position after the last slot) of every image
    done, moved = 0, 0  # ids already placed, and how far images shift the next ones
    for at, count in [*zip(places, slots), (len(ids), None)]:
        wide[done + moved : at + moved] = ids[done:at]
        for first, end in zip(turns[::2], turns[1::2]):
            if first < at and end > done:
                first, end = max(first, done), min(end, at)
                labels[first + moved : end + moved] = ids[first:end]
        done = at
        if count is not None:
            first = at + moved + len(before)
            end = first + count
            wide[first:end] = tokenizer.image_id
            if before or after:
                wide[at + moved : first], wide[end : end + len(after)] = before, after
            ends.append((first, end))
            moved = end + len(after) - at
    num_images, truncated = len(places), 0
    if max_tokens is not None and len(wide) > max_tokens:
        # Never keep half an image: if the cut falls inside its slots, cut before them.
        cut = next((first for first, end in ends if first < max_tokens < end), max_tokens)
        truncated = len(wide) - cut
        wide, labels = wide[:cut], labels[:cut]
        num_images = sum(end <= cut for _, end in ends)
    if len(labels):
        # Nothing precedes the first token, so nothing predicts it. If it were learned, the last token of the
        # previous sample in the pack would predict it.
        labels[0] = IGNORE_INDEX
    return wide, labels, num_images, truncated


def encode_record(
    record: dict,
    tokenizer: Tokenizer,
    *,
    tokens_per_image: int | Sequence[int],
    max_tokens: int | None = None,
    prompt: bool = False,
) -> Encoded:
    """Encode a record's `messages` or `document` as ids and labels.

    Args:
        record: `{"messages": [{"role", "content"}]}` or `{"document": parts}`; content is a string or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}`.
        tokens_per_image: slots per image; a sequence gives them for each image in order (views times M).
        max_tokens: cut off the end beyond this length, an image only as a whole; None: do not cut.
        prompt: end with the template's opening of an assistant turn (for generation).

    Raises:
        ValueError: neither or both keys, an unknown role or part, or slots for another number of images.
    """
    text = tokenise(record, tokenizer, prompt=prompt)
    ids, labels, num_images, truncated = lay_out(
        text, tokenizer, tokens_per_image=tokens_per_image, max_tokens=max_tokens
    )
    return Encoded(ids.tolist(), labels.tolist(), num_images, truncated)


def without_images(record: dict) -> dict:
    """Return the record without its images, for blind baselines.

    An empty text takes the place of an image that begins a turn, so that the turn opens as before.
    """

    def words(content):
        if isinstance(content, str):
            return content
        told = [part for part in content if part["type"] != "image"]
        return told if told[:1] == content[:1] else [{"type": "text", "text": ""}, *told]

    if "document" in record:
        return {**record, "document": [part for part in record["document"] if part["type"] != "image"]}
    return {**record, "messages": [{**m, "content": words(m["content"])} for m in record["messages"]]}


def with_system(record: dict, text: str) -> dict:
    """Return the conversation with a system prompt in front; its own system prompt, if any, follows.

    Raises:
        ValueError: a document, which has no roles.
    """
    if "messages" not in record:
        raise ValueError("a system prompt needs a conversation, and this record is a document")
    return {**record, "messages": [{"role": "system", "content": text}, *record["messages"]]}


def with_system_text(text: Text, system: str, tokenizer: Tokenizer) -> Text:
    """Return `tokenise(with_system(record, system))`, given the text of the record.

    Raises:
        ValueError: a document, which has no roles.
    """
    if text.document:
        raise ValueError("a system prompt needs a conversation, and this record is a document")
    start, added = len(tokenizer.encode_template(tokenizer.template.start)), system_ids(system, tokenizer)
    return replace(
        text,
        ids=np.concatenate([text.ids[:start], added, text.ids[start:]]),
        turns=text.turns + len(added),
        image_at=text.image_at + len(added),
    )


def without_images_text(text: Text) -> Text:
    """Return `tokenise(without_images(record))`, given the text of the record."""
    return replace(text, image_at=text.image_at[:0])


def system_ids(system: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids that a system prompt adds to any conversation, after the template's opening: int32."""
    start = len(tokenizer.encode_template(tokenizer.template.start))
    return tokenise(with_system({"messages": []}, system), tokenizer).ids[start:]
