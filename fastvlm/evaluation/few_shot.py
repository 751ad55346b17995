"""Few-shot scoring: likelihood of answers after solved examples, and whether greedy decoding produces them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from fastvlm.data.conversation import encode_record
from fastvlm.data.source import shuffled
from fastvlm.evaluation.likelihood import token_scores
from fastvlm.evaluation.prompts import Prompt
from fastvlm.evaluation.questions import Question
from fastvlm.inference.engine import Engine
from fastvlm.tokens import IGNORE_INDEX


def draw_examples(questions: Sequence[Question], *, count: int) -> list[list[int]]:
    """Draw `count` examples for every question: indices of other questions of its type and source.

    All have different images from the question and from each other. The draw depends only on the question's source and
    key, and the first k of them are those of `count=k`.

    Raises:
        ValueError: a type has too few questions about different images.
    """
    same: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        same[question.source, question.type].append(place)
    drawn = []
    for place, question in enumerate(questions):
        others, seen, found = same[question.source, question.type], set(question.image_ids), []
        for other in (others[i] for i in shuffled(len(others), "shots", question.source, question.key)):
            if len(found) == count:
                break
            shown = questions[other].image_ids
            if other != place and seen.isdisjoint(shown):
                found.append(other)
                seen.update(shown)
        if len(found) < count:
            raise ValueError(
                f"task.shots={count}: of type {question.type} there are {len(found)} questions about other images than "
                f"that of {question.key}; raise task.limit or lower task.shots"
            )
        drawn.append(found)
    return drawn


def score_after(
    engine: Engine,
    questions: Sequence[Question],
    examples: Sequence[Sequence[int]],
    visual: Sequence[Sequence[Tensor]],
    *,
    prompt: Prompt,
    batch_size: int = 128,
) -> list[tuple[float, int, bool]]:
    """Return (nats, tokens, right) of every question's answer, including the tokens that end it.

    `right` means that greedy decoding chooses each of these tokens, so that it would generate the answer.

    Args:
        examples: for every question, indices of those that precede it with their images and answers.
        visual: visual tokens (T, D) of every question's images.

    Raises:
        ValueError: a prompt with its answer is too long for the model.
    """
    rows, shown = [], []
    limit = engine.model.llm.max_positions + 1  # the last token is predicted, but not an input
    for question, before in zip(questions, examples, strict=True):
        asked = prompt.ask(question.answered, [questions[place].answered for place in before])
        images = [image for place in before for image in visual[place]] + list(visual[len(rows)])
        slots = [len(image) for image in images]
        answered = prompt.answer(asked, question.answer)
        # prompt=True leaves out the end of the document, which is not part of the answer.
        whole = encode_record(answered, engine.tokenizer, tokens_per_image=slots, prompt="document" in answered)
        known = len(encode_record(asked, engine.tokenizer, tokens_per_image=slots, prompt=True).input_ids)
        if len(whole.input_ids) > limit:
            raise ValueError(
                f"task.shots={len(before)}: {question.key} takes {len(whole.input_ids)} tokens, {sum(slots)} of them "
                f"of images, but the model ends at {limit - 1}: fewer shots or fewer tokens an image fit"
            )
        rows.append((whole.input_ids, [IGNORE_INDEX] * known + whole.labels[known:]))
        shown.append(images)
    scores = token_scores(
        engine.model,
        engine.tokenizer,
        rows,
        shown,
        tokens_per_view=engine.tokens_per_image,
        batch_size=batch_size,
    )
    return [(float(nll.sum()), len(nll), bool(best.all())) for nll, best in scores]
