"""Short-answer questions about images: exact match beside what a model without (the right) image would reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlm.data.index import load_index
from fastvlm.data.shards import ShardReader
from fastvlm.data.source import Source
from fastvlm.evaluation.likelihood import answer_nll, text_perplexity
from fastvlm.evaluation.metrics import (
    accuracy,
    bootstrap_interval,
    exact_match,
    mean_answer_length,
    wilson_interval,
)
from fastvlm.evaluation.questions import (
    Question,
    count_majorities,
    plain_text,
    read_questions,
    swap_partners,
    without_images,
)
from fastvlm.inference.engine import Engine
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer

CONDITIONS = ("real", "removed", "swapped")


def evaluate_answers(
    engine: Engine,
    questions: Sequence[Question],
    *,
    majorities: dict[str, str] | None = None,
    formed: Sequence[str] = (),
    batch_size: int = 128,
    max_new_tokens: int = 16,
) -> dict:
    """Greedy answers with the real images, with none, and with another question's; likelihood of the references.

    Args:
        majorities: the most frequent training answer to each type, scored as if it were always given.
        formed: types whose mean is reported on its own.

    Returns:
        `metrics` (flat, `test/...`), `table` (a row a type, then the means) and `predictions` (a row a question); None
        where a baseline is not defined (a question without an image has nothing to remove).

    Raises:
        ValueError: no questions, or a type in `formed` that none of them has.
    """
    if not questions:
        raise ValueError("there is no question to evaluate: is the split empty, or limit 0?")
    if unknown := sorted(set(formed) - {q.type for q in questions}):
        have = ", ".join(sorted({q.type for q in questions}))
        raise ValueError(f"task.formed names {unknown[0]}, but the questions are of the types {have}")
    partners = swap_partners(questions)
    visual = _encode_once(engine, questions)
    seen = {
        "real": visual,
        "removed": [tokens[:0] for tokens in visual],
        "swapped": [visual[partner] if partner is not None else None for partner in partners],
    }
    asked = {
        "real": range(len(questions)),
        "removed": [i for i, q in enumerate(questions) if q.images],
        "swapped": [i for i, partner in enumerate(partners) if partner is not None],
    }
    predictions = [_describe(question, engine.tokenizer) for question in questions]
    for condition in CONDITIONS:
        chosen = asked[condition]
        prompts = [
            without_images(questions[i].prompt) if condition == "removed" else questions[i].prompt for i in chosen
        ]
        shown = [seen[condition][i] for i in chosen]
        answers = _answer_all(engine, prompts, shown, batch_size=batch_size, max_new_tokens=max_new_tokens)
        suffix = "" if condition == "real" else f"_{condition}"
        for i, (text, length) in zip(chosen, answers):
            predictions[i][f"prediction{suffix}"] = text
            predictions[i][f"correct{suffix}"] = exact_match(text, questions[i].answer)
            if condition == "real":
                predictions[i]["prediction_tokens"] = length
        if condition != "removed":
            nll = answer_nll(
                engine.model,
                engine.tokenizer,
                [questions[i].answered for i in chosen],
                shown,
                tokens_per_image=engine.tokens_per_image,
                batch_size=batch_size,
            )
            for i, (nats, num_tokens) in zip(chosen, nll):
                predictions[i][f"nats{suffix}"] = nats
                predictions[i]["scored_tokens"] = num_tokens
    for i, prediction in enumerate(predictions):
        if partners[i] is not None:
            prediction["swapped_with"] = questions[partners[i]].key
        if majorities is not None and (majority := majorities.get(prediction["type"])) is not None:
            prediction["correct_majority"] = exact_match(majority, prediction["reference"])
    table = make_table(predictions, formed=formed)
    return {"metrics": collect_metrics(table, predictions), "table": table, "predictions": predictions}


def make_table(predictions: Sequence[dict], *, formed: Sequence[str] = ()) -> list[dict]:
    """A row a question type in alphabetical order, then the mean of `formed` and of all types (types weigh the same).

    Intervals (95 %) are Wilson's for a type, and resampled within the types for a mean.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction["type"]].append(prediction)
    rows = []
    for kind in sorted(groups):
        group = groups[kind]
        correct = [p["correct"] for p in group]
        low, high = wilson_interval(sum(correct), len(correct))
        rows.append(
            {
                "type": kind,
                "mean": False,
                "n": len(group),
                "exact_match": accuracy(correct),
                "low": low,
                "high": high,
                "removed": _share(group, "correct_removed"),
                "swapped": _share(group, "correct_swapped"),
                "majority": _share(group, "correct_majority"),
                "nll": _nll(group, "nats"),
                "nll_swapped": _nll(group, "nats_swapped"),
            }
        )
    by_type = {row["type"]: row for row in rows}
    means = [(f"mean of {len(formed)}: {', '.join(formed)}", list(formed))] if formed else []
    for name, kinds in [*means, (f"mean of all {len(rows)}", sorted(groups))]:
        members = [p for kind in kinds for p in groups[kind]]
        low, high = bootstrap_interval([[p["correct"] for p in groups[kind]] for kind in kinds])
        rows.append(
            {
                "type": name,
                "mean": True,
                "n": len(members),
                **{
                    column: _mean([by_type[kind][column] for kind in kinds])
                    for column in ("exact_match", "removed", "swapped", "majority")
                },
                "low": low,
                "high": high,
                "nll": _nll(members, "nats"),
                "nll_swapped": _nll(members, "nats_swapped"),
            }
        )
    return rows


