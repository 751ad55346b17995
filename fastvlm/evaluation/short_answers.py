"""Short-answer questions about images: exact match, compared with no image and with the wrong image."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvlm.data.conversation import without_images
from fastvlm.data.index import no_shards
from fastvlm.data.shards import ShardReader
from fastvlm.data.source import Source
from fastvlm.data.source_index import SourceIndex
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.likelihood import answer_nll, text_perplexity
from fastvlm.evaluation.metrics import exact_match
from fastvlm.evaluation.questions import (
    Question,
    count_majorities,
    encode_once,
    plain_text,
    read_questions,
    swap_partners,
)
from fastvlm.evaluation.tables import collect_metrics, make_table, render_markdown, render_text
from fastvlm.inference.engine import Engine
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer

CONDITIONS = ("real", "removed", "swapped")


def evaluate_answers(
    engine: Engine,
    questions: Sequence[Question],
    visual: Sequence[Sequence[Tensor]] | None = None,
    *,
    majorities: dict[str, str] | None = None,
    formed: Sequence[str] = (),
    batch_size: int = 128,
    max_new_tokens: int = 16,
) -> dict:
    """Answer greedily with the real images, with none and with another question's; score the references' likelihood.

    Args:
        visual: visual tokens (T, D) of every question's images; None encodes them.
        majorities: the most frequent training answer per type, as a baseline that always gives it; None skips it.
        formed: question types whose mean is also reported on its own.

    Returns:
        `metrics` (flat, `test/...`), `table` (a row per type, then the means; None where a baseline is undefined, e.g.
        without an image for questions that have none) and `predictions` (a row per question).

    Raises:
        ValueError: there are no questions, or no question has a type named in `formed`.
    """
    if not questions:
        raise ValueError("there is no question to evaluate: is the split empty, or limit 0?")
    if unknown := sorted(set(formed) - {q.type for q in questions}):
        have = ", ".join(sorted({q.type for q in questions}))
        raise ValueError(f"task.formed names {unknown[0]}, but the questions are of the types {have}")
    partners = swap_partners(questions)
    visual = encode_once(engine, questions) if visual is None else visual
    seen = {
        "real": visual,
        "removed": [[] for _ in visual],
        "swapped": [visual[partner] if partner is not None else None for partner in partners],
    }
    asked = {
        "real": range(len(questions)),
        "removed": [i for i, q in enumerate(questions) if q.files],
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
                tokens_per_view=engine.tokens_per_image,
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


class ShortAnswers:
    """The task: held-out questions, and held-out text to measure what training on images costs on text.

    Args:
        sources: sources of questions by name.
        text: source of documents for the perplexity; None skips it.
        split: split of questions and text. Majority answers come from `train`.
        limit: number of questions per type and source; None takes all.
        formed: question types whose mean is reported besides the mean of all.
        batch_size: questions answered or scored at once.
        max_new_tokens: limit on the length of an answer.
        text_window: maximum number of tokens of context of a scored token.
        text_limit: number of documents; None takes all.
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

    def run(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        transform: ImageTransform | None = None,
        device: str | torch.device = "cpu",
        out: str | Path | None = None,
    ) -> dict:
        """Evaluate a model; the result can be serialised as JSON.

        Args:
            image_size: side of a view in pixels, as in the last training stage.
            transform: turns an image file into views, as in the last training stage; None pads to squares.
            out: folder for `predictions/short_answers.jsonl` (a line per question) and `short_answers.md`.

        Returns:
            `metrics`, `table` and `predictions` of `evaluate_answers`, and `text_perplexity`: {"after": ...}. With
            `out` also `examples`, predictions whose image is saved.
        """
        engine = Engine(model, tokenizer, image_size=image_size, transform=transform, device=device)
        questions: list[Question] = []
        majorities: dict[str, str] = {}
        for name, source in self.sources.items():
            index = source.load(self.split, tokenizer)
            rows, _ = source.select(index)
            options = {"limit": self.limit, "transform": engine.transform, "rows": rows, "edit": source.edit}
            questions += read_questions(index, source=name, **options)
            if source.has_split("train"):
                index = source.load("train", tokenizer)
                majorities |= count_majorities(index, source=name, rows=source.select(index)[0])
        visual = encode_once(engine, questions)
        result = evaluate_answers(
            engine,
            questions,
            visual,
            majorities=majorities,
            formed=self.formed,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        if self.text is not None:
            result["metrics"] |= self.score_text(engine.model, tokenizer)
            result["text_perplexity"] = {"after": result["metrics"]["test/text_perplexity"]}
        result["metrics"] |= self.measure(engine, questions, visual)
        if out is not None:
            lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in result["predictions"])
            (Path(out) / "predictions").mkdir(parents=True, exist_ok=True)
            result["examples"] = save_examples(result["predictions"], questions, folder=Path(out))
            (Path(out) / "predictions" / "short_answers.jsonl").write_text(lines, encoding="utf-8")
            (Path(out) / "short_answers.md").write_text(render_markdown(result), encoding="utf-8")
        return result

    def require_shards(self) -> None:
        """Check that every source has shards of the split; majority answers do without those of train.

        Raises:
            ValueError: one has none.
        """
        for key, source in self.named_sources().items():
            if not source.has_split(self.split):
                raise ValueError(f"task.{key}: {no_shards(source.path, self.split, source.shards)}")

    def named_sources(self) -> dict[str, Source]:
        """Return every source of which the split is read, by its key."""
        text = {} if self.text is None else {"text": self.text}
        return {f"sources.{name}": source for name, source in self.sources.items()} | text

    def measure(
        self, engine: Engine, questions: Sequence[Question], visual: Sequence[Sequence[Tensor]]
    ) -> dict[str, float]:
        """Return further metrics; for subclasses.

        Args:
            visual: visual tokens (T, D) of every question's images.
        """
        return {}

    def render(self, result: dict) -> str:
        """Return the result as a table for the terminal."""
        return render_text(result)

    def score_text(self, model: VLM, tokenizer: Tokenizer) -> dict[str, float]:
        """Return perplexity and bits per byte of the held-out text; also used on models before their image stages.

        Raises:
            ValueError: the task has no text source.
        """
        if self.text is None:
            raise ValueError("task.text names no source, so there is no held-out text to score")
        index = self.text.load(self.split, tokenizer)
        rows, _ = self.text.select(index)
        texts = read_texts(index, rows=rows[: self.text_limit])
        score = text_perplexity(model, tokenizer, texts, window=self.text_window)
        return {
            "test/text_perplexity": score["perplexity"],
            "test/text_bits_per_byte": score["bits_per_byte"],
            "test/text_tokens": float(score["num_tokens"]),
        }


