"""GQA: exact match on testdev_balanced (Hudson and Manning, arXiv:1902.09506).

`match` is lmms-eval's exact match, which ignores case and punctuation (lmms-eval@75571cfe `api/metrics.py`). GQA's own
`eval.py` (a copy: SHI-Labs/VCoder@4e85acef) compares texts as they are; `match_strict` is its result after LLaVA's
`scripts/convert_gqa_for_eval.py`, which converts answers to lower case and strips trailing full stops.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol, mean

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def match(prediction: str, answer: str) -> bool:
    """Return whether both are equal, ignoring case and ASCII punctuation; spaces count."""
    return prediction.lower().translate(NO_PUNCTUATION) == answer.lower().translate(NO_PUNCTUATION)


def match_strict(prediction: str, answer: str) -> bool:
    """Return whether the prediction, in lower case and without trailing full stops, equals the answer."""
    return prediction.rstrip(".").lower() == answer


class GQA(Protocol):
    """Exact match, broken down by a question's structural and semantic type, and by open or binary."""

    metric = "exact_match"

    def grade(self, row: dict) -> dict:
        return {"score": float(match(row["prediction"], row["answers"][0]))}

    def groups(self, row: dict) -> list[str]:
        structural, semantic = row["meta"].get("structural"), row["meta"].get("semantic")
        # As in GQA's own scorer: all types but "query" name their possible answers.
        kind = "open" if structural == "query" else "binary"
        return [*super().groups(row), *([kind] if structural else []), *([f"about {semantic}"] if semantic else [])]

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        return {"exact_match_strict": mean([float(match_strict(r["prediction"], r["answers"][0])) for r in rows])}

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{"questionId": row["question_id"], "prediction": row["prediction"].rstrip(".").lower()} for row in rows]
