"""AdamW with moments of one byte each."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def adamw_8bit(
    params: Iterable[dict],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] | list[float] = (0.9, 0.98),
    weight_decay: float = 0.05,
    eps: float = 1e-8,
    min_8bit_size: int = 4096,
    paged: bool = False,
) -> torch.optim.Optimizer:
    """Build bitsandbytes' AdamW with blockwise dynamic 8-bit moments. Source: Dettmers et al., arXiv:2110.02861.

    Args:
        params: parameter groups.
        min_8bit_size: tensors with fewer elements keep 32-bit moments.
        paged: allow moments to be paged to host memory when a GPU is full.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("optimizer=adamw8bit needs bitsandbytes: pip install '.[quant]'") from None
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    options = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size)
    return kind(list(params), **options)
