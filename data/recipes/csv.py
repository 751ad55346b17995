"""A CSV or TSV table of image, question, answer or of image, caption; column names can be set by keys.

`image=` (nothing) is for a table of text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.conversations import name_row
from data.recipes.pictures import find_image, find_roots
from data.recipes.record import EMPTY, MISMATCH, Dropped, Part, Record, Unusable, make_key, make_messages, split_markers
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train"}
NOT_ON_HUB = "name a table there as path=hf://datasets/org/name/table.csv"
FIELDS = "another number of fields than the header"


def parts(
    path: Path,
    *,
    split: str,
    images: tuple = (),
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
    caption: str = "caption",
    id: str = "id",
    rows: int = 2000,
) -> list[Part]:
    columns = {"image": image, "question": question, "answer": answer, "caption": caption, "id": id}
    options = {"columns": columns, "roots": find_roots(path, images)}
    cut = cut_rows(path, rows=rows, options=options)
    header = cut[0].options.get("header") or list(next(read_rows(cut[0]))[1])
    asks = question in header and answer in header
    if not asks and caption not in header:
        raise ValueError(
            f"{cut[0].path}: no columns {question} and {answer}, nor {caption}, in its header ({', '.join(header)}); "
            "name them with question=... answer=... or caption=..."
        )
    if twice := [name for name in columns.values() if name and header.count(name) > 1]:
        raise ValueError(f"{cut[0].path}: column {twice[0]} stands twice in its header; rename one of them")
    if image and image not in header:  # the rows would become text alone
        raise ValueError(
            f"{cut[0].path}: no column {image} in its header ({', '.join(header)}); name it with image=..., "
            "or set image= (nothing) if the table is text alone"
        )
    for part in cut:
        part.options |= {"asks": asks, "width": len(set(header))}
    return cut


def convert(part: Part) -> Iterator[Record | Dropped]:
    columns = part.options["columns"]
    for numbers, row in read_rows(part):
        id, name = row.get(columns["id"]), row.get(columns["image"]) if columns["image"] else None
        try:
            if None in row or len(row) < part.options["width"]:
                raise Unusable(FIELDS)
            images = [find_image(name, part.options["roots"])] if name else []
            notes: list[str] = []
            if part.options["asks"]:
                turns = [("user", row[columns["question"]]), ("assistant", row[columns["answer"]])]
                messages, notes = make_messages(turns, num_images=len(images), images_first=True)
                content = {"messages": messages}
            else:
                text = split_markers(row[columns["caption"]] or "")
                if not any(p["type"] == "text" and p["text"].strip() for p in text):
                    raise Unusable(EMPTY)
                if len(marked := [p for p in text if p["type"] == "image"]) not in (0, len(images)):
                    raise Unusable(MISMATCH)
                content = {"document": text if marked else [{"type": "image"}] * len(images) + text}
        except Unusable as fault:
            yield Dropped(name_row(id, numbers), str(fault))
            continue
        meta = ({"turns": 1} if part.options["asks"] else {}) | (
            {"image_id": name} if isinstance(name, str) and name else {}
        )
        yield Record(make_key(id, *numbers), content | {"id": id, "source": "csv", "meta": meta}, images, notes)
