"""ChartQA: questions about charts, written by people or generated; the original folders or either parquet copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, image_bytes, list_rows
from data.recipes.questions import (
    BAD_ROW,
    Question,
    check_split,
    convert_part,
    convert_rows,
    cut_parts,
    cut_table,
    is_table,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "val", "test": "test"}
HUB = True
KINDS = ("human", "augmented")


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `<split>/<split>_human.json`, `<split>/<split>_augmented.json` and `<split>/png/`; or a folder
            of parquet or a hub id with `query`, `label`, `human_or_machine` (HuggingFaceM4/ChartQA) or with
            `question`, `answer`, `type` (lmms-lab/ChartQA).
        images: folder of the charts; default: the folder of the annotations, with `png/`.
        grouped: training asks all questions about a chart in one conversation; with parquet, only those in one shard.
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS)
    options = {"split": split, "images": images, "answers": answers, "grouped": grouped, "prompt": prompt}
    if is_table(path):
        return cut_table(path, rows=rows, needs=("image",), options=options, streaming=streaming)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    split = options["split"]
    out: list[Question | Dropped] = []
    for kind in KINDS:
        file = find_file(path, f"{split}_{kind}.json")
        for number, row in enumerate(list_rows(file)):
            # The data set has no ids.
            name, chart = f"{kind}-{number}", str(row.get("imgname") or "")
            if not chart:
                out.append(Dropped(name, BAD_ROW))
                continue
            folder = options["images"] or file.parent
            image = first_there(folder, f"png/{chart}", chart, f"{split}/png/{chart}")
            out.append(Question(name, image, chart, row.get("query"), to_answers(row.get("label")), kind))
    return out


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    if (image := image_bytes(row.get("image"))) is None:
        return Dropped(str(number), BAD_ROW)
    if "query" in row:
        text, answer = row["query"], row.get("label")
        kind = {0: "human", 1: "augmented", "machine": "augmented"}.get(row.get("human_or_machine"), "human")
    else:
        text, answer = row.get("question"), row.get("answer")
        kind = str(row.get("type") or "").removesuffix("_test")
    return Question(f"{kind}-{number}", image, number, text, to_answers(answer), kind)


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="chartqa")
    return convert_part(read, part, source="chartqa")
