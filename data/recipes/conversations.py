"""Rows of `conversations` with `from` and `value` (LLaVA, ShareGPT4V, ShareGPT); shared by several recipes."""

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
    """Split a JSON list (or JSONL, or parquet) of rows with `conversations` into parts.

    Args:
        rows: rows per part.
        images: see `find_roots`.
        files: file names to look for if `path` is a folder.
        form: "messages", or "document" for an image and its caption without the question.
        text: the data set is text, so `<image>` in a row without images is an ordinary word.
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
    """Return document parts: the images of the question and the text of its answer."""
    asked, told = messages[-2]["content"], messages[-1]["content"]
    images = [part for part in asked if part["type"] == "image"] if isinstance(asked, list) else []
    return images + (told if isinstance(told, list) else [{"type": "text", "text": told}])


def name_row(id: object, numbers: Sequence[int]) -> str:
    """Return the name of a dropped row in the report."""
    return str(id) if id not in (None, "") else f"row {'-'.join(map(str, numbers))}"
