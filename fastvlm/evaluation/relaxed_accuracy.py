"""ChartQA's relaxed accuracy: numbers within 5 %, text exactly (Masry et al., arXiv:2203.10244, section 5.1).

Source: google-research/pix2struct `pix2struct/metrics.py`; lmms-eval's `tasks/chartqa/utils.py` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol

TOLERANCE = 0.05


def to_number(text: str) -> float | None:
    """Parse a text by `float` ("1e3", " 7 " and "nan" are numbers, "1,000" is not); a trailing % divides by 100."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, answer: str, *, tolerance: float = TOLERANCE) -> bool:
    """Return whether two numbers are within the tolerance; else, and for a target of 0, whether the texts are equal."""
    number, target = to_number(prediction), to_number(answer)
    if number is not None and target:
        return abs(number - target) / abs(target) <= tolerance
    return prediction.lower() == answer.lower()


class RelaxedAccuracy(Protocol):
    """Relaxed accuracy; the types human and augmented are reported besides the mean over all questions."""

    metric = "relaxed_accuracy"

    def grade(self, row: dict) -> dict:
        return {"score": float(any(relaxed_match(row["prediction"], answer) for answer in row["answers"]))}

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{"imgname": row["image_id"], "query": row["question"], "prediction": row["prediction"]} for row in rows]
