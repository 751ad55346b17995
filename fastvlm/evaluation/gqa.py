"""GQA: exact match on testdev_balanced (Hudson and Manning, arXiv:1902.09506).

`match` is lmms-eval's exact match, case and punctuation aside (lmms-eval@75571cfe `api/metrics.py`). GQA's own
`eval.py` (a copy: SHI-Labs/VCoder@4e85acef) compares texts as they are; `match_strict` is what it says once LLaVA's
`scripts/convert_gqa_for_eval.py` has put an answer in lower case, without full stops at its end.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol, mean

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def match(prediction: str, answer: str) -> bool:
    """The same but for case and ASCII punctuation; spaces count."""
    return prediction.lower().translate(NO_PUNCTUATION) == answer.lower().translate(NO_PUNCTUATION)


def match_strict(prediction: str, answer: str) -> bool:
    """The same after the prediction's lower case, without the full stops at its end."""
    return prediction.rstrip(".").lower() == answer


class GQA(Protocol):
    """The breakdown goes by the structural and the semantic type of a question, and open or binary."""

    metric = "exact_match"

    def grade(self, row: dict) -> dict:
        return {"score": float(match(row["prediction"], row["answers"][0]))}

    def groups(self, row: dict) -> list[str]:
        structural, semantic = row["meta"].get("structural"), row["meta"].get("semantic")
        # As in GQA's own scorer: what is not a query names its possible answers.
        kind = "open" if structural == "query" else "binary"
        return [*super().groups(row), *([kind] if structural else []), *([f"about {semantic}"] if semantic else [])]

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        return {"exact_match_strict": mean([float(match_strict(r["prediction"], r["answers"][0])) for r in rows])}

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{"questionId": row["question_id"], "prediction": row["prediction"].rstrip(".").lower()} for row in rows]
