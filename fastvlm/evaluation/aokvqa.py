"""A-OKVQA in both forms, by allenai/aokvqa@83786de0 `evaluation/eval_predictions.py`.

The official scorer takes the chosen option's text as it is, and direct answers without any normalisation. How a written
answer becomes an option is left to the model: here a letter names it, or its words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol

LETTER = re.compile(r"^\(?([A-Z])\)?(?:[.:)\s]|$)")


def direct_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3) over the ten answers: nothing is left out, nothing normalised."""
    return min(1.0, sum(prediction == answer for answer in answers) / 3.0)


def read_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """The option an answer names: its words (case aside), or its letter as in "B", "(B)", "B. wood"; else None."""
    text = prediction.strip()
    for choice in choices:
        if text.rstrip(".").lower() == choice.strip().rstrip(".").lower():
            return choice
    if (match := LETTER.match(text)) and (at := ord(match[1]) - ord("A")) < len(choices):
        return choices[at]
    return None


class DirectAnswer(Protocol):
    """Questions marked difficult_direct_answer are asked and not counted."""

    metric = "direct_answer"

    def grade(self, row: dict) -> dict:
        return {"score": direct_accuracy(row["prediction"], row["meta"].get("direct_answers") or row["answers"])}

    def counts(self, row: dict) -> bool:
        return not row["meta"].get("difficult_direct_answer")

    def official(self, rows: Sequence[dict]) -> dict[str, dict]:
        return {str(row["question_id"]): {"direct_answer": row["prediction"]} for row in rows}


class MultipleChoice(Protocol):
    """An answer that names no option is wrong."""

    metric = "multiple_choice"

    def grade(self, row: dict) -> dict:
        choices, right = row["meta"]["choices"], row["meta"]["correct_choice_idx"]
        if not 0 <= right < len(choices):
            raise ValueError(
                f"question {row['question_id']}: correct_choice_idx={right} is none of its {len(choices)} choices; "
                "prepare the shards with form=choice, which drops such questions"
            )
        chosen = read_choice(row["prediction"], choices)
        return {"score": float(chosen == choices[right]), "parsed": chosen}

    def official(self, rows: Sequence[dict]) -> dict[str, dict]:
        # The official reader refuses what is none of the choices: an answer without one is left out, and so wrong.
        graded = [(row, self.grade(row)["parsed"]) for row in rows]
        return {str(row["question_id"]): {"multiple_choice": chosen} for row, chosen in graded if chosen is not None}
