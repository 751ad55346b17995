"""ANLS of DocVQA: average normalised Levenshtein similarity (Biten et al., arXiv:1905.13648; arXiv:1907.00490, eq. 1).

This follows the competition's script (rrc.cvc.uab.es; a copy: QwenLM/Qwen-VL@aa00ed04
`eval_mm/infographicsvqa_eval.py`): it keeps a similarity of exactly 0.5, which the formula drops, and divides by the
length of the longer text before whitespace is normalised. lmms-eval's `anls` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol

THRESHOLD = 0.5


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Return the Levenshtein distance."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], *, threshold: float = THRESHOLD) -> float:
    """Return the similarity to the nearest reference, in [0, 1]; 0 if it is below the threshold.

    Raises:
        ValueError: there is no reference.
    """
    if not answers:
        raise ValueError("ANLS needs a reference answer")
    distances = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))  # as in the script; upper case can be longer
        distance = edit_distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        distances.append(distance / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= threshold else 0.0


class ANLS(Protocol):
    """ANLS by DocVQA's question types: figure/diagram, form, table/list, ...; a question may have several."""

    metric = "anls"

    def __init__(self, *, threshold: float = THRESHOLD):
        if not 0 <= threshold <= 1:
            raise ValueError(f"protocol.threshold={threshold} is not in [0, 1]")
        self.threshold = threshold

    def grade(self, row: dict) -> dict:
        return {"score": anls(row["prediction"], row["answers"], threshold=self.threshold)}

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{"questionId": row["question_id"], "answer": row["prediction"]} for row in rows]
