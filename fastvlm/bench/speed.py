"""Measure inference speed: time to first token and its parts, decoding, latency, a second question, memory."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image

from fastvlm.inference.clock import Clock, peak_bytes, percentiles
from fastvlm.inference.engine import Engine
from fastvlm.inference.levers import count_bytes

QUESTION = "what is in the image, and how many are there?"


@dataclass
class Speed:
    """The measurements of one model. Seconds are medians over the requests unless stated otherwise."""

    parts: dict[str, float]  # preprocessing, encoding, projection, prefill, first decode
    ttft: dict[str, float]  # of a request: p50, p90, p95, p99, max
    latency: dict[str, float]  # of whole answers, likewise
    tokens_per_second: float  # of a single answer
    batch_tokens_per_second: float  # of a batch, summed over its rows
    reference_tokens_per_second: float | None  # transformers' generate on the same model without levers
    second_question: float  # TTFT of a second question about an image, divided by that of the first
    image_tokens: int
    prompt_tokens: int
    answer_tokens: int
    batch: int
    weight_bytes: int
    peak_bytes: int
    setting: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        ms = lambda seconds: f"{1000 * seconds:.1f}"
        parts = ", ".join(f"{name} {ms(seconds)}" for name, seconds in self.parts.items())
        spread = lambda values: ", ".join(f"{name} {ms(seconds)}" for name, seconds in values.items())
        lines = [
            f"prompt: {self.prompt_tokens} tokens, {self.image_tokens} of the image; answer: {self.answer_tokens}",
            f"time to first token, ms: {spread(self.ttft)}",
            f"  in parts, ms: {parts}",
            f"  a second question about the image: {self.second_question:.2f} of the first",
            f"whole answer, ms: {spread(self.latency)}",
            f"decoding, tokens/s: {self.tokens_per_second:.1f}; {self.batch} rows: {self.batch_tokens_per_second:.1f}",
        ]
        if self.reference_tokens_per_second:
            theirs, ratio = self.reference_tokens_per_second, self.tokens_per_second / self.reference_tokens_per_second
            lines.append(f"  transformers' generate without levers: {theirs:.1f} tokens/s; here {ratio:.2f}x")
        weights, peak = self.weight_bytes / 1e6, self.peak_bytes / 1e6
        return [*lines, f"memory: {weights:.1f} MB of weights, {peak:.0f} MB at the peak of the process"]

    def metrics(self) -> dict[str, float]:
        """Return the metrics that a run logs."""
        return {
            "speed/ttft_ms": 1000 * self.ttft["p50"],
            "speed/ttft_p95_ms": 1000 * self.ttft["p95"],
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/second_question": self.second_question,
        }

    def as_dict(self) -> dict:
        return asdict(self)


def draw_image(seed: int, side: int) -> bytes:
    """Return a JPEG of coarse noise, `side` pixels high with aspect ratio 3:2."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((side * 3 // 2, side), Image.BICUBIC).save(file, "jpeg", quality=90)
    return file.getvalue()


def ask(question: str) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]}


def reference_speed(engine: Engine, *, tokens: int, repeats: int, clock: Clock) -> float:
    """Measure tokens per second of `transformers`' greedy `generate` on the same prompt, without the first token."""
    llm = engine.model.llm
    with torch.inference_mode():
        image = engine.transform(draw_image(0, 2 * engine.image_size))
        embeds = engine.row(ask(QUESTION), engine.encode_images([image]), max_new_tokens=1).embeds[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=engine.device)
        options = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
        options |= {"inputs_embeds": embeds, "attention_mask": mask}
        generate = lambda count: llm.hf.generate(**options, max_new_tokens=count, min_new_tokens=count)
        first = statistics.median(clock.time(lambda: generate(1), repeats=repeats)[0])
        whole = statistics.median(clock.time(lambda: generate(tokens + 1), repeats=repeats, warm=0)[0])
    return tokens / (whole - first)


def measure_speed(
    engine: Engine,
    *,
    requests: int = 10,
    tokens: int = 32,
    batch: int = 8,
    clock: Clock | None = None,
    reference: float | None = None,
) -> Speed:
    """Measure an engine with single requests and with a batch; see `Engine.measured`.

    Args:
        requests: number of single requests, each with a different image.
        tokens: length of every answer.
        batch: number of rows in the batch.
        clock: None measures wall time.
        reference: result of `reference_speed`; None if not measured.
    """
    clock = clock or Clock(engine.device)
    with engine.measured(clock):
        return _measure(engine, requests, tokens, batch, clock, reference)


def _measure(engine: Engine, requests: int, tokens: int, batch: int, clock: Clock, reference: float | None) -> Speed:
    model, side = engine.model, 2 * engine.image_size
    record, options = ask(QUESTION), {"max_new_tokens": tokens}
    files = [draw_image(seed, side) for seed in range(max(requests, batch) + 1)]
    images = [engine.transform(file) for file in files]
    engine.generate([record], [[images[-1]]], **options)  # warm up kernel caches and thread pools
    ttft, latency, speeds, parts = [], [], [], []
    for file in files[:requests]:
        start = clock.now()
        image = engine.transform(file)
        read = clock.now() - start
        (answer,) = engine.generate([record], [[image]], **options)
        latency.append(clock.now() - start)
        ttft.append(read + answer.first_token_seconds)
        speeds.append(answer.tokens_per_second)
        parts.append({"preprocessing": read, "prefill": answer.prefill_seconds})
    with torch.inference_mode():
        views = images[0] if images[0].ndim == 4 else images[0][None]
        encoding, patches = clock.time(lambda: model.encode_patches(views.to(engine.device)), repeats=5)
        projection, _ = clock.time(lambda: model.project(patches), repeats=5)
    short = [engine.generate([record], [[images[0]]], max_new_tokens=2)[0].decode_seconds for _ in range(5)]
    rows = min(batch, len(images))
    seconds, _ = clock.time(lambda: engine.generate([record] * rows, [[i] for i in images[:rows]], **options))
    return Speed(
        parts={
            "preprocessing": _median(parts, "preprocessing"),
            "encoding": statistics.median(encoding),
            "projection": statistics.median(projection),
            "prefill": _median(parts, "prefill"),
            "first decode": statistics.median(short),
        },
        ttft=percentiles(ttft),
        latency=percentiles(latency),
        tokens_per_second=statistics.median(speeds),
        batch_tokens_per_second=rows * tokens / seconds[0],
        reference_tokens_per_second=reference,
        second_question=_second_question(engine, files[:requests], clock),
        image_tokens=answer.num_image_tokens,
        prompt_tokens=answer.num_prompt_tokens,
        answer_tokens=tokens,
        batch=rows,
        weight_bytes=count_bytes(model),
        peak_bytes=peak_bytes(engine.device),
    )


def _second_question(engine: Engine, files: Sequence[bytes], clock: Clock) -> float:
    """TTFT ratio of a second to a first question about an image, with stores; both start from the file's bytes."""
    seconds: dict[str, list[float]] = {"which word is this": [], "how many digits do you see": []}
    with engine.measured(clock, store_bytes=1 << 30):
        for file in files:
            for question, times in seconds.items():
                start = clock.now()
                (image,) = engine.read_images([file])
                read = clock.now() - start
                (answer,) = engine.generate([ask(question)], [[image]], max_new_tokens=1)
                times.append(read + answer.first_token_seconds)
    first, second = map(statistics.median, seconds.values())
    return second / first


def _median(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)
