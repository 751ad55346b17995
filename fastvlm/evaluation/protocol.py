"""The interface of scoring protocols."""

from __future__ import annotations

import json
from collections.abc import Sequence


class Protocol:
    """Scores predictions; each benchmark has a subclass in a file of its own.

    A row is a dict like a line of the predictions file: `question_id`, `image_id`, `type`, `question`, `answers` (all
    references), `meta` (further data of the question) and `prediction`. Scoring reads nothing else, so a file can be
    scored again without the model.
    """

    metric = "accuracy"  # name of the main figure; shown times 100, as in papers

    def grade(self, row: dict) -> dict:
        """Return `score`, in [0, 1], of one answer, and usually what was parsed from it (`parsed`)."""
        raise NotImplementedError

    def score(self, rows: Sequence[dict]) -> list[dict]:
        """Grade every row; overridden by protocols that need all rows at once."""
        return [self.grade(row) for row in rows]

    def counts(self, row: dict) -> bool:
        """Return whether the official score includes this question."""
        return True

    def groups(self, row: dict) -> list[str]:
        """Return the groups of the breakdown that a row belongs to."""
        return [kind for kind in str(row.get("type") or "").split(",") if kind]

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        """Return figures besides the mean score, from scored rows."""
        return {}

    def describe(self) -> dict[str, str]:
        """Return the protocol's settings that two scores must share to be comparable."""
        return {}

    def official(self, rows: Sequence[dict]) -> list | dict:
        """Return the result file for the benchmark's official scorer or server."""
        return [{"question_id": row["question_id"], "answer": row["prediction"]} for row in rows]

    def official_files(self, name: str, rows: Sequence[dict]) -> dict[str, str]:
        """Return the texts of a task's official result files by name."""
        return {f"{name}_official.json": json.dumps(self.official(rows), ensure_ascii=False)}


def mean(values: Sequence[float | int]) -> float:
    """Return the mean, summed in order like the official scorers; 0 for an empty sequence."""
    return sum(values) / len(values) if len(values) else 0.0
