"""Questions of an evaluation split, and the baselines that show whether a model uses the image."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from fastvlm.data.shards import ShardReader, count_images
from fastvlm.data.source_index import SourceIndex
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.metrics import majority_answer, normalise_answer
from fastvlm.inference.engine import Engine


@dataclass
class Question:
    """One question with its reference answer."""

    key: str
    source: str
    type: str
    messages: list[dict]  # up to the assistant's turn
    answer: str
    files: tuple[bytes, ...] = ()  # the images, in the order of their slots
    image_ids: tuple[str, ...] = ()  # digests of the files; equal files are encoded once and never swapped
    transform: ImageTransform | None = None  # turns a file into views

    @property
    def images(self) -> list[UInt8[Tensor, "v 3 H W"]]:
        """Views of every image, the whole one first; read at each call, as those of all questions take tens of GiB."""
        return [self.transform(file) for file in self.files]

    @property
    def prompt(self) -> dict:
        """The record without the answer."""
        return {"messages": self.messages}

    @property
    def answered(self) -> dict:
        """The record with its reference answer."""
        return {"messages": [*self.messages, {"role": "assistant", "content": self.answer}]}

    @property
    def text(self) -> str:
        """The text before the answer, with images as `<image>`."""
        return "\n".join(plain_text(message["content"]) for message in self.messages)


def plain_text(content: str | list[dict]) -> str:
    """Return the text of a message or document, with images as `<image>`."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "<image>" for part in content)


def read_questions(
    index: SourceIndex,
    *,
    source: str,
    limit: int | None,
    transform: ImageTransform,
    rows: np.ndarray | None = None,
    edit: Callable[[dict], dict] = lambda record: record,
) -> list[Question]:
    """Read the first `limit` questions of every type (None: all), in the order of the index.

    Args:
        source: name of the source; also the type of questions that have none.
        transform: turns an image file into views.
        rows: use only these rows of the index; None uses all.
        edit: converts a record to the one shown to the model (`Source.edit`); images are read only if it has some.

    Raises:
        ValueError: a record is not one question with one answer.
    """
    types, faults = index.types.to_pylist(), index.faults.to_pylist()
    taken: dict[str, int] = defaultdict(int)
    questions = []
    reader = ShardReader()
    for row in range(index.num_samples) if rows is None else map(int, rows):
        kind = types[row] or source
        if faults[row] or (limit is not None and taken[kind] >= limit):
            continue
        raw = index.read(row, reader)
        record = edit(raw.record)
        messages, files = record.get("messages", ()), tuple(raw.images) if count_images(record) else ()
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] != "assistant" or roles.count("assistant") != 1:
            raise ValueError(
                f"{index.folder}: {raw.key} of split {index.split} is not one question with one answer, "
                "which is what a short-answer task scores"
            )
        taken[kind] += 1
        questions.append(
            Question(
                key=raw.key,
                source=source,
                type=kind,
                messages=messages[:-1],
                answer=plain_text(messages[-1]["content"]),
                files=files,
                image_ids=tuple(hashlib.sha256(file).hexdigest() for file in files),
                transform=transform,
            )
        )
    reader.close()
    return questions


def spread(count: int, at_most: int) -> np.ndarray:
    """Return up to `at_most` of the places 0 to count - 1, evenly spread and in order."""
    if at_most >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, at_most).round().astype(int)


def first_of_types(questions: Sequence[Question], *, source: str, count: int) -> list[Question]:
    """Return the first `count` questions of each type of a source, in order."""
    taken: dict[str, int] = defaultdict(int)
    found = []
    for question in questions:
        if question.source == source and taken[question.type] < count:
            taken[question.type] += 1
            found.append(question)
    return found


def encode_once(engine: Engine, questions: Sequence[Question]) -> list[list[Float[Tensor, "_ D"]]]:
    """Return visual tokens (T, D) of every question's images; an image shared by questions is encoded once.

    They are on the CPU: a GPU has no room for those of all questions beside a large model.
    """
    files = {name: (file, q.transform) for q in questions for name, file in zip(q.image_ids, q.files)}
    images = (transform(file) for file, transform in files.values())
    encoded = {name: tokens.cpu() for name, tokens in zip(files, engine.encode_each(images))}
    return [[encoded[name] for name in q.image_ids] for q in questions]


def count_majorities(
    index: SourceIndex, *, source: str, limit: int = 4000, rows: np.ndarray | None = None
) -> dict[str, str]:
    """Return the most frequent answer to each question type, over `limit` training records, evenly spread."""
    answers: dict[str, list[str]] = defaultdict(list)
    faults = index.faults.to_pylist()
    reader = ShardReader()
    rows = np.arange(index.num_samples) if rows is None else rows
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int))].tolist():
        if faults[row]:
            continue
        record = index.read(row, reader).record
        turns = [m["content"] for m in record.get("messages", ()) if m["role"] == "assistant"]
        meta = record.get("meta") or {}
        kinds = meta.get("types") or [meta.get("type") or source] * len(turns)
        for kind, turn in zip(kinds, turns):
            answers[kind].append(plain_text(turn))
    reader.close()
    return {kind: majority_answer(given) for kind, given in answers.items()}


def swap_partners(questions: Sequence[Question]) -> list[int | None]:
    """Choose, deterministically, the question whose images each question gets when images are swapped.

    A partner has the same number of images, and different ones; None if there is no such question. In order of
    preference it has the same type and another answer; the same type; another type. Among equals it is the next one in
    the list, cyclically, so that partners vary.
    """
    partners: list[int | None] = []
    n = len(questions)
    for i, mine in enumerate(questions):
        if not mine.image_ids:
            partners.append(None)
            continue
        best, best_rank = None, 3
        for step in range(1, n):
            j = (i + step) % n
            other = questions[j]
            if len(other.image_ids) != len(mine.image_ids) or other.image_ids == mine.image_ids:
                continue
            same_type = other.type == mine.type and other.source == mine.source
            same_answer = normalise_answer(other.answer) == normalise_answer(mine.answer)
            rank = 2 - same_type * (2 - same_answer)
            if rank < best_rank:
                best, best_rank = j, rank
            if rank == 0:
                break
        partners.append(best)
    return partners
