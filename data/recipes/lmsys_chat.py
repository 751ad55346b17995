"""LMSYS-Chat-1M: conversations between people and language models, from parquet or JSON lines; gated on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.questions import check_choice
from data.recipes.record import (
    BAD_ROW,
    ODD_ROW,
    Dropped,
    Part,
    Record,
    Unusable,
    keep_texts,
    make_key,
    make_messages,
    make_turns,
)
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train"}  # val=0.001 holds out a share
HUB = True
OTHER_LANGUAGE = "another language"
FLAGGED = "flagged by moderation"
REDACTED = "names redacted"


def parts(
    path: Path,
    *,
    split: str,
    languages: str = "English",
    flagged: str = "drop",
    redacted: str = "keep",
    streaming: bool = True,
    rows: int = 5000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder of parquet, a JSON or JSON-lines file, or the hub id once you have accepted its licence there.
        languages: languages to keep, separated by commas and spelled as in the data set; "all" keeps all of them.
        flagged: "drop" or "keep" conversations in which moderation flagged a turn.
        redacted: "drop" or "keep" conversations in which names were replaced by NAME_1 and so on.
    """
    check_choice("flagged", flagged, "drop", "keep")
    check_choice("redacted", redacted, "keep", "drop")
    wanted = [word.strip() for word in str(languages).split(",") if word.strip()]
    options = {"languages": wanted, "flagged": flagged, "redacted": redacted}
    settings = {"needs": ("conversation",), "hub": "", "streaming": streaming}
    return cut_rows(Path(path), split=split, rows=rows, options=options, **settings)


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    for numbers, row in read_rows(part):
        name = str(row.get("conversation_id") or f"{Path(part.path).stem}-{numbers[-1]}")
        try:
            yield convert_chat(row, numbers, name, options)
        except Unusable as error:
            yield Dropped(name, str(error))
        except ODD_ROW:
            yield Dropped(name, BAD_ROW)


def convert_chat(row: dict, numbers: tuple[int, ...], name: str, options: dict) -> Record:
    """Convert one conversation.

    Raises:
        Unusable: the options exclude the row, or its turns are broken.
    """
    language = row.get("language")
    if options["languages"] != ["all"] and language not in options["languages"]:
        raise Unusable(OTHER_LANGUAGE)
    moderation = row.get("openai_moderation") or []
    if options["flagged"] == "drop" and any(m.get("flagged") for m in moderation if isinstance(m, dict)):
        raise Unusable(FLAGGED)
    if options["redacted"] == "drop" and row.get("redacted"):
        raise Unusable(REDACTED)
    turns = keep_texts(make_turns(row.get("conversation"), role="role", text="content"))
    messages, notes = make_messages(turns, num_images=0)
    meta = {key: row[key] for key in ("model", "language", "redacted") if row.get(key) is not None}
    meta["turns"] = sum(message["role"] == "user" for message in messages)
    record = {"messages": messages, "id": row.get("conversation_id"), "source": "lmsys_chat", "meta": meta}
    return Record(make_key(name, *numbers), record, [], notes)
