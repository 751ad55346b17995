"""MMMU: parses options and open answers from free text, after MMMU-Benchmark/MMMU@bb0b95a9
`mmmu/utils/eval_utils.py` (Yue et al., arXiv:2311.16502)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from fastvlm.evaluation.protocol import Protocol

OUTER = ",.!?;:'"
# Words that introduce the answer; in the last piece also an equals sign.
KEYWORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
# As in the official code. The text is in lower case by then, so the first rule never matches: only line breaks split.
PIECES = re.compile(r"\.\s(?=[A-Z])|\n")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}


def read_option(response: str, options: Mapping[str, str], *, chance: random.Random) -> str:
    """Return the letter that a response names, or a random one.

    It is the last "(B)"; else the last " B "; else, in responses of more than five words, the option whose text occurs
    last.

    Args:
        options: text of each option by letter, in order.
        chance: generator for the random choice.
    """
    for mark in OUTER:
        response = response.strip(mark)
    response = f" {response} "
    for place in ("({})", " {} "):
        if found := {letter: at for letter in options if (at := response.rfind(place.format(letter))) >= 0}:
            return max(found, key=found.__getitem__)
    if len(response.split()) > 5:
        lower = response.lower()
        if found := {letter: at for letter, text in options.items() if (at := lower.rfind(text.lower())) >= 0}:
            return max(found, key=found.__getitem__)
    return chance.choice(list(options))


def normalise(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, else the lower-case text; a single "x" becomes " x" and "x "."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def read_open(response: str) -> set[str | float]:
    """Return the candidate answers of an open response: each line's shortest tail after a keyword, and its numbers."""
    response = response.strip().strip(".").lower()
    pieces = PIECES.split(response)
    tails = []
    for number, piece in enumerate(pieces, 1):
        keywords = (*KEYWORDS, "=") if number == len(pieces) else KEYWORDS
        found = [piece.split(word)[-1].strip() for word in keywords if word in piece]
        # As in the official code, an empty tail is replaced by the next one.
        shortest = ""
        for tail in found:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in TRIVIAL:
            tails.append(shortest)
    tails = tails or [response]
    numbers = [number for tail in tails for pattern in NUMBERS for number in pattern.findall(tail)]
    return {value for text in [*tails, *numbers] for value in normalise(text)}


def match_open(meant: set[str | float], answers: Sequence[str]) -> bool:
    """Return whether a candidate text contains a reference text, or a candidate number equals a reference number."""
    references = [value for answer in answers for value in normalise(answer)]
    texts = [value for value in references if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in references for value in meant
    )


class MMMU(Protocol):
    """Micro accuracy, broken down by subject, domain and form.

    Args:
        seed: for the random choices if a response names no option, drawn in the order of the rows. The official code
            uses Python's generator seeded with 42.
    """

    def __init__(self, *, seed: int = 42):
        self.seed = seed

    def score(self, rows: Sequence[dict]) -> list[dict]:
        chance = random.Random(self.seed)
        return [self._grade(row, chance) for row in rows]

    def grade(self, row: dict) -> dict:
        return self._grade(row, random.Random(self.seed))

    def _grade(self, row: dict, chance: random.Random) -> dict:
        answers = row["answers"]
        if choices := row["meta"].get("choices"):
            options = {chr(ord("A") + i): text for i, text in enumerate(choices)}
            chosen = read_option(row["prediction"], options, chance=chance)
            return {"score": float(chosen in answers), "parsed": chosen}
        meant = read_open(row["prediction"])
        return {"score": float(match_open(meant, answers)), "parsed": sorted(map(str, meant))}

    def groups(self, row: dict) -> list[str]:
        subject = str(row.get("type") or "")
        domain = [name for name, subjects in DOMAINS.items() if subject in subjects]
        return [*super().groups(row), *domain, "multiple-choice" if row["meta"].get("choices") else "open"]

    def official(self, rows: Sequence[dict]) -> dict[str, str]:
        """Return the input of `main_eval_only.py`: letters for multiple-choice questions, text for open ones."""
        graded = zip(rows, self.score(rows))
        return {r["question_id"]: g["parsed"] if r["meta"].get("choices") else r["prediction"] for r, g in graded}
