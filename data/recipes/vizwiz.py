"""VizWiz-VQA: questions that blind people asked about their photographs, ten answers each, some "unanswerable"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, list_rows, look_for, read_vqa, read_vqa_row
from data.recipes.questions import (
    BAD_ROW,
    NO_TEST_ANSWERS,
    SHORT,
    Question,
    check_choice,
    check_split,
    convert_part,
    convert_rows,
    count_answers,
    cut_parts,
    cut_table,
    is_table,
    to_answers,
)
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "val"}
HUB = True
REFUSED = {"test": NO_TEST_ANSWERS}
UNANSWERABLE = "unanswerable (unanswerable=drop)"
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    unanswerable: str = "keep",
    answers: str = "majority",
    grouped: bool = True,
    prompt: str = "first",
    streaming: bool = True,
    rows: int = 2000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with VizWiz's own `<split>.json`, or with OpenFlamingo's copy in VQA format,
            `<split>_questions_vqa_format.json` and `<split>_annotations_vqa_format.json`; or a folder of parquet, or a
            hub id, with `question`, `answers`, `category` and the photograph in `image` (lmms-lab/VizWiz-VQA: only
            val).
        images: folder of `train/` and `val/`, or of their files; default: `path`.
        unanswerable: what to do with questions whose most frequent answer is "unanswerable": "keep", "drop" (training
            only), or "prompt", which keeps them and adds to the prompt line when to answer "Unanswerable".
        The other arguments are as in vqav2.
    """
    check_split(split, SPLITS, refused=REFUSED)
    check_choice("unanswerable", unanswerable, "keep", "drop", "prompt")
    options = {"split": split, "images": images or str(path), "answers": answers, "grouped": grouped, "prompt": prompt}
    options |= {"unanswerable": unanswerable}
    if look_for(path, f"{split}.json", f"{split}_questions_vqa_format.json") is None and is_table(path):
        needs = ("question", "image", "answers")
        return cut_table(path, rows=rows, needs=needs, options=options, streaming=streaming)
    return cut_parts(read, path, rows=rows, options=options)


def read(path: str, options: dict) -> list[Question | Dropped]:
    split = options["split"]
    image = lambda name: first_there(options["images"], f"{split}/{name}", name)
    line = say_how(options)
    own = look_for(path, f"{split}.json")
    if own is None and (questions := look_for(path, f"{split}_questions_vqa_format.json")):
        annotations = find_file(path, f"{split}_annotations_vqa_format.json")
        out = read_vqa(questions, annotations, image=lambda row: image(row["image_id"]), prompt=line)
    else:
        out = read_own(own or find_file(path, f"{split}.json"), image, line)
    return [drop_silent(question, options) for question in out]


def say_how(options: dict) -> str:
    return f"{INSUFFICIENT}\n{SHORT}" if options["unanswerable"] == "prompt" else SHORT


def drop_silent(question: Question | Dropped, options: dict) -> Question | Dropped:
    """Drop an unanswerable training question if `unanswerable=drop`."""
    if options["unanswerable"] != "drop" or options["split"] != "train" or isinstance(question, Dropped):
        return question
    silent = count_answers(question.answers)[:1] == ["unanswerable"]
    return Dropped(str(question.id), UNANSWERABLE) if silent else question


def read_row(row: dict, number: int, options: dict) -> Question | Dropped:
    key = "category" if "category" in row else "answer_type"
    return drop_silent(read_vqa_row(row, number, type_key=key, prompt=say_how(options)), options)


def read_own(file: Path, image, line: str) -> list[Question | Dropped]:
    out: list[Question | Dropped] = []
    for row in list_rows(file):
        name = row.get("image")
        if not isinstance(name, str) or row.get("question") is None:
            out.append(Dropped(str(name), BAD_ROW))
            continue
        kind, answerable = row.get("answer_type"), row.get("answerable")
        answers = to_answers(row.get("answers") or [])
        # One question per image and no question id: use the file name, as VizWiz's result files do.
        question = Question(name, image(name), name, row["question"], answers, str(kind or ""), prompt=line)
        if answerable is not None:
            question.meta["answerable"] = answerable
        out.append(question)
    return out


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        return convert_rows(read_row, part, source="vizwiz")
    return convert_part(read, part, source="vizwiz")
