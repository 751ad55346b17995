"""Questions about images with one or many reference answers; shared by the recipes for VQA data sets.

A recipe reads its layout into a list of `Question` (or `Dropped`); this module turns them into conversations. Training
asks all questions about an image in one conversation; evaluation has one question per record, with all its references.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from data.recipes.inputs import list_files
from data.recipes.record import BAD_ROW, EMPTY, IMAGE_MISSING, NO_ANSWER, ODD_ROW, Dropped, Part, Record, make_key
from data.recipes.rows import SPLIT_NAMES, cut_rows, read_rows

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
NO_ANNOTATION = "question without an annotation"
NO_QUESTION = "annotation without a question"
REPEATED = "question id repeats"

NO_TEST_ANSWERS = "its answers are not public, and evaluation reads a reference from every record"
CHOICES = {"answers": ("majority", "all_distinct"), "prompt": ("first", "every", "none")}


@dataclass(slots=True)
class Question:
    """One question with its annotation."""

    id: object  # the original id: int, float or str; may be 0
    image: str | bytes  # the image's path, or the file itself
    image_id: object
    text: str
    answers: list[str]  # all reference answers, as evaluation scores them
    type: str = ""
    said: list[str] | None = None  # answers to learn; None: those in `answers`
    prompt: str = SHORT  # the line under the question that says how to answer
    meta: dict = field(default_factory=dict)
    repeats: bool = False  # an earlier row of the file has the same id


def plain_id(value: object) -> str:
    """Return an id as a string; 42, 42.0 and "42" give the same."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def to_answers(value: object) -> list[str]:
    """Return reference answers as strings; accepts a string, a number, or a list of them or of `{"answer": ...}`."""
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [v.get("answer") if isinstance(v, dict) else v for v in values]
    return [plain_id(v) if isinstance(v, float) else str(v) for v in values if v is not None]


def count_answers(answers: list[str]) -> list[str]:
    """Return the distinct non-empty answers, most frequent first; ties keep the given order."""
    return [answer for answer, _ in Counter(a.strip() for a in answers if a.strip()).most_common()]


def check_choice(key: str, value: str, *allowed: str) -> None:
    """Check an option that takes one of a few words.

    Raises:
        ValueError: the value is not allowed.
    """
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}={value} is not one of {', '.join(allowed)}{hint}")


def check_split(split: str, splits: dict, *, refused: Mapping[str, str] = MappingProxyType({})) -> None:
    """Check that a split can be prepared.

    Raises:
        ValueError: the data set has no such split, or its answers are not public.
    """
    if split not in splits:
        raise ValueError(
            f"split={split}: {refused.get(split, 'this data set has no such split')}; take {' or '.join(splits)}"
        )


def group_questions(questions: list[Question | Dropped], *, grouped: bool) -> list[list[Question] | Dropped]:
    """Group questions by image, in the order in which images first occur; without `grouped`, each question alone.

    Sets `Question.repeats`.
    """
    groups: dict[object, list[Question] | Dropped] = {}
    seen: set[str] = set()
    for number, question in enumerate(questions):
        if isinstance(question, Dropped):
            groups["row", number] = question
            continue
        word = plain_id(question.id)
        question.repeats = word in seen
        seen.add(word)
        image = question.image
        name = ("row", number) if not grouped else hashlib.sha256(image).digest() if type(image) is bytes else image
        groups.setdefault(name, []).append(question)
    return list(groups.values())


# Groups of the file read last: parts of one file are converted in sequence, and forked workers inherit this cache.
_last: dict[tuple, list] = {}


def load_groups(read: Callable, path: str, options: dict) -> list[list[Question] | Dropped]:
    name = (read.__module__, path, json.dumps(options, sort_keys=True))
    if name not in _last:
        groups = group_questions(read(path, options), grouped=options["grouped"] and options["split"] == "train")
        _last.clear()
        _last[name] = groups
    return _last[name]


def cut_parts(read: Callable, path: Path | str, *, rows: int, options: dict) -> list[Part]:
    """Split a data set into parts of `rows` conversations; `read(path, options)` returns all questions of a file."""
    for key, allowed in CHOICES.items():
        check_choice(key, options[key], *allowed)
    options = options | {"state": describe_files(Path(path))}
    count = len(load_groups(read, str(path), options))
    return [Part(str(path), i, min(i + rows, count), options) for i in range(0, count, rows)]


def describe_files(path: Path) -> list[list]:
    """Return [file, size, mtime] of each annotation file, so that a part changes when its annotations do."""
    files = [path] if path.is_file() else list_files(path, (".json",), depth=1)
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def convert_part(read: Callable, part: Part, *, source: str) -> Iterator[Record | Dropped]:
    """Yield the conversations of a part made by `cut_parts`."""
    groups = load_groups(read, part.path, part.options)
    for number in range(part.start, part.stop):
        yield from converse(groups[number], number, source=source, options=part.options)


def is_table(path: Path | str) -> bool:
    """Return whether the rows are in parquet files or on the hub, not in JSON beside a folder of images."""
    path = Path(path)
    return path.suffix == ".parquet" or not path.exists() or bool(list_files(path, (".parquet",)))


