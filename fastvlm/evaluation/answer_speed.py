"""How fast answers come, one question at a time: first token, further tokens, a second question about an image."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fastvlm.evaluation.questions import Question
from fastvlm.inference.clock import Clock
from fastvlm.inference.engine import Engine
from fastvlm.inference.levers import count_bytes

OPENING = "what is in the image?"
STORE = 1 << 28


def answer_speed(
    engine: Engine, questions: Sequence[Question], *, second: bool = False, tokens: int = 32, repeats: int = 5
) -> dict[str, float]:
    """`test/speed/...`: `ttft_ms` and its two terms `image_ms` and `prefill_ms`, `tokens_per_second` of an answer's
    further tokens, `weights_mib`. Medians over questions and repeats; reading and resizing the file is not counted.

    Seconds are those this process computed where the model runs on one thread of a CPU, so that others on the machine
    are mostly left out; else wall time.

    Args:
        second: each question comes after another one about the same image, which the engine remembers.
        tokens: length of every answer.
    """
    image, prefill, speed = [], [], []
    with engine.measured(Clock.steady(engine.device), store_bytes=STORE if second else 0):
        for question in questions:
            for turn in range(repeats + 1):
                engine.images.clear()
                engine.prefixes.clear()
                if second:
                    engine.generate([opening(question)], [question.images], max_new_tokens=1)
                (answer,) = engine.generate([question.prompt], [question.images], max_new_tokens=tokens)
                if turn:  # the first of each warms up
                    image.append(answer.image_seconds * 1e3)
                    prefill.append(answer.prefill_seconds * 1e3)
                    speed.append(answer.tokens_per_second)
    both = [a + b for a, b in zip(image, prefill)]
    return {
        "test/speed/ttft_ms": median(both),
        "test/speed/image_ms": median(image),
        "test/speed/prefill_ms": median(prefill),
        "test/speed/tokens_per_second": median(speed),
        "test/speed/weights_mib": count_bytes(engine.model) / 2**20,
    }


def opening(question: Question) -> dict:
    """Another question about the same image, with the image where this question has it."""
    first, *_ = question.messages
    parts = first["content"] if isinstance(first["content"], list) else [{"type": "text", "text": first["content"]}]
    asked = [part if part["type"] == "image" else {"type": "text", "text": OPENING} for part in parts]
    return {"messages": [first | {"content": asked}]}
