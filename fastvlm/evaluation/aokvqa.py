"""A-OKVQA, multiple choice and direct answer, after allenai/aokvqa@83786de0 `evaluation/eval_predictions.py`.

The official scorer expects the exact text of the chosen option, and compares direct answers without normalisation. It
does not define how generated text is mapped to an option; here the option's letter or its text is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol

LETTER = re.compile(r"^\(?([A-Z])\)?(?:[.:)]|$)")  # not "A cab", an article


def direct_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return min(1, matches / 3) over the ten answers, without leave-one-out and without normalisation."""
    return min(1.0, sum(prediction == answer for answer in answers) / 3.0)


def read_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """Return the option named by its text (ignoring case) or its letter, as in "B", "(B)", "B. wood"; else None."""
    text = prediction.strip()
    for choice in choices:
        if text.rstrip(".").lower() == choice.strip().rstrip(".").lower():
            return choice
    if (match := LETTER.match(text)) and (at := ord(match[1]) - ord("A")) < len(choices):
        return choices[at]
    return None


class DirectAnswer(Protocol):
    """Direct answers; questions marked `difficult_direct_answer` are asked but not counted."""

    metric = "direct_answer"

    def grade(self, row: dict) -> dict:
        return {"score": direct_accuracy(row["prediction"], row["meta"].get("direct_answers") or row["answers"])}

    def counts(self, row: dict) -> bool:
        return not row["meta"].get("difficult_direct_answer")

    def official(self, rows: Sequence[dict]) -> dict[str, dict]:
        return {str(row["question_id"]): {"direct_answer": row["prediction"]} for row in rows}


class MultipleChoice(Protocol):
    """Multiple choice; an answer that names no option is wrong."""

    metric = "multiple_choice"

    def grade(self, row: dict) -> dict:
        choices, right = row["meta"]["choices"], row["meta"]["correct_choice_idx"]
        if not 0 <= right < len(choices):
            raise ValueError(
                f"question {row['question_id']}: correct_choice_idx={right} is not one of its {len(choices)} choices; "
                "prepare the shards with form=choice, which drops such questions"
            )
        chosen = read_choice(row["prediction"], choices)
        return {"score": float(chosen == choices[right]), "parsed": chosen}

    def official(self, rows: Sequence[dict]) -> dict[str, dict]:
        # The official reader rejects texts that are not a choice, so these answers are left out, which counts as wrong.
        graded = [(row, self.grade(row)["parsed"]) for row in rows]
        return {str(row["question_id"]): {"multiple_choice": chosen} for row, chosen in graded if chosen is not None}
