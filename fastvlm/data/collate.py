"""Collation: rows of samples -> Batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastvlm.batch import NO_LABEL, Batch, Sample
from fastvlm.data.transforms import empty_views
from fastvlm.tokens import IGNORE_INDEX


def collate(
    rows: Sequence[Sequence[Sample]],
    *,
    sources: Sequence[str],
    pad_id: int,
    image_size: int,
    num_answer_tokens: int,
    num_planned_images: int = 0,
    step: int = 0,
    skipped: Sequence[str] = (),
    pixel_values: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> Batch:
    """Concatenate the samples of each row and pad the rows to the longest.

    A row may be empty (none of its samples could be read): it is all padding. If some images of a batch have label
    maps, the others get one filled with NO_LABEL.

    Args:
        rows: the samples of each row.
        sources: names of the sources, which `source_ids` number.
        image_size: side of a view, pixels.
        pixel_values: the samples' views in order, if they are in one tensor already.
        features: cached features of the views in order; the batch then holds no pixels.

    Raises:
        ValueError: label maps of different sizes in one batch.
    """
    length = max(1, *(sum(len(s.input_ids) for s in row) for row in rows)) if rows else 1
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    position_ids, segment_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
    source_ids = np.full_like(input_ids, -1)
    number = {name: i for i, name in enumerate(sources)}
    for b, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            end = start + len(sample.input_ids)
            input_ids[b, start:end] = sample.input_ids
            labels[b, start:end] = sample.labels
            position_ids[b, start:end] = np.arange(end - start)
            segment_ids[b, start:end] = segment
            source_ids[b, start:end] = number[sample.source]
            start = end
    samples = [sample for row in rows for sample in row]
    layouts = [layout for sample in samples for layout in sample.layouts]
    if features is not None:
        pixel_values = empty_views(0, image_size)
    if pixel_values is None:
        images = [image for sample in samples for image in sample.images]
        pixel_values = empty_views(len(images), image_size)
        for i, image in enumerate(images):
            pixel_values[i] = image
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        source_ids=torch.from_numpy(source_ids),
        pixel_values=pixel_values,
        num_answer_tokens=num_answer_tokens,
        num_planned_images=num_planned_images,
        sources=tuple(sources),
        keys=tuple(sample.key for sample in samples),
        label_maps=stack_label_maps(samples),
        step=step,
        skipped=tuple(skipped),
        features=features,
        layouts=torch.tensor(layouts, dtype=torch.long) if layouts else None,
    )


def tiles_among(views: Sequence[int]) -> torch.Tensor | None:
    """Return which of the images' views are tiles (all but the first of each image): bool (I,), None if none is."""
    if all(count == 1 for count in views):
        return None
    return torch.tensor([number > 0 for count in views for number in range(count)])


def stack_label_maps(samples: Sequence[Sample]) -> torch.Tensor | None:
    """Stack the label maps, aligned with the images: uint8 (I, C, h, w); None if no sample has any."""
    shapes = {tuple(m.shape): sample.key for sample in samples for m in sample.label_maps}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"label maps of different sizes in one batch: {shapes}; a stage needs one cell grid")
    empty = torch.full(next(iter(shapes)), NO_LABEL, dtype=torch.uint8)
    return torch.stack([m for sample in samples for m in (sample.label_maps or [empty] * len(sample.images))])