def save_examples(predictions: list[dict], questions: Sequence[Question], *, folder: Path) -> list[dict]:
    """Select one right and one wrong answer of each type, and save their first image as a PNG (`image` is its path)."""
    chosen: dict[tuple[str, bool], dict] = {}
    for prediction, question in zip(predictions, questions, strict=True):
        key = (prediction["type"], bool(prediction["correct"]))
        if key in chosen or not question.files:
            continue
        # Keys are only unique within a source, and two of them may differ in what a file name cannot hold.
        name = re.sub(r"[^\w.-]+", "-", f"{question.source}-{question.key}")
        path = Path("predictions") / f"{name}-{len(chosen)}.png"
        Image.fromarray(question.images[0][0].permute(1, 2, 0).numpy()).save(folder / path)
        chosen[key] = prediction | {"image": path.as_posix()}
    return [chosen[key] for key in sorted(chosen)]


def read_texts(index: SourceIndex, *, rows: np.ndarray) -> list[str]:
    """Return the documents in these rows of a text source, in order.

    Raises:
        ValueError: a record is not a text-only document.
    """
    reader, texts = ShardReader(), []
    for row in rows:
        raw = index.read(int(row), reader)
        if "document" not in raw.record or raw.images:
            raise ValueError(f"{index.folder}: {raw.key} is not a document of text alone, so it has no text perplexity")
        texts.append(plain_text(raw.record["document"]))
    reader.close()
    return texts


def _answer_all(
    engine: Engine, prompts: Sequence[dict], visual: Sequence[Sequence[Tensor]], *, batch_size: int, max_new_tokens: int
) -> list[tuple[str, int]]:
    """Return text and token count of the greedy answer to every prompt; batches prompts of similar length."""
    lengths = [
        len(engine.encode_prompt(prompt, slots=[len(image) for image in images], max_new_tokens=max_new_tokens))
        for prompt, images in zip(prompts, visual)
    ]
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
