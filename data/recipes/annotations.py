"""Read the annotation files of VQA data sets: JSON lists, the VQA format's two files, and the images they name."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data.recipes.questions import NO_ANNOTATION, NO_QUESTION, SHORT, Question, plain_id, to_answers
from data.recipes.record import BAD_ROW, ODD_ROW, Dropped


def read_json(path: str | Path):
    """Read a JSON file.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; unpack the annotations there") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from None


def list_rows(path: str | Path, key: str | None = None) -> list[dict]:
    """Return the list of rows of a JSON file: the value under `key` if the file holds an object, else the whole file.

    Raises:
        ValueError: there is no such list, or a row is not an object.
    """
    content = read_json(path)
    rows = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(rows, list):
        place = f" under {key!r}" if key else ""
        raise ValueError(f"{path} holds no list of rows{place}; is it the file of another data set?")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(
                f"{path}: row {number} is of type {kind}, not an object; is it the file of another data set?"
            )
    return rows


def find_file(folder: str | Path, *names: str) -> Path:
    """Return the first of these files that exists in a folder or in one of its subfolders.

    Raises:
        ValueError: none of them exists.
    """
    if (found := look_for(folder, *names)) is None:
        raise ValueError(f"path={folder}: no {names[0]} there or one folder down; unpack the annotations into it")
    return found


def look_for(folder: str | Path, *names: str) -> Path | None:
    folder = Path(folder)
    for name in names:
        for found in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if found.is_file():
                return found
    return None


def first_there(folder: str | Path, *names: str) -> str:
    """Return the path of the first of these images that exists, or of the first name if none does."""
    paths = [Path(folder).expanduser() / name for name in names]
    return str(next((path for path in paths if os.path.isfile(path)), paths[0]))


def read_vqa(
    questions: Path,
    annotations: Path,
    *,
    image: Callable[[dict], str],
    answer_key: str = "answer",
    type_key: str = "answer_type",
    describe: Callable[[dict], dict] = lambda annotation: {},
    prompt: str = SHORT,
) -> list[Question | Dropped]:
    """Join the two files of the VQA format by question id. Layout: https://visualqa.org/download.html.

    Args:
        image: row of a question -> path of its image.
        answer_key: the form of an annotator's answer to learn; `answer` is the one that is scored.
        type_key: the key of an annotation that holds the question's type.
        describe: annotation -> `meta` of the question.
        prompt: see `Question.prompt`.
    """
    found: dict[str, list[dict]] = {}
    for annotation in list_rows(annotations, "annotations"):
        found.setdefault(plain_id(annotation.get("question_id")), []).append(annotation)
    out: list[Question | Dropped] = []
    asked: Counter[str] = Counter()
    one = functools.lru_cache(None)(str)  # interns answers: a few thousand words, repeated ten times per question
    for row in list_rows(questions, "questions"):
        if any(row.get(key) is None for key in ("question_id", "image_id", "question")):
            out.append(Dropped(plain_id(row.get("question_id")), BAD_ROW))
            continue
        try:
            file = image(row)
        except (TypeError, ValueError):  # an id that cannot be part of COCO's file names, which need a number
            out.append(Dropped(plain_id(row["question_id"]), BAD_ROW))
            continue
        word = plain_id(row["question_id"])
        theirs = found.get(word, [])
        if not theirs:
            out.append(Dropped(word, NO_ANNOTATION))
            continue
        # For a repeated id, the k-th question goes with the k-th annotation.
        annotation = theirs[min(asked[word], len(theirs) - 1)]
        asked[word] += 1
        try:
            given = annotation.get("answers") or []
            answers = [one(a) for a in to_answers(given)]
            said = None
            if answer_key != "answer":
                forms = [g.get(answer_key, g.get("answer")) for g in given if isinstance(g, dict)]
                said = [one(a) for a in to_answers(forms)]
            meta = describe(annotation)
        except ODD_ROW:
            out.append(Dropped(word, BAD_ROW))
            continue
        about = {"said": said, "prompt": prompt, "meta": meta}
        kind = one(str(annotation.get(type_key) or ""))
        out.append(Question(row["question_id"], file, row["image_id"], row["question"], answers, kind, **about))
    out += [Dropped(word, NO_QUESTION) for word in found if word not in asked]
    return out


def read_vqa_row(
    row: dict, number: int, *, answers: str = "answers", type_key: str = "answer_type", prompt: str = SHORT
) -> Question | Dropped:
    """Read a question from a row of parquet or of the hub that holds its image; without an id, `number` is the id.

    Args:
        answers: the column of the reference answers, a list or a list literal as a string.
    """
    name, image = row.get("question_id", number), image_bytes(row.get("image"))
    if name is None or image is None or row.get("question") is None:
        return Dropped(plain_id(number if name is None else name), BAD_ROW)
    given, kind = to_answers(as_list(row.get(answers))), str(row.get(type_key) or "")
    return Question(name, image, row.get("image_id", name), row["question"], given, kind, prompt=prompt)


def as_list(value: object) -> list:
    """Return a value as a list: some copies hold list literals as strings; None is [], any other value is wrapped."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def image_bytes(value: object) -> bytes | None:
    """Return the encoded image of a parquet cell (`{"bytes", "path"}` or plain bytes), or None."""
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) and data else None
