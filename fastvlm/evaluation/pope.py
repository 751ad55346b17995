"""POPE, yes-no questions on object hallucination, after RUCAIBox/POPE@3df3ba1b `evaluate.py` (Li et al.,
arXiv:2305.10355)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastvlm.evaluation.protocol import Protocol, mean


def read_yes_no(prediction: str) -> str:
    """Return "no" if the first sentence, commas removed, contains the word No, no or not; else "yes"."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_figures(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Return accuracy, precision, recall, F1 (yes is positive) and the share of yes; 0 where undefined."""
    pairs = [(a == "yes", b != "no") for a, b in zip(said, truth, strict=True)]
    tp, tn = pairs.count((True, True)), pairs.count((False, False))
    precision = _ratio(tp, tp + pairs.count((True, False)))
    recall = _ratio(tp, tp + pairs.count((False, True)))
    return {
        "accuracy": _ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_share": _ratio(sum(a for a, _ in pairs), len(pairs)),
    }


class Pope(Protocol):
    """POPE; `f1_mean` over the categories random, popular and adversarial is what LLaVA and FastVLM report."""

    def grade(self, row: dict) -> dict:
        said = read_yes_no(row["prediction"])
        return {"score": float(said == ("no" if row["answers"][0] == "no" else "yes")), "parsed": said}

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        figures: dict[str, float] = {}
        f1 = []
        for kind in sorted({row["type"] for row in rows}):
            chosen = [row for row in rows if row["type"] == kind]
            mine = yes_no_figures([row["parsed"] for row in chosen], [row["answers"][0] for row in chosen])
            figures |= {f"{name}/{kind}": value for name, value in mine.items() if name != "accuracy"}
            f1.append(mine["f1"])
        both = yes_no_figures([row["parsed"] for row in rows], [row["answers"][0] for row in rows])
        figures |= {name: value for name, value in both.items() if name != "accuracy"}
        return figures | {"f1_mean": mean(f1)}

    def official_files(self, name: str, rows: Sequence[dict]) -> dict[str, str]:
        """Return a file of JSON lines per category: the official scorer reads one category at a time, in order."""
        files: dict[str, str] = {}
        for row in rows:
            file = f"{name}_{row['type'] or 'all'}_official.jsonl"
            line = json.dumps({"question": row["question"], "answer": row["prediction"]}, ensure_ascii=False)
            files[file] = files.get(file, "") + line + "\n"
        return files


def _ratio(part: float | int, whole: float | int) -> float:
    return part / whole if whole else 0.0
