"""Tensors of which this rank holds a shard, under torch's FSDP2 or DeepSpeed's ZeRO stage 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds only a shard of it."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def held_of(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.ds_tensor if hasattr(tensor, "ds_id") else tensor


def size_of(tensor: Tensor) -> int:
    """Number of elements of the whole tensor."""
    return tensor.ds_numel if hasattr(tensor, "ds_id") else tensor.numel()


@contextmanager
def whole_of(tensor: Tensor) -> Iterator[Tensor]:
    """The whole tensor, gathered for the duration of the block. Every rank must call it."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # whose `zero` is a name in it, no module

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
