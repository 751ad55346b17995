"""The exact length of every sample of a source under a plan's limits, and which samples are left out and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastvlm.data.conversation import lay_out, system_ids, tokenise
from fastvlm.data.kept_texts import text_key
from fastvlm.data.shard_cache import cache_folder
from fastvlm.data.shards import ShardReader
from fastvlm.data.sidecar import FORMAT
from fastvlm.data.source import NothingLeft, Source
from fastvlm.data.source_index import SourceIndex
from fastvlm.data.transforms import ImageTransform
from fastvlm.files import replacing
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

REASONS = ("", "unreadable", "no learned token", "answer truncated away", "too many images")
UNREADABLE, MUTE, CUT, CROWDED = range(1, 5)
FAILED_DOWNLOAD = " has no image ("  # how `shards.read_caption` says that img2dataset could not fetch a row's image
NOTED_ROWS = 1000  # fewer are read in less than a second and not cached


@dataclass
class Measured:
    """A source as a plan sees it; columns are int32 with one entry per row of the index."""

    name: str  # its key in the mixture
    source: Source
    index: SourceIndex
    rows: np.ndarray  # int64: planned rows of the index, ascending
    length: np.ndarray  # positions a sample takes, image slots and truncation included
    answer: np.ndarray  # learned tokens, after truncation
    images: np.ndarray  # number of views; an image with tiles has several
    num_truncated: int = 0
    excluded: dict[str, np.ndarray] = field(default_factory=dict)  # reason -> rows
    repeat: Fraction = Fraction(1)
    max_epochs: Fraction | None = None
    augment: tuple[str, ...] = ()  # kinds of augmentation its questions allow

    @property
    def num_served(self) -> int | None:
        """Number of samples that `max_epochs` allows; None: unlimited."""
        return None if self.max_epochs is None else max(1, int(self.max_epochs * len(self.rows)))

    def costs(self, unit: str) -> np.ndarray:
        """Return the cost of every row in `unit`."""
        one = np.broadcast_to(np.int32(1), self.length.shape)  # takes no memory
        return {"samples": one, "tokens": self.length, "answer_tokens": self.answer}[unit]


def measure_source(
    source: Source,
    tokenizer: Tokenizer,
    *,
    name: str,
    split: str,
    tokens_per_image: int,
    max_tokens: int,
    max_images: int,
    transform: ImageTransform | None = None,
    where: str = "",
) -> Measured:
    """Measure the samples of a source under a token budget.

    Samples that exceed the budget are cut, to know exactly what truncation leaves; they are read for it if the index
    holds no texts.

    Args:
        name: the source's key in the mixture.
        split: train, val or test.
        tokens_per_image: slots per view.
        max_tokens: maximum length of a row; longer samples are truncated.
        max_images: maximum number of views per row; samples with more are left out.
        transform: determines the number of views of an image; None: one view.
        where: prefix of the keys in error messages, such as `stages.align.`.

    Raises:
        ValueError: no shards, or a system prompt for documents.
        NothingLeft: no sample is left.
    """
    index = source.load(split, tokenizer)
    rows, left_out = source.select(index)
    if source.system is not None and holds_documents(index):
        raise ValueError(
            f"source {name}: system={source.system!r} needs conversations and {source.path} holds "
            "documents; set system=null"
        )
    text, answer = count_text(source, index, tokenizer)
    images = count_views(index, transform) if source.images else np.zeros_like(text)
    length = text + images * np.int32(tokens_per_image)
    reasons = np.zeros(index.num_samples, dtype=np.int8)
    reasons[pc.not_equal(index.faults, "").to_numpy(zero_copy_only=False)] = UNREADABLE
    reasons[(reasons == 0) & (answer == 0)] = MUTE
    chosen = np.zeros(index.num_samples, dtype=bool)
    chosen[rows] = True
    long = np.flatnonzero(chosen & (reasons == 0) & (length > max_tokens))
    whole = np.stack([length[long], answer[long], images[long], reasons[long]])
    budget = {"tokens_per_image": tokens_per_image, "max_tokens": max_tokens}
    left = cut(source, index, long, whole, tokenizer=tokenizer, transform=transform, **budget)
    length[long], answer[long], images[long], reasons[long] = left
    num_truncated = len(long) - int((reasons[long] == UNREADABLE).sum())
    reasons[(reasons == 0) & (images > max_images)] = CROWDED
    kept = rows[reasons[rows] == 0]
    excluded = {why: gone for why, gone in left_out.items() if len(gone)}
    excluded |= {REASONS[r]: rows[reasons[rows] == r] for r in np.unique(reasons[rows]).tolist() if r}
    if not len(kept):
        why = ", ".join(f"{len(gone)} {reason}" for reason, gone in excluded.items()) or "its shards are empty"
        fix = f"raise {where}max_tokens={max_tokens} or {where}max_images={max_images}"
        if left_out and not {REASONS[CUT], REASONS[CROWDED]} & set(excluded):
            fix = f"loosen its filters ({', '.join(source.filters)})"
        if not index.num_samples:
            fix = "write them again"
        raise NothingLeft(
            f"source {name} ({source.path}, split {split}): no sample is left of {index.num_samples} ({why}); "
            f"{fix}, or leave the source out"
        )
    exact = lambda value: None if value is None else Fraction(str(value))
    limits = {"repeat": exact(source.repeat), "max_epochs": exact(source.max_epochs), "augment": source.augment}
    return Measured(name, source, index, kept, length, answer, images, num_truncated, excluded, **limits)


def check_damage(sources: Sequence[Measured], *, max_share: float) -> None:
    """Refuse a source if more than `max_share` of its samples (at least of 100) or of its shards are damaged.

    Images that img2dataset could not download are no damage. A shard that ends at a break counts as a whole, because
    nobody knows how many samples it held.

    Raises:
        ValueError: names the source, its first damaged sample or shard, and the counts.
    """
    for source in sources:
        index, allowed = source.index, f"more than data.max_skipped_share={max_share}"
        if len(index.broken) > max_share * len(index.shards):
            place, why = next(iter(index.broken.items()))
            whole = int(np.diff(index.start)[index.shards.index(place)])
            raise ValueError(
                f"source {source.name}: {len(index.broken)} of {len(index.shards)} shards of {index.split} end at a "
                f"break, {allowed} ({place}: {why}; {whole} whole samples before it); copy or write them again, or "
                "raise the share to use what is left"
            )
        gone = source.excluded.get(REASONS[UNREADABLE], np.empty(0, dtype=np.int64))
        failed = pc.match_substring(index.faults.take(pa.array(gone)).cast(pa.string()), FAILED_DOWNLOAD)
        gone = gone[~failed.to_numpy(zero_copy_only=False)]
        if len(gone) > max_share * max(len(source.rows) + len(gone), 100):
            row = int(gone[0])
            raise ValueError(
                f"source {source.name}: {len(gone)} of {len(source.rows) + len(gone)} samples of {index.split} cannot "
                f"be read, {allowed} (first in {index.shards[index.shard[row]]}: "
                f"{index.faults[row].as_py() or index.key(row)}); copy or write its shards again, or raise the share"
            )


def cut(
    source: Source,
    index: SourceIndex,
    rows: np.ndarray,
    whole: np.ndarray,
    *,
    tokenizer: Tokenizer,
    transform: ImageTransform | None,
    tokens_per_image: int,
    max_tokens: int,
) -> np.ndarray:
    """Return what truncation leaves of samples: (length, answer, images, reason), int32 (4, rows).

    Samples whose texts the index does not hold are read for it. If there are many rows, the result is cached, so that
    a resumed run need not cut them again.
    """
    views = [transform.image_size, transform.tiles] if transform is not None and transform.tiles else None
    state = [FORMAT, index.checksum, source.system, source.images, tokens_per_image, max_tokens, views]
    digest = hashlib.sha256(json.dumps(state).encode() + rows.tobytes()).hexdigest()[:20]
    note = cache_folder() / "index" / f"cut-{digest}.npy"
    if len(rows) > NOTED_ROWS:
        with suppress(OSError, ValueError):
            return np.load(note)
    left, reader, key = whole.copy(), ShardReader(), text_key(tokenizer)
    for i, row in enumerate(rows.tolist()):
        try:
            text = index.text(row, key=key) or tokenise(index.read(row, reader).record, tokenizer)
        except (OSError, ValueError):
            left[3, i] = UNREADABLE
            continue
        counts = views_of(index, row, transform) if source.images else []
        slots = [tokens_per_image * count for count in counts]
        text = source.edit_text(text, tokenizer)
        ids, labels, num_images, _ = lay_out(text, tokenizer, tokens_per_image=slots, max_tokens=max_tokens)
        learned = int((labels != IGNORE_INDEX).sum())
        left[:, i] = len(ids), learned, sum(counts[:num_images]), 0 if learned else CUT
    reader.close()
    if len(rows) > NOTED_ROWS and not (left[3] == UNREADABLE).any():  # unreadable samples may be back later
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            with replacing(note) as part, open(part, "wb") as file:
                np.save(file, left)
    return left


def holds_documents(index: SourceIndex) -> bool:
    """Return whether the first readable sample is a document."""
    reader = ShardReader()
    for row in range(min(100, index.num_samples)):
        with suppress(OSError, ValueError):
            return "document" in index.read(row, reader).record
    return False


def count_text(source: Source, index: SourceIndex, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the text and learned tokens of every sample with the source's system prompt, with or without its images.

    Both are int32 (rows,). The tokens that the template puts around an image are removed with it. The first token of a
    sample is never learned, because nothing predicts it. Which token is first matters if a text is learned from its
    first token on: a document under a template without `start` and, if the template does not mark roles either, a
    conversation that begins with an answer. The latter are checked text by text.
    """
    template, text = tokenizer.template, index.text_tokens.copy()
    learned, system = index.answer_tokens.copy(), source.system is not None
    if not source.images:
        text -= index.num_images * np.int32(sum(len(tokenizer.encode_template(piece)) for piece in template.image))
    if system:
        text += len(system_ids(source.system, tokenizer))
    if (source.images and not system) or tokenizer.encode_template(template.start):
        return text, learned
    if not system:
        learned = np.minimum(learned, np.maximum(text - 1, 0))
    if not tokenizer.encode_template(template.before["assistant"].removesuffix(" ")):
        # A text learned throughout is a document, or an answer alone: for these, `learned` is exact already.
        rows = system | ((index.num_images > 0) & (learned > 0) & (index.answer_tokens < text))
        reader, key = ShardReader(), text_key(tokenizer)
        for row in np.flatnonzero(np.broadcast_to(rows, len(text))).tolist():
            with suppress(OSError, ValueError):  # will be skipped when it is read, whatever its length
                one = index.text(row, key=key) or tokenise(index.read(row, reader).record, tokenizer)
                answered, shown = one.turns[:1].tolist() == [0], one.image_at[:1].tolist() == [0]
                learned[row] += (answered and not shown) if system else -(answered and shown)
        reader.close()
    return text, learned


