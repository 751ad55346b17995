"""SmolTalk and smol-smoltalk: parquet rows of `messages` without images, one configuration per subset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.conversations import name_row
from data.recipes.record import Dropped, Part, Record, Unusable, keep_texts, make_key, make_messages, make_turns
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train", "test": "test"}
HUB = True


def parts(path: Path, *, split: str, name: str = "all", streaming: bool = True, rows: int = 5000) -> list[Part]:
    """Return the parts of a split; `name` is the configuration (all, smol-magpie-ultra, ...) or subfolder, if any."""
    for folder in (path / name, path / "data" / name):
        if folder.is_dir():
            path = folder
    return cut_rows(path, split=split, rows=rows, needs=("messages",), hub=name, streaming=streaming)


def convert(part: Part) -> Iterator[Record | Dropped]:
    for numbers, row in read_rows(part):
        try:
            turns = keep_texts(make_turns(row.get("messages"), role="role", text="content"))
            messages, notes = make_messages(turns, num_images=0)
        except Unusable as fault:
            yield Dropped(name_row(None, numbers), str(fault))
            continue
        meta = {"turns": sum(m["role"] == "user" for m in messages), "subset": row.get("source")}
        if row.get("full_topic") is not None:
            meta["topic"] = row["full_topic"]
        record = {"messages": messages, "id": None, "source": "smoltalk", "meta": meta}
        yield Record(make_key(row.get("source"), *numbers), record, [], notes)
