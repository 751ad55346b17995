"""FineWeb-Edu: educational web text from parquet, a document a row; long ones may be cut at paragraph borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from data.recipes.documents import NO_TEXT, cut_text
from data.recipes.holdout import check_holdout, held_out
from data.recipes.questions import check_split
from data.recipes.record import Dropped, Part, Record, make_key
from data.recipes.rows import cut_rows, read_rows

SPLITS = {"train": "train", "val": "held out of train"}
LOW_SCORE = "score below min_score"
META = ("url", "dump", "date", "language", "language_score", "score", "int_score")


def parts(
    path: Path,
    *,
    split: str,
    name: str = "sample-10BT",
    max_chars: int = 0,
    max_tokens: int = 0,
    tokenizer: str = "",
    template: str = "chatml",
    min_score: float = 0.0,
    holdout: float = 0.001,
    rows: int = 10000,
) -> list[Part]:
    """
    Args:
        path: folder of parquet with `text` and `id`, or a hub id.
        name: the configuration on the hub.
        max_chars, max_tokens: cut longer documents into several of at most this length; 0 leaves them whole. Tokens
            are those a plan counts, the closing one included, and need the tokenizer.
        min_score: documents of a lower educational score are dropped.
        holdout: share of the documents kept for val; the data set has no validation split of its own.
    """
    check_split(split, SPLITS)
    check_holdout(split, holdout)
    if max_chars and max_tokens:
        raise ValueError(f"max_chars={max_chars} and max_tokens={max_tokens}: give one of them")
    for key, value in (("max_chars", max_chars), ("max_tokens", max_tokens)):
        if value and value < 16:
            raise ValueError(f"{key}={value} must be 16 or more, or 0 for no cut")
    if max_tokens and not tokenizer:
        raise ValueError(f"max_tokens={max_tokens} needs tokenizer=<folder or hub id>; max_chars needs none")
    options = {"becomes": split, "max_chars": max_chars, "max_tokens": max_tokens, "tokenizer": str(tokenizer)}
    options |= {"template": template, "min_score": min_score, "holdout": holdout}
    rows = rows if split == "train" else round(rows / holdout)
    return cut_rows(Path(path), split="train", rows=rows, needs=("text",), options=options, hub=name)


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    limit = options["max_chars"] or options["max_tokens"]
    measure = count_tokens(options["tokenizer"], options["template"]) if options["max_tokens"] else len
    for numbers, row in read_rows(part):
        name = str(row.get("id") or f"{Path(part.path).stem}-{numbers[-1]}")
        if held_out(name, options["holdout"]) != (options["becomes"] == "val"):
            continue
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
            # A document is whole or in pieces: its first piece has the number that the whole would have.
            yield Record(make_key("text", *numbers, i), record)


@lru_cache(1)
def count_tokens(path: str, template: str) -> Callable[[str], int]:
    from fastvlm.data.conversation import encode_record
    from fastvlm.tokens import Tokenizer

    tokenizer = Tokenizer(path, template=template)
    return lambda text: len(encode_record({"document": text}, tokenizer, tokens_per_image=1).input_ids)
