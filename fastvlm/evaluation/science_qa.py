"""ScienceQA, multiple choice with two to five options. Answers are parsed as in haotian-liu/LLaVA@c121f043
`llava/eval/eval_science_qa.py`; groups are those of lupantech/ScienceQA@2cbf8318 `tools/evaluate_acc.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol

OPTIONS = "ABCDE"
SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last "." matches any character, as in the original


def read_option(prediction: str, *, num_choices: int) -> int:
    """Return the index of the option named by "B", "B. ..." or exactly one "The answer is B."; -1 if there is none."""
    sentences = SENTENCE.findall(prediction)
    if prediction[:1] in tuple(OPTIONS) and (len(prediction) == 1 or prediction[1:3] == ". "):
        named = prediction[0]
    else:
        named = sentences[0] if len(sentences) == 1 else ""
    return OPTIONS[:num_choices].find(named) if named else -1


class ScienceQA(Protocol):
    """ScienceQA accuracy; an answer that names no option is wrong."""

    def grade(self, row: dict) -> dict:
        option = read_option(row["prediction"], num_choices=len(row["meta"]["choices"]))
        return {"score": float(option == row["meta"]["correct_choice_idx"]), "parsed": option}

    def groups(self, row: dict) -> list[str]:
        meta = row["meta"]
        grade = int("".join(c for c in str(meta.get("grade", "")) if c.isdigit()) or 0)
        context = [name for name, there in (("text", meta.get("hint")), ("image", meta.get("has_image"))) if there]
        return [
            *super().groups(row),
            *[f"with {name}" for name in context],
            *([] if context else ["without context"]),
            *([] if not grade else ["grades 1-6" if grade <= 6 else "grades 7-12"]),
        ]

    def official(self, rows: Sequence[dict]) -> dict:
        return {"results": {str(row["question_id"]): self.grade(row)["parsed"] for row in rows}}
