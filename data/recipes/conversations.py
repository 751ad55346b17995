"""Rows of `conversations` with `from` and `value` (LLaVA, ShareGPT4V, ShareGPT); several recipes share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data.recipes.pictures import find_image, find_roots, list_images, name_images
from data.recipes.record import Dropped, Part, Record, Unusable, keep_texts, make_key, make_messages, make_turns
from data.recipes.rows import cut_rows, read_rows

TOOLS = "tool definitions are in meta.tools, not in the prompt"


def cut_conversations(
    path: Path,
    *,
    source: str,
    rows: int,
    images: Sequence[str] = (),
    files: Sequence[str] = (),
    form: str = "messages",
    text: bool = False,
) -> list[Part]:
    """Parts of a JSON list (or JSONL, or parquet) of rows with `conversations`.

    Args:
        files: names looked for where `path` is a folder.
        form: messages, or document: an image and its caption without the question.
        text: a data set of text, in which `<image>` is a word wherever the row has no image.
    """
    if form not in ("messages", "document"):
        raise ValueError(f"form={form} is not messages or document")
    options = {"source": source, "roots": find_roots(path, images), "form": form, "text": text}
    return cut_rows(path, rows=rows, needs=("conversations",), files=files, options=options)


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    for numbers, row in read_rows(part):
        id = row.get("id")
        try:
            values = list_images(row)
            images = [find_image(value, options["roots"]) for value in values]
            turns = make_turns(row.get("conversations"))
            if row.get("system"):
                turns = [("system", row["system"]), *turns]
            if options["text"] and not images:
                turns = keep_texts(turns)
            messages, notes = make_messages(turns, num_images=len(images))
        except Unusable as fault:
            yield Dropped(name_row(id, numbers), str(fault))
            continue
        meta = {"turns": sum(m["role"] == "user" for m in messages)} | name_images(values)
        if row.get("tools"):
            meta["tools"] = row["tools"]
            notes = [*notes, TOOLS]
        content = {"messages": messages}
        if options["form"] == "document" and meta["turns"] == 1:
            content = {"document": make_document(messages)}
        record = content | {"id": id, "source": options["source"], "meta": meta}
        yield Record(make_key(id, *numbers), record, images, notes)


def make_document(messages: list[dict]) -> list[dict]:
    """The images of a question and the text of its answer."""
    asked, told = messages[-2]["content"], messages[-1]["content"]
    images = [part for part in asked if part["type"] == "image"] if isinstance(asked, list) else []
    return images + (told if isinstance(told, list) else [{"type": "text", "text": told}])


def name_row(id: object, numbers: Sequence[int]) -> str:
    """How a dropped row is called in the report."""
    return str(id) if id not in (None, "") else f"row {'-'.join(map(str, numbers))}"
