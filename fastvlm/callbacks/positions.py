"""Count samples, tokens and padding per source on the device, from the positions of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm.batch import Batch
from fastvlm.tokens import IGNORE_INDEX

# Properties of a position in a row; its code is (source + 1) * 8 + the bits that apply.
FIRST, ANSWER, IMAGE = 1, 2, 4


def count_positions(batch: Batch, *, image_token_id: int | None) -> Tensor:
    """Return the histogram of position codes, int64 (num_sources + 1, 8); row 0 is padding.

    This one pass gives all counts: samples, tokens, answer tokens and image tokens per source, and padding.
    """
    code = (batch.source_ids + 1) * 8
    code = code + (batch.position_ids == 0) * FIRST + (batch.labels != IGNORE_INDEX) * ANSWER
    if image_token_id is not None:
        code = code + (batch.input_ids == image_token_id) * IMAGE
    size = (len(batch.sources) + 1) * 8
    code = code.flatten()
    if code.device.type == "cpu":
        return torch.bincount(code, minlength=size).view(-1, 8)
    # bincount synchronises with the device to get its output's size; scatter_add_ does not.
    counts = torch.zeros(size, dtype=torch.int64, device=code.device)
    return counts.scatter_add_(0, code, torch.ones_like(code)).view(-1, 8)


def read_counts(counts: Tensor) -> dict[str, Tensor]:
    """Return samples, tokens, answer and image tokens per source (num_sources,), and padding (), of a histogram."""
    codes = torch.arange(8)
    real = counts[1:]
    return {
        "samples": real[:, (codes & FIRST) > 0].sum(1),
        "tokens": real.sum(1),
        "answer_tokens": real[:, (codes & ANSWER) > 0].sum(1),
        "image_tokens": real[:, (codes & IMAGE) > 0].sum(1),
        "padding": counts[0].sum(),
    }