def cut_table(
    path: Path | str,
    *,
    rows: int,
    needs: tuple[str, ...],
    options: dict,
    hub: str = "",
    streaming: bool = True,
) -> list[Part]:
    """Split parquet files, or a hub data set, into parts; each row holds one question and its image."""
    for key, allowed in CHOICES.items():
        check_choice(key, options[key], *allowed)
    # `read_rows` uses the key `split` for the split that rows come from; `becomes` is the split they are written to.
    options = {key: value for key, value in options.items() if key != "split"} | {"becomes": options["split"]}
    settings = {"needs": needs, "options": options, "hub": hub, "streaming": streaming}
    return cut_rows(Path(path), split=SPLIT_NAMES[options["becomes"]], rows=rows, **settings)


def convert_rows(
    read_row: Callable[[dict, int, dict], Question | Dropped], part: Part, *, source: str
) -> Iterator[Record | Dropped]:
    """Yield the conversations of a part made by `cut_table`; an image's questions are grouped within the part only."""
    options = part.options | {"split": part.options["becomes"]}
    rows = ((numbers, try_row(read_row, row, numbers[-1], options)) for numbers, row in read_rows(part))
    if not options["grouped"] or options["split"] != "train":
        for numbers, question in rows:
            group = question if isinstance(question, Dropped) else [question]
            yield from converse(group, *numbers, source=source, options=options)
        return
    images: dict[bytes, bytes] = {}
    read, first = [], {}
    for numbers, question in rows:
        if isinstance(question, Question):
            # Every row repeats its page's image: keep one copy in memory.
            question.image = images.setdefault(hashlib.sha256(question.image).digest(), question.image)
        read.append(question)
        first[id(question)] = numbers
    for group in group_questions(read, grouped=True):
        numbers = () if isinstance(group, Dropped) else first[id(group[0])]
        yield from converse(group, *numbers, source=source, options=options)


def try_row(make: Callable[..., Question | Dropped], row: dict, name: object, *more: object) -> Question | Dropped:
    """Call `make(row, name, *more)`; if the row's values have unexpected types, return it as dropped."""
    try:
        return make(row, name, *more)
    except ODD_ROW:
        return Dropped(plain_id(name), BAD_ROW)


def converse(group: list[Question] | Dropped, *numbers: int, source: str, options: dict) -> Iterator[Record | Dropped]:
    """Yield the record or records of the questions about one image.

    Training learns the most frequent answer. With `answers=all_distinct`, the k-th record of a group repeats the
    questions that have a k-th answer, so that no conversation contradicts itself.
    """
    if isinstance(group, Dropped):
        yield group
        return
    usable = []
    for question in group:
        reason = ""
        if not isinstance(question.text, str) or not question.text.strip():
            reason = EMPTY
        elif not (learned := count_answers(question.answers if question.said is None else question.said)):
            reason = NO_ANSWER
        elif isinstance(question.image, str) and not os.path.isfile(question.image):
            reason = IMAGE_MISSING
        if reason:
            yield Dropped(plain_id(question.id), reason)
        else:
            usable.append((question, learned))
    if not usable:
        return
    image = usable[0][0].image
    images = [image if isinstance(image, bytes) else Path(image)]
    if options["split"] != "train":
        for question, learned in usable:
            meta = describe_question(question) | {"answers": question.answers}
            messages = make_dialogue([(question, learned[0])], prompt=options["prompt"])
            record = {"messages": messages, "id": question.id, "source": source, "meta": meta}
            yield Record(make_key(plain_id(question.id), *numbers), record, images)
        return
    rounds = max(len(learned) for _, learned in usable) if options["answers"] == "all_distinct" else 1
    for k in range(rounds):
        turns = [(question, learned[k]) for question, learned in usable if k < len(learned)]
        questions = [question for question, _ in turns]
        if options["grouped"]:
            name = questions[0].image_id
            meta = {"question_ids": [q.id for q in questions], "types": [q.type or source for q in questions]}
            meta |= {"image_id": name, "turns": len(turns)}
        else:
            name, meta = questions[0].id, describe_question(questions[0])
        # The assembly counts repeated ids of records; only we see repeated ids of questions within a record.
        notes = [REPEATED for q in questions if q.repeats] if options["grouped"] and not k else []
        record = {"messages": make_dialogue(turns, prompt=options["prompt"]), "id": name, "source": source}
        key = make_key(plain_id(name), *numbers, *([k] if options["answers"] == "all_distinct" else []))
        yield Record(key, record | {"meta": meta}, images, notes)


def describe_question(question: Question) -> dict:
    meta = {"question_id": question.id, "image_id": question.image_id, "type": question.type, "turns": 1}
    return {key: value for key, value in meta.items() if key != "type" or value} | question.meta


def make_dialogue(turns: list[tuple[Question, str]], *, prompt: str) -> list[dict]:
    """Return the messages of an image, its questions and their answers.

    `prompt` says which questions are followed by the line that asks for a short answer: "first" as in LLaVA-1.5's mix,
    "every" or "none".
    """
    messages: list[dict] = []
    for i, (question, answer) in enumerate(turns):
        text = question.text.strip()
        if question.prompt and (prompt == "every" or (prompt == "first" and i == 0)):
            text = f"{text}\n{question.prompt}"
        content: str | list[dict] = text if i else [{"type": "image"}, {"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return messages
