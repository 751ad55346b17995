"""VQA accuracy: VQAv2, OK-VQA and VizWiz by the official code, TextVQA by EvalAI's.

Sources: GT-Vision-Lab/VQA@a013f004 `PythonEvaluationTools/vqaEvaluation/vqaEval.py`; for EvalAI's form
facebookresearch/mmf `mmf/utils/m4c_evaluators.py` and LLaVA's copy `llava/eval/m4c_evaluator.py`. OK-VQA is scored by
the same code over stemmed answers, VizWiz by it over its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from fastvlm.evaluation.protocol import Protocol

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
# The typo `(?!<=` for `(?<!` is the official one: a period goes unless a digit follows, whatever stands before it ...
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
# ... and re.UNICODE stands where `count` does: only so many go.
MAX_PERIODS = 32
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# A form that lacks one of its apostrophes is given it back. Forms with a capital are never met: words are lower case.
WHOLE_WORDS = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've "
    "must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're "
    "you've"
)
WHOLE = WHOLE_WORDS.split()
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in WHOLE for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, officially


def strip_punctuation(text: str) -> str:
    """A mark is deleted where it stands beside a space anywhere in the text or a comma between digits occurs, else it
    becomes a space."""
    out = text
    everywhere = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if everywhere or beside_space else " ")
    return PERIOD.sub("", out, count=MAX_PERIODS)


def normalise_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def trim(text: str) -> str:
    """Line breaks and tabs as spaces, no outer space: what is done to an answer in any case."""
    return text.replace("\n", " ").replace("\t", " ").strip()


# Ten annotators a question mostly say the same few thousand things.
@lru_cache(1 << 16)
def normalise_official(text: str) -> str:
    """The form in which VQAv2's scorer compares answers that are not unanimous."""
    return normalise_words(strip_punctuation(trim(text)))


@lru_cache(1 << 16)
def normalise_evalai(text: str) -> str:
    """The form in which TextVQA's scorer compares all answers: commas, question marks and 's go first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(trim(text)))


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the others / 3)."""
    matches = sum(answer == prediction for answer in answers)
    shares = [min(1, float(matches - (answer == prediction)) / 3) for answer in answers]
    return float(sum(shares)) / len(shares)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer. Unanimous annotators are compared as they are, but for outer space."""
    answers, prediction = [trim(answer) for answer in answers], trim(prediction)
    if len(set(answers)) > 1:
        answers, prediction = [normalise_official(a) for a in answers], normalise_official(prediction)
    return leave_one_out(prediction, answers)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy of one answer: always normalised."""
    return leave_one_out(normalise_evalai(prediction), [normalise_evalai(answer) for answer in answers])


class VQAAccuracy(Protocol):
    """Ten annotators, leave one out.

    Args:
        normalisation: official (VQAv2, OK-VQA, VizWiz) or evalai (TextVQA).
        by: what the breakdown goes by besides the type: `answer_type` or `question_type` of the meta.
        named_by: the key of the official result file that names a question: question_id, or VizWiz's image.
    """

    metric = "vqa_accuracy"

    def __init__(self, *, normalisation: str = "official", by: Sequence[str] = (), named_by: str = "question_id"):
        scorers = {"official": vqa_accuracy, "evalai": evalai_accuracy}
        if normalisation not in scorers:
            raise ValueError(f"protocol.normalisation={normalisation} is none of official, evalai")
        self.accuracy, self.by, self.named_by = scorers[normalisation], tuple(by), named_by

    def grade(self, row: dict) -> dict:
        return {"score": self.accuracy(row["prediction"], row["answers"])}

    def groups(self, row: dict) -> list[str]:
        more = [f"{key}: {row['meta'][key]}" for key in self.by if row["meta"].get(key) is not None]
        return [*super().groups(row), *more]

    def official(self, rows: Sequence[dict]) -> list[dict]:
        return [{self.named_by: row["question_id"], "answer": row["prediction"]} for row in rows]
