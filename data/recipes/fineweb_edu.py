"""FineWeb-Edu: educational web text from parquet, one document per row; long ones can be split at paragraphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from data.recipes.documents import NO_TEXT, cut_text
from data.recipes.record import Dropped, Part, Record, make_key
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train"}  # val=0.001 holds out a share
HUB = True
LOW_SCORE = "score below min_score"
META = ("url", "dump", "date", "language", "language_score", "score", "int_score")


def parts(
    path: Path,
    *,
    split: str,
    name: str = "sample-10BT",
    max_chars: int = 0,
    max_tokens: int = 0,
    cut_tokenizer: str = "",
    min_score: float = 0.0,
    streaming: bool = True,
    rows: int = 10000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder of parquet with `text` and `id`, or a hub id.
        name: the configuration on the hub.
        max_chars, max_tokens: split longer documents into several of at most this length; 0 keeps them whole. The token
            count includes two tokens for what a template adds around the text.
        cut_tokenizer: folder or hub id of the tokenizer for `max_tokens`.
        min_score: documents with a lower educational score are dropped.
    """
    if max_chars and max_tokens:
        raise ValueError(f"max_chars={max_chars} and max_tokens={max_tokens}: give one of them")
    for key, value in (("max_chars", max_chars), ("max_tokens", max_tokens)):
        if value and value < 16:
            raise ValueError(f"{key}={value} must be 16 or more, or 0 for no cut")
    if max_tokens and not cut_tokenizer:
        raise ValueError(f"max_tokens={max_tokens} needs cut_tokenizer=<folder or hub id>; max_chars needs none")
    options = {"max_chars": max_chars, "max_tokens": max_tokens, "min_score": min_score}
    options |= {"cut_tokenizer": cut_tokenizer}
    settings = {"needs": ("text",), "hub": name, "streaming": streaming}
    return cut_rows(Path(path), split=split, rows=rows, options=options, **settings)


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    limit = options["max_chars"] or options["max_tokens"]
    measure = count_tokens(options["cut_tokenizer"]) if options["max_tokens"] else len
    for numbers, row in read_rows(part):
        name = str(row.get("id") or f"{Path(part.path).stem}-{numbers[-1]}")
        text, score = row.get("text"), row.get("score")
        if not isinstance(text, str) or not text.strip():
            yield Dropped(name, NO_TEXT)
            continue
        if score is not None and score < options["min_score"]:
            yield Dropped(name, LOW_SCORE)
            continue
        pieces = cut_text(text, limit, measure) if limit else [text.strip()]
        meta = {key: row[key] for key in META if row.get(key) is not None}
        for i, piece in enumerate(pieces):
            record = {"document": [{"type": "text", "text": piece}], "id": row.get("id"), "source": "fineweb_edu"}
            record["meta"] = meta | ({"piece": i, "pieces": len(pieces)} if len(pieces) > 1 else {})
            # The key always ends in a piece number, so a whole document and a first piece have the same key.
            yield Record(make_key("text", *numbers, i), record)


@lru_cache(1)
def count_tokens(path: str) -> Callable[[str], int]:
    from fastvlm.tokens import Tokenizer

    tokenizer = Tokenizer(path, template="chatml")
    return lambda text: len(tokenizer.encode_text(text)) + 2
