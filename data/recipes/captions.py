"""Documents of images with several captions each; shared by the two COCO recipes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.recipes.record import Dropped, Record, make_key

NO_CAPTION = "image without a caption"
BAD_CAPTION = "caption is empty or not a string"
CHOICES = ("each", "first", "all")


def check_choice(captions: str) -> None:
    if captions not in CHOICES:
        raise ValueError(f"captions={captions} is not one of {', '.join(CHOICES)}")


def load_json(path: str) -> dict:
    """Load a JSON object with `images`; parsed once per process unless the file changes.

    Raises:
        ValueError: the file is missing, is not JSON, or has another layout.
    """
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; leave its split out with splits=train") from None
    return parse_json(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def parse_json(path: str, size: int, time: int) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); a cut download?") from None
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise ValueError(f"{path}: no list `images` in it; is it the right file?")
    for number, row in enumerate(value["images"]):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: images, row {number} is of type {type(row).__name__}, not an object")
    if not value["images"]:
        raise ValueError(f"{path}: `images` is empty")
    return value


def find_repeats(rows: Sequence[dict], key: str) -> set[int]:
    """Return the numbers of rows whose id repeats an earlier one; ids are equal if their sample keys are."""
    seen: set[str] = set()
    repeats = set()
    for number, row in enumerate(rows):
        id = row.get(key)
        word = str(id) if isinstance(id, int) and id >= 0 else make_key(id)  # fast path: there are 100,000 rows
        if word in seen:
            repeats.add(number)
        seen.add(word)
    return repeats


def make_records(
    id: object,
    image: Path | bytes,
    captions: Sequence[tuple[object, object]],
    *,
    source: str,
    split: str,
    choice: str,
    row: Sequence[int] = (),
) -> Iterator[Record | Dropped]:
    """Yield the documents of one image.

    Args:
        captions: (id, text) pairs in the data set's order.
        choice: for train: "each" yields a document per caption, "first" one with the first caption, "all" one with all
            captions, one per line. val and test always have one document per image, with the first caption as text
            and all captions in `meta.answers`.
        row: the row's numbers, to make keys unique if another row may have the same id.
    """
    good = []
    for caption_id, text in captions:
        if isinstance(text, str) and text.strip():
            good.append((caption_id, text.strip()))
        else:
            yield Dropped(str(caption_id), BAD_CAPTION)
    if not captions:
        yield Dropped(str(id), NO_CAPTION)
    if not good:
        return
    texts = [text for _, text in good]
    meta = {"image_id": id}
    if split != "train":
        meta |= {"question_id": id, "answers": texts}
    if split != "train" or choice == "first":
        chosen = [(id, texts[0])]
    else:
        chosen = good if choice == "each" else [(id, "\n".join(texts))]
    for number, (caption_id, text) in enumerate(chosen):
        document = [{"type": "image"}, {"type": "text", "text": text}]
        record = {"document": document, "id": caption_id, "source": source, "meta": meta}
        key = make_key(f"{id}-row", *row, number) if row else make_key(id, number)
        yield Record(key, record, [image])
