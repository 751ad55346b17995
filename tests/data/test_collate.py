from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvlm.batch import NO_LABEL, Sample
from fastvlm.data.collate import collate
from fastvlm.tokens import IGNORE_INDEX

OPTIONS = {"sources": ("a", "b"), "pad_id": 9, "image_size": 2, "num_answer_tokens": 5}


def sample(key, source, count, images=0, maps=0, map_size=2):
    ids = list(range(1, count + 1))
    picture = lambda i: torch.full((3, 2, 2), ord(key[0]) + i, dtype=torch.uint8)
    labels = [IGNORE_INDEX, *ids[1:]]
    cells = [torch.full((3, map_size, map_size), i, dtype=torch.uint8) for i in range(maps)]
    return Sample(key, source, np.array(ids), np.array(labels), [picture(i) for i in range(images)], cells)


def test_golden_batch():
    rows = [[sample("x", "a", 3), sample("y", "b", 2, images=1)], [sample("z", "b", 2, images=2)]]
    batch = collate(rows, **OPTIONS, step=7, skipped=["a/k"])
    ignore = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2], [1, 2, 9, 9, 9]]
    assert batch.labels.tolist() == [[ignore, 2, 3, ignore, 2], [ignore, 2, ignore, ignore, ignore]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert batch.source_ids.tolist() == [[0, 0, 0, 1, 1], [1, 1, -1, -1, -1]]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [ord("y"), ord("z"), ord("z") + 1]
    assert (batch.keys, batch.step, batch.skipped, batch.num_answer_tokens) == (("x", "y", "z"), 7, ("a/k",), 5)
    assert (batch.num_tokens, batch.num_learned, batch.num_images) == (7, 4, 3)


def test_the_first_token_of_a_segment_is_never_learned():
    """A shifted loss would have it predicted by the neighbour in the pack."""
    batch = collate([[sample("x", "a", 3), sample("y", "a", 4)]], **OPTIONS)
    assert (batch.labels[batch.position_ids == 0] == IGNORE_INDEX).all()


@pytest.mark.parametrize("rows", [[[]], [[], []], [[sample("x", "a", 2)], []]])
def test_rows_without_samples_and_batches_without_images_keep_their_shape(rows):
    batch = collate(rows, **OPTIONS)
    assert batch.input_ids.shape[0] == len(rows) and batch.input_ids.shape[1] >= 1
    assert batch.pixel_values.shape == (0, 3, 2, 2) and batch.pixel_values.dtype == torch.uint8
    assert batch.label_maps is None
    assert (batch.segment_ids[-1] == 0).all()


def test_label_maps_stay_in_line_with_images():
    batch = collate([[sample("x", "a", 2, images=1), sample("y", "a", 2, images=2, maps=2)]], **OPTIONS)
    assert batch.label_maps[:, 0, 0, 0].tolist() == [NO_LABEL, 0, 1]
    mixed = [[sample("x", "a", 2, 1, 1), sample("y", "a", 2, 1, 1, map_size=3)]]
    with pytest.raises(ValueError, match="different sizes"):
        collate(mixed, **OPTIONS)
