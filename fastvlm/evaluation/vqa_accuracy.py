"""VQA accuracy: VQAv2 and OK-VQA as in the official code, TextVQA as in EvalAI's, VizWiz as in its own script.

Sources: GT-Vision-Lab/VQA@a013f004 `PythonEvaluationTools/vqaEvaluation/vqaEval.py`; for EvalAI's variant
facebookresearch/mmf `mmf/utils/m4c_evaluators.py` and LLaVA's copy `llava/eval/m4c_evaluator.py`. OK-VQA uses the
official code with stemmed answers. VizWiz's script (Q. Li, vizwiz.org) always normalises the prediction, and never the
annotators' answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from fastvlm.evaluation.predictions import question_name
from fastvlm.evaluation.protocol import Protocol, mean

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
# The typo `(?!<=` for `(?<!` is the official code's: a period goes unless a digit follows, whatever precedes it ...
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
# ... and it passes re.UNICODE (32) as `count`, so at most 32 periods are removed.
MAX_PERIODS = 32
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# Contractions that lack one of their apostrophes get it back. Only lower-case forms are needed: words are lower case.
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
CONTRACTIONS["somebody'd"] = "somebodyd"  # reversed in the official code


def strip_punctuation(text: str) -> str:
    """Remove punctuation as the official code does.

    A mark is deleted everywhere if it is next to a space somewhere in the text, or if the text has a comma between
    digits; otherwise it becomes a space.
    """
    out = text
    everywhere = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if everywhere or beside_space else " ")
    return PERIOD.sub("", out, count=MAX_PERIODS)


def normalise_words(text: str) -> str:
    """Convert to lower case and number words to digits, drop articles, restore the apostrophes of contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def trim(text: str) -> str:
    """Replace line breaks and tabs by spaces and strip; applied to every answer."""
    return text.replace("\n", " ").replace("\t", " ").strip()


# Most of the ten annotators' answers per question are among the same few thousand texts.
@lru_cache(1 << 16)
def normalise_official(text: str) -> str:
    """Normalise an answer as VQAv2's scorer does if the annotators are not unanimous."""
    return normalise_words(strip_punctuation(trim(text)))


@lru_cache(1 << 16)
def normalise_evalai(text: str) -> str:
    """Normalise an answer as TextVQA's scorer always does: first removes commas and question marks, splits off 's."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(trim(text)))


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, matches among the others / 3)."""
    matches = sum(answer == prediction for answer in answers)
    shares = [min(1, float(matches - (answer == prediction)) / 3) for answer in answers]
    return float(sum(shares)) / len(shares)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return VQAv2's accuracy of one answer; if annotators are unanimous, texts are only trimmed, not normalised."""
    answers, prediction = [trim(answer) for answer in answers], trim(prediction)
    if len(set(answers)) > 1:
        answers, prediction = [normalise_official(a) for a in answers], normalise_official(prediction)
    return leave_one_out(prediction, answers)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return TextVQA's accuracy of one answer; texts are always normalised."""
    return leave_one_out(normalise_evalai(prediction), [normalise_evalai(answer) for answer in answers])


def processed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return VQAv2's accuracy of an answer that has been normalised as EvalAI does, as LLaVA and lmms-eval score it.

    The official code alone gives "Yes" nothing where all ten annotators wrote "yes".
    """
    return vqa_accuracy(normalise_evalai(prediction), answers)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return VizWiz's accuracy of one answer: only the prediction is normalised."""
    return leave_one_out(normalise_official(prediction), answers)


class VQAAccuracy(Protocol):
    """Accuracy against ten annotators, leaving one out at a time.

    With `official`, `vqa_accuracy_processed` is the score of predictions that are normalised first, as LLaVA and
    lmms-eval do. Where shards hold OK-VQA's `raw_answers`, `vqa_accuracy_raw` is that score against them: its
    references are stems, which an answer in plain words often is not.

    Args:
        normalisation: official (VQAv2, OK-VQA), evalai (TextVQA) or vizwiz.
        by: keys of `meta` for the breakdown besides the type: `answer_type`, `question_type`.
        named_by: key of the question in the official result file: question_id, or image (the file's name) for VizWiz.

    Raises:
        ValueError: an unknown normalisation.
    """

    metric = "vqa_accuracy"

    def __init__(self, *, normalisation: str = "official", by: Sequence[str] = (), named_by: str = "question_id"):
        scorers = {"official": vqa_accuracy, "evalai": evalai_accuracy, "vizwiz": vizwiz_accuracy}
        if normalisation not in scorers:
            raise ValueError(f"protocol.normalisation={normalisation} is not one of {', '.join(scorers)}")
        self.accuracy, self.by, self.named_by = scorers[normalisation], tuple(by), named_by

    def grade(self, row: dict) -> dict:
        return {"score": self.accuracy(row["prediction"], row["answers"])}

    def groups(self, row: dict) -> list[str]:
        more = [f"{key}: {row['meta'][key]}" for key in self.by if row["meta"].get(key) is not None]
        return [*super().groups(row), *more]

    def summarise(self, rows: Sequence[dict]) -> dict[str, float]:
        if self.accuracy is not vqa_accuracy:
            return {}
        figures = {"processed": [(row["prediction"], row["answers"]) for row in rows]}
        if all(row["meta"].get("raw_answers") for row in rows):
            figures["raw"] = [(row["prediction"], row["meta"]["raw_answers"]) for row in rows]
        return {
            f"{self.metric}_{name}": mean([processed_accuracy(said, answers) for said, answers in pairs])
            for name, pairs in figures.items()
        }

    def official(self, rows: Sequence[dict]) -> list[dict]:
        named = [question_name(row, "image") if self.named_by == "image" else row["question_id"] for row in rows]
        return [{self.named_by: name, "answer": row["prediction"]} for name, row in zip(named, rows, strict=True)]