def collect_metrics(table: Sequence[dict], predictions: Sequence[dict]) -> dict[str, float]:
    """The flat figures of a result, `test/<metric>[_<condition>]/<type, formed or mean>`; what is undefined is left out.

    NLL is in nats per token over all reference tokens (their end included); lengths are in tokens.
    """
    metrics: dict[str, float | None] = {}
    for row in table:
        name = row["type"] if not row["mean"] else "mean" if row is table[-1] else "formed"
        metrics[f"test/exact_match/{name}"] = row["exact_match"]
        for condition in ("removed", "swapped", "majority"):
            metrics[f"test/exact_match_{condition}/{name}"] = row[condition]
    metrics["test/answer_nll"] = table[-1]["nll"]
    metrics["test/answer_nll_swapped"] = table[-1]["nll_swapped"]
    # On the questions that have both: a question without an image would count on one side only.
    both = [p for p in predictions if "nats_swapped" in p]
    metrics["test/answer_nll_gap"] = _nll(both, "nats_swapped") - _nll(both, "nats") if both else None
    metrics["test/answer_length"] = mean_answer_length([p["prediction_tokens"] for p in predictions])
    metrics["test/answer_length_reference"] = mean_answer_length([p["reference_tokens"] for p in predictions])
    metrics["test/num_questions"] = len(predictions)
    return {name: float(value) for name, value in metrics.items() if value is not None}


