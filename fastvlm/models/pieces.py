"""Tensors of which a rank holds a piece: by torch's FSDP2, or by DeepSpeed's ZeRO stage 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds only a piece of it."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def held_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.ds_tensor if hasattr(tensor, "ds_id") else tensor


def size_of(tensor: Tensor) -> int:
    """Numbers in the whole tensor."""
    return tensor.ds_numel if hasattr(tensor, "ds_id") else tensor.numel()


@contextmanager
def whole_of(tensor: Tensor) -> Iterator[Tensor]:
    """All of a tensor, for a while. Every rank must ask."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # whose `zero` is a name in it, no module

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