def views_of(index: SourceIndex, row: int, transform: ImageTransform | None) -> list[int]:
    """Return the number of views of every image of a sample."""
    if transform is None or transform.tiles is None:
        return [1] * int(index.num_images[row])
    sizes = zip(index.image_width[int(row)].as_py(), index.image_height[int(row)].as_py())
    return [transform.num_views(width, height) for width, height in sizes]


def layouts_of(index: SourceIndex, row: int, transform: ImageTransform) -> list[tuple[int, int, int, int]]:
    """Return `ImageTransform.layout` of every image of a sample; empty without tiles, where every image is one view."""
    if transform.tiles is None:
        return []
    sizes = zip(index.image_width[int(row)].as_py(), index.image_height[int(row)].as_py())
    return [transform.layout(width, height) for width, height in sizes]


def count_views(index: SourceIndex, transform: ImageTransform | None) -> np.ndarray:
    """Return the number of views of every sample, over all its images: int32 (rows,)."""
    if transform is None or transform.tiles is None:
        return index.num_images.copy()
    widths, heights = (column.flatten().to_numpy() for column in (index.image_width, index.image_height))
    before = np.concatenate([[0], np.cumsum(transform.count_views(widths, heights), dtype=np.int64)])
    end = np.concatenate([[0], np.cumsum(index.num_images, dtype=np.int64)])
    return (before[end[1:]] - before[end[:-1]]).astype(np.int32)