class ShortAnswers:
    """The task: questions from the sources' held-out split, and held-out text to see what the images cost the words.

    Args:
        sources: sources of questions by name.
        text: source of documents for the perplexity; None leaves it out.
        split: where questions and text come from. Majority answers come from `train`.
        limit: questions of each type and source; None takes all.
        formed: types whose mean is reported beside the mean of all.
        max_new_tokens: bound of an answer.
        text_window: tokens a scored token may see before it, at most.
        text_limit: documents; None takes all.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        *,
        text: Source | None = None,
        split: str = "test",
        limit: int | None = 100,
        formed: Sequence[str] = (),
        batch_size: int = 128,
        max_new_tokens: int = 16,
        text_window: int = 256,
        text_limit: int | None = None,
    ):
        self.sources, self.text, self.split, self.limit = sources, text, split, limit
        self.formed, self.batch_size, self.max_new_tokens = tuple(formed), batch_size, max_new_tokens
        self.text_window, self.text_limit = text_window, text_limit

    def run(self, model: VLM, tokenizer: Tokenizer, *, image_size: int, device: str | torch.device = "cpu") -> dict:
        """Evaluate; the result can be written as JSON: `metrics`, `table`, `predictions`."""
        engine = Engine(model, tokenizer, image_size=image_size, device=device)
        questions: list[Question] = []
        majorities: dict[str, str] = {}
        for name, source in self.sources.items():
            index = load_index(source.path, self.split, tokenizer)
            questions += read_questions(index, source=name, limit=self.limit, image_size=image_size)
            if any(source.path.glob("train-*.tar")):
                majorities |= count_majorities(load_index(source.path, "train", tokenizer), source=name)
        result = evaluate_answers(
            engine,
            questions,
            majorities=majorities,
            formed=self.formed,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        if self.text is not None:
            result["metrics"] |= self.score_text(engine.model, tokenizer)
        return result

    def score_text(self, model: VLM, tokenizer: Tokenizer) -> dict[str, float]:
        """Perplexity and bits per byte of the held-out text, also for a language model before its image stages.

        Raises:
            ValueError: the task has no text source.
        """
        if self.text is None:
            raise ValueError("task.text names no source, so there is no held-out text to score")
        texts = read_texts(load_index(self.text.path, self.split, tokenizer), limit=self.text_limit)
        score = text_perplexity(model, tokenizer, texts, window=self.text_window)
        return {
            "test/text_perplexity": score["perplexity"],
            "test/text_bits_per_byte": score["bits_per_byte"],
            "test/text_tokens": float(score["num_tokens"]),
        }


def read_texts(index, *, limit: int | None = None) -> list[str]:
    """The documents of a text source, in order.

    Raises:
        ValueError: a record is not a document of text alone.
    """
    reader, texts = ShardReader(), []
    for row in range(index.num_samples)[:limit]:
        raw = index.read(row, reader)
        if "document" not in raw.record or raw.images:
            raise ValueError(f"{index.folder}: {raw.key} is not a document of text alone, so it has no text perplexity")
        texts.append(plain_text(raw.record["document"]))
    reader.close()
    return texts


def _encode_once(engine: Engine, questions: Sequence[Question]) -> list[Tensor]:
    """Visual tokens (images, M, D) of every question; an image several questions ask about is encoded once."""
    images = {name: image for q in questions for name, image in zip(q.image_ids, q.images)}
    position = {name: i for i, name in enumerate(images)}
    encoded = engine.encode_images(list(images.values()))
    return [encoded[[position[name] for name in q.image_ids]] for q in questions]


def _answer_all(
    engine: Engine, prompts: Sequence[dict], visual: Sequence[Tensor], *, batch_size: int, max_new_tokens: int
) -> list[tuple[str, int]]:
    """(text, tokens) of the greedy answer to every prompt; prompts of like length share a batch."""
    lengths = [len(engine.encode_prompt(p, num_images=len(v))) for p, v in zip(prompts, visual)]
    by_length = sorted(range(len(prompts)), key=lengths.__getitem__)
    answers: list[tuple[str, int]] = [("", 0)] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        generations = engine.generate_from_visual(
            [prompts[i] for i in chosen], [visual[i] for i in chosen], max_new_tokens=max_new_tokens
        )
        for i, generation in zip(chosen, generations):
            answers[i] = generation.text, len(generation.token_ids)
    return answers


def _describe(question: Question, tokenizer: Tokenizer) -> dict:
    return {
        "key": question.key,
        "source": question.source,
        "type": question.type,
        "prompt": question.text,
        "reference": question.answer,
        "reference_tokens": len(tokenizer.encode_text(question.answer)),
    }


def _share(predictions: Sequence[dict], column: str) -> float | None:
    values = [p[column] for p in predictions if column in p]
    return accuracy(values) if values else None


def _nll(predictions: Sequence[dict], column: str) -> float | None:
    """Nats per token: summed over all tokens first, divided once."""
    scored = [p for p in predictions if column in p]
    return sum(p[column] for p in scored) / sum(p["scored_tokens"] for p in scored) if scored else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
