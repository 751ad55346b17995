"""The metrics that studies test their claims on: short answers, likelihood of held-out records, time to first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.data.conversation import Encoded, encode_record
from fastvlm.data.shards import ShardReader, count_images
from fastvlm.data.source import Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.answer_speed import first_token_ms
from fastvlm.evaluation.likelihood import token_nll
from fastvlm.evaluation.questions import Question, first_of_types, spread
from fastvlm.evaluation.short_answers import ShortAnswers
from fastvlm.inference.engine import Engine
from fastvlm.models.vlm import VLM
from fastvlm.tokens import IGNORE_INDEX, Tokenizer


class Panel(ShortAnswers):
    """`ShortAnswers` plus `test/nll/<source>`, in nats per learned token, on the records of `held_out`.

    In documents with several images, tokens are also grouped by the image they follow: `test/nll/<source>/0` is for
    text after the first image, `/1` after the second. That measures likelihood with examples in the context, on the
    same kind of document as in training; it is not in-context learning of a new task. A record longer than the language
    model reads is cut at its end, as in training, an image only as a whole; what is cut off is not scored.

    Args:
        held_out: sources of documents or conversations by name.
        records: maximum number of records per source; of n records, every (n // records)-th is taken.
        first_token: number of questions whose time to first token is measured; 0 skips it.
        options: those of `ShortAnswers`.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        *,
        held_out: dict[str, Source] | None = None,
        records: int = 200,
        first_token: int = 6,
        **options,
    ):
        super().__init__(sources, **options)
        self.held_out, self.records, self.first_token = held_out or {}, records, first_token

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
        result = super().run(model, tokenizer, image_size=image_size, transform=transform, device=device, out=out)
        for row in result["table"]:
            if not row["mean"] and row["nll"] is not None:
                result["metrics"][f"test/answer_nll/{row['type']}"] = row["nll"]
        return result

    def named_sources(self) -> dict[str, Source]:
        return super().named_sources() | {f"held_out.{name}": source for name, source in self.held_out.items()}

    def measure(
        self, engine: Engine, questions: Sequence[Question], visual: Sequence[Sequence[Tensor]]
    ) -> dict[str, float]:
        metrics = {}
        for name, source in self.held_out.items():
            metrics |= self.score_records(engine, name, source)
        if self.first_token:
            asked = first_of_types(questions, source=next(iter(self.sources)), count=1)
            metrics |= first_token_ms(engine, asked[: self.first_token])
        return metrics

    def score_records(self, engine: Engine, name: str, source: Source) -> dict[str, float]:
        index = source.load(self.split, engine.tokenizer)
        rows, _ = source.select(index)
        rows = rows[spread(len(rows), self.records)]
        reader = ShardReader()
        raws = [index.read(int(row), reader) for row in rows]
        reader.close()
        records = [source.edit(raw.record) for raw in raws]
        files = [raw.images if count_images(record) else () for raw, record in zip(raws, records)]
        views = (engine.transform(file) for row in files for file in row)
        # On the CPU: a GPU has no room for the visual tokens of all records beside a large model.
        visual = (tokens.cpu() for tokens in engine.encode_each(views))
        encoded: list[Encoded] = []
        shown: list[list[Tensor]] = []
        for record, row in zip(records, files):
            images = [next(visual) for _ in row]
            slots, room = [len(image) for image in images], engine.model.llm.max_positions
            encoded.append(encode_record(record, engine.tokenizer, tokens_per_image=slots, max_tokens=room))
            shown.append(images[: encoded[-1].num_images])
        scores = token_nll(
            engine.model,
            engine.tokenizer,
            [(e.input_ids, e.labels) for e in encoded],
            shown,
            tokens_per_view=engine.tokens_per_image,
            batch_size=min(32, self.batch_size),
        )
        sums: dict[str, list[float]] = {}
        for e, score, row in zip(encoded, scores, shown):
            before = images_before(
                e.input_ids, e.labels, image_id=engine.tokenizer.image_id, sizes=[len(v) for v in row]
            )
            for nats, place in zip(score.tolist(), before):
                for key in (f"test/nll/{name}", *([f"test/nll/{name}/{place - 1}"] if place and len(row) > 1 else [])):
                    total = sums.setdefault(key, [0.0, 0])
                    total[0] += nats
                    total[1] += 1
        return {key: nats / count for key, (nats, count) in sums.items()}


def images_before(input_ids: list[int], labels: list[int], *, image_id: int, sizes: list[int]) -> list[int]:
    """Return the number of images before each scored token (learned, and not the first of the row)."""
    ends, places, slots = [], [], 0
    for size in sizes:
        ends.append(size + (ends[-1] if ends else 0))
    for position, (token, label) in enumerate(zip(input_ids, labels)):
        slots += token == image_id
        if position and label != IGNORE_INDEX:
            places.append(sum(slots >= end for end in ends))
    return places
