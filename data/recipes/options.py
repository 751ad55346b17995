"""Questions with any number of images or with answer options, shared by the recipes for exams.

Unlike in `questions.py`, a record is one question in every split, with its images where the question names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.recipes.questions import plain_id
from data.recipes.record import EMPTY, IMAGE_MISSING, NO_ANSWER, Dropped, Record, make_key


def list_options(options: Sequence[str]) -> str:
    """Return `A. wood`, `B. metal`, ..., one per line."""
    return "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))


def make_question(
    id: object,
    content: Sequence[dict],
    images: Sequence[bytes | Path],
    answers: Sequence[str],
    *numbers: int,
    source: str,
    said: str | None = None,
    image_id: object = None,
    kind: str = "",
    meta: dict,
) -> Iterator[Record | Dropped]:
    """Yield one question as a record, or `Dropped` if it is empty or its answer or image file is missing.

    Args:
        content: image and text parts; without images, only their text is kept.
        answers: all reference answers; the first is learned unless `said` is given.
        said: the answer to learn.
        kind: the question's type.
    """
    text = "".join(part["text"] for part in content if part["type"] == "text")
    learned = said if said is not None else next(iter(answers), "")
    reason = EMPTY if not text.strip() else NO_ANSWER if not str(learned).strip() else ""
    if not reason and any(isinstance(image, Path) and not os.path.isfile(image) for image in images):
        reason = IMAGE_MISSING
    if reason:
        yield Dropped(plain_id(id), reason)
        return
    about = {"question_id": id, "image_id": image_id, "type": kind, "turns": 1} | meta | {"answers": list(answers)}
    about = {key: value for key, value in about.items() if value is not None and value != ""}
    asked: object = list(content) if images else text
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(learned)}]
    yield Record(
        make_key(plain_id(id), *numbers),
        {"messages": messages, "id": id, "source": source, "meta": about},
        list(images),
    )
