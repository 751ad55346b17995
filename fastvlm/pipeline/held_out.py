"""What the model is asked at every validation: held-out samples and timed questions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyarrow.compute as pc
from torch import Tensor

from fastvlm.data.shards import ShardReader
from fastvlm.data.source import Mixture, NothingLeft
from fastvlm.data.transforms import ImageTransform
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


def held_out_records(
    mixture: Mixture, tokenizer: Tokenizer, num: int, *, transform: ImageTransform
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Return up to `num` validation samples, source by source, with the views (v, 3, H, W) of each of their images.

    Sources of which types and filters leave nothing are skipped.
    """
    reader, found, there = ShardReader(), [], []
    for source in (s for s in mixture.sources.values() if s.has_split("val")):
        index = source.load("val", tokenizer)
        with suppress(NothingLeft):
            rows, _ = source.select(index)
            rows = rows[pc.equal(index.faults, "").to_numpy(zero_copy_only=False)[rows]]
            if len(rows):
                there.append((source, index, rows))
    for source, index, rows in there:
        # Spread over the split, in which questions are ordered by type.
        for row in rows[:: max(1, len(rows) // max(1, num // len(there)))][: -(-num // len(there))]:
            raw = index.read(int(row), reader)
            images = [transform(data) for data in raw.images] if source.images else []
            found.append((source.edit(raw.record), images))
    return found[:num]


def generate_answers(
    model: VLM,
    records: list[dict[str, Any]],
    images: list[list[Tensor]],
    *,
    tokenizer: Tokenizer,
    image_size: int,
    transform: ImageTransform,
    device: str,
) -> list[str]:
    """Return the model's answer to each record and its images; the reference answer is not shown to it."""
    from fastvlm.inference.engine import Engine

    engine = Engine(model, tokenizer, image_size=image_size, transform=transform, device=device)
    return [answer.text for answer in engine.generate(records, images)]


def answer_speed(
    model: VLM, *, images: int, tokenizer: Tokenizer, image_size: int, transform: ImageTransform, device: str
) -> dict[str, float]:
    """Measure `speed/...` as `fastvlm.bench` does: `ttft_ms` and `ttft_p95_ms` (including reading the file),
    `tokens_per_second`, `second_question`; in CPU time if the device is one thread of a CPU.

    This costs `images` + 3 answers of 16 tokens and 2 x `images` + 14 passes through the encoder.

    Args:
        images: number of images; each is asked about once for the first metrics and twice for the last.
    """
    from fastvlm.bench.speed import measure_speed
    from fastvlm.inference.clock import Clock
    from fastvlm.inference.engine import Engine

    engine = Engine(model, tokenizer, image_size=image_size, transform=transform, device=device)
    return measure_speed(engine, requests=images, tokens=16, batch=1, clock=Clock.steady(device)).metrics()
