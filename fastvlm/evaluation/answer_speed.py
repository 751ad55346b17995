"""Answer speed, one question at a time: first token, further tokens, a second question about an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from fastvlm.evaluation.questions import Question
from fastvlm.inference.clock import Clock
from fastvlm.inference.engine import Engine, Generation
from fastvlm.inference.levers import count_bytes

OPENING = "what is in the image?"
STORE = 1 << 28


def first_token_ms(engine: Engine, questions: Sequence[Question], *, repeats: int = 3) -> dict[str, float]:
    """Measure `test/ttft_ms` and its terms `image` (encoder, resampler, projector) and `prefill`, medians in ms.

    Times are wall times; on a CPU with a single thread they are CPU times of that thread, which other load on the
    machine hardly affects. Each question is asked alone (batch 1), once to warm up and then `repeats` times. Reading
    and resizing the image file is not included; `prefill` covers the whole prompt, text and image.
    """
    if not questions:
        return {}
    with engine.measured(Clock.steady(engine.device)):
        image, prefill, _ = ask_alone(engine, questions, tokens=1, repeats=repeats)
    both = [a + b for a, b in zip(image, prefill)]
    return {"test/ttft_ms": median(both), "test/ttft_ms/image": median(image), "test/ttft_ms/prefill": median(prefill)}


def answer_speed(
    engine: Engine, questions: Sequence[Question], *, second: bool = False, tokens: int = 32, repeats: int = 5
) -> dict[str, float]:
    """Measure `test/speed/...`: `ttft_ms` and its terms `image_ms` and `prefill_ms`, `tokens_per_second` after the
    first token, and `weights_mib`.

    Values are medians over questions and repeats, without reading and resizing the image file. On a CPU, times are CPU
    times on one thread, however many the process may use, which other load hardly affects; on a GPU, wall times.

    Args:
        second: ask another question about the same image first, with the engine's stores enabled.
        tokens: length of every answer.

    Raises:
        ValueError: there is no question.
    """
    if not questions:
        raise ValueError("task.sources: its first source has no question with an image, whose answer could be timed")
    with one_thread(engine.device), engine.measured(Clock.steady(engine.device), store_bytes=STORE if second else 0):
        image, prefill, speed = ask_alone(engine, questions, tokens=tokens, repeats=repeats, second=second)
    both = [a + b for a, b in zip(image, prefill)]
    return {
        "test/speed/ttft_ms": median(both),
        "test/speed/image_ms": median(image),
        "test/speed/prefill_ms": median(prefill),
        "test/speed/tokens_per_second": median(speed),
        "test/speed/weights_mib": count_bytes(engine.model) / 2**20,
    }


def ask_alone(
    engine: Engine, questions: Sequence[Question], *, tokens: int, repeats: int, second: bool = False
) -> tuple[list[float], list[float], list[float]]:
    """Return image and prefill times (ms), and tokens per second after the first, of every question and repeat."""
    answers: list[Generation] = []
    for question in questions:
        images = question.images
        for turn in range(repeats + 1):
            engine.images.clear()
            engine.prefixes.clear()
            if second:
                engine.generate([opening(question)], [images], max_new_tokens=1)
            (answer,) = engine.generate([question.prompt], [images], max_new_tokens=tokens)
            answers += [answer] if turn else []  # the first answer of each is a warm-up
    image, prefill = [a.image_seconds * 1e3 for a in answers], [a.prefill_seconds * 1e3 for a in answers]
    return image, prefill, [a.tokens_per_second for a in answers]


@contextmanager
def one_thread(device: str | torch.device) -> Iterator[None]:
    """Use a single CPU thread inside the context, also for code that is compiled in it."""
    threads = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def opening(question: Question) -> dict:
    """Return another question about the same images, in the same places."""
    first, *_ = question.messages
    parts = first["content"] if isinstance(first["content"], list) else [{"type": "text", "text": first["content"]}]
    asked = [part if part["type"] == "image" else {"type": "text", "text": OPENING} for part in parts]
    return {"messages": [first | {"content": asked}]}
