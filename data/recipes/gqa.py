"""GQA: questions about Visual Genome photographs made from scene graphs, one answer each; a JSON object per split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, read_json
from data.recipes.questions import BAD_ROW, Question, check_split, convert_part, cut_parts, try_row
from data.recipes.record import Dropped, Part, Record

NOT_ON_HUB = "get its JSON files from https://cs.stanford.edu/people/dorarad/gqa"
SPLITS = {"train": "train_balanced", "val": "val_balanced", "test": "testdev_balanced"}


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    grouped: bool = True,
    prompt: str = "first",
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `train_balanced_questions.json`, `val_balanced_questions.json` and, as test,
            `testdev_balanced_questions.json`, on which results are reported.
        images: folder of `<image id>.jpg`, or of an `images/` folder with them; default: `path`.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS)
    options = {"split": split, "images": images or str(path), "answers": "majority", "grouped": grouped}
    return cut_parts(read, path, rows=rows, options=options | {"prompt": prompt})


def read(path: str, options: dict) -> list[Question | Dropped]:
    file = find_file(path, f"{SPLITS[options['split']]}_questions.json")
    rows = read_json(file)
    if not isinstance(rows, dict):
        raise ValueError(f"{file} holds no object of questions by id; is it the file of another data set?")
    out: list[Question | Dropped] = []
    for name, row in rows.items():
        if not isinstance(row, dict) or any(row.get(key) is None for key in ("imageId", "question", "answer")):
            out.append(Dropped(name, BAD_ROW))
            continue
        out.append(try_row(make_question, row, name, options["images"]))
    return out


def make_question(row: dict, name: str, images: str) -> Question:
    image = first_there(images, f"images/{row['imageId']}.jpg", f"{row['imageId']}.jpg")
    types = row.get("types") or {}
    kinds = {key: types.get(key) for key in ("structural", "semantic", "detailed") if types.get(key)}
    kind, answers = str(types.get("structural") or ""), [str(row["answer"])]
    return Question(name, image, row["imageId"], row["question"], answers, kind, meta=kinds)


def convert(part: Part) -> Iterator[Record | Dropped]:
    return convert_part(read, part, source="gqa")
