"""MathVista, after lupantech/MathVista@53d52587 `evaluation/{extract_answer,calculate_score}.py` (Lu et al.,
arXiv:2310.02255).

If the official rules find no answer in a response, the official code asks GPT. Here the last number, letter or list of
the response is taken instead, and each row says which was used (`extracted_by`); published scores used GPT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastvlm.evaluation.anls import edit_distance
from fastvlm.evaluation.protocol import Protocol

QUOTED = re.compile(r'The answer is "(.*)"\.')
BRACKETED_LETTER = re.compile(r"\(([a-zA-Z])\)")
LAST = {
    "integer": re.compile(r"-?\d+(?:\.\d+)?"),
    "float": re.compile(r"-?(?:\d+\.?\d*|\.\d+)"),
    "list": re.compile(r"\[[^\[\]]*\]"),
    "letter": re.compile(r"\(([A-Z])\)|\b([A-Z])\b(?!['’])"),
}


def extract(response: str, *, choices: Sequence[str] | None, answer_type: str) -> str | None:
    """Apply the official rules: an option's text, a bare number, `The answer is "..."`; None if they find nothing."""
    if response == "" or choices and response in choices:
        return response
    readers = {"integer": lambda text: str(int(text)), "float": lambda text: str(float(text))}
    if answer_type in readers:
        try:
            return readers[answer_type](response)
        except ValueError:
            pass
    found = QUOTED.search(response)
    return found[1] if found else None


def extract_last(response: str, *, choices: Sequence[str] | None, answer_type: str) -> str:
    """Return the last letter, number or list of a response, in place of GPT's reading; the response if it has none."""
    if choices:
        letters = [a or b for a, b in LAST["letter"].findall(response)]
        letters = [letter for letter in letters if ord(letter) - ord("A") < len(choices)]
        return letters[-1] if letters else response
    text = response.replace(",", "") if answer_type in ("integer", "float") else response
    found = LAST[answer_type].findall(text) if answer_type in LAST else []
    return found[-1] if found else response


def normalise(
    extraction: str, *, choices: Sequence[str] | None, answer_type: str, precision: float | int | None
) -> str | None:
    """Return the form in which an extraction is compared.

    This is an option's text (by its letter, else the one with the smallest edit distance), or a number rounded to the
    question's precision; None if it is not a number.
    """
    if choices:
        extraction = extraction.strip()
        if letters := BRACKETED_LETTER.findall(extraction):
            extraction = letters[0].upper()
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        if extraction in letters:
            return choices[letters.index(extraction)]
        return min(choices, key=lambda choice: edit_distance(extraction, choice))
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(precision)))
    except (ValueError, OverflowError, TypeError):
        return None
    return extraction


class MathVista(Protocol):
    """MathVista accuracy; `parsed` is the normalised answer, groups come from the metadata, such as task and skills."""

    def grade(self, row: dict) -> dict:
        meta = row["meta"]
        form = {"choices": meta.get("choices"), "answer_type": meta.get("answer_type", "text")}
        response = row["prediction"]
        extraction = extract(response, **form)
        if by_rule := extraction is None:
            extraction = extract_last(response, **form)
        parsed = normalise(extraction, **form, precision=meta.get("precision"))
        score = {"score": float(parsed == row["answers"][0]), "parsed": parsed, "extraction": extraction}
        return score | {"extracted_by": "last of its kind" if by_rule else "official rules"}

    def groups(self, row: dict) -> list[str]:
        meta = row["meta"]
        keys = ("task", "category", "context", "grade", "skills", "answer_type")
        words = [meta[key] if isinstance(meta.get(key), list) else [meta.get(key)] for key in keys]
        return [*super().groups(row), *[str(word) for several in words for word in several if word]]

    def official(self, rows: Sequence[dict]) -> dict[str, dict]:
        """Return the input of the official `calculate_score.py`."""
        return {
            str(row["question_id"]): {
                "response": row["prediction"],
                "extraction": (graded := self.grade(row))["extraction"],
                "prediction": graded["parsed"],
                "true_false": bool(graded["score"]),
                "answer": row["answers"][0],
                "question_type": "multi_choice" if row["meta"].get("choices") else "free_form",
                **{key: row["meta"].get(key) for key in ("choices", "answer_type", "precision")},
            }
            for row in rows
        }
