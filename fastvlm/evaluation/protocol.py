"""How a benchmark scores: what every protocol answers, and the questions it is asked about."""

from __future__ import annotations

from collections.abc import Sequence


class Protocol:
    """Scores predictions; one subclass a benchmark, in a file of its own.

    A row is a dict as a line of the predictions file: `question_id`, `image_id`, `type`, `question`, `answers` (all
    references), `meta` (what else the data set says of the question) and `prediction`. Scoring reads nothing else, so a
    file can be scored again without the model.
    """

    metric = "accuracy"  # the main figure's name; shown times 100, as the papers do

    def grade(self, row: dict) -> dict:
        """`score` of one answer in [0, 1], and what was read out of it (`parsed`)."""
        raise NotImplementedError

    def score(self, rows: Sequence[dict]) -> list[dict]:
        """`grade` of every row; a protocol that needs all of them at once does it here."""
        return [self.grade(row) for row in rows]

    def counts(self, row: dict) -> bool:
        """Whether the official score counts this question at all."""
        return True

    def groups(self, row: dict) -> list[str]:
        """The breakdowns a row belongs to."""
        return [kind for kind in str(row.get("type") or "").split(",") if kind]

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        """Figures beside the mean score, of scored rows."""
        return {}

    def describe(self) -> dict[str, str]:
        """What a score of this protocol cannot be compared without, beside the prompt."""
        return {}

    def official(self, rows: Sequence[dict]) -> list | dict:
        """What the benchmark's own scorer or server takes as a result file."""
        return [{"question_id": row["question_id"], "answer": row["prediction"]} for row in rows]


def mean(values: Sequence[float | int]) -> float:
    """The plain mean, summed in order as the official scorers do; of nothing it is 0."""
    return sum(values) / len(values) if len(values) else 0.0
