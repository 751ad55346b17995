"""Time to the first token of an answer, as the engine measures it, one question at a time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fastvlm.evaluation.questions import Question
from fastvlm.inference.engine import Engine


def first_token_ms(engine: Engine, questions: Sequence[Question], *, repeats: int = 3) -> dict[str, float]:
    """`test/ttft_ms` and its two terms, `image` (encoder, resampler, projector) and `prefill`: medians, milliseconds.

    Each question is asked alone (batch 1), once unmeasured and then `repeats` times; reading and resizing the file is
    not counted, the words of the prompt are.
    """
    image, prefill = [], []
    for question in questions:
        for turn in range(repeats + 1):
            (answer,) = engine.generate([question.prompt], [question.images], max_new_tokens=1)
            if turn:
                image.append(answer.image_seconds * 1e3)
                prefill.append(answer.prefill_seconds * 1e3)
    if not image:
        return {}
    both = [a + b for a, b in zip(image, prefill)]
    return {"test/ttft_ms": median(both), "test/ttft_ms/image": median(image), "test/ttft_ms/prefill": median(prefill)}
