"""From a record (`messages` or `document`) to token ids, with exactly the assistant's tokens learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastvlm.tokens import IGNORE_INDEX, ROLES, Tokenizer


@dataclass
class Encoded:
    """Ids and labels with every image as wide as its slots."""

    input_ids: list[int]
    labels: list[int]
    num_images: int
    truncated: int = 0  # tokens cut off at the end


def encode_record(
    record: dict,
    tokenizer: Tokenizer,
    *,
    tokens_per_image: int | Sequence[int],
    max_tokens: int | None = None,
    prompt: bool = False,
) -> Encoded:
    """Encode a record's `messages` or `document`.

    Args:
        record: `{"messages": [{"role", "content"}]}` or `{"document": parts}`; content is a string or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}`.
        tokens_per_image: slots an image takes; a sequence says it of each image in order (views times M).
        max_tokens: cut the end off beyond this length; an image is never cut in the middle (it goes whole).
        prompt: end with the template's opening of an assistant turn (for generation).

    Raises:
        ValueError: neither or both keys, an unknown role or part, or slots for another number of images.
    """
    ids: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []  # first slot of every image, and the place behind its last
    template = tokenizer.template

    def add(new: list[int], learned: bool) -> None:
        ids.extend(new)
        labels.extend(new if learned else [IGNORE_INDEX] * len(new))

    def add_parts(content, learned: bool) -> None:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                slots = tokens_per_image
                if not isinstance(slots, int):
                    slots = slots[len(spans)] if len(spans) < len(slots) else 0
                add(tokenizer.encode_template(template.image[0]), False)
                spans.append((len(ids), len(ids) + slots))
                add([tokenizer.image_id] * slots, False)
                add(tokenizer.encode_template(template.image[1]), False)
            elif kind == "text" and isinstance(part.get("text"), str):
                add(tokenizer.encode_text(part["text"]), learned)
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
            add(tokenizer.encode_template(template.before[role]), False)
            add_parts(message["content"], role == "assistant")
            if role == "assistant":
                add([tokenizer.end_id], True)
            add(tokenizer.encode_template(template.after[role]), False)
        if prompt:
            add(tokenizer.encode_template(template.before["assistant"]), False)

    if not isinstance(tokens_per_image, int) and len(tokens_per_image) != len(spans):
        raise ValueError(f"the record has {len(spans)} image parts and slots for {len(tokens_per_image)} images")
    truncated = 0
    if max_tokens is not None and len(ids) > max_tokens:
        # Never half an image: if the cut falls inside its slots, go back to where they start.
        cut = next((first for first, end in spans if first < max_tokens < end), max_tokens)
        truncated = len(ids) - cut
        ids, labels = ids[:cut], labels[:cut]
        spans = [(first, end) for first, end in spans if end <= cut]
    if labels:
        # Nothing comes before the first token, so nothing predicts it; learned, it would be predicted by the last
        # token of the neighbour in the pack.
        labels[0] = IGNORE_INDEX
    return Encoded(ids, labels, len(spans), truncated)


def without_images(record: dict) -> dict:
    """The same conversation or document with every image part taken out: what a model without eyes is given."""

    def words(content):
        return content if isinstance(content, str) else [part for part in content if part["type"] != "image"]

    if "document" in record:
        return {**record, "document": words(record["document"])}
    return {**record, "messages": [{**m, "content": words(m["content"])} for m in record["messages"]]}


def with_system(record: dict, text: str) -> dict:
    """The same conversation under a system prompt; one it brings itself stays behind it.

    Raises:
        ValueError: a document, which has no roles.
    """
    if "messages" not in record:
        raise ValueError("a system prompt needs a conversation, and this record is a document")
    return {**record, "messages": [{"role": "system", "content": text}, *record["messages"]]}


def count_system_tokens(text: str, tokenizer: Tokenizer) -> int:
    """Tokens that `with_system` adds to any conversation."""
    empty = {"messages": []}
    count = lambda record: len(encode_record(record, tokenizer, tokens_per_image=0).input_ids)
    return count(with_system(empty, text)) - count(empty)
